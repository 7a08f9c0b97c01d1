//! The reports of engines, and what the owner hears of them.

use super::{Loaded, ShardKey, WorkerFact, WorkerState};
use crate::core::failover::{Change, EngineNumber, Outcome, ShardNumber};
use crate::core::stage::StageEvent;
use crate::core::step_times::SlowDown;
use crate::worker::shard::ShardReport;
use std::time::Duration;

impl WorkerState {
    pub(super) fn on_report(&mut self, key: &ShardKey, serial: ShardNumber, of: EngineNumber, report: ShardReport) {
        let Some(shard) = self.shards.get(key).filter(|shard| shard.serial == serial) else { return };
        // The report of an engine that was stopped.
        let Some(device) = self.failover.device_of(serial, of).cloned() else { return };
        let stage = key.stage;
        let concerns_users = self.failover.concerns_users(serial, of);
        match report {
            ShardReport::Loading(progress) if concerns_users => {
                let (loaded_bytes, total_bytes) = (progress.loaded_bytes, progress.total_bytes);
                self.tell(key, StageEvent::Loading { stage, loaded_bytes, total_bytes });
            }
            ShardReport::Up { engine, hidden, vocabulary, row } => {
                if row > Duration::ZERO {
                    let bytes_per_s = shard.cost_bytes as f64 / row.as_secs_f64();
                    self.args.facts.tell(WorkerFact::Measured { device, bytes_per_s });
                }
                let loaded = Loaded { engine, hidden, vocabulary };
                let Outcome { change, orders } = self.failover.handle_loaded(serial, of, loaded);
                self.carry_out(orders);
                if change == Change::Up {
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
            // While a standby waits to take over, the leak is known.
            ShardReport::Leaks(growth) if self.failover.newest(serial).is_some_and(|(newest, _)| newest == of) => {
                if let Some(growth) = growth {
                    self.on_leak(key, of, growth);
                }
                self.tell(key, StageEvent::Leaks { stage, growth });
            }
            ShardReport::Failed(error) => self.on_failed(key, of, &device, error),
            // The report of an engine that does not serve.
            ShardReport::Loading(_) | ShardReport::Speed(_) | ShardReport::Leaks(_) => {}
        }
    }

    /// Tells the owner of the shard's newest engine, if one is loaded.
    pub(super) fn tell_up(&self, key: &ShardKey) {
        let Some(shard) = self.shards.get(key) else { return };
        if let Some((EngineNumber(load), device)) = self.failover.newest(shard.serial) {
            let device = device.clone();
            self.tell(key, StageEvent::Up { stage: key.stage, device, load });
        }
    }
}
