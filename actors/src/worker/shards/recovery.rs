//! Failed engines, their replacements, and the health of devices: `core/failover.rs` decides, and devices are told.

use super::{HostedShard, ShardKey, WorkerMsg, WorkerRef, WorkerState};
use crate::core::device_health::Health;
use crate::core::failover::{Change, EngineNumber, EngineOrder, Outcome};
use crate::core::memory_watch::MemoryGrowth;
use crate::core::node_status::{DeviceTrouble, Fact};
use crate::core::offer::MemoryPool;
use crate::core::spec::InstanceId;
use crate::core::stage::StageEvent;
use crate::transport::callback::EventCallback;
use crate::transport::protocol::LinkEnd;
use crate::worker::device::DeviceMsg;
use crate::worker::machine::available_bytes;
use crate::worker::probe::ProbeOutcome;
use crate::worker::shard::{ShardReport, ShardTask};
use exo_engines::EngineError;
use exo_engines::engine::{DeviceId, DeviceReport};
use std::sync::Arc;
use std::time::{SystemTime, UNIX_EPOCH};

impl WorkerState {
    pub(super) fn on_failed(&mut self, key: &ShardKey, of: EngineNumber, device: &DeviceId, error: EngineError) {
        let Some(shard) = self.shards.get_mut(key) else { return };
        let Outcome { change, orders } =
            self.failover.handle_failed(shard.serial, of, error.class(), self.started.elapsed());
        let (instance, stage) = (key.instance, key.stage);
        tracing::info!(
            %instance, stage, %device, class = ?error.class(), %error, remedy = error.remedy(), ?change, ?orders,
            "an engine failed"
        );
        if let Change::Down | Change::Replaced = change {
            let wired = shard.wired.take();
            self.args.link_registry.remove(instance, LinkEnd::Stage(stage), wired);
        }
        self.tell_trouble(device, &error);
        self.carry_out(orders);
        match change {
            Change::Nothing => {}
            Change::Up => self.tell_up(key),
            Change::Down => self.tell(key, StageEvent::Down { stage, error }),
            Change::Replaced => {
                self.tell(key, StageEvent::Down { stage, error });
                self.tell_up(key);
            }
            Change::Lost => {
                self.tell(key, StageEvent::Lost { stage, error });
                self.stop(key);
            }
        }
    }

    /// Replaces an engine whose process leaks memory, if the machine's memory suffices for both.
    pub(super) fn on_leak(&mut self, key: &ShardKey, of: EngineNumber, growth: MemoryGrowth) {
        let Some(HostedShard { serial, start: Some(start), .. }) = self.shards.get(key) else { return };
        let (instance, stage, needed_bytes) = (key.instance, key.stage, start.engine.memory.bytes);
        tracing::warn!(%instance, stage, grown_bytes = growth.grown_bytes, "a shard's process leaks memory");
        let has_memory = available_bytes().is_none_or(|available| available > needed_bytes);
        let order = has_memory.then(|| self.failover.handle_leak(*serial, of, self.started.elapsed())).flatten();
        if order.is_none() {
            tracing::warn!(%instance, stage, needed_bytes, "the leaking process is not replaced for now");
        }
        self.carry_out(order);
    }

    /// Lets the standby engines of an instance's shards serve, as far as they are loaded.
    pub(super) fn take_over(&mut self, instance: InstanceId) {
        let of_instance = self.shards.iter().filter(|(key, _)| key.instance == instance);
        for serial in of_instance.map(|(_, shard)| shard.serial).collect::<Vec<_>>() {
            let orders = self.failover.take_over(serial);
            self.carry_out(orders);
        }
    }

    /// Passes orders on to the devices.
    pub(super) fn carry_out(&self, orders: impl IntoIterator<Item = EngineOrder>) {
        for order in orders {
            match order {
                EngineOrder::Start { shard, engine, device, after } => {
                    let shard = self.shards.values().find(|hosted| hosted.serial == shard);
                    let start = shard.and_then(|HostedShard { start, .. }| start.clone());
                    // A shard is placed when its headers are read, and only on a device of this node.
                    let Some(mut task) = start else { continue };
                    let Some(local) = self.args.devices.iter().find(|local| local.report.id == device) else {
                        continue;
                    };
                    task.number = engine;
                    if let Some(error) = self.lacks_memory(&task, &local.report) {
                        task.report(ShardReport::Failed(error));
                        continue;
                    }
                    (task.engine.device, task.engine.factory) = (device, Arc::clone(&local.factory));
                    self.tell_device(&task.engine.device.clone(), DeviceMsg::Start { task: Box::new(task), after });
                }
                EngineOrder::Stop { engine, device } => self.tell_device(&device, DeviceMsg::Stop(engine)),
            }
        }
    }

    /// The error of a shard that was placed in a card's memory, and is to fall back to a device that uses the
    /// machine's: nobody has planned that memory for it.
    fn lacks_memory(&self, task: &ShardTask, to: &DeviceReport) -> Option<EngineError> {
        let placed = self.args.devices.iter().find(|local| local.report.id == task.engine.device)?;
        let (needed_bytes, free_bytes) = (task.engine.memory.bytes, available_bytes()?);
        let is_planned = MemoryPool::of(&placed.report) == MemoryPool::of(to);
        let what = "the weights and the cache of a card's shard, on the CPU".to_owned();
        (!is_planned && free_bytes < needed_bytes).then_some(EngineError::OutOfMemory {
            what,
            needed_bytes,
            free_bytes,
        })
    }

    pub(super) fn start_probes(&mut self, myself: &WorkerRef) {
        for device in self.failover.poll_probes(self.started.elapsed()) {
            let of = device.clone();
            let report = EventCallback::to(myself, move |outcome| WorkerMsg::Probed { device: of.clone(), outcome });
            self.tell_device(&device, DeviceMsg::Probe(report));
        }
    }

    pub(super) fn on_probed(&mut self, device: &DeviceId, outcome: ProbeOutcome) {
        let now = self.started.elapsed();
        match outcome {
            Err(error) => {
                self.failover.handle_probe_failed(device, now);
                tracing::info!(%device, %error, remedy = error.remedy(), "a device failed its probe");
                self.tell_trouble(device, &error);
            }
            Ok(report) => {
                let orders = self.failover.handle_probe_passed(device, now);
                if self.failover.health(device) == Some(Health::Well) {
                    tracing::info!(%device, step_us = report.step.as_micros(), "a device passed its probe");
                    self.args.health.tell(Fact::DeviceRecovered(device.clone()));
                }
                self.carry_out(orders);
            }
        }
    }

    /// Tells why a device rests, if it does, and until when.
    fn tell_trouble(&self, device: &DeviceId, error: &EngineError) {
        let Some(Health::Resting { until }) = self.failover.health(device) else { return };
        let now_s = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs();
        let probe_at_s = now_s + until.saturating_sub(self.started.elapsed()).as_secs();
        let (error, remedy) = (error.to_string(), error.remedy().to_owned());
        let trouble = DeviceTrouble { error, remedy, probe_at_s };
        self.args.health.tell(Fact::DeviceFailed { device: device.clone(), trouble });
    }

    fn tell_device(&self, device: &DeviceId, message: DeviceMsg) {
        if let Some(local) = self.args.devices.iter().find(|local| local.report.id == *device) {
            // Sending fails only if the device has stopped; the node stops, too.
            let _ = local.device.send_message(message);
        }
    }
}
