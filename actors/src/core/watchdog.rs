//! How long work may show no progress before it counts as hung.

use crate::core::step_times::StepTimes;
use exo_engines::engine::DeviceKind;
use std::time::Duration;

/// The most time that one check counts since the previous check: a longer gap means that the process or machine was
/// suspended, not that the work hangs.
const CHECK_MAX: Duration = Duration::from_secs(2);

/// The least deadline of a GPU's step: a driver that recompiles a kernel, or a desktop that uses the GPU, takes less.
const GPU_STEP_MIN: Duration = Duration::from_secs(5);

/// How long one device may work without progress before it counts as hung.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct HangTimeouts {
    /// The limit between two progress reports of a load: reading the largest tensor from a slow disk, or compiling all
    /// kernels.
    pub load: Duration,
    /// The limit for a step of any size. A machine that swaps takes tens of seconds per token, and is of no use.
    pub step: Duration,
    /// The additional time for each row of a step.
    pub row: Duration,
}

impl Default for HangTimeouts {
    fn default() -> Self {
        Self { load: Duration::from_secs(300), step: Duration::from_secs(60), row: Duration::from_secs(2) }
    }
}

impl HangTimeouts {
    /// The timeout for a step of `rows` rows on one device.
    pub fn for_step(&self, rows: usize) -> Duration {
        self.step.saturating_add(self.row.saturating_mul(u32::try_from(rows).unwrap_or(u32::MAX)))
    }
}

impl HangTimeouts {
    /// The timeout for a step of `rows` rows on a device of this kind. A GPU computes for nobody else, so it gets no
    /// more than a multiple of its own slowest step; a CPU that is busy with other work must not look broken.
    pub(crate) fn for_step_on(&self, kind: DeviceKind, rows: usize, times: &StepTimes) -> Duration {
        let most = self.for_step(rows);
        match (kind, times.deadline(rows)) {
            (DeviceKind::Gpu, Some(deadline)) => deadline.max(GPU_STEP_MIN).min(most),
            (DeviceKind::Gpu, None) | (DeviceKind::Cpu, _) => most,
        }
    }
}

/// Measures how long work has shown no progress.
#[derive(Debug, Default)]
pub(crate) struct Watchdog {
    progress: u64,
    silence: Duration,
    checked: Duration,
}

impl Watchdog {
    /// Returns how long the counter `progress` has not changed. `now` counts from any fixed start.
    pub(crate) fn check(&mut self, progress: u64, now: Duration) -> Duration {
        let passed = now.saturating_sub(self.checked).min(CHECK_MAX);
        self.silence = if progress == self.progress { self.silence + passed } else { Duration::ZERO };
        (self.progress, self.checked) = (progress, now);
        self.silence
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: Duration = Duration::from_secs(1);

    #[test]
    fn silence_counts_from_the_last_progress() {
        let mut watchdog = Watchdog::default();
        let checks = [(1, 1), (1, 2), (1, 3), (2, 4), (2, 5)];
        let silences = checks.map(|(progress, now)| watchdog.check(progress, now * SECOND));
        assert_eq!(silences, [0, 1, 2, 0, 1].map(|seconds| seconds * SECOND));
    }

    #[test]
    fn a_suspended_process_does_not_count_as_hung() {
        let mut watchdog = Watchdog::default();
        assert_eq!(watchdog.check(1, SECOND), Duration::ZERO);
        assert_eq!(watchdog.check(1, 2 * SECOND), SECOND);
        assert_eq!(watchdog.check(1, 3600 * SECOND), SECOND + CHECK_MAX);
        assert_eq!(watchdog.check(1, 3601 * SECOND), 2 * SECOND + CHECK_MAX);
    }

    #[test]
    fn a_gpu_has_its_own_history_as_deadline_and_a_cpu_has_not() {
        let timeouts = HangTimeouts::default();
        let mut times = StepTimes::default();
        let on = |kind, times: &StepTimes| timeouts.for_step_on(kind, 1, times);
        assert_eq!(on(DeviceKind::Gpu, &times), timeouts.for_step(1), "its first step may compile kernels");
        times.note(1, Duration::from_millis(400));
        assert_eq!(on(DeviceKind::Gpu, &times), 8 * SECOND);
        assert_eq!(on(DeviceKind::Cpu, &times), timeouts.for_step(1));
        times.note(1, 30 * SECOND);
        assert_eq!(on(DeviceKind::Gpu, &times), timeouts.for_step(1), "never longer than the setting");
    }

    #[test]
    fn more_rows_have_a_longer_timeout() {
        let timeouts = HangTimeouts::default();
        assert!(timeouts.for_step(1) < timeouts.for_step(256));
        assert!(timeouts.for_step(usize::MAX) >= timeouts.for_step(1 << 20));
    }
}
