//! The health of one device of this node: when it is left alone after a failure, and when it is tried again.
//!
//! ```text
//! Well ─failure─► Resting ─(pause)─► Probing ─passed─► Well
//!                    ▲                  │failed
//!                    └── longer pause ◄─┘
//! ```
//! A state machine without I/O: `failover` tells it what has happened. Times count from any fixed start.

use std::time::Duration;

/// The first pause before a device that has failed is probed.
pub const PROBE_AFTER: Duration = Duration::from_secs(10);
/// The longest pause. A device that fails under load once an hour costs its users little.
pub(super) const PAUSE_MAX: Duration = Duration::from_secs(3600);
/// After each such time without a failure the pause halves: a device that fails once a day is tried at once.
const FORGIVEN_AFTER: Duration = Duration::from_secs(600);

/// The health of a device.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Health {
    Well,
    /// The device has failed, and is left alone.
    Resting {
        until: Duration,
    },
    /// A self-test runs on the device.
    Probing,
}

/// The health of a device, with the history that the next pause depends on.
#[derive(Debug, Clone)]
pub(crate) struct DeviceHealth {
    /// The first pause before a probe.
    probe_after: Duration,
    health: Health,
    /// The pause before the next probe.
    pause: Duration,
    /// When the device last failed or became well.
    since: Duration,
    /// Whether a probe runs, even one whose result will not count.
    is_probed: bool,
}

impl DeviceHealth {
    pub(crate) fn new(probe_after: Duration) -> Self {
        Self { probe_after, health: Health::Well, pause: probe_after, since: Duration::ZERO, is_probed: false }
    }

    pub(crate) fn health(&self) -> Health {
        self.health
    }

    pub(crate) fn is_well(&self) -> bool {
        self.health == Health::Well
    }

    /// Leaves the device alone after a failure, the longer the more often it has failed lately.
    pub(crate) fn handle_failure(&mut self, now: Duration) {
        if self.health == Health::Well {
            let forgiven = now.saturating_sub(self.since).as_secs() / FORGIVEN_AFTER.as_secs();
            let halved = u32::try_from(forgiven).ok().and_then(|times| 1_u32.checked_shl(times));
            self.pause = halved.map_or(Duration::ZERO, |times| self.pause / times).max(self.probe_after);
        }
        // Several shards that fail together are one failure of the device.
        if let Health::Resting { .. } = self.health {
            return;
        }
        self.health = Health::Resting { until: now + self.pause };
        self.since = now;
        self.pause = (self.pause * 2).min(PAUSE_MAX);
    }

    /// Returns whether a probe is to start now. The next call does not return true before the probe has ended.
    pub(crate) fn poll_probe(&mut self, now: Duration) -> bool {
        match self.health {
            Health::Resting { until } if until <= now && !self.is_probed => {
                (self.health, self.is_probed) = (Health::Probing, true);
                true
            }
            _ => false,
        }
    }

    /// Notes that the probe has passed. It does not count if a shard has failed since the probe began.
    pub(crate) fn handle_probe_passed(&mut self, now: Duration) {
        self.is_probed = false;
        if self.health == Health::Probing {
            (self.health, self.since) = (Health::Well, now);
        }
    }

    /// Notes that the probe has failed.
    pub(crate) fn handle_probe_failed(&mut self, now: Duration) {
        self.is_probed = false;
        if self.health == Health::Probing {
            self.handle_failure(now);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: Duration = Duration::from_secs(1);

    #[test]
    fn pauses_double_with_each_failed_probe_and_halve_with_time() {
        let mut device = DeviceHealth::new(10 * SECOND);
        device.handle_failure(SECOND);
        assert_eq!(device.health(), Health::Resting { until: 11 * SECOND });
        assert!(!device.poll_probe(10 * SECOND) && device.poll_probe(11 * SECOND) && !device.poll_probe(12 * SECOND));
        device.handle_probe_failed(12 * SECOND);
        assert_eq!(device.health(), Health::Resting { until: 32 * SECOND });
        assert!(device.poll_probe(32 * SECOND));
        device.handle_probe_passed(33 * SECOND);
        assert!(device.is_well());
        device.handle_failure(33 * SECOND + FORGIVEN_AFTER);
        assert_eq!(device.health(), Health::Resting { until: 53 * SECOND + FORGIVEN_AFTER }, "40 s, halved");
    }

    #[test]
    fn a_probe_that_passes_after_a_new_failure_does_not_count() {
        let mut device = DeviceHealth::new(10 * SECOND);
        device.handle_failure(SECOND);
        assert!(device.poll_probe(11 * SECOND));
        device.handle_failure(12 * SECOND);
        device.handle_probe_passed(13 * SECOND);
        assert_eq!(device.health(), Health::Resting { until: 32 * SECOND });
        assert!(device.poll_probe(32 * SECOND));
        device.handle_failure(33 * SECOND);
        assert!(!device.poll_probe(1000 * SECOND), "the earlier probe still runs");
    }
}
