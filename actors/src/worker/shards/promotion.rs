//! Shards that are loaded once more beside the one that serves: on their own device after the fallback, or in another
//! process because theirs leaks memory.
//!
//! The worker tells the owner that the shard is up with another number of load. With the owner's next order to connect,
//! the newer one takes over, and the other one stops.

use super::{HostedShard, Loaded, ShardKey, WorkerState};
use crate::core::spec::InstanceId;
use crate::core::stage::StageEvent;
use crate::worker::device::DeviceMsg;
use exo_engines::engine::DeviceId;

impl HostedShard {
    /// The event of the shard's latest load, if it is loaded.
    pub(super) fn up(&self, stage: usize) -> Option<StageEvent> {
        let Loaded { run, load, .. } = self.promoted.as_ref().or(self.loaded.as_ref())?;
        Some(StageEvent::Up { stage, device: run.device.clone(), load: *load })
    }
}

impl WorkerState {
    /// Lets the shards of an instance that are loaded once more take over.
    pub(super) fn promote_all(&mut self, instance: InstanceId) {
        let is_ready = |(key, shard): &(&ShardKey, &HostedShard)| key.instance == instance && shard.promoted.is_some();
        let ready: Vec<ShardKey> = self.shards.iter().filter(is_ready).map(|(key, _)| key.clone()).collect();
        for key in ready {
            self.take_over(&key);
        }
    }

    /// Lets a shard take over that is loaded beside one that has failed, and tells its owner.
    pub(super) fn promote(&mut self, key: &ShardKey) {
        self.take_over(key);
        self.tell_up(key);
    }

    fn take_over(&mut self, key: &ShardKey) {
        let Some(shard) = self.shards.get_mut(key) else { return };
        let Some(promoted) = shard.promoted.take() else { return };
        let (number, device) = (shard.serial, promoted.run.device.clone());
        let retired = shard.loaded.replace(promoted);
        self.tell_device(&device, DeviceMsg::Promoted(number));
        if let Some(Loaded { run, .. }) = retired {
            self.tell_device(&run.device, DeviceMsg::Retire { shard: number, run: run.run });
        }
    }

    /// Goes on with the shard that serves, because the one that was loaded beside it has failed.
    pub(super) fn drop_promoted(&mut self, key: &ShardKey) {
        let dropped = self.shards.get_mut(key).and_then(|shard| shard.promoted.take());
        if dropped.is_some() {
            self.tell_up(key);
        }
    }

    fn tell_up(&self, key: &ShardKey) {
        if let Some(up) = self.shards.get(key).and_then(|shard| shard.up(key.stage)) {
            self.tell(key, up);
        }
    }

    pub(super) fn tell_device(&self, device: &DeviceId, message: DeviceMsg) {
        if let Some(local) = self.args.devices.iter().find(|local| local.report.id == *device) {
            // Sending fails only if the device has stopped; the node stops, too.
            let _ = local.device.send_message(message);
        }
    }
}
