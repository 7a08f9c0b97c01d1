//! What to do about a failed shard, by the class of its error and the number of its recent failures.
//!
//! The model is Chromium's `gpu_process_host.cc`: a number of crashes in a time leads to the next fallback, and one
//! crash is forgiven per interval.

use exo_engines::ErrorClass;
use std::time::Duration;

/// One failure is forgiven after each such time.
const FORGIVEN_AFTER: Duration = Duration::from_secs(60);
/// The limit on restarts that are not forgiven: more do not help.
const RESTARTS_MAX: usize = 3;
/// The wait before a restart, by the number of failures that are not forgiven: a short fault costs no time, and a
/// lasting fault does not keep the machine busy.
const WAITS: [Duration; RESTARTS_MAX] = [Duration::ZERO, Duration::from_millis(100), Duration::from_secs(1)];

/// Whether a shard can move to another device of the same node.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fallback {
    /// Another device is available.
    Available,
    /// There is no other device.
    None,
}

/// What the supervisor does about a failed shard.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verdict {
    /// A restart of the shard on the same device.
    Restart {
        /// The wait before the restart.
        after: Duration,
    },
    /// A start of the shard on another device of this node.
    FallBack,
    /// No further attempt on this node.
    GiveUp,
}

/// The failures of a shard that are not forgiven.
#[derive(Debug, Clone, Copy, Default)]
pub struct FailureHistory {
    failures: usize,
    /// When the first of these failed, or a failure was last forgiven, from any fixed start.
    since: Duration,
}

impl FailureHistory {
    /// Records a failure at `now`, and decides what to do.
    pub fn decide(&mut self, now: Duration, class: ErrorClass, fallback: Fallback) -> Verdict {
        let forgiven = now.saturating_sub(self.since).as_secs() / FORGIVEN_AFTER.as_secs();
        let recent = self.failures.saturating_sub(usize::try_from(forgiven).unwrap_or(usize::MAX));
        self.since = if recent == 0 { now } else { self.since + FORGIVEN_AFTER * u32::try_from(forgiven).unwrap_or(0) };
        // A failure beyond the limit does not delay forgiveness.
        self.failures = (recent + 1).min(RESTARTS_MAX);
        let restart = WAITS.get(recent).map(|&after| Verdict::Restart { after });
        let otherwise = match fallback {
            Fallback::Available => Verdict::FallBack,
            Fallback::None => Verdict::GiveUp,
        };
        match class {
            // The same load fails again on any device.
            ErrorClass::Caller => Verdict::GiveUp,
            ErrorClass::Overload => Verdict::GiveUp,
            ErrorClass::Hung if fallback == Fallback::Available => Verdict::FallBack,
            ErrorClass::Hung => Verdict::GiveUp,
            ErrorClass::Transient | ErrorClass::Fatal => restart.unwrap_or(otherwise),
            ErrorClass::DeviceLost if fallback == Fallback::Available => Verdict::FallBack,
            ErrorClass::DeviceLost => restart.unwrap_or(Verdict::GiveUp),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const CLASSES: [ErrorClass; 6] = [
        ErrorClass::Caller,
        ErrorClass::Overload,
        ErrorClass::Transient,
        ErrorClass::DeviceLost,
        ErrorClass::Hung,
        ErrorClass::Fatal,
    ];

    #[test]
    fn a_shard_that_keeps_failing_is_not_restarted_forever() {
        let mut history = FailureHistory::default();
        let verdicts: Vec<Verdict> = (0..5)
            .map(|second| history.decide(Duration::from_secs(second), ErrorClass::Fatal, Fallback::None))
            .collect();
        let restarts = WAITS.map(|after| Verdict::Restart { after });
        assert_eq!(verdicts[..3], restarts);
        assert_eq!(verdicts[3..], [Verdict::GiveUp, Verdict::GiveUp]);
    }

    #[test]
    fn old_failures_do_not_count() {
        let mut history = FailureHistory::default();
        for hour in 0..10 {
            let verdict = history.decide(Duration::from_secs(3600 * hour), ErrorClass::Fatal, Fallback::None);
            assert_eq!(verdict, Verdict::Restart { after: Duration::ZERO });
        }
    }

    proptest! {
        /// R1.4, R8.1–R8.5: a shard of a lost device falls back at once if it can, a caller's mistake is never retried,
        /// a hung shard is never restarted on its device, and in no time there are more restarts than the limit and
        /// those forgiven in that time.
        #[test]
        fn restarts_are_bounded(steps in prop::collection::vec((0_usize..6, 0_u64..30), 1..60), fall in any::<bool>()) {
            let fallback = if fall { Fallback::Available } else { Fallback::None };
            let mut history = FailureHistory::default();
            let mut now = Duration::ZERO;
            let mut restarts: Vec<Duration> = Vec::new();
            for (class, wait) in steps {
                now += Duration::from_secs(wait);
                let class = CLASSES[class];
                match history.decide(now, class, fallback) {
                    Verdict::Restart { .. } => {
                        prop_assert!(class != ErrorClass::Caller && class != ErrorClass::Hung);
                        prop_assert!(class != ErrorClass::DeviceLost || fallback == Fallback::None);
                        restarts.push(now);
                    }
                    Verdict::FallBack => prop_assert_eq!(fallback, Fallback::Available),
                    Verdict::GiveUp => {}
                }
                for (index, &from) in restarts.iter().enumerate() {
                    let forgiven = (now.saturating_sub(from).as_secs() / FORGIVEN_AFTER.as_secs()) as usize + 1;
                    prop_assert!(restarts.len() - index <= RESTARTS_MAX + forgiven);
                }
            }
        }
    }
}
