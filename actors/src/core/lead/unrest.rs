//! Comings and goings of members, which nothing is given up for while they last.

use super::MET_WITHIN;
use std::time::Duration;

/// A member that comes and goes without end keeps nobody from hearing that there is no room.
const LASTS_MAX: Duration = Duration::from_secs(15);

/// When the first and the last of them were, of a row with no calm between them.
#[derive(Debug, Default)]
pub(super) struct Unrest(Option<(Duration, Duration)>);

impl Unrest {
    /// Someone has come, or gone.
    pub(super) fn note(&mut self, now: Duration) {
        let row = self.0.filter(|(_, last)| now.saturating_sub(*last) < MET_WITHIN);
        self.0 = Some((row.map_or(now, |(first, _)| first), now));
    }

    pub(super) fn is_on(&self, now: Duration) -> bool {
        let is_on = |(first, last)| now.saturating_sub(last) < MET_WITHIN && now.saturating_sub(first) < LASTS_MAX;
        self.0.is_some_and(is_on)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: Duration = Duration::from_secs(1);

    #[test]
    fn what_has_just_changed_is_waited_for_and_what_changes_without_end_is_not() {
        let mut unrest = Unrest::default();
        assert!(!unrest.is_on(SECOND));
        unrest.note(SECOND);
        assert!(unrest.is_on(3 * SECOND) && !unrest.is_on(4 * SECOND));
        for second in 10..40 {
            unrest.note(second * SECOND);
            assert_eq!(unrest.is_on(second * SECOND), second < 25, "at {second} s");
        }
        unrest.note(50 * SECOND);
        assert!(unrest.is_on(52 * SECOND), "there was calm before");
    }
}
