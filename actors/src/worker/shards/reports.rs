//! The reports of shards and their devices, and what the owner hears of them.

use super::{HostedShard, Loaded, ShardKey, WorkerFact, WorkerState};
use crate::core::memory_watch::MemoryGrowth;
use crate::core::stage::StageEvent;
use crate::core::step_times::SlowDown;
use crate::transport::protocol::LinkEnd;
use crate::worker::device::DeviceMsg;
use crate::worker::shard::{EngineRun, ShardReport};
use exo_engines::EngineError;
use std::time::Duration;

/// What an engine is to its shard.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum EngineRole {
    /// It serves.
    Serving,
    /// It is loaded beside the one that serves.
    Beside,
    /// No engine is loaded.
    Awaited,
    /// Another engine serves.
    Other,
}

impl HostedShard {
    fn role(&self, run: &EngineRun) -> EngineRole {
        let is_it = |loaded: &Option<Loaded>| loaded.as_ref().is_some_and(|loaded| loaded.run == *run);
        match self.loaded {
            None => EngineRole::Awaited,
            _ if is_it(&self.loaded) => EngineRole::Serving,
            _ if is_it(&self.promoted) => EngineRole::Beside,
            _ => EngineRole::Other,
        }
    }
}

impl WorkerState {
    pub(super) fn on_report(&mut self, key: &ShardKey, serial: u64, of: EngineRun, report: ShardReport) {
        let Some(shard) = self.shards.get_mut(key).filter(|shard| shard.serial == serial) else { return };
        let (stage, role) = (key.stage, shard.role(&of));
        let concerns_users = matches!(role, EngineRole::Serving | EngineRole::Awaited);
        match report {
            ShardReport::Loading(progress) if concerns_users => {
                let (loaded_bytes, total_bytes) = (progress.loaded_bytes, progress.total_bytes);
                self.tell(key, StageEvent::Loading { stage, loaded_bytes, total_bytes });
            }
            ShardReport::Up { engine, hidden, vocabulary, row } => {
                self.loads += 1;
                let load = self.loads;
                let device = of.device.clone();
                let loaded = Loaded { engine, run: of, load, hidden, vocabulary };
                let place = if role == EngineRole::Awaited { &mut shard.loaded } else { &mut shard.promoted };
                *place = Some(loaded);
                if row > Duration::ZERO {
                    let bytes_per_s = shard.cost_bytes as f64 / row.as_secs_f64();
                    self.args.facts.tell(WorkerFact::Measured { device: device.clone(), bytes_per_s });
                }
                self.tell(key, StageEvent::Up { stage, device, load });
            }
            ShardReport::Speed(slow_down) if concerns_users => {
                if let Some(SlowDown { rows, best, latest }) = slow_down {
                    let (best_ms, latest_ms) = (best.as_millis(), latest.as_millis());
                    tracing::warn!(instance = %key.instance, stage, rows, best_ms, latest_ms, "a shard has become slow");
                }
                self.tell(key, StageEvent::Speed { stage, slow_down });
            }
            ShardReport::Leaks(growth) if role == EngineRole::Serving => self.on_leak(key, &of, growth),
            ShardReport::NotPromoted(_) if role == EngineRole::Beside => self.drop_promoted(key),
            ShardReport::NotPromoted(error) if role == EngineRole::Serving => {
                self.on_down(key, error);
                self.tell_device(&of.device, DeviceMsg::Unserved(serial));
            }
            ShardReport::Down(error) if concerns_users => self.on_down(key, error),
            ShardReport::Lost(error) if concerns_users => {
                self.tell(key, StageEvent::Lost { stage, error });
                self.stop(key);
            }
            ShardReport::Down(_) | ShardReport::Lost(_) if role == EngineRole::Beside => self.drop_promoted(key),
            // The report of an engine that another one has replaced, or that is to replace another one.
            _ => {}
        }
    }

    fn on_leak(&self, key: &ShardKey, of: &EngineRun, growth: MemoryGrowth) {
        let (stage, MemoryGrowth { from_bytes, to_bytes }) = (key.stage, growth);
        tracing::warn!(instance = %key.instance, stage, from_bytes, to_bytes, "a shard's process leaks memory");
        if let Some(shard) = self.shards.get(key) {
            self.tell_device(&of.device, DeviceMsg::Renew(shard.serial));
        }
        self.tell(key, StageEvent::Leaks { stage, growth });
    }

    /// Notes that the shard that serves has failed. One that is loaded beside it takes over.
    fn on_down(&mut self, key: &ShardKey, error: EngineError) {
        let Some(shard) = self.shards.get_mut(key) else { return };
        shard.loaded = None;
        let wired = shard.wired.take();
        self.args.link_registry.remove(key.instance, LinkEnd::Stage(key.stage), wired);
        self.tell(key, StageEvent::Down { stage: key.stage, error });
        self.promote(key);
    }
}
