//! The shards of a simulated node, and their head: orders and events of stages.

use super::Cluster;
use super::node::{Message, Shard};
use crate::core::desired::Stamp;
use crate::core::pipeline::PipelineEvent;
use crate::core::spec::InstanceId;
use crate::core::stage::{StageEvent, StageTask};
use exo_engines::engine::Incarnation;
use exo_net::NodeId;
use std::time::Duration;

impl Cluster {
    pub(super) fn start(&mut self, index: usize, owner: NodeId, task: StageTask) {
        let loads = Duration::from_millis(200 + self.random.below(1500));
        let now = self.now;
        let Some(node) = &mut self.nodes[index] else { return };
        let key = (task.instance, task.stage);
        let latest =
            node.shards.values().filter(|shard| shard.task.instance == task.instance).map(|shard| shard.task.stamp);
        if latest.max().is_some_and(|latest| task.stamp < latest) {
            return;
        }
        let held =
            node.shards.get_mut(&key).filter(|held| StageTask { stamp: task.stamp, ..held.task.clone() } == task);
        match held {
            Some(held) => {
                (held.owner, held.task, held.ordered) = (owner, task, now);
                if held.is_up {
                    held.is_up = false;
                    held.up = now;
                }
            }
            None => {
                let seen = None;
                node.shards.insert(key, Shard { owner, task, ordered: now, up: now + loads, is_up: false, seen });
            }
        }
    }

    pub(super) fn wire(&mut self, index: usize, from: NodeId, id: InstanceId, stage: usize, incarnation: Incarnation) {
        let Some(node) = &mut self.nodes[index] else { return };
        let Some(shard) = node.shards.get_mut(&(id, stage)).filter(|shard| shard.is_up && shard.owner == from) else {
            return;
        };
        // An engine refuses an incarnation that is not later than the last one.
        if shard.seen.is_some_and(|seen| incarnation <= seen) {
            return;
        }
        shard.seen = Some(incarnation);
        let stamp = shard.task.stamp;
        self.send(index, from, Message::StageEvent { id, stamp, event: StageEvent::Wired { stage, incarnation } });
    }

    pub(super) fn on_stage_event(
        &mut self,
        index: usize,
        from: NodeId,
        id: InstanceId,
        stamp: Stamp,
        event: &StageEvent,
    ) {
        let now = self.now;
        let Some(node) = &mut self.nodes[index] else { return };
        let Some(head) = node.heads.get_mut(&id).filter(|head| head.pipeline.stamp() == stamp) else { return };
        let step = head.pipeline.on_stage_event(from, event, now);
        self.on_pipeline_event(index, id, step);
    }

    pub(super) fn on_pipeline_event(&mut self, index: usize, id: InstanceId, step: PipelineEvent) {
        let now = self.now;
        let Some(head) = self.nodes[index].as_mut().and_then(|node| node.heads.get_mut(&id)) else { return };
        match step {
            PipelineEvent::Loaded | PipelineEvent::Moved => head.rewire = Some(now),
            PipelineEvent::Cut(.., wait) => head.rewire = Some(now + wait),
            PipelineEvent::Running => {
                let below = head.pipeline.stamp();
                self.clear(index, id, below);
            }
            PipelineEvent::Nothing | PipelineEvent::Down(..) | PipelineEvent::Lost(..) => {}
        }
    }

    /// Orders all nodes to drop shards of placements before `below`.
    pub(super) fn clear(&mut self, index: usize, id: InstanceId, below: Stamp) {
        let clear = Message::Clear { id, below };
        self.send(index, self.ids[index], clear.clone());
        self.broadcast(index, &clear);
    }
}
