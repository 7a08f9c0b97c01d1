//! What the leader does: places what is asked for, mends what is broken, lets go of what nobody uses.
//!
//! ```text
//! asks, losses, failures ─► Leader ─round(World)─► entries of the list, refusals
//! ```
//! A state machine without I/O. Its methods:
//! - `handle_*`: something happened;
//! - [`Leader::round`]: everything that is to be looked after, once; effects gather in the [`RoundContext`];
//! - [`Leader::preview`]: what a round would do, without doing it.

mod capacity;
mod churn;
mod repair;

use crate::core::clique::OUTSIDE_AFTER;
use crate::core::desired::{Deployment, Desired, DesiredEntry, MoveStrategy, Stamp, Target};
use crate::core::members::Members;
use crate::core::plan::{Demand, Offer, PlanError, Policy, Preview, PreviewOutcome, ShardCount, place, preview, reason};
use crate::core::spec::{InstanceId, Model, ModelSpec};
use crate::core::request::RequestError;
use churn::Churn;
use exo_engines::engine::DeviceId;
use exo_net::NodeId;
use serde::{Deserialize, Serialize};
use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;
use std::time::Duration;

/// A device that has failed an instance is not tried again for so long.
const EXCLUDED_FOR: Duration = Duration::from_secs(60);
/// Members tell what they use every second.
const REPORT_GRACE: Duration = Duration::from_secs(3);
/// Who has lost most of the others at once is probably the one who was away.
const PARTITION_GRACE: Duration = Duration::from_secs(3);
/// One that others see and we still have not met after this is no more use than one that is gone. By then it is apart from all
/// of us, if its and our network are such that it is to be: looks, and reports of them, are a second apart each.
const UNREACHABLE_GRACE: Duration = OUTSIDE_AFTER.saturating_add(Duration::from_secs(5));
/// Two members meet within this, once one has heard where the other is.
const CONNECT_GRACE: Duration = Duration::from_secs(3);
/// Memory that goes is gone within this of the last that went: what holds on to it longer hangs.
pub const RELEASE_TIMEOUT: Duration = Duration::from_secs(30);
/// Models that are waited for at once.
const REQUESTS_MAX: usize = 256;

/// A model that is needed, with what a planner must know of it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct PlacementRequest {
    pub spec: ModelSpec,
    pub model: Model,
    pub demand: Demand,
}

/// What a round is a function of, and what it gives.
#[derive(Debug)]
pub struct RoundContext<'a> {
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
    Written { id: InstanceId, entry: DesiredEntry, was: Option<ModelSpec> },
    /// Whoever asked does not get the model.
    Refused { to: NodeId, spec: ModelSpec, error: RequestError },
}

impl RoundContext<'_> {
    /// Writes an entry.
    pub fn set(&mut self, id: InstanceId, target: Target) {
        let was = self.desired.get(id).and_then(DesiredEntry::deployment).map(|deployment| deployment.spec.clone());
        let entry = self.desired.set(id, target, self.now);
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
    requests: BTreeMap<String, (PlacementRequest, BTreeSet<NodeId>)>,
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
    churn: Churn,
    /// Nodes with shards that are not here, since when.
    absent: BTreeMap<NodeId, Duration>,
    /// Those of them that were.
    lost: BTreeSet<NodeId>,
    releasing: PendingRelease,
    /// Since when the members are the same, or when it was last looked for better places.
    settled: Option<Duration>,
}

/// A device has failed an instance for good, as the instance's owner says.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct BrokenShard {
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
struct PendingRelease {
    bytes: u64,
    /// When it last changed, or something was made to leave.
    changed: Option<Duration>,
}

impl PendingRelease {
    fn note(&mut self, round: &RoundContext<'_>) {
        let releasing = round.members.0.values().map(|report| report.releasing_bytes).fold(0, u64::saturating_add);
        if releasing != self.bytes {
            (self.bytes, self.changed) = (releasing, Some(round.now));
        }
    }

    /// Whether it is worth waiting for. What has left is seen when its machine has been measured again.
    fn is_coming(&self, now: Duration) -> bool {
        let within = if self.bytes > 0 { RELEASE_TIMEOUT } else { REPORT_GRACE };
        self.changed.is_some_and(|changed| now.saturating_sub(changed) < within)
    }
}

/// Specs in an order of their own.
fn key(spec: &ModelSpec) -> String {
    format!("{spec:?}")
}

impl Leader {
    /// Somebody needs a model.
    pub fn handle_request(&mut self, from: NodeId, ask: PlacementRequest) {
        let key = key(&ask.spec);
        if self.requests.len() >= REQUESTS_MAX && !self.requests.contains_key(&key) {
            // Whoever waits asks again.
            return;
        }
        let known = self.requests.entry(key).or_insert_with(|| (ask, BTreeSet::new()));
        known.1.insert(from);
    }

    /// A request of this node uses an instance. What others use is seen in their reports.
    pub fn handle_use(&mut self, id: InstanceId, now: Duration) {
        self.used.insert(id, now);
        self.fresh.remove(&id);
    }

    /// A member is here, and may have others to tell of.
    pub fn handle_joined(&mut self, now: Duration) {
        self.churn.note(now);
    }

    /// This node was away: who it misses is probably not gone.
    pub fn handle_suspended(&mut self, now: Duration) {
        self.until = Some(now + PARTITION_GRACE);
    }

    /// A member is gone, and `left` are here, this one included. What its devices failed at counts no more when it returns.
    pub fn handle_lost(&mut self, gone: NodeId, now: Duration, left: usize) {
        for excluded in self.excluded.values_mut() {
            excluded.retain(|((node, _), _)| *node != gone);
        }
        self.lost.insert(gone);
        self.churn.note(now);
        self.losses.retain(|loss| now.saturating_sub(*loss) < PARTITION_GRACE);
        self.losses.push(now);
        if self.losses.len() > left {
            self.handle_suspended(now);
        }
    }

    /// An instance has other places: what failed long ago may be tried again.
    pub fn handle_placed(&mut self, id: InstanceId, now: Duration) {
        if let Some(excluded) = self.excluded.get_mut(&id) {
            excluded.retain(|(_, since)| now.saturating_sub(*since) < EXCLUDED_FOR);
        }
    }

    /// One round of everything that the leader looks after.
    pub fn round(&mut self, round: &mut RoundContext<'_>) {
        self.note_members(round);
        self.releasing.note(round);
        self.stop_duplicates(round);
        self.repair_broken(round);
        self.resolve_overcommit(round);
        self.unload_idle(round);
        self.place_requested(round);
        self.rebalance(round);
    }

    fn note_members(&mut self, round: &RoundContext<'_>) {
        let members: Vec<NodeId> = round.members.0.keys().copied().collect();
        if members != self.members {
            self.members = members;
            self.settled = Some(round.now);
        }
        let snapshot =
            round.desired.running().flat_map(|(.., deployment)| &deployment.placement.stages).map(|stage| stage.node);
        let absent: BTreeSet<NodeId> = snapshot.filter(|node| !round.members.0.contains_key(node)).collect();
        self.absent.retain(|node, _| absent.contains(node));
        self.lost.retain(|node| absent.contains(node));
        for node in absent {
            self.absent.entry(node).or_insert(round.now);
        }
    }

    /// Whether a node is no member any more. One that others see is about to be met; so may be one that has never been here,
    /// for what runs is heard of before all others are met.
    fn is_gone(&self, round: &RoundContext<'_>, node: NodeId) -> bool {
        let waited = self.absent.get(&node).map_or(Duration::ZERO, |&since| round.now.saturating_sub(since));
        let is_near = waited < UNREACHABLE_GRACE && round.members.is_seen(node);
        let is_new = waited < CONNECT_GRACE && !self.lost.contains(&node);
        !is_near && !is_new && !round.members.0.contains_key(&node)
    }

    /// Two parts of a cluster that meet again may both run a model: the later one stays.
    fn stop_duplicates(&self, round: &mut RoundContext<'_>) {
        let desired = &*round.desired;
        let is_earlier = |(id, _, deployment): &(InstanceId, Stamp, &Deployment)| {
            desired.find(&deployment.spec).is_some_and(|(kept, ..)| kept != *id)
        };
        let earlier: Vec<InstanceId> = desired.running().filter(is_earlier).map(|(id, ..)| id).collect();
        for id in earlier {
            round.set(id, Target::Stopped { error: None });
        }
    }

    fn place_requested(&mut self, round: &mut RoundContext<'_>) {
        for key in self.requests.keys().cloned().collect::<Vec<_>>() {
            let Some((ask, by)) = self.requests.get(&key).cloned() else { continue };
            if round.desired.find(&ask.spec).is_some() {
                self.requests.remove(&key);
                continue;
            }
            let near = by.iter().next().copied().unwrap_or(round.own);
            match self.plan(round, &ask, near) {
                Ok(deployment) => {
                    self.requests.remove(&key);
                    let id = round.fresh_id();
                    self.fresh.insert(id, round.now);
                    tracing::info!(instance = %id, model = deployment.model.name, why = deployment.reason, "placed a model");
                    round.set(id, Target::Run(Box::new(deployment)));
                }
                // When others have left, it is tried again.
                // Whoever is named may be about to come, or to come back.
                Err(RequestError::Plan(PlanError::NoSuchNode { .. }) | RequestError::NoDevice { .. })
                    if self.churn.is_recent(round.now) => {}
                Err(RequestError::Plan(PlanError::DoesNotFit { .. }))
                    if self.churn.is_recent(round.now)
                        || self.releasing.is_coming(round.now)
                        || self.unload_for(round, &ask, near, None) => {}
                Err(RequestError::Plan(PlanError::DoesNotFit { needed_bytes, .. }))
                    if round.desired.running().next().is_some() =>
                {
                    let model = ask.model.name.clone();
                    self.refuse(round, &key, &RequestError::MemoryBusy { model, needed_bytes });
                }
                Err(error) => self.refuse(round, &key, &error),
            }
        }
    }

    fn plan(&self, round: &RoundContext<'_>, ask: &PlacementRequest, near: NodeId) -> Result<Deployment, RequestError> {
        let links = round.members.links();
        let (offers, shards) = (self.offers_for(round, ask, near)?, shard_count(round.members, &ask.spec)?);
        let placement = place(&ask.demand, &offers, &links, &shards, ask.spec.policy)?;
        let reason = reason(&ask.demand, &placement, &offers, &links, &shards, ask.spec.policy);
        let PlacementRequest { spec, model, demand } = ask.clone();
        Ok(Deployment { spec, model, demand, strategy: MoveStrategy::Beside { rollback: None }, placement, reason })
    }

    fn offers_for(
        &self,
        round: &RoundContext<'_>,
        ask: &PlacementRequest,
        near: NodeId,
    ) -> Result<Vec<Offer>, RequestError> {
        let offers = self.offers(round, None, ask.spec.device.as_ref(), near, &BTreeSet::new());
        match &ask.spec.device {
            Some(device) if offers.is_empty() => Err(RequestError::NoDevice { device: device.to_string() }),
            _ => Ok(offers),
        }
    }

    /// What would become of a model that was asked for now, by each policy.
    pub fn preview(&self, round: &RoundContext<'_>, ask: &PlacementRequest) -> Vec<Preview> {
        let links = round.members.links();
        let of = |policy| {
            let (offers, shards) = (self.offers_for(round, ask, round.own)?, shard_count(round.members, &ask.spec)?);
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
    fn refuse(&mut self, round: &mut RoundContext<'_>, key: &str, error: &RequestError) {
        let Some((ask, by)) = self.requests.remove(key) else { return };
        for to in by {
            round.effects.push(Effect::Refused { to, spec: ask.spec.clone(), error: error.clone() });
        }
    }

    /// Whether a model is made to leave: the one of those that nobody uses that was used longest ago. None does where
    /// all of them together would not make room enough. Memory of the instance `own`, which the room is for, is free.
    fn unload_for(
        &mut self,
        round: &mut RoundContext<'_>,
        ask: &PlacementRequest,
        near: NodeId,
        own: Option<InstanceId>,
    ) -> bool {
        let used = |id: &InstanceId| self.used.get(id).copied();
        // Whoever asked for it has not yet told that it uses it.
        let placed = |id: &InstanceId| self.fresh.get(id).copied();
        let is_new = |id: &InstanceId| placed(id).is_some_and(|placed| round.now.saturating_sub(placed) < REPORT_GRACE);
        let running = round.desired.running().map(|(id, ..)| id);
        let is_idle = |id: &InstanceId| Some(*id) != own && !round.members.is_in_use(*id) && !is_new(id);
        let idle: BTreeSet<InstanceId> = running.filter(is_idle).collect();
        let free = idle.iter().copied().chain(own).collect();
        let offers = self.offers(round, own, ask.spec.device.as_ref(), near, &free);
        let shards = shard_count(round.members, &ask.spec);
        let fits =
            shards.and_then(|shards| place(&ask.demand, &offers, &round.members.links(), &shards, ask.spec.policy));
        let Some(id) = idle.into_iter().min_by_key(used).filter(|_| fits.is_ok()) else { return false };
        tracing::info!(instance = %id, "unloading a model: another one needs its room");
        self.releasing.changed = Some(round.now);
        round.set(id, Target::Stopped { error: None });
        true
    }

    fn unload_idle(&mut self, round: &mut RoundContext<'_>) {
        let now = round.now;
        let running: BTreeSet<InstanceId> = round.desired.running().map(|(id, ..)| id).collect();
        self.used.retain(|id, _| running.contains(id));
        self.fresh.retain(|id, _| running.contains(id));
        let mut over = Vec::new();
        for id in running {
            let is_used = round.members.is_in_use(id);
            let used = self.used.entry(id).or_insert(now);
            if is_used {
                *used = now;
                self.fresh.remove(&id);
            }
            if round.idle.is_some_and(|limit| now.saturating_sub(*used) >= limit) {
                over.push(id);
            }
        }
        for id in over {
            tracing::info!(instance = %id, "unloading a model: nobody uses it");
            round.set(id, Target::Stopped { error: None });
        }
    }
}

fn shard_count(members: &Members, spec: &ModelSpec) -> Result<ShardCount, PlanError> {
    let Some(split) = &spec.split else {
        return Ok(spec.shards.map_or(ShardCount::Automatic, ShardCount::Exactly));
    };
    let part = |(name, layers): &(String, Range<usize>)| match members.find_by_name(name) {
        Some(node) if members.0[&node].is_draining => Err(PlanError::Leaving { node: name.clone() }),
        Some(node) => Ok((node, layers.clone())),
        None => Err(PlanError::NoSuchNode { node: name.clone() }),
    };
    split.0.iter().map(part).collect::<Result<_, _>>().map(ShardCount::ByHand)
}

#[cfg(test)]
mod tests;
