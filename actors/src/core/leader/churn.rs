//! Joins and losses of members. While they last, the leader neither refuses a request nor stops an instance for lack of
//! a node or memory.

use super::CONNECT_GRACE;
use std::time::Duration;

/// The longest churn that counts: a member that joins and leaves without end must not delay refusals for ever.
const LASTS_MAX: Duration = Duration::from_secs(15);

/// The times of the first and the last change in a series whose pauses are shorter than [`CONNECT_GRACE`].
#[derive(Debug, Default)]
pub(super) struct Churn(Option<(Duration, Duration)>);

impl Churn {
    /// Records that a member joined or was lost.
    pub(super) fn note(&mut self, now: Duration) {
        let row = self.0.filter(|(_, last)| now.saturating_sub(*last) < CONNECT_GRACE);
        self.0 = Some((row.map_or(now, |(first, _)| first), now));
    }

    /// Whether further changes are likely.
    pub(super) fn is_recent(&self, now: Duration) -> bool {
        let is_recent =
            |(first, last)| now.saturating_sub(last) < CONNECT_GRACE && now.saturating_sub(first) < LASTS_MAX;
        self.0.is_some_and(is_recent)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: Duration = Duration::from_secs(1);

    #[test]
    fn churn_is_recent_until_calm_returns_or_it_lasts_too_long() {
        let mut churn = Churn::default();
        assert!(!churn.is_recent(SECOND));
        churn.note(SECOND);
        assert!(churn.is_recent(3 * SECOND) && !churn.is_recent(4 * SECOND));
        for second in 10..40 {
            churn.note(second * SECOND);
            assert_eq!(churn.is_recent(second * SECOND), second < 25, "at {second} s");
        }
        churn.note(50 * SECOND);
        assert!(churn.is_recent(52 * SECOND), "a new series begins after a calm");
    }
}
