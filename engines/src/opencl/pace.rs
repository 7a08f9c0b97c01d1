//! How much work is queued on a device before the engine waits for it.
//!
//! A device whose queue holds half a second of work at most shows soon that it hangs, and leaves others room. The time
//! of work is guessed from that of earlier work.

use std::time::Duration;

/// The most work that is queued at once.
const QUEUED_MAX: Duration = Duration::from_millis(500);

/// The work that is queued, in multiplications.
#[derive(Debug, Default)]
pub(super) struct Pace {
    /// The work of a second, at the last wait; `None` before the first.
    per_s: Option<f64>,
    queued: u64,
}

impl Pace {
    /// Notes that `work` is about to be queued. Returns true, and notes nothing, if the queue must be waited for first.
    pub(super) fn queue(&mut self, work: u64) -> bool {
        let all = self.queued.saturating_add(work);
        let is_full = match self.per_s {
            None => self.queued > 0,
            Some(per_s) => self.queued > 0 && all as f64 > per_s * QUEUED_MAX.as_secs_f64(),
        };
        if !is_full {
            self.queued = all;
        }
        is_full
    }

    /// Notes that all queued work is done, after `elapsed`.
    pub(super) fn done(&mut self, elapsed: Duration) {
        if self.queued > 0 && elapsed > Duration::ZERO {
            self.per_s = Some(self.queued as f64 / elapsed.as_secs_f64());
        }
        self.queued = 0;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MILLISECOND: Duration = Duration::from_millis(1);

    #[test]
    fn a_slow_device_gets_half_a_second_of_work_at_once() {
        let mut pace = Pace::default();
        assert!(!pace.queue(10), "the first work");
        assert!(pace.queue(10), "nothing is known before it is done");
        pace.done(1000 * MILLISECOND);
        assert!(!pace.queue(4) && !pace.queue(1), "500 ms");
        assert!(pace.queue(1));
        pace.done(500 * MILLISECOND);
        assert!(!pace.queue(1000), "one launch is queued however long it takes");
    }

    #[test]
    fn a_fast_device_gets_whole_steps() {
        let mut pace = Pace::default();
        pace.queue(256);
        pace.done(MILLISECOND);
        assert!((0..100).all(|_| !pace.queue(256)));
    }
}
