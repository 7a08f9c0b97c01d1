//! What the leader does: places what is asked for, mends what is broken, lets go of what nobody uses.
//!
//! ```text
//! asks, losses, failures ─► Leader ─round(World)─► entries of the list, refusals
//! ```
//! A state machine without I/O. Its methods:
//! - `handle_*`: something happened;
//! - [`Leader::round`]: everything that is to be looked after, once; effects gather in the [`World`];
//! - [`Leader::preview`]: what a round would do, without doing it.

mod market;
mod unrest;
mod upkeep;

use super::circle::APART_AFTER;
use super::desired::{Change, Desired, Entry, Stamp, Want, Wanted};
use super::members::Members;
use super::plan::{Demand, Offer, PlanError, Policy, Preview, PreviewOutcome, ShardCount, place, preview, reason};
use super::spec::{InstanceId, Model, ModelSpec};
use crate::request::RequestError;
use exo_engines::engine::DeviceId;
use exo_net::NodeId;
use serde::{Deserialize, Serialize};
use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;
use std::time::Duration;
use unrest::Unrest;

/// A device that has failed an instance is not tried again for so long.
const EXCLUDED_FOR: Duration = Duration::from_secs(60);
/// Members tell what they use every second.
const TOLD_WITHIN: Duration = Duration::from_secs(3);
/// Who has lost most of the others at once is probably the one who was away.
const ALONE_WAIT: Duration = Duration::from_secs(3);
/// One that others see and we still have not met after this is no more use than one that is gone. By then it is apart from all
/// of us, if its and our network are such that it is to be: looks, and reports of them, are a second apart each.
const UNMET_WITHIN: Duration = APART_AFTER.saturating_add(Duration::from_secs(5));
/// Two members meet within this, once one has heard where the other is.
const MET_WITHIN: Duration = Duration::from_secs(3);
/// Memory that goes is gone within this of the last that went: what holds on to it longer hangs.
pub const ROOM_WITHIN: Duration = Duration::from_secs(30);
/// Models that are waited for at once.
const ASKS_MAX: usize = 256;

/// A model that is needed, with what a planner must know of it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Ask {
    pub spec: ModelSpec,
    pub model: Model,
    pub demand: Demand,
}

/// What a round is a function of, and what it gives.
#[derive(Debug)]
pub struct World<'a> {
    pub own: NodeId,
    /// Since any fixed start.
    pub now: Duration,
    pub members: &'a Members,
    pub desired: &'a mut Desired,
    /// A model that nobody has used for so long leaves; `None`: it stays.
    pub idle: Option<Duration>,
    /// Numbers new instances: of no meaning, and seldom the same twice.
    pub seed: u64,
    pub effects: Vec<Effect>,
}

/// What is to be told.
#[derive(Debug, Clone, PartialEq)]
pub enum Effect {
    /// An entry was written. `was`: what had run until then.
    Written { id: InstanceId, entry: Entry, was: Option<ModelSpec> },
    /// Whoever asked does not get the model.
    Refused { to: NodeId, spec: ModelSpec, error: RequestError },
}

impl World<'_> {
    /// Writes an entry.
    pub fn set(&mut self, id: InstanceId, want: Want) {
        let was = self.desired.get(id).and_then(Entry::wanted).map(|wanted| wanted.spec.clone());
        let entry = self.desired.set(id, want, self.now);
        self.effects.push(Effect::Written { id, entry, was });
    }

    fn fresh_id(&mut self) -> InstanceId {
        // splitmix64; short enough to be read aloud.
        self.seed = self.seed.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut mixed = (self.seed ^ (self.seed >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        InstanceId((mixed ^ (mixed >> 31)) >> 32)
    }
}

/// A device that has failed, and when.
type Excluded = ((NodeId, DeviceId), Duration);

/// What the leader remembers beside what all know.
#[derive(Debug, Default)]
pub struct Leader {
    /// In the order of their names: which goes first does not depend on who asked.
    asks: BTreeMap<String, (Ask, BTreeSet<NodeId>)>,
    /// Devices that have failed an instance, since when.
    excluded: BTreeMap<InstanceId, Vec<Excluded>>,
    used: BTreeMap<InstanceId, Duration>,
    /// When those were placed that nobody has been seen to use yet.
    fresh: BTreeMap<InstanceId, Duration>,
    /// Nothing is mended before.
    until: Option<Duration>,
    /// When members were lost, of late.
    losses: Vec<Duration>,
    members: Vec<NodeId>,
    /// Whether members have just come or gone: others may follow.
    unrest: Unrest,
    /// Nodes with shards that are not here, since when.
    unmet: BTreeMap<NodeId, Duration>,
    /// Those of them that were.
    lost: BTreeSet<NodeId>,
    leaving: Leaving,
    /// Since when the members are the same, or when it was last looked for better places.
    settled: Option<Duration>,
}

/// A device has failed an instance for good, as the instance's owner says.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Broken {
    pub instance: InstanceId,
    /// Of the placement that the device has its place in.
    pub stamp: Stamp,
    pub node: NodeId,
    pub device: DeviceId,
    /// Whether that placement has ever served.
    pub has_run: bool,
    pub error: RequestError,
}

/// Memory that members still hold, and are letting go of.
#[derive(Debug, Default)]
struct Leaving {
    bytes: u64,
    /// When it last changed, or something was made to leave.
    changed: Option<Duration>,
}

impl Leaving {
    fn note(&mut self, world: &World<'_>) {
        let leaving = world.members.0.values().map(|report| report.leaving_bytes).fold(0, u64::saturating_add);
        if leaving != self.bytes {
            (self.bytes, self.changed) = (leaving, Some(world.now));
        }
    }

    /// Whether it is worth waiting for. What has left is seen when its machine has been measured again.
    fn is_coming(&self, now: Duration) -> bool {
        let within = if self.bytes > 0 { ROOM_WITHIN } else { TOLD_WITHIN };
        self.changed.is_some_and(|changed| now.saturating_sub(changed) < within)
    }
}

/// Specs in an order of their own.
fn key(spec: &ModelSpec) -> String {
    format!("{spec:?}")
}

impl Leader {
    /// Somebody needs a model.
    pub fn handle_ask(&mut self, from: NodeId, ask: Ask) {
        let key = key(&ask.spec);
        if self.asks.len() >= ASKS_MAX && !self.asks.contains_key(&key) {
            // Whoever waits asks again.
            return;
        }
        let known = self.asks.entry(key).or_insert_with(|| (ask, BTreeSet::new()));
        known.1.insert(from);
    }

    /// A request of this node uses an instance. What others use is seen in their reports.
    pub fn handle_use(&mut self, id: InstanceId, now: Duration) {
        self.used.insert(id, now);
        self.fresh.remove(&id);
    }

    /// A member is here, and may have others to tell of.
    pub fn handle_meeting(&mut self, now: Duration) {
        self.unrest.note(now);
    }

    /// This node was away: who it misses is probably not gone.
    pub fn handle_absence(&mut self, now: Duration) {
        self.until = Some(now + ALONE_WAIT);
    }

    /// A member is gone, and `left` are here, this one included. What its devices failed at counts no more when it returns.
    pub fn handle_loss(&mut self, gone: NodeId, now: Duration, left: usize) {
        for excluded in self.excluded.values_mut() {
            excluded.retain(|((node, _), _)| *node != gone);
        }
        self.lost.insert(gone);
        self.unrest.note(now);
        self.losses.retain(|loss| now.saturating_sub(*loss) < ALONE_WAIT);
        self.losses.push(now);
        if self.losses.len() > left {
            self.handle_absence(now);
        }
    }

    /// An instance has other places: what failed long ago may be tried again.
    pub fn handle_placed(&mut self, id: InstanceId, now: Duration) {
        if let Some(excluded) = self.excluded.get_mut(&id) {
            excluded.retain(|(_, since)| now.saturating_sub(*since) < EXCLUDED_FOR);
        }
    }

    /// One round of everything that the leader looks after.
    pub fn round(&mut self, world: &mut World<'_>) {
        self.note_members(world);
        self.leaving.note(world);
        self.end_doubles(world);
        self.mend_broken(world);
        self.relieve(world);
        self.unload_idle(world);
        self.place_asked(world);
        self.rebalance(world);
    }

    fn note_members(&mut self, world: &World<'_>) {
        let members: Vec<NodeId> = world.members.0.keys().copied().collect();
        if members != self.members {
            self.members = members;
            self.settled = Some(world.now);
        }
        let listed = world.desired.running().flat_map(|(.., wanted)| &wanted.placement.stages).map(|stage| stage.node);
        let unmet: BTreeSet<NodeId> = listed.filter(|node| !world.members.0.contains_key(node)).collect();
        self.unmet.retain(|node, _| unmet.contains(node));
        self.lost.retain(|node| unmet.contains(node));
        for node in unmet {
            self.unmet.entry(node).or_insert(world.now);
        }
    }

    /// Whether a node is no member any more. One that others see is about to be met; so may be one that has never been here,
    /// for what runs is heard of before all others are met.
    fn is_gone(&self, world: &World<'_>, node: NodeId) -> bool {
        let waited = self.unmet.get(&node).map_or(Duration::ZERO, |&since| world.now.saturating_sub(since));
        let is_near = waited < UNMET_WITHIN && world.members.is_seen(node);
        let is_new = waited < MET_WITHIN && !self.lost.contains(&node);
        !is_near && !is_new && !world.members.0.contains_key(&node)
    }

    /// Two parts of a cluster that meet again may both run a model: the later one stays.
    fn end_doubles(&self, world: &mut World<'_>) {
        let desired = &*world.desired;
        let is_earlier = |(id, _, wanted): &(InstanceId, Stamp, &Wanted)| {
            desired.find(&wanted.spec).is_some_and(|(kept, ..)| kept != *id)
        };
        let earlier: Vec<InstanceId> = desired.running().filter(is_earlier).map(|(id, ..)| id).collect();
        for id in earlier {
            world.set(id, Want::Gone { error: None });
        }
    }

    fn place_asked(&mut self, world: &mut World<'_>) {
        for key in self.asks.keys().cloned().collect::<Vec<_>>() {
            let Some((ask, by)) = self.asks.get(&key).cloned() else { continue };
            if world.desired.find(&ask.spec).is_some() {
                self.asks.remove(&key);
                continue;
            }
            let near = by.iter().next().copied().unwrap_or(world.own);
            match self.plan(world, &ask, near) {
                Ok(wanted) => {
                    self.asks.remove(&key);
                    let id = world.fresh_id();
                    self.fresh.insert(id, world.now);
                    tracing::info!(instance = %id, model = wanted.model.name, why = wanted.reason, "placed a model");
                    world.set(id, Want::Run(Box::new(wanted)));
                }
                // When others have left, it is tried again.
                // Whoever is named may be about to come, or to come back.
                Err(RequestError::Plan(PlanError::NoSuchNode { .. }) | RequestError::NoDevice { .. })
                    if self.unrest.is_on(world.now) => {}
                Err(RequestError::Plan(PlanError::DoesNotFit { .. }))
                    if self.unrest.is_on(world.now)
                        || self.leaving.is_coming(world.now)
                        || self.make_room(world, &ask, near, None) => {}
                Err(RequestError::Plan(PlanError::DoesNotFit { needed_bytes, .. }))
                    if world.desired.running().next().is_some() =>
                {
                    let model = ask.model.name.clone();
                    self.refuse(world, &key, &RequestError::Crowded { model, needed_bytes });
                }
                Err(error) => self.refuse(world, &key, &error),
            }
        }
    }

    fn plan(&self, world: &World<'_>, ask: &Ask, near: NodeId) -> Result<Wanted, RequestError> {
        let links = world.members.links();
        let (offers, shards) = (self.offers_for(world, ask, near)?, shard_count(world.members, &ask.spec)?);
        let placement = place(&ask.demand, &offers, &links, &shards, ask.spec.policy)?;
        let reason = reason(&ask.demand, &placement, &offers, &links, &shards, ask.spec.policy);
        let Ask { spec, model, demand } = ask.clone();
        Ok(Wanted { spec, model, demand, change: Change::Beside { back: None }, placement, reason })
    }

    fn offers_for(&self, world: &World<'_>, ask: &Ask, near: NodeId) -> Result<Vec<Offer>, RequestError> {
        let offers = self.offers(world, None, ask.spec.device.as_ref(), near, &BTreeSet::new());
        match &ask.spec.device {
            Some(device) if offers.is_empty() => Err(RequestError::NoDevice { device: device.to_string() }),
            _ => Ok(offers),
        }
    }

    /// What would become of a model that was asked for now, by each policy.
    pub fn preview(&self, world: &World<'_>, ask: &Ask) -> Vec<Preview> {
        let links = world.members.links();
        let of = |policy| {
            let (offers, shards) = (self.offers_for(world, ask, world.own)?, shard_count(world.members, &ask.spec)?);
            let placement = place(&ask.demand, &offers, &links, &shards, policy)?;
            Ok(preview(&ask.demand, placement, &offers, &links, &shards, policy))
        };
        let refused = |policy, error: RequestError| Preview {
            policy,
            outcome: PreviewOutcome::Refused { error: error.to_string(), remedy: error.remedy().to_owned() },
        };
        let policies = [Policy::Latency, Policy::Throughput, Policy::FewestNodes];
        policies.map(|policy| of(policy).unwrap_or_else(|error| refused(policy, error))).to_vec()
    }

    /// Nobody gets the model; whoever asked is told.
    fn refuse(&mut self, world: &mut World<'_>, key: &str, error: &RequestError) {
        let Some((ask, by)) = self.asks.remove(key) else { return };
        for to in by {
            world.effects.push(Effect::Refused { to, spec: ask.spec.clone(), error: error.clone() });
        }
    }

    /// Whether a model is made to leave: the one of those that nobody uses that was used longest ago. None does where
    /// all of them together would not make room enough. Memory of the instance `own`, which the room is for, is free.
    fn make_room(&mut self, world: &mut World<'_>, ask: &Ask, near: NodeId, own: Option<InstanceId>) -> bool {
        let used = |id: &InstanceId| self.used.get(id).copied();
        // Whoever asked for it has not yet told that it uses it.
        let placed = |id: &InstanceId| self.fresh.get(id).copied();
        let is_new = |id: &InstanceId| placed(id).is_some_and(|placed| world.now.saturating_sub(placed) < TOLD_WITHIN);
        let running = world.desired.running().map(|(id, ..)| id);
        let is_idle = |id: &InstanceId| Some(*id) != own && !world.members.use_instance(*id) && !is_new(id);
        let idle: BTreeSet<InstanceId> = running.filter(is_idle).collect();
        let free = idle.iter().copied().chain(own).collect();
        let offers = self.offers(world, own, ask.spec.device.as_ref(), near, &free);
        let shards = shard_count(world.members, &ask.spec);
        let fits =
            shards.and_then(|shards| place(&ask.demand, &offers, &world.members.links(), &shards, ask.spec.policy));
        let Some(id) = idle.into_iter().min_by_key(used).filter(|_| fits.is_ok()) else { return false };
        tracing::info!(instance = %id, "unloading a model: another one needs its room");
        self.leaving.changed = Some(world.now);
        world.set(id, Want::Gone { error: None });
        true
    }

    fn unload_idle(&mut self, world: &mut World<'_>) {
        let now = world.now;
        let running: BTreeSet<InstanceId> = world.desired.running().map(|(id, ..)| id).collect();
        self.used.retain(|id, _| running.contains(id));
        self.fresh.retain(|id, _| running.contains(id));
        let mut over = Vec::new();
        for id in running {
            let is_used = world.members.use_instance(id);
            let used = self.used.entry(id).or_insert(now);
            if is_used {
                *used = now;
                self.fresh.remove(&id);
            }
            if world.idle.is_some_and(|limit| now.saturating_sub(*used) >= limit) {
                over.push(id);
            }
        }
        for id in over {
            tracing::info!(instance = %id, "unloading a model: nobody uses it");
            world.set(id, Want::Gone { error: None });
        }
    }
}

fn shard_count(members: &Members, spec: &ModelSpec) -> Result<ShardCount, PlanError> {
    let Some(split) = &spec.split else {
        return Ok(spec.shards.map_or(ShardCount::Automatic, ShardCount::Exactly));
    };
    let part = |(name, layers): &(String, Range<usize>)| match members.called(name) {
        Some(node) if members.0[&node].is_draining => Err(PlanError::Leaving { node: name.clone() }),
        Some(node) => Ok((node, layers.clone())),
        None => Err(PlanError::NoSuchNode { node: name.clone() }),
    };
    split.0.iter().map(part).collect::<Result<_, _>>().map(ShardCount::ByHand)
}

#[cfg(test)]
mod tests;
