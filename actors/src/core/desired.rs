//! What is to run, as every member knows it: without consensus, by last writer wins.
//!
//! Each instance has an entry with a stamp; of two entries the one with the higher stamp holds, wherever and in whatever
//! order they are heard of, so members that have heard the same hold the same. What is over stays for a while as a
//! tombstone, so that a member that was away does not bring it back.
//!
//! The stamp orders the lives of an instance, too: incarnations of a later stamp are later.

use super::plan::{Demand, Placement};
use super::spec::{InstanceId, Model, ModelSpec};
use crate::request::RequestError;
use exo_engines::engine::Incarnation;
use exo_net::NodeId;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::time::Duration;

/// How long what is over is remembered: longer than a member is away and comes back with old entries.
const TOMBSTONES_KEPT: Duration = Duration::from_secs(24 * 3600);
/// And how many: the oldest go first.
const TOMBSTONES_MAX: usize = 1024;
/// Instances at once.
pub const INSTANCES_MAX: usize = 256;
/// A stamp of a message is no later than this beyond what we know: counters grow by one, and nobody uses them up soon.
const LEAP_MAX: u64 = 1 << 20;
/// And never later than this: an epoch is a stamp's counter and a life's number.
const COUNTER_MAX: u64 = 1 << (63 - LIVES_BITS);
/// What other members write into an entry, as bytes on their way: demands of the deepest models take a fifth.
const ENTRY_BYTES_MAX: usize = 160 << 10;
/// An order to a shard's node may be there before the entry that it follows from, but not by more than this.
const ENTRY_WITHIN: Duration = Duration::from_secs(30);
/// Lives of an instance within one stamp.
const LIVES_BITS: u32 = 20;

/// When an entry was written: a Lamport clock, and who.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct Stamp {
    pub counter: u64,
    pub by: NodeId,
}

/// How an instance comes to its places from those that it had.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Change {
    /// Its shards are loaded beside those that are there, which serve until all are up. `back`: where it returns to if that
    /// fails, for it was well there.
    Beside { back: Option<Placement> },
    /// There is no room for both: what is there goes first, and requests wait.
    InPlace,
}

/// An instance that is to run.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Wanted {
    pub spec: ModelSpec,
    pub model: Model,
    pub placement: Placement,
    /// What it needs, so that whoever plans next needs no file.
    pub demand: Demand,
    pub change: Change,
    /// Why it is where it is, for people.
    pub reason: String,
}

impl Wanted {
    /// The node with the head: that of the first shard.
    pub fn owner(&self) -> Option<NodeId> {
        self.placement.stages.first().map(|stage| stage.node)
    }
}

/// What is wanted of an instance.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub enum Want {
    Run(Box<Wanted>),
    /// It is over; why, where that was nobody's wish.
    Gone {
        error: Option<RequestError>,
    },
}

/// One instance's entry.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Entry {
    pub stamp: Stamp,
    pub want: Want,
}

impl Entry {
    /// Whether a member could have written it.
    pub fn is_plausible(&self) -> bool {
        let is_placed = |placement: &Placement, wanted: &Wanted| placement.is_of(&wanted.demand);
        let is_possible = |wanted: &Wanted| {
            let back = match &wanted.change {
                Change::Beside { back } => back.as_ref(),
                Change::InPlace => None,
            };
            let are_placed = is_placed(&wanted.placement, wanted) && back.is_none_or(|back| is_placed(back, wanted));
            wanted.demand.is_plausible() && are_placed
        };
        is_short(self) && self.wanted().is_none_or(is_possible)
    }

    /// What is to run, if it is.
    pub fn wanted(&self) -> Option<&Wanted> {
        match &self.want {
            Want::Run(wanted) => Some(wanted),
            Want::Gone { .. } => None,
        }
    }
}

/// Whether something that a member tells is no longer than what is kept of it.
pub fn is_short(told: &impl Serialize) -> bool {
    exo_net::wire::encode(told).is_ok_and(|bytes| bytes.len() <= ENTRY_BYTES_MAX)
}

/// What runs and what is over, as a member's list had it.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Listed {
    running: BTreeMap<InstanceId, Run>,
    over: BTreeMap<InstanceId, Stamp>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
struct Run {
    stamp: Stamp,
    owner: Option<NodeId>,
    /// Whether it has a shard on the member whose list it is.
    is_placed_here: bool,
}

impl Listed {
    /// The stamp of an instance that is to run.
    pub fn stamp(&self, id: InstanceId) -> Option<Stamp> {
        self.running.get(&id).map(|run| run.stamp)
    }

    /// Whether a shard of this member stays that was ordered with `stamp`, `age` ago. The entry that the order follows from
    /// may still be on its way. What an earlier placement left behind is cleared by the instance's owner, as long as that
    /// one can be reached (`is_here`).
    pub fn keeps(&self, id: InstanceId, stamp: Stamp, age: Duration, is_here: impl Fn(NodeId) -> bool) -> bool {
        let is_young = age < ENTRY_WITHIN;
        match (self.running.get(&id), self.over.get(&id)) {
            (Some(run), _) if stamp > run.stamp => is_young,
            (Some(run), _) => stamp == run.stamp || run.is_placed_here || run.owner.is_some_and(is_here),
            (None, Some(end)) => stamp > *end && is_young,
            (None, None) => is_young,
        }
    }
}

/// The incarnation of life `life` of an instance as `stamp` has it.
pub fn incarnation(stamp: Stamp, life: u64, owner: NodeId) -> Incarnation {
    let epoch = (stamp.counter << LIVES_BITS) | life.min((1 << LIVES_BITS) - 1);
    Incarnation { epoch, owner: *owner.as_bytes() }
}

/// A member's list.
#[derive(Debug)]
pub struct Desired {
    own: NodeId,
    clock: u64,
    entries: BTreeMap<InstanceId, Entry>,
    /// When a tombstone came, since any fixed start.
    over: BTreeMap<InstanceId, Duration>,
}

impl Desired {
    /// An empty list of the member `own`.
    pub fn new(own: NodeId) -> Self {
        Self { own, clock: 0, entries: BTreeMap::new(), over: BTreeMap::new() }
    }

    pub fn get(&self, id: InstanceId) -> Option<&Entry> {
        self.entries.get(&id)
    }

    /// All entries, tombstones included.
    pub fn entries(&self) -> impl Iterator<Item = (InstanceId, &Entry)> {
        self.entries.iter().map(|(&id, entry)| (id, entry))
    }

    /// What is to run.
    pub fn running(&self) -> impl Iterator<Item = (InstanceId, Stamp, &Wanted)> {
        self.entries().filter_map(|(id, entry)| Some((id, entry.stamp, entry.wanted()?)))
    }

    /// What those who keep shards here need of it.
    pub fn listed(&self) -> Listed {
        let run = |(id, stamp, wanted): (InstanceId, Stamp, &Wanted)| {
            let is_placed_here = wanted.placement.stages.iter().any(|stage| stage.node == self.own);
            (id, Run { stamp, owner: wanted.owner(), is_placed_here })
        };
        let over = self.entries().filter(|(_, entry)| entry.wanted().is_none()).map(|(id, entry)| (id, entry.stamp));
        Listed { running: self.running().map(run).collect(), over: over.collect() }
    }

    /// The instance that is to run `spec`; of several, the one with the highest stamp.
    pub fn find(&self, spec: &ModelSpec) -> Option<(InstanceId, Stamp, &Wanted)> {
        self.running().filter(|(.., wanted)| wanted.spec == *spec).max_by_key(|(_, stamp, _)| *stamp)
    }

    /// The same where the same is to run: members that tell different ones have not heard the same, and tell each other
    /// all they have. (FNV-1a over ids and stamps.)
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

    /// Writes an entry; gives it, for others.
    pub fn set(&mut self, id: InstanceId, want: Want, now: Duration) -> Entry {
        self.clock += 1;
        let entry = Entry { stamp: Stamp { counter: self.clock, by: self.own }, want };
        self.insert(id, entry.clone(), now);
        entry
    }

    /// Takes in what another member has; gives the instances whose entry changed.
    pub fn merge(&mut self, entries: Vec<(InstanceId, Entry)>, now: Duration) -> Vec<InstanceId> {
        let mut changed = Vec::new();
        let latest = self.clock.saturating_add(LEAP_MAX).min(COUNTER_MAX);
        for (id, entry) in entries {
            let is_later = self.entries.get(&id).is_none_or(|known| entry.stamp > known.stamp);
            let is_possible = entry.stamp.counter <= latest;
            let is_fresh = !self.entries.contains_key(&id);
            let is_crowded = || entry.wanted().is_some() && self.running().count() >= INSTANCES_MAX;
            let is_full = is_fresh && (is_crowded() || self.entries.len() >= INSTANCES_MAX + TOMBSTONES_MAX);
            if !is_later || !is_possible || is_full || !entry.is_plausible() {
                continue;
            }
            self.clock = self.clock.max(entry.stamp.counter);
            self.insert(id, entry, now);
            changed.push(id);
        }
        changed
    }

    fn insert(&mut self, id: InstanceId, entry: Entry, now: Duration) {
        match entry.want {
            Want::Run(_) => drop(self.over.remove(&id)),
            Want::Gone { .. } => drop(self.over.insert(id, now)),
        }
        self.entries.insert(id, entry);
        self.forget_old(now);
    }

    fn forget_old(&mut self, now: Duration) {
        let mut by_age: Vec<(Duration, InstanceId)> = self.over.iter().map(|(&id, &at)| (at, id)).collect();
        by_age.sort_unstable();
        let surplus = by_age.len().saturating_sub(TOMBSTONES_MAX);
        for (index, (at, id)) in by_age.into_iter().enumerate() {
            if index < surplus || at + TOMBSTONES_KEPT < now {
                self.over.remove(&id);
                self.entries.remove(&id);
            }
        }
    }
}

#[cfg(test)]
impl Wanted {
    /// A model of one layer, on `node`.
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
            context_tokens: 1,
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
            change: Change::Beside { back: None },
            reason: String::new(),
        }
    }
}

#[cfg(test)]
mod tests;
