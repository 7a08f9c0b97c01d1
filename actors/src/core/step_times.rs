//! How long the steps of a shard take, by their number of rows: the source of deadlines, and of the alarm about a
//! device that has become slow.

use serde::{Deserialize, Serialize};
use std::time::Duration;

/// Sizes of steps that are told apart: 1 row, 2 to 3, 4 to 7, …, 4096 and more.
const SIZES: usize = 13;
/// Steps of a size whose median counts as one measurement: a pause of the machine is no slow device.
const WINDOW: usize = 16;
/// The factor between a shard's best and its latest measurement at which it counts as slow. A long context alone makes
/// steps several times as long.
const SLOW_FACTOR: u32 = 10;
/// A deadline is this many times the slowest step of the size.
const DEADLINE_FACTOR: u32 = 20;

/// A shard whose steps take much longer than they did.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct SlowDown {
    /// The least number of rows of the steps.
    pub rows: usize,
    /// The median time of these steps, when they were fastest.
    pub best: Duration,
    /// The median time of the latest.
    pub latest: Duration,
}

#[derive(Debug, Clone, Default)]
struct Size {
    window: Vec<Duration>,
    best: Option<Duration>,
    latest: Option<Duration>,
    slowest: Option<Duration>,
}

/// The times of a shard's steps since it was loaded.
#[derive(Debug, Clone, Default)]
pub(crate) struct StepTimes {
    sizes: [Size; SIZES],
}

fn size_of_step(rows: usize) -> usize {
    (rows.max(1).ilog2() as usize).min(SIZES - 1)
}

impl StepTimes {
    /// Notes that a step of `rows` rows took `elapsed`.
    pub(crate) fn note(&mut self, rows: usize, elapsed: Duration) {
        let size = &mut self.sizes[size_of_step(rows)];
        size.slowest = size.slowest.max(Some(elapsed));
        size.window.push(elapsed);
        if size.window.len() == WINDOW {
            size.window.sort_unstable();
            let median = size.window[WINDOW / 2];
            size.window.clear();
            size.latest = Some(median);
            size.best = Some(size.best.map_or(median, |best| best.min(median)));
        }
    }

    /// Returns how long a step of `rows` rows may take, by the slowest one of its size; `None` if there was none.
    pub(crate) fn deadline(&self, rows: usize) -> Option<Duration> {
        Some(self.sizes[size_of_step(rows)].slowest? * DEADLINE_FACTOR)
    }

    /// Returns the first size of steps that has become slow.
    pub(crate) fn slow_down(&self) -> Option<SlowDown> {
        let mut sizes = self.sizes.iter().enumerate();
        sizes.find_map(|(index, size)| {
            let (best, latest) = (size.best?, size.latest?);
            (latest >= best * SLOW_FACTOR).then_some(SlowDown { rows: 1 << index, best, latest })
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MILLISECOND: Duration = Duration::from_millis(1);

    #[test]
    fn a_shard_is_slow_after_many_slow_steps_and_well_after_many_fast_ones() {
        let mut times = StepTimes::default();
        let mut note = |count: usize, each: Duration| {
            (0..count).for_each(|_| times.note(1, each));
            times.slow_down()
        };
        assert_eq!(note(WINDOW, 3 * MILLISECOND), None);
        assert_eq!(note(WINDOW / 4, 900 * MILLISECOND), None, "a short pause");
        assert_eq!(note(WINDOW, 3 * MILLISECOND), None);
        let slow = SlowDown { rows: 1, best: 3 * MILLISECOND, latest: 60 * MILLISECOND };
        assert_eq!(note(2 * WINDOW, 60 * MILLISECOND), Some(slow));
        assert_eq!(note(2 * WINDOW, 4 * MILLISECOND), None);
    }

    #[test]
    fn steps_of_other_sizes_have_their_own_times() {
        let mut times = StepTimes::default();
        for _ in 0..WINDOW {
            times.note(1, MILLISECOND);
            times.note(256, 300 * MILLISECOND);
        }
        assert_eq!(times.slow_down(), None);
        assert_eq!(times.deadline(1), Some(20 * MILLISECOND));
        assert_eq!(times.deadline(300), Some(6000 * MILLISECOND));
        assert_eq!(times.deadline(8), None, "no such step yet");
    }
}
