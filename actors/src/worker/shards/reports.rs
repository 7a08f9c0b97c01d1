//! The reports of shards and their devices, and what the owner and the devices hear of them.

use super::{HostedShard, Loaded, ShardKey, WorkerFact, WorkerState};
use crate::core::memory_watch::MemoryGrowth;
use crate::core::shard_engines::{EngineOrder, EngineRun, Failure};
use crate::core::spec::InstanceId;
use crate::core::stage::StageEvent;
use crate::core::step_times::SlowDown;
use crate::transport::protocol::LinkEnd;
use crate::worker::device::DeviceMsg;
use crate::worker::shard::ShardReport;
use exo_engines::EngineError;
use exo_engines::engine::DeviceId;
use std::time::Duration;

impl HostedShard {
    /// The event of the shard's latest load, if it is loaded.
    pub(super) fn up(&self, stage: usize) -> Option<StageEvent> {
        let (run, loaded) = self.engines.newest()?;
        Some(StageEvent::Up { stage, device: run.device.clone(), load: loaded.load })
    }
}

impl WorkerState {
    pub(super) fn on_report(&mut self, key: &ShardKey, serial: u64, of: EngineRun, report: ShardReport) {
        let Some(shard) = self.shards.get_mut(key).filter(|shard| shard.serial == serial) else { return };
        let stage = key.stage;
        let concerns_users = shard.engines.concerns_users(&of);
        match report {
            ShardReport::Loading(progress) if concerns_users => {
                let (loaded_bytes, total_bytes) = (progress.loaded_bytes, progress.total_bytes);
                self.tell(key, StageEvent::Loading { stage, loaded_bytes, total_bytes });
            }
            ShardReport::Up { engine, hidden, vocabulary, row } => {
                let device = of.device.clone();
                if row > Duration::ZERO {
                    let bytes_per_s = shard.cost_bytes as f64 / row.as_secs_f64();
                    self.args.facts.tell(WorkerFact::Measured { device, bytes_per_s });
                }
                self.loads += 1;
                let loaded = Loaded { engine, load: self.loads, hidden, vocabulary };
                let (is_up, orders) = shard.engines.handle_up(of, loaded);
                self.order(serial, orders);
                if is_up {
                    self.tell_up(key);
                }
            }
            ShardReport::Speed(slow_down) if concerns_users => {
                if let Some(SlowDown { rows, best, latest }) = slow_down {
                    let (instance, best_ms, latest_ms) = (key.instance, best.as_millis(), latest.as_millis());
                    tracing::warn!(%instance, stage, rows, best_ms, latest_ms, "a shard has become slow");
                }
                self.tell(key, StageEvent::Speed { stage, slow_down });
            }
            ShardReport::Leaks(growth) if concerns_users => {
                let MemoryGrowth { grown_bytes } = growth;
                tracing::warn!(instance = %key.instance, stage, grown_bytes, "a shard's process leaks memory");
                shard.engines.handle_renewal();
                self.tell_device(&of.device, DeviceMsg::Renew(serial));
                self.tell(key, StageEvent::Leaks { stage, growth });
            }
            ShardReport::NotPromoted(error) => {
                let failed = shard.engines.handle_not_promoted(&of);
                self.on_failure(key, failed, error);
            }
            ShardReport::Down(error) => {
                let failed = shard.engines.handle_down(&of);
                self.on_failure(key, failed, error);
            }
            ShardReport::Lost(error) if concerns_users && !shard.engines.has_beside() => {
                self.tell(key, StageEvent::Lost { stage, error });
                self.stop(key);
            }
            ShardReport::Lost(error) => {
                let failed = shard.engines.handle_down(&of);
                self.on_failure(key, failed, error);
            }
            // The report of an engine that does not serve.
            ShardReport::Loading(_) | ShardReport::Speed(_) | ShardReport::Leaks(_) => {}
        }
    }

    fn on_failure(&mut self, key: &ShardKey, (failure, orders): (Failure, Vec<EngineOrder>), error: EngineError) {
        let Some(shard) = self.shards.get_mut(key) else { return };
        let serial = shard.serial;
        if let Failure::Down | Failure::Replaced = failure {
            let wired = shard.wired.take();
            self.args.link_registry.remove(key.instance, LinkEnd::Stage(key.stage), wired);
            self.tell(key, StageEvent::Down { stage: key.stage, error });
        }
        self.order(serial, orders);
        if let Failure::Replaced | Failure::BesideGone = failure {
            self.tell_up(key);
        }
    }

    /// Lets the engines of an instance's shards take over that wait to.
    pub(super) fn take_over(&mut self, instance: InstanceId) {
        let of_instance = self.shards.iter_mut().filter(|(key, _)| key.instance == instance);
        let orders: Vec<_> = of_instance.map(|(_, shard)| (shard.serial, shard.engines.take_over())).collect();
        for (serial, orders) in orders {
            self.order(serial, orders);
        }
    }

    fn order(&self, shard: u64, orders: Vec<EngineOrder>) {
        for order in orders {
            match order {
                EngineOrder::Promoted(EngineRun { device, .. }) => {
                    self.tell_device(&device, DeviceMsg::Promoted(shard));
                }
                EngineOrder::Retire(EngineRun { device, run }) => {
                    self.tell_device(&device, DeviceMsg::Retire { shard, run });
                }
                EngineOrder::Unserved(EngineRun { device, .. }) => {
                    self.tell_device(&device, DeviceMsg::Unserved(shard));
                }
            }
        }
    }

    fn tell_up(&self, key: &ShardKey) {
        if let Some(up) = self.shards.get(key).and_then(|shard| shard.up(key.stage)) {
            self.tell(key, up);
        }
    }

    fn tell_device(&self, device: &DeviceId, message: DeviceMsg) {
        if let Some(local) = self.args.devices.iter().find(|local| local.report.id == *device) {
            // Sending fails only if the device has stopped; the node stops, too.
            let _ = local.device.send_message(message);
        }
    }
}
