//! Shards that go back from the fallback to their own device.
//!
//! The device loads the shard beside the one that serves, and the worker tells the owner that the shard is up on
//! another device. With the owner's next order to connect, the shard on the device takes over, and the other one stops.

use super::{HostedShard, Loaded, ShardKey, WorkerState};
use crate::core::spec::InstanceId;
use crate::core::stage::StageEvent;
use crate::worker::device::DeviceMsg;
use exo_engines::engine::DeviceId;

impl HostedShard {
    /// The device on which the shard was loaded last.
    pub(super) fn newest_device(&self) -> Option<DeviceId> {
        self.promoted.as_ref().or(self.loaded.as_ref()).map(|loaded| loaded.device.clone())
    }
}

impl WorkerState {
    /// Lets the shards of an instance that are loaded on their devices take over.
    pub(super) fn promote_all(&mut self, instance: InstanceId) {
        let is_ready = |(key, shard): &(&ShardKey, &HostedShard)| key.instance == instance && shard.promoted.is_some();
        let ready: Vec<ShardKey> = self.shards.iter().filter(is_ready).map(|(key, _)| key.clone()).collect();
        for key in ready {
            self.take_over(&key);
        }
    }

    /// Lets a shard take over whose fallback has failed, and tells its owner.
    pub(super) fn promote(&mut self, key: &ShardKey) {
        if let Some(device) = self.take_over(key) {
            self.tell(key, StageEvent::Up { stage: key.stage, device });
        }
    }

    /// Replaces a shard on the fallback by the one on its device, which it returns.
    fn take_over(&mut self, key: &ShardKey) -> Option<DeviceId> {
        let shard = self.shards.get_mut(key)?;
        let promoted = shard.promoted.take()?;
        let (number, device) = (shard.serial, promoted.device.clone());
        let retired = shard.loaded.replace(promoted).map(|Loaded { device, .. }| device);
        self.tell_device(&device, DeviceMsg::Promoted(number));
        if let Some(retired) = retired {
            self.tell_device(&retired, DeviceMsg::Retire(number));
        }
        Some(device)
    }

    /// Goes on with the shard on the fallback, because the one on its device has failed.
    pub(super) fn on_not_promoted(&mut self, key: &ShardKey) {
        let Some(shard) = self.shards.get_mut(key) else { return };
        if shard.promoted.take().is_none() {
            return;
        }
        if let Some(device) = shard.newest_device() {
            self.tell(key, StageEvent::Up { stage: key.stage, device });
        }
    }

    fn tell_device(&self, device: &DeviceId, message: DeviceMsg) {
        if let Some(local) = self.args.devices.iter().find(|local| local.report.id == *device) {
            // Sending fails only if the device has stopped; the node stops, too.
            let _ = local.device.send_message(message);
        }
    }
}
