//! What to do about a shard that failed: a function of its error's class and of how often it failed lately.

use exo_engines::ErrorClass;
use std::collections::VecDeque;
use std::time::Duration;

/// Failures within this time count together.
const WINDOW: Duration = Duration::from_secs(60);
/// More restarts than this within [`WINDOW`] are in vain.
const RESTARTS_MAX: usize = 3;
/// The wait before a restart, by how many went before: a fault that passes at once costs nothing, one that stays
/// does not keep the machine busy.
const WAITS: [Duration; RESTARTS_MAX] = [Duration::ZERO, Duration::from_millis(100), Duration::from_secs(1)];

/// Whether a shard could go to another device of the same node.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fallback {
    Available,
    None,
}

/// What the supervisor does.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verdict {
    /// The same shard on the same device, after a wait.
    Restart { after: Duration },
    /// The same shard on another device of this node.
    FallBack,
    /// Another placement: there is no room here.
    Replan,
    /// Nothing helps: whoever waits is told.
    Stop,
}

/// When a shard failed, as far as it still counts.
#[derive(Debug, Clone, Default)]
pub struct FailureHistory {
    /// Ascending, since any fixed start.
    failures: VecDeque<Duration>,
}

impl FailureHistory {
    /// Takes a failure at `now` into account, and decides.
    pub fn decide(&mut self, now: Duration, class: ErrorClass, fallback: Fallback) -> Verdict {
        while self.failures.front().is_some_and(|&at| at + WINDOW < now) {
            self.failures.pop_front();
        }
        let recent = self.failures.len();
        self.failures.push_back(now);
        let restart = WAITS.get(recent).map(|&after| Verdict::Restart { after });
        let otherwise = match fallback {
            Fallback::Available => Verdict::FallBack,
            Fallback::None => Verdict::Stop,
        };
        match class {
            // The same load fails again, wherever it is tried.
            ErrorClass::Caller => Verdict::Stop,
            ErrorClass::Overload => Verdict::Replan,
            ErrorClass::Hung if fallback == Fallback::Available => Verdict::FallBack,
            ErrorClass::Hung => Verdict::Replan,
            ErrorClass::Transient | ErrorClass::Fatal => restart.unwrap_or(otherwise),
            ErrorClass::DeviceLost if fallback == Fallback::Available => Verdict::FallBack,
            ErrorClass::DeviceLost => restart.unwrap_or(Verdict::Stop),
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
    fn a_shard_that_keeps_failing_is_not_restarted_for_ever() {
        let mut history = FailureHistory::default();
        let verdicts: Vec<Verdict> = (0..5)
            .map(|second| history.decide(Duration::from_secs(second), ErrorClass::Fatal, Fallback::None))
            .collect();
        let restarts = WAITS.map(|after| Verdict::Restart { after });
        assert_eq!(verdicts[..3], restarts);
        assert_eq!(verdicts[3..], [Verdict::Stop, Verdict::Stop]);
    }

    #[test]
    fn old_failures_are_forgiven() {
        let mut history = FailureHistory::default();
        for hour in 0..10 {
            let verdict = history.decide(Duration::from_secs(3600 * hour), ErrorClass::Fatal, Fallback::None);
            assert_eq!(verdict, Verdict::Restart { after: Duration::ZERO });
        }
    }

    proptest! {
        /// R1.4, R8.4: a lost device falls back at once where it can, a caller's mistake is never retried, what
        /// hangs is never tried again where it hangs, and no sequence of failures gets more restarts within a window than the limit.
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
                    Verdict::Replan | Verdict::Stop => {}
                }
                let recent = restarts.iter().filter(|&&at| at + WINDOW >= now).count();
                prop_assert!(recent <= RESTARTS_MAX);
            }
        }
    }
}
