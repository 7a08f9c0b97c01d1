//! A simulated member, its state, and the messages between members.

use super::GB;
use crate::core::clique::Clique;
use crate::core::context::Context;
use crate::core::desired::{Desired, DesiredEntry, DesiredSnapshot, Stamp};
use crate::core::leader::{BrokenShard, Leader, PlacementRequest};
use crate::core::members::{MemberReport, Members, OwnedInstance};
use crate::core::pipeline::Pipeline;
use crate::core::plan::{Demand, Link};
use crate::core::request::RequestError;
use crate::core::spec::{FilesId, InstanceId, Model, ModelSpec};
use crate::core::stage::{StageEvent, StageTask};
use exo_engines::engine::Incarnation;
use exo_net::NodeId;
use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

#[derive(Debug, Clone)]
pub(super) enum Message {
    Report(Box<MemberReport>),
    Desired(Vec<(InstanceId, DesiredEntry)>),
    Target(Box<PlacementRequest>),
    Refused(ModelSpec, RequestError),
    Broken(BrokenShard),
    Start(Box<StageTask>),
    Wire { id: InstanceId, stage: usize, incarnation: Incarnation },
    Clear { id: InstanceId, below: Stamp },
    StageEvent { id: InstanceId, stamp: Stamp, event: StageEvent },
}

/// A shard that a node hosts.
pub(super) struct Shard {
    pub(super) owner: NodeId,
    pub(super) task: StageTask,
    pub(super) ordered: Duration,
    pub(super) up: Duration,
    pub(super) is_up: bool,
    pub(super) seen: Option<Incarnation>,
}

/// The head of an instance.
pub(super) struct Head {
    pub(super) pipeline: Pipeline,
    pub(super) rewire: Option<Duration>,
}

/// A running member.
pub(super) struct Node {
    pub(super) id: NodeId,
    pub(super) memory_bytes: u64,
    pub(super) bytes_per_s: f64,
    pub(super) desired: Desired,
    /// The desired list, as the member's worker last received it.
    pub(super) snapshot: DesiredSnapshot,
    pub(super) members: Members,
    pub(super) clique: Clique,
    pub(super) leader: Leader,
    pub(super) heads: BTreeMap<InstanceId, Head>,
    pub(super) shards: BTreeMap<(InstanceId, usize), Shard>,
    /// By name, the models that its clients request, the time of the last request to the leader, and the last refusal.
    pub(super) wants: BTreeMap<String, (PlacementRequest, Option<Duration>, Option<RequestError>)>,
    /// The number of entries that the member has written.
    pub(super) written: u64,
}

pub(super) fn demand(layers: u64, layer_bytes: u64) -> Demand {
    Demand {
        layer_bytes: vec![layer_bytes; layers as usize],
        layer_cost_bytes: vec![layer_bytes; layers as usize],
        head_cost_bytes: layer_bytes / 4,
        kv_pages: 512,
        kv_bytes: vec![layer_bytes / 16; layers as usize],
        embedding_bytes: layer_bytes / 4,
        head_bytes: layer_bytes / 4,
        ties_embeddings: true,
        row_bytes: 4096,
    }
}

pub(super) fn request_model(number: u64) -> PlacementRequest {
    let name = format!("model-{number}");
    // The longer context takes twice the memory for its cache.
    let context = Context::largest(None, if number == 1 { 32_768 } else { 4096 }, None);
    let model = Model {
        name: name.clone(),
        family: String::new(),
        quantization: String::new(),
        context,
        vocabulary: 256,
        files: FilesId([number as u8; 32]),
    };
    // The last model fits no node, nor all nodes together.
    let demand = if number == 3 { demand(8, 100 * GB) } else { demand(4 + number * 2, GB / 4 * (1 + number)) };
    let demand = demand.with_pages(context.cache_pages());
    PlacementRequest { spec: ModelSpec::new(name), model, demand }
}

impl Node {
    pub(super) fn new(id: NodeId, (memory_bytes, bytes_per_s): (u64, f64)) -> Self {
        Self {
            id,
            memory_bytes,
            bytes_per_s,
            desired: Desired::new(id),
            snapshot: DesiredSnapshot::default(),
            members: Members::default(),
            clique: Clique::default(),
            leader: Leader::default(),
            heads: BTreeMap::new(),
            shards: BTreeMap::new(),
            wants: BTreeMap::new(),
            written: 0,
        }
    }

    /// The member's report while it is connected with `seen`.
    pub(super) fn report(&self, seen: &BTreeSet<NodeId>) -> MemberReport {
        let held: u64 = self.shards.values().map(|shard| shard.task.memory_bytes).sum();
        let owned = self.heads.iter().map(|(&id, head)| {
            let (stamp, is_ready) = (head.pipeline.stamp(), head.pipeline.is_running());
            (id, OwnedInstance { stamp, is_ready, is_in_use: false, state: None })
        });
        let used = self.wants.values().filter_map(|(ask, ..)| Some(self.desired.find_for(&ask.spec)?.0));
        let mut report = MemberReport::of_cpu(self.memory_bytes, self.bytes_per_s);
        report.machine.memory_free_bytes = Some(self.memory_bytes.saturating_sub(held));
        MemberReport {
            name: self.id.short(),
            owned: owned.collect(),
            in_use: used.collect(),
            list: self.desired.digest(),
            outside: self.clique.announced(),
            cuts: self.clique.cuts(),
            links: seen.iter().map(|&id| (id, Link { rtt_s: 1e-3, bytes_per_s: Some(1e8), spread: 1.0 })).collect(),
            ..report
        }
    }

    /// Handles a member that fell silent or left the clique.
    pub(super) fn lose(&mut self, lost: NodeId, now: Duration) {
        self.leader.handle_lost(lost, now, self.members.0.len());
        self.leave(lost);
    }

    /// Handles a member whose host says that its process has ended.
    pub(super) fn end(&mut self, ended: NodeId, now: Duration) {
        self.leader.handle_ended(ended, now);
        self.leave(ended);
    }

    fn leave(&mut self, lost: NodeId) {
        for head in self.heads.values_mut() {
            let _ = head.pipeline.on_node_lost(lost);
        }
        for (_, asked, _) in self.wants.values_mut() {
            *asked = None;
        }
    }
}
