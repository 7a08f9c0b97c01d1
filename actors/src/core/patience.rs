//! How long work may give no sign before it has hung.

use std::time::Duration;

/// A look that comes later than this after the last one counts no more: what was stopped was the whole process, or the
/// machine, and not the work.
const LOOK_MAX: Duration = Duration::from_secs(2);

/// What one device is given time for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Patience {
    /// Between two signs of a load: the largest tensor from the slowest disk, or all kernels from their sources.
    pub load: Duration,
    /// For a step, whatever it has: a machine that swaps decodes a token in tens of seconds, and is of use to nobody.
    pub step: Duration,
    /// For each row of it beside that.
    pub row: Duration,
}

impl Default for Patience {
    fn default() -> Self {
        Self { load: Duration::from_secs(300), step: Duration::from_secs(60), row: Duration::from_secs(2) }
    }
}

impl Patience {
    /// For a step of so many rows on one device.
    pub fn with_step(&self, rows: usize) -> Duration {
        self.step.saturating_add(self.row.saturating_mul(u32::try_from(rows).unwrap_or(u32::MAX)))
    }
}

/// Looks at work now and then, and counts how long it has given no sign.
#[derive(Debug, Default)]
pub(crate) struct Watchdog {
    signs: u64,
    silence: Duration,
    looked: Duration,
}

impl Watchdog {
    /// How long work that has given so many `signs` by now has been silent; `now` is since any fixed start.
    pub(crate) fn look(&mut self, signs: u64, now: Duration) -> Duration {
        let passed = now.saturating_sub(self.looked).min(LOOK_MAX);
        self.silence = if signs == self.signs { self.silence + passed } else { Duration::ZERO };
        (self.signs, self.looked) = (signs, now);
        self.silence
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: Duration = Duration::from_secs(1);

    #[test]
    fn silence_is_counted_from_the_last_sign() {
        let mut watchdog = Watchdog::default();
        let looks = [(1, 1), (1, 2), (1, 3), (2, 4), (2, 5)];
        let silences = looks.map(|(signs, now)| watchdog.look(signs, now * SECOND));
        assert_eq!(silences, [0, 1, 2, 0, 1].map(|seconds| seconds * SECOND));
    }

    #[test]
    fn a_process_that_was_stopped_takes_no_work_for_hung() {
        let mut watchdog = Watchdog::default();
        assert_eq!(watchdog.look(1, SECOND), Duration::ZERO);
        assert_eq!(watchdog.look(1, 2 * SECOND), SECOND);
        assert_eq!(watchdog.look(1, 3600 * SECOND), SECOND + LOOK_MAX);
        assert_eq!(watchdog.look(1, 3601 * SECOND), 2 * SECOND + LOOK_MAX);
    }

    #[test]
    fn more_rows_are_given_more_time_and_any_number_some() {
        let patience = Patience::default();
        assert!(patience.with_step(1) < patience.with_step(256));
        assert!(patience.with_step(usize::MAX) >= patience.with_step(1 << 20));
    }
}
