//! The desired list: the deployments that are to run, as every member knows them. Last writer wins; there is no
//! consensus.
//!
//! Each instance has an entry with a stamp. The entry with the higher stamp wins, in whatever order entries arrive, so
//! members that have received the same entries hold the same list. A stopped instance stays in the list for a while as
//! a tombstone, so that a member that was disconnected does not bring the instance back.
//!
//! The stamp also orders the incarnations of an instance: an incarnation of a later stamp is later.

use crate::core::plan::{Demand, Placement};
use crate::core::request::RequestError;
use crate::core::spec::{InstanceId, Model, ModelSpec};
use exo_engines::engine::Incarnation;
use exo_net::NodeId;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::time::Duration;

/// How long a tombstone is kept: longer than a disconnected member takes to return with old entries.
const TOMBSTONES_KEPT: Duration = Duration::from_secs(24 * 3600);
/// The most tombstones that are kept; the oldest are dropped first.
const TOMBSTONES_MAX: usize = 1024;
/// The most instances that run at once.
pub const INSTANCES_MAX: usize = 256;
/// How far a received stamp may be ahead of this member's clock: honest counters grow by one, and a single hostile
/// stamp must not exhaust them.
const LEAP_MAX: u64 = 1 << 20;
/// The largest counter of a stamp: an epoch holds the counter and the number of the incarnation.
const COUNTER_MAX: u64 = 1 << (63 - INCARNATION_BITS);
/// The most encoded bytes of an entry or of a placement request. The demand of the deepest model takes a fifth.
const ENTRY_BYTES_MAX: usize = 160 << 10;
/// How long an order to a shard's node may arrive before the entry that caused it.
const ENTRY_WITHIN: Duration = Duration::from_secs(30);
/// Bits of an epoch that number the incarnations of one stamp.
const INCARNATION_BITS: u32 = 20;

/// When an entry was written, by a Lamport clock, and by which member.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct Stamp {
    /// The writer's Lamport clock at the write.
    pub counter: u64,
    /// The member that wrote the entry.
    pub by: NodeId,
}

/// How an instance moves from its earlier placement.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum MoveStrategy {
    /// The new shards load beside the old ones, which serve until all are loaded.
    Beside {
        /// The placement to return to if the new one does not come up.
        rollback: Option<Placement>,
    },
    /// Memory does not suffice for both: the old shards stop first, and requests wait.
    InPlace,
}

/// An instance that is to run, and where.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Deployment {
    /// The requested spec.
    pub spec: ModelSpec,
    /// The model that the spec resolves to.
    pub model: Model,
    /// The node, device and layers of each shard.
    pub placement: Placement,
    /// The memory and work that the model needs, so that the next leader needs no file of the model.
    pub demand: Demand,
    /// How the instance moves to `placement`.
    pub strategy: MoveStrategy,
    /// Why the leader chose `placement`, for users.
    pub reason: String,
}

impl Deployment {
    /// This deployment with the [least context](crate::core::context::Context::least), if that saves memory.
    pub fn with_least_context(&self) -> Option<Self> {
        let context = self.model.context.least();
        let pages = context.cache_pages();
        if pages >= self.demand.kv_pages {
            return None;
        }
        let demand = self.demand.with_pages(pages);
        let model = Model { context, ..self.model.clone() };
        Some(Self { model, placement: self.placement.with_demand(&demand), demand, ..self.clone() })
    }

    /// Whether the instance is what `spec` demands. A spec that names only the model demands nothing else; its policy
    /// is a wish of whoever places the model.
    pub fn meets(&self, spec: &ModelSpec) -> bool {
        let stages = &self.placement.stages;
        (&self.spec.model, self.spec.quantize) == (&spec.model, spec.quantize)
            && spec.shards.is_none_or(|shards| stages.len() == shards)
            && spec.kv_cache.is_none_or(|element| self.spec.kv_element() == element)
            && spec.activations.is_none_or(|bits| self.spec.activation_bits() == bits)
            && (spec.draft.is_none() || spec.draft == self.spec.draft)
            && spec.device.as_ref().is_none_or(|device| stages.iter().all(|stage| stage.device == *device))
            // What is beyond the least context may be given back.
            && spec.context_tokens.is_none_or(|tokens| self.model.context.least().tokens >= tokens)
            && (spec.split.is_none() || self.spec.split == spec.split)
    }

    /// Bytes of memory of all shards.
    pub fn memory_bytes(&self) -> u64 {
        self.placement.stages.iter().map(|stage| stage.memory_bytes).fold(0, u64::saturating_add)
    }

    /// The node of the head, which is the node of the first shard.
    pub fn owner(&self) -> Option<NodeId> {
        self.placement.stages.first().map(|stage| stage.node)
    }
}

/// The target of an instance.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub enum Target {
    /// The instance is to run.
    Run(Box<Deployment>),
    /// The instance is to stop, or has stopped.
    Stopped {
        /// Why the instance stopped, if it failed.
        error: Option<RequestError>,
    },
}

/// The entry of one instance.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct DesiredEntry {
    /// When the entry was written, and by which member.
    pub stamp: Stamp,
    /// Whether, and how, the instance is to run.
    pub target: Target,
}

impl DesiredEntry {
    /// Whether the entry's size and values are possible.
    pub fn is_plausible(&self) -> bool {
        let is_placed = |placement: &Placement, deployment: &Deployment| placement.is_of(&deployment.demand);
        let is_possible = |deployment: &Deployment| {
            let rollback = match &deployment.strategy {
                MoveStrategy::Beside { rollback } => rollback.as_ref(),
                MoveStrategy::InPlace => None,
            };
            let placements = std::iter::once(&deployment.placement).chain(rollback);
            deployment.demand.is_plausible() && placements.into_iter().all(|placement| is_placed(placement, deployment))
        };
        fits_entry(self) && self.deployment().is_none_or(is_possible)
    }

    /// The deployment, if the instance is to run.
    pub fn deployment(&self) -> Option<&Deployment> {
        match &self.target {
            Target::Run(deployment) => Some(deployment),
            Target::Stopped { .. } => None,
        }
    }
}

/// Whether a received value is small enough to store.
pub fn fits_entry(value: &impl Serialize) -> bool {
    exo_net::wire::encode(value).is_ok_and(|bytes| bytes.len() <= ENTRY_BYTES_MAX)
}

/// The instances of a member's list that run, and those that have stopped.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct DesiredSnapshot {
    running: BTreeMap<InstanceId, RunningEntry>,
    stopped: BTreeMap<InstanceId, Stamp>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
struct RunningEntry {
    stamp: Stamp,
    owner: Option<NodeId>,
    /// Whether the list's member hosts a shard of the instance.
    is_placed_here: bool,
}

impl DesiredSnapshot {
    /// The stamp of an instance that is to run.
    pub fn stamp(&self, id: InstanceId) -> Option<Stamp> {
        self.running.get(&id).map(|run| run.stamp)
    }

    /// Whether this member keeps a shard that was ordered with `stamp`, `age` ago. The entry that caused the order may
    /// still be on its way. The instance's owner stops the shards of an earlier placement, as long as `is_reachable`
    /// says that the owner's orders arrive.
    pub fn keeps(&self, id: InstanceId, stamp: Stamp, age: Duration, is_reachable: impl Fn(NodeId) -> bool) -> bool {
        let is_young = age < ENTRY_WITHIN;
        match (self.running.get(&id), self.stopped.get(&id)) {
            (Some(run), _) if stamp > run.stamp => is_young,
            (Some(run), _) => stamp == run.stamp || run.is_placed_here || run.owner.is_some_and(is_reachable),
            (None, Some(end)) => stamp > *end && is_young,
            (None, None) => is_young,
        }
    }
}

/// The incarnation with `number`, from 1, of a placement with `stamp`.
pub fn incarnation(stamp: Stamp, number: u64, owner: NodeId) -> Incarnation {
    let epoch = (stamp.counter << INCARNATION_BITS) | number.min((1 << INCARNATION_BITS) - 1);
    Incarnation { epoch, owner: *owner.as_bytes() }
}

/// A member's copy of the desired list.
#[derive(Debug)]
pub struct Desired {
    own: NodeId,
    clock: u64,
    entries: BTreeMap<InstanceId, DesiredEntry>,
    /// When each tombstone was written here or received, counted from any fixed start.
    stopped: BTreeMap<InstanceId, Duration>,
}

impl Desired {
    /// An empty list of the member `own`.
    pub fn new(own: NodeId) -> Self {
        Self { own, clock: 0, entries: BTreeMap::new(), stopped: BTreeMap::new() }
    }

    /// The entry of an instance, tombstones included.
    pub fn get(&self, id: InstanceId) -> Option<&DesiredEntry> {
        self.entries.get(&id)
    }

    /// All entries, tombstones included.
    pub fn entries(&self) -> impl Iterator<Item = (InstanceId, &DesiredEntry)> {
        self.entries.iter().map(|(&id, entry)| (id, entry))
    }

    /// The deployments that are to run.
    pub fn running(&self) -> impl Iterator<Item = (InstanceId, Stamp, &Deployment)> {
        self.entries().filter_map(|(id, entry)| Some((id, entry.stamp, entry.deployment()?)))
    }

    /// The part of the list that this member's worker needs.
    pub fn snapshot(&self) -> DesiredSnapshot {
        let run = |(id, stamp, deployment): (InstanceId, Stamp, &Deployment)| {
            let is_placed_here = deployment.placement.stages.iter().any(|stage| stage.node == self.own);
            (id, RunningEntry { stamp, owner: deployment.owner(), is_placed_here })
        };
        let stopped =
            self.entries().filter(|(_, entry)| entry.deployment().is_none()).map(|(id, entry)| (id, entry.stamp));
        DesiredSnapshot { running: self.running().map(run).collect(), stopped: stopped.collect() }
    }

    /// The instance that is to run `spec`; of several, the instance with the highest stamp.
    pub fn find(&self, spec: &ModelSpec) -> Option<(InstanceId, Stamp, &Deployment)> {
        self.running().filter(|(.., deployment)| deployment.spec == *spec).max_by_key(|(_, stamp, _)| *stamp)
    }

    /// The instance that is to answer requests for `spec`: the one that was requested so, else one that meets all that
    /// `spec` demands; of several, the instance with the highest stamp.
    pub fn find_for(&self, spec: &ModelSpec) -> Option<(InstanceId, Stamp, &Deployment)> {
        let meets = |(.., deployment): &(InstanceId, Stamp, &Deployment)| deployment.meets(spec);
        self.find(spec).or_else(|| self.running().filter(meets).max_by_key(|(_, stamp, _)| *stamp))
    }

    /// A digest of the deployments that are to run: FNV-1a over ids and stamps. Members with different digests send
    /// each other their whole lists.
    pub fn digest(&self) -> u64 {
        let mut digest = 0xcbf2_9ce4_8422_2325_u64;
        for (id, stamp, _) in self.running() {
            let numbers = id.0.to_le_bytes().into_iter().chain(stamp.counter.to_le_bytes());
            for byte in numbers.chain(*stamp.by.as_bytes()) {
                digest = (digest ^ u64::from(byte)).wrapping_mul(0x100_0000_01b3);
            }
        }
        digest
    }

    /// Writes an entry. Returns the entry, for the other members.
    pub fn set(&mut self, id: InstanceId, target: Target, now: Duration) -> DesiredEntry {
        self.clock += 1;
        let entry = DesiredEntry { stamp: Stamp { counter: self.clock, by: self.own }, target };
        self.insert(id, entry.clone(), now);
        entry
    }

    /// Merges entries of another member. Returns the instances whose entry changed.
    pub fn merge(&mut self, entries: Vec<(InstanceId, DesiredEntry)>, now: Duration) -> Vec<InstanceId> {
        let mut changed = Vec::new();
        let latest = self.clock.saturating_add(LEAP_MAX).min(COUNTER_MAX);
        for (id, entry) in entries {
            let is_later = self.entries.get(&id).is_none_or(|known| entry.stamp > known.stamp);
            let is_possible = entry.stamp.counter <= latest;
            let is_new = !self.entries.contains_key(&id);
            let has_too_many = || entry.deployment().is_some() && self.running().count() >= INSTANCES_MAX;
            let is_full = is_new && (has_too_many() || self.entries.len() >= INSTANCES_MAX + TOMBSTONES_MAX);
            if !is_later || !is_possible || is_full || !entry.is_plausible() {
                continue;
            }
            self.clock = self.clock.max(entry.stamp.counter);
            self.insert(id, entry, now);
            changed.push(id);
        }
        changed
    }

    fn insert(&mut self, id: InstanceId, entry: DesiredEntry, now: Duration) {
        match entry.target {
            Target::Run(_) => drop(self.stopped.remove(&id)),
            Target::Stopped { .. } => drop(self.stopped.insert(id, now)),
        }
        self.entries.insert(id, entry);
        self.forget_old(now);
    }

    fn forget_old(&mut self, now: Duration) {
        let mut by_age: Vec<(Duration, InstanceId)> = self.stopped.iter().map(|(&id, &at)| (at, id)).collect();
        by_age.sort_unstable();
        let surplus = by_age.len().saturating_sub(TOMBSTONES_MAX);
        for (index, (at, id)) in by_age.into_iter().enumerate() {
            if index < surplus || at + TOMBSTONES_KEPT < now {
                self.stopped.remove(&id);
                self.entries.remove(&id);
            }
        }
    }
}

#[cfg(test)]
impl Deployment {
    /// A deployment of a one-layer model on `node`.
    pub(crate) fn of_one_layer(model: &str, node: NodeId) -> Self {
        let demand = Demand {
            layer_bytes: vec![1],
            layer_cost_bytes: vec![1],
            head_cost_bytes: 0,
            kv_pages: 1,
            kv_bytes: vec![1],
            embedding_bytes: 0,
            head_bytes: 0,
            ties_embeddings: false,
            row_bytes: 1,
        };
        let model = Model {
            name: model.to_owned(),
            family: String::new(),
            quantization: String::new(),
            context: crate::core::context::Context::largest(Some(1), 1, None),
            vocabulary: 256,
            files: crate::core::spec::FilesId([0; 32]),
        };
        let device = exo_engines::engine::DeviceId("cpu".to_owned());
        let stage = crate::core::plan::Stage { node, device, layers: 0..1, memory_bytes: 1 };
        Self {
            spec: ModelSpec::new(model.name.clone()),
            model,
            placement: Placement { stages: vec![stage] },
            demand,
            strategy: MoveStrategy::Beside { rollback: None },
            reason: String::new(),
        }
    }
}

#[cfg(test)]
mod tests;
