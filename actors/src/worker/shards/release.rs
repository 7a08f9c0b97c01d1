//! Stopping the shards that no placement uses any more.

use super::{HostedShard, ShardKey, WorkerState};
use crate::core::desired::{DesiredSnapshot, Stamp};
use crate::core::spec::InstanceId;
use crate::transport::protocol::LinkEnd;

impl WorkerState {
    /// Stops shards that a stage has besides the serving one and `loading`. An earlier order loaded them in vain.
    pub(super) fn stop_unused(&mut self, loading: &ShardKey) {
        let is_unused = |(key, shard): &(&ShardKey, &HostedShard)| {
            (key.instance, key.stage) == (loading.instance, loading.stage) && *key != loading && shard.wired.is_none()
        };
        let unused = self.shards.iter().filter(is_unused).map(|(key, _)| key.clone());
        for key in unused.collect::<Vec<_>>() {
            self.stop(&key);
        }
    }

    pub(super) fn clear(&mut self, instance: InstanceId, below: Stamp) {
        let is_over = |shard: &HostedShard| shard.task.instance == instance && shard.task.stamp < below;
        let over = self.shards.iter().filter(|(_, shard)| is_over(shard)).map(|(key, _)| key.clone());
        for key in over.collect::<Vec<_>>() {
            self.stop(&key);
        }
    }

    /// Stops the shards that the desired list does not keep, and forgets the stamps of unknown instances.
    pub(super) fn reconcile(&mut self, desired: &DesiredSnapshot) {
        let is_reachable = |node| self.args.router.is_reachable(node);
        let is_over = |(key, shard): &(&ShardKey, &HostedShard)| {
            !desired.keeps(key.instance, shard.task.stamp, shard.ordered.elapsed(), is_reachable)
        };
        let over = self.shards.iter().filter(is_over).map(|(key, _)| key.clone());
        for key in over.collect::<Vec<_>>() {
            self.stop(&key);
        }
        // A stamp whose entry reached no member is kept only as long as its shard.
        let shards = &self.shards;
        self.stamps.retain(|&instance, latest| {
            let of_shards =
                shards.iter().filter(|(key, _)| key.instance == instance).map(|(_, shard)| shard.task.stamp).max();
            let known = of_shards.max(desired.stamp(instance));
            *latest = known.unwrap_or(*latest);
            known.is_some()
        });
    }

    pub(super) fn stop(&mut self, key: &ShardKey) {
        let Some(shard) = self.shards.remove(key) else { return };
        let orders = self.failover.remove(shard.serial);
        self.carry_out(orders);
        self.args.link_registry.remove(key.instance, LinkEnd::Stage(key.stage), shard.wired);
        tracing::info!(instance = %key.instance, stage = key.stage, layers = ?key.layers, "stopping a shard");
        self.tell_memory();
    }

    pub(super) fn on_memory_released(&mut self, instance: InstanceId, bytes: u64) {
        if let Some(held) = self.memory.get_mut(&instance) {
            *held = held.saturating_sub(bytes);
            if *held == 0 {
                self.memory.remove(&instance);
            }
        }
        self.tell_memory();
    }
}
