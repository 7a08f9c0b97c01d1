//! Where the shards of one device run: on it, or on the fallback device of the node while it is not well.
//!
//! ```text
//! failure ─► restart here ─(too many)─► fallback, the device rests ─(pause)─► probe ─passed─► shards load here again,
//!    ▲                                         ▲                        │failed               beside what serves
//!    └───────────── promoted ◄─────────────────┴── longer rest ◄────────┴──────────────────────────┘
//! ```
//! A state machine without I/O: the device's actor tells it what has happened, and does what it decides. Times count
//! from any fixed start. The model is Chromium's GPU process: a number of crashes in a time leads to the next fallback,
//! and one crash is forgiven per interval.

use crate::core::restart_policy::{FailureHistory, Fallback, Verdict};
use exo_engines::ErrorClass;
use std::collections::BTreeMap;
use std::time::Duration;

/// The first pause before a device that has failed is probed.
pub const PROBE_AFTER: Duration = Duration::from_secs(10);
/// The longest pause.
pub(super) const PAUSE_MAX: Duration = Duration::from_secs(3600);
/// After this long without a failure the pause halves.
const FORGIVEN_AFTER: Duration = Duration::from_secs(600);

/// The number of a shard on this node.
pub(crate) type ShardNumber = u64;

/// What to do about a failed shard.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Decision {
    /// What the restart policy says.
    Serve(Verdict),
    /// Nothing: another engine serves on. The shard is promoted after the device's next probe, unless the model's files
    /// are at fault.
    StayFallen,
}

/// The device on which a new shard starts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Start {
    Here,
    OnFallback,
}

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

#[derive(Debug, Clone)]
struct Shard {
    history: FailureHistory,
    place: Place,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Place {
    Here,
    /// On the fallback.
    Fallen,
    /// On the fallback, while it loads here.
    Promoting,
    /// On the fallback for good: a load here fails whatever the device's health is.
    Barred,
}

#[derive(Debug, Clone)]
pub(crate) struct DevicePolicy {
    fallback: Fallback,
    /// The first pause before a probe.
    probe_after: Duration,
    health: Health,
    /// The pause before the next probe.
    pause: Duration,
    /// When the device last failed or became well, or a failure was last forgiven.
    since: Duration,
    shards: BTreeMap<ShardNumber, Shard>,
}

impl DevicePolicy {
    pub(crate) fn new(fallback: Fallback, probe_after: Duration) -> Self {
        Self {
            fallback,
            probe_after,
            health: Health::Well,
            pause: probe_after,
            since: Duration::ZERO,
            shards: BTreeMap::new(),
        }
    }

    pub(crate) fn health(&self) -> Health {
        self.health
    }

    /// Decides where a shard starts that was placed on this device. A restart asks, too.
    pub(crate) fn handle_start(&mut self, shard: ShardNumber) -> Start {
        let is_well = self.health == Health::Well || self.fallback == Fallback::None;
        let place = if is_well { Place::Here } else { Place::Fallen };
        let known = self.shards.entry(shard).or_insert_with(|| Shard { history: FailureHistory::default(), place });
        match known.place {
            Place::Here if !is_well => {
                known.place = Place::Fallen;
                Start::OnFallback
            }
            Place::Here | Place::Promoting => Start::Here,
            Place::Fallen | Place::Barred => Start::OnFallback,
        }
    }

    /// Decides about a shard that failed on this device.
    pub(crate) fn handle_failure(&mut self, shard: ShardNumber, class: ErrorClass, now: Duration) -> Decision {
        let Some(known) = self.shards.get_mut(&shard) else { return Decision::StayFallen };
        if known.place != Place::Here {
            if class == ErrorClass::Caller {
                known.place = Place::Barred;
                return Decision::StayFallen;
            }
            // A device that is out of memory gets time to free it.
            known.place = Place::Fallen;
            self.rest(now);
            return Decision::StayFallen;
        }
        let verdict = known.history.decide(now, class, self.fallback);
        match verdict {
            Verdict::Restart { .. } => {}
            Verdict::FallBack => {
                known.place = Place::Fallen;
                self.rest(now);
            }
            Verdict::Replan | Verdict::Stop => drop(self.shards.remove(&shard)),
        }
        Decision::Serve(verdict)
    }

    /// Whether a shard of this device runs on the fallback.
    pub(crate) fn has_fallen(&self, shard: ShardNumber) -> bool {
        self.shards.get(&shard).is_some_and(|shard| shard.place != Place::Here)
    }

    /// Forgets a shard that is not needed any more.
    pub(crate) fn handle_over(&mut self, shard: ShardNumber) {
        self.shards.remove(&shard);
    }

    /// Notes that a shard serves on this device again. Returns false if it has failed here meanwhile.
    pub(crate) fn handle_promoted(&mut self, shard: ShardNumber) -> bool {
        let known = self.shards.get_mut(&shard).filter(|known| known.place == Place::Promoting);
        known.map(|known| known.place = Place::Here).is_some()
    }

    /// Notes that the probe has passed. Returns the shards to load on the device again, beside what serves.
    pub(crate) fn handle_probe_passed(&mut self, now: Duration) -> Vec<ShardNumber> {
        // A shard has failed since the probe began.
        if self.health != Health::Probing {
            return Vec::new();
        }
        (self.health, self.since) = (Health::Well, now);
        let fallen = self.shards.iter_mut().filter(|(_, shard)| shard.place == Place::Fallen);
        let promoted = fallen.map(|(&number, shard)| {
            shard.place = Place::Promoting;
            number
        });
        promoted.collect()
    }

    /// Notes that the probe has failed.
    pub(crate) fn handle_probe_failed(&mut self, now: Duration) {
        if self.health == Health::Probing {
            self.rest(now);
        }
    }

    /// Returns whether a probe is to start now. The next call does not return true before the probe has ended.
    pub(crate) fn poll_probe(&mut self, now: Duration) -> bool {
        match self.health {
            Health::Resting { until } if until <= now => {
                self.health = Health::Probing;
                true
            }
            _ => false,
        }
    }

    /// Leaves the device alone, the longer the more often it has failed lately.
    fn rest(&mut self, now: Duration) {
        if self.health == Health::Well {
            let forgiven = now.saturating_sub(self.since).as_secs() / FORGIVEN_AFTER.as_secs();
            let forgiven = u32::try_from(forgiven).unwrap_or(u32::MAX).min(16);
            self.pause = (self.pause / (1 << forgiven)).max(self.probe_after);
        }
        // Several shards that fail together are one failure of the device.
        if let Health::Resting { .. } = self.health {
            return;
        }
        self.health = Health::Resting { until: now + self.pause };
        self.since = now;
        self.pause = (self.pause * 2).min(PAUSE_MAX);
    }
}
