//! Comings and goings of members, which nothing is given up for while they last.

use super::CONNECT_GRACE;
use std::time::Duration;

/// A member that comes and goes without end keeps nobody from hearing that there is no room.
const LASTS_MAX: Duration = Duration::from_secs(15);

/// When the first and the last of them were, of a row with no calm between them.
#[derive(Debug, Default)]
pub(super) struct Churn(Option<(Duration, Duration)>);

impl Churn {
    /// Someone has come, or gone.
    pub(super) fn note(&mut self, now: Duration) {
        let row = self.0.filter(|(_, last)| now.saturating_sub(*last) < CONNECT_GRACE);
        self.0 = Some((row.map_or(now, |(first, _)| first), now));
    }

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
    fn what_has_just_changed_is_waited_for_and_what_changes_without_end_is_not() {
        let mut churn = Churn::default();
        assert!(!churn.is_recent(SECOND));
        churn.note(SECOND);
        assert!(churn.is_recent(3 * SECOND) && !churn.is_recent(4 * SECOND));
        for second in 10..40 {
            churn.note(second * SECOND);
            assert_eq!(churn.is_recent(second * SECOND), second < 25, "at {second} s");
        }
        churn.note(50 * SECOND);
        assert!(churn.is_recent(52 * SECOND), "there was calm before");
    }
}
