//! Letting shards go: what no placement has any more, and what hangs on from those before.

use super::{Held, Key, StagesState};
use crate::core::desired::{Listed, Stamp};
use crate::core::spec::InstanceId;
use crate::device::DeviceMsg;
use crate::protocol::End;

impl StagesState {
    /// A stage has the shard that serves, and the one that is to come: what was to come before goes.
    pub(super) fn stop_unused(&mut self, to_come: &Key) {
        let is_unused = |(key, held): &(&Key, &Held)| {
            (key.instance, key.stage) == (to_come.instance, to_come.stage) && *key != to_come && held.wired.is_none()
        };
        let unused = self.held.iter().filter(is_unused).map(|(key, _)| key.clone());
        for key in unused.collect::<Vec<_>>() {
            self.stop(&key);
        }
    }

    pub(super) fn clear(&mut self, instance: InstanceId, below: Stamp) {
        let is_over = |held: &Held| held.task.instance == instance && held.task.stamp < below;
        let over = self.held.iter().filter(|(_, held)| is_over(held)).map(|(key, _)| key.clone());
        for key in over.collect::<Vec<_>>() {
            self.stop(&key);
        }
    }

    pub(super) fn keep(&mut self, listed: &Listed) {
        let is_here = |node| self.args.post.is_here(node);
        let is_over =
            |(key, held): &(&Key, &Held)| !listed.keeps(key.instance, held.task.stamp, held.ordered.elapsed(), is_here);
        let over = self.held.iter().filter(is_over).map(|(key, _)| key.clone());
        for key in over.collect::<Vec<_>>() {
            self.stop(&key);
        }
        // An order whose entry came to nobody counts no more than its shard.
        let held = &self.held;
        self.stamps.retain(|&instance, latest| {
            let of_shards =
                held.iter().filter(|(key, _)| key.instance == instance).map(|(_, held)| held.task.stamp).max();
            let known = of_shards.max(listed.stamp(instance));
            *latest = known.unwrap_or(*latest);
            known.is_some()
        });
    }

    pub(super) fn stop(&mut self, key: &Key) {
        let Some(held) = self.held.remove(key) else { return };
        held.is_over.cancel();
        self.args.board.forget(key.instance, End::Stage(key.stage), held.wired);
        tracing::info!(instance = %key.instance, stage = key.stage, layers = ?key.layers, "letting go of a shard");
        self.tell_memory();
        // It may have fallen back to another device.
        for local in &self.args.devices {
            let _ = local.device.send_message(DeviceMsg::Sweep);
        }
    }

    pub(super) fn on_vacated(&mut self, instance: InstanceId, bytes: u64) {
        if let Some(held) = self.memory.get_mut(&instance) {
            *held = held.saturating_sub(bytes);
            if *held == 0 {
                self.memory.remove(&instance);
            }
        }
        self.tell_memory();
    }
}
