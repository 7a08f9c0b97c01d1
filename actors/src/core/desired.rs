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
            let is_crowded = entry.wanted().is_some() && self.running().count() >= INSTANCES_MAX;
            let is_full = is_fresh && (is_crowded || self.entries.len() >= INSTANCES_MAX + TOMBSTONES_MAX);
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
mod tests {
    use super::*;
    use crate::core::plan::Stage;
    use exo_engines::engine::DeviceId;
    use proptest::prelude::*;

    fn node() -> NodeId {
        exo_net::Identity::ephemeral().expect("random bytes").node_id()
    }

    fn run(model: &str) -> Want {
        let demand = Demand {
            layer_bytes: vec![1],
            layer_work: vec![1],
            head_work: 0,
            kv_pages: 1,
            kv_bytes: vec![1],
            embedding_bytes: 0,
            head_bytes: 0,
            ties_embeddings: false,
            row_bytes: 1,
        };
        Want::Run(Box::new(Wanted {
            spec: ModelSpec::new(model),
            model: Model {
                name: model.to_owned(),
                family: String::new(),
                quantization: String::new(),
                context_tokens: 1,
                vocabulary: 256,
                files: crate::core::spec::FilesId([0; 32]),
            },
            placement: Placement {
                stages: vec![Stage { node: node(), device: DeviceId("cpu".to_owned()), layers: 0..1, memory_bytes: 1 }],
            },
            demand,
            change: Change::Beside { back: None },
            reason: String::new(),
        }))
    }

    #[test]
    fn of_two_instances_of_one_model_the_later_counts() {
        let mut desired = Desired::new(node());
        desired.set(InstanceId(7), run("a"), Duration::ZERO);
        desired.set(InstanceId(3), run("a"), Duration::ZERO);
        assert_eq!(desired.find(&ModelSpec::new("a")).map(|(id, ..)| id), Some(InstanceId(3)));
        desired.set(InstanceId(3), Want::Gone { error: None }, Duration::ZERO);
        assert_eq!(desired.find(&ModelSpec::new("a")).map(|(id, ..)| id), Some(InstanceId(7)));
    }

    #[test]
    fn a_shard_stays_until_its_instance_is_over_or_elsewhere() {
        let (mut desired, by, second) = (Desired::new(node()), node(), Duration::from_secs(1));
        let (id, stamp) = (InstanceId(1), |counter| Stamp { counter, by });
        let keeps = |desired: &Desired, counter, age, owner_is_here: bool| {
            desired.listed().keeps(id, stamp(counter), age, |_| owner_is_here)
        };
        assert!(keeps(&desired, 1, second, true), "the order was faster than the entry");
        assert!(!keeps(&desired, 1, ENTRY_WITHIN, true), "there is no entry");
        let hears = |desired: &mut Desired, counter, want| {
            drop(desired.merge(vec![(id, Entry { stamp: stamp(counter), want })], second));
        };
        hears(&mut desired, 1, run("a"));
        hears(&mut desired, 2, Want::Gone { error: None });
        assert!(!keeps(&desired, 1, second, true));
        assert!(keeps(&desired, 3, second, true), "it runs again, as the entry on its way says");
        hears(&mut desired, 3, run("a"));
        assert!(keeps(&desired, 3, 2 * ENTRY_WITHIN, false));
        assert!(keeps(&desired, 1, 2 * ENTRY_WITHIN, true), "its owner clears what is left of earlier ones");
        assert!(!keeps(&desired, 1, 2 * ENTRY_WITHIN, false), "who is away clears nothing");
        assert!(!keeps(&desired, 4, ENTRY_WITHIN, true), "the entry of that order came to nobody");
    }

    #[test]
    fn what_no_planner_places_is_not_taken_in() {
        let mut desired = Desired::new(node());
        let by = node();
        let mut hears = |change: &dyn Fn(&mut Wanted)| {
            let Want::Run(mut wanted) = run("a") else { unreachable!("it is to run") };
            change(&mut wanted);
            let entry = Entry { stamp: Stamp { counter: 1, by }, want: Want::Run(wanted) };
            desired.merge(vec![(InstanceId(1), entry)], Duration::ZERO).len()
        };
        assert_eq!(hears(&|wanted| wanted.demand.kv_bytes.clear()), 0);
        assert_eq!(hears(&|wanted| wanted.demand.head_bytes = u64::MAX), 0);
        assert_eq!(hears(&|wanted| wanted.demand.kv_pages = u32::MAX), 0);
        assert_eq!(hears(&|wanted| wanted.placement.stages.clear()), 0);
        let nowhere = Change::Beside { back: Some(Placement { stages: Vec::new() }) };
        assert_eq!(hears(&|wanted| wanted.change = nowhere.clone()), 0);
        assert_eq!(hears(&|wanted| wanted.reason = "x".repeat(1 << 20)), 0);
        assert_eq!(hears(&|wanted| wanted.placement.stages[0].layers = 0..2), 0);
        assert_eq!(hears(&|wanted| wanted.placement.stages[0].memory_bytes = u64::MAX), 0);
        assert_eq!(hears(&|_| {}), 1);
    }

    #[test]
    fn what_is_over_does_not_come_back_and_is_forgotten_in_time() {
        let (mut here, mut away) = (Desired::new(node()), Desired::new(node()));
        let begun = here.set(InstanceId(1), run("a"), Duration::ZERO);
        away.merge(vec![(InstanceId(1), begun.clone())], Duration::ZERO);
        here.set(InstanceId(1), Want::Gone { error: None }, Duration::ZERO);
        assert!(here.merge(vec![(InstanceId(1), begun)], Duration::ZERO).is_empty());
        let known: Vec<_> = here.entries().map(|(id, entry)| (id, entry.clone())).collect();
        assert_eq!(away.merge(known, Duration::ZERO), [InstanceId(1)]);
        assert_eq!(away.running().count(), 0);
        for id in 2..5000 {
            away.set(InstanceId(id), Want::Gone { error: None }, Duration::from_secs(id));
        }
        assert_eq!(away.entries().count(), TOMBSTONES_MAX);
        away.set(InstanceId(1), Want::Gone { error: None }, TOMBSTONES_KEPT * 3);
        assert_eq!(away.entries().count(), 1);
    }

    #[test]
    fn nobody_can_use_up_the_stamps() {
        let mut desired = Desired::new(node());
        let absurd = Entry { stamp: Stamp { counter: u64::MAX, by: node() }, want: run("a") };
        assert!(desired.merge(vec![(InstanceId(1), absurd)], Duration::ZERO).is_empty());
        assert!(desired.set(InstanceId(1), run("a"), Duration::ZERO).stamp.counter < 10);
        // Nor does it help to leap from one entry to the next.
        let by = node();
        let leap = |at: u64| (InstanceId(1), Entry { stamp: Stamp { counter: at * LEAP_MAX, by }, want: run("a") });
        desired.merge((1..4096).map(leap).collect(), Duration::ZERO);
        assert!(desired.set(InstanceId(1), run("a"), Duration::ZERO).stamp.counter <= 2 * LEAP_MAX);
    }

    proptest! {
        /// Members that have heard the same hold the same, in whatever order, and however often, they heard it; and a
        /// later stamp begins later lives.
        #[test]
        fn all_who_hear_the_same_hold_the_same(
            writes in prop::collection::vec((0_u64..4, 0_usize..3, any::<bool>()), 1..30),
            order in any::<u64>(),
        ) {
            let nodes = [node(), node(), node()];
            let mut writers = nodes.map(Desired::new);
            let mut log = Vec::new();
            for (id, writer, is_run) in writes {
                let want = if is_run { run("a") } else { Want::Gone { error: None } };
                log.push((InstanceId(id), writers[writer].set(InstanceId(id), want, Duration::ZERO)));
            }
            let mut shuffled = log.clone();
            fastrand::Rng::with_seed(order).shuffle(&mut shuffled);
            let (mut a, mut b) = (Desired::new(nodes[0]), Desired::new(nodes[1]));
            a.merge(log.clone(), Duration::ZERO);
            for entry in shuffled.iter().chain(&shuffled) {
                b.merge(vec![entry.clone()], Duration::ZERO);
            }
            prop_assert!(a.entries().eq(b.entries()));
            for (_, first) in &log {
                for (_, second) in log.iter().filter(|(_, second)| second.stamp.counter > first.stamp.counter) {
                    let earlier = incarnation(first.stamp, u64::MAX, first.stamp.by);
                    prop_assert!(earlier < incarnation(second.stamp, 0, second.stamp.by));
                }
            }
        }
    }
}
