//! Memory that grows without a cause.

use serde::{Deserialize, Serialize};
use std::time::Duration;

/// How long memory must stay above the limit: a load or a long prompt needs more for a moment.
const LASTS: Duration = Duration::from_secs(3);
/// The least time between two reports of the same growth.
const REPORT_EVERY: Duration = Duration::from_secs(600);

/// Memory that has grown without a cause.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct MemoryGrowth {
    /// The least unexplained memory so far.
    pub from_bytes: u64,
    /// The unexplained memory now.
    pub to_bytes: u64,
}

/// Watches an amount of memory that nothing explains, and that should not grow.
#[derive(Debug, Clone, Default)]
pub(crate) struct MemoryWatch {
    least_bytes: Option<u64>,
    /// Since when the memory has been above the limit.
    over: Option<Duration>,
    reported: Option<Duration>,
}

impl MemoryWatch {
    /// Returns the growth if `bytes` has been more than `slack_bytes` above its least for a while, and this was not
    /// reported lately. `now` counts from any fixed start.
    pub(crate) fn check(&mut self, bytes: u64, slack_bytes: u64, now: Duration) -> Option<MemoryGrowth> {
        let least = self.least_bytes.map_or(bytes, |least| least.min(bytes));
        self.least_bytes = Some(least);
        if bytes <= least.saturating_add(slack_bytes) {
            self.over = None;
            return None;
        }
        let over = *self.over.get_or_insert(now);
        let is_due = self.reported.is_none_or(|reported| now.saturating_sub(reported) >= REPORT_EVERY);
        if now.saturating_sub(over) < LASTS || !is_due {
            return None;
        }
        self.reported = Some(now);
        Some(MemoryGrowth { from_bytes: least, to_bytes: bytes })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn growth_that_lasts_is_reported_once() {
        let mut watch = MemoryWatch::default();
        let mut check = |second: u64, bytes: u64| watch.check(bytes, 100, Duration::from_secs(second));
        assert_eq!([(0, 500), (1, 30), (2, 120), (3, 131)].map(|(second, bytes)| check(second, bytes)), [None; 4]);
        assert_eq!([(4, 400), (5, 40)].map(|(second, bytes)| check(second, bytes)), [None; 2], "a moment");
        assert_eq!([(10, 200), (11, 210), (12, 220)].map(|(second, bytes)| check(second, bytes)), [None; 3]);
        assert_eq!(check(13, 230), Some(MemoryGrowth { from_bytes: 30, to_bytes: 230 }));
        assert_eq!(check(14, 900), None);
        assert_eq!(check(700, 950), Some(MemoryGrowth { from_bytes: 30, to_bytes: 950 }));
    }
}
