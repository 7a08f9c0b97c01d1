//! Memory that grows without a cause.

use serde::{Deserialize, Serialize};
use std::time::Duration;

/// How long memory must stay above the limit: a load or a long prompt needs more for a moment.
const LASTS: Duration = Duration::from_secs(3);

/// Memory that has grown without a cause.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct MemoryGrowth {
    /// The growth since the memory was least.
    pub grown_bytes: u64,
}

/// A change that users hear of.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum MemoryChange {
    Grown(MemoryGrowth),
    /// The memory is about what it was before it grew.
    Returned,
}

impl MemoryChange {
    /// The growth that lasts.
    pub(crate) fn growth(self) -> Option<MemoryGrowth> {
        match self {
            Self::Grown(growth) => Some(growth),
            Self::Returned => None,
        }
    }
}

/// Watches an amount of memory that nothing explains, and that should not grow.
#[derive(Debug, Clone, Default)]
pub(crate) struct MemoryWatch {
    /// The least so far, or the amount of the last report.
    base_bytes: Option<i64>,
    /// The least before the first report, until the memory has returned.
    before_bytes: Option<i64>,
    /// Since when the memory has been above the limit.
    over: Option<Duration>,
}

impl MemoryWatch {
    /// Reports growth if the unexplained `bytes` have been more than `slack_bytes` above their base for a while, and
    /// their return. `now` counts from any fixed start.
    pub(crate) fn check(&mut self, bytes: i64, slack_bytes: u64, now: Duration) -> Option<MemoryChange> {
        let is_over = |base: i64| bytes > base && bytes.abs_diff(base) > slack_bytes;
        if self.before_bytes.is_some_and(|before| !is_over(before)) {
            *self = Self { base_bytes: Some(bytes), ..Self::default() };
            return Some(MemoryChange::Returned);
        }
        let base = self.base_bytes.map_or(bytes, |base| base.min(bytes));
        self.base_bytes = Some(base);
        if !is_over(base) {
            self.over = None;
            return None;
        }
        let over = *self.over.get_or_insert(now);
        if now.saturating_sub(over) < LASTS {
            return None;
        }
        let before = *self.before_bytes.get_or_insert(base);
        (self.base_bytes, self.over) = (Some(bytes), None);
        Some(MemoryChange::Grown(MemoryGrowth { grown_bytes: bytes.abs_diff(before) }))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn growth_that_lasts_is_reported_and_so_is_its_end() {
        let mut watch = MemoryWatch::default();
        let mut check = |second: u64, bytes: i64| watch.check(bytes, 100, Duration::from_secs(second));
        assert_eq!([(0, 500), (1, -30), (2, 60), (3, 71)].map(|(second, bytes)| check(second, bytes)), [None; 4]);
        assert_eq!([(4, 400), (5, -20)].map(|(second, bytes)| check(second, bytes)), [None; 2], "a moment");
        assert_eq!([(10, 200), (11, 210), (12, 220)].map(|(second, bytes)| check(second, bytes)), [None; 3]);
        let grown = |grown_bytes| Some(MemoryChange::Grown(MemoryGrowth { grown_bytes }));
        assert_eq!(check(13, 230), grown(260));
        assert_eq!([(14, 240), (900, 310)].map(|(second, bytes)| check(second, bytes)), [None; 2], "it was reported");
        assert_eq!([(1000, 340), (1003, 350)].map(|(second, bytes)| check(second, bytes)), [None, grown(380)]);
        assert_eq!(
            [(1010, 80), (1011, 60)].map(|(second, bytes)| check(second, bytes)),
            [None, Some(MemoryChange::Returned)]
        );
        assert_eq!([(1012, 150), (1013, 60)].map(|(second, bytes)| check(second, bytes)), [None; 2]);
    }
}
