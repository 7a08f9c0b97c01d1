//! The leader's decisions: it places requested models, repairs and rebalances deployments, and stops idle ones.
//!
//! ```text
//! placement requests, losses, failures ─► Leader ─round(RoundContext)─► entries of the desired list, refusals
//! ```
//! A state machine without I/O. Its methods:
//! - `handle_*`: record an event;
//! - [`Leader::round`]: makes all decisions that are due; the effects gather in the [`RoundContext`];
//! - [`Leader::preview`]: where a round would place a model, without placing it.

mod capacity;
mod churn;
mod context;
mod failures;
mod interface;
mod repair;

pub use interface::{Effect, PlacementRequest, RoundContext};

use crate::core::clique::OUTSIDE_AFTER;
use crate::core::desired::{Deployment, MoveStrategy, Stamp, Target};
use crate::core::members::Members;
use crate::core::offer::Offer;
use crate::core::plan::{PlanError, Policy, Preview, PreviewOutcome, ShardCount, preview, reason};
use crate::core::request::RequestError;
use crate::core::spec::{InstanceId, Model, ModelSpec};
use churn::Churn;
use context::Placed;
use exo_engines::engine::DeviceId;
use exo_net::NodeId;
use failures::Failed;
use serde::{Deserialize, Serialize};
use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;
use std::time::Duration;

/// How long members may take to report what they use, and what they release: they report every second.
const REPORT_GRACE: Duration = Duration::from_secs(3);
/// A node that loses most members within this time was probably disconnected itself, and repairs nothing for as long.
const PARTITION_GRACE: Duration = Duration::from_secs(3);
/// A node that other members see counts as lost after this long without a connection to the leader. By then the clique
/// excludes the node if the two cannot connect: clique checks, and the reports of them, run every second.
const UNREACHABLE_GRACE: Duration = OUTSIDE_AFTER.saturating_add(Duration::from_secs(5));
/// Two members connect within this time, once one of them knows the other's address.
const CONNECT_GRACE: Duration = Duration::from_secs(3);
/// The longest wait for the next release of memory, after the last one: a shard that holds its memory longer hangs.
pub const RELEASE_TIMEOUT: Duration = Duration::from_secs(30);
/// The most models that wait for a placement at once.
const REQUESTS_MAX: usize = 256;

/// The leader's own state: everything that neither the desired list nor the members' reports hold.
#[derive(Debug, Default)]
pub struct Leader {
    /// Requests and the nodes that sent them, by [`key`]: the order of placement does not depend on the senders.
    requests: BTreeMap<String, (PlacementRequest, BTreeSet<NodeId>)>,
    /// Devices that failed an instance lately.
    failed: BTreeMap<InstanceId, Vec<Failed>>,
    /// When each instance was last used.
    used: BTreeMap<InstanceId, Duration>,
    /// Placement times of instances that no member has reported to use yet.
    fresh: BTreeMap<InstanceId, Duration>,
    /// No instance is repaired before this time.
    until: Option<Duration>,
    /// When members were lost, within [`PARTITION_GRACE`].
    losses: Vec<Duration>,
    /// The members at the last round.
    members: Vec<NodeId>,
    /// Recent joins and losses of members: others may follow.
    churn: Churn,
    /// Nodes that have shards and are no members, and since when.
    absent: BTreeMap<NodeId, Duration>,
    /// Nodes among `absent` that were members.
    lost: BTreeSet<NodeId>,
    releasing: PendingRelease,
    /// When the members last changed, or better placements were last searched for.
    settled: Option<Duration>,
}

/// A report of an instance's owner that a shard cannot run on its device any more.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct BrokenShard {
    /// The shard's instance.
    pub instance: InstanceId,
    /// The stamp of the placement that the shard belongs to.
    pub stamp: Stamp,
    /// The shard's node.
    pub node: NodeId,
    /// The shard's device.
    pub device: DeviceId,
    /// Whether that placement has ever served.
    pub has_run: bool,
    /// Why the shard cannot run.
    pub error: RequestError,
}

/// Memory that stopped shards of all members have yet to release.
#[derive(Debug, Default)]
struct PendingRelease {
    bytes: u64,
    /// When `bytes` last changed, or a model was last stopped to free memory.
    changed: Option<Duration>,
}

impl PendingRelease {
    fn note(&mut self, round: &RoundContext<'_>) {
        let releasing = round.members.0.values().map(|report| report.releasing_bytes).fold(0, u64::saturating_add);
        if releasing != self.bytes {
            (self.bytes, self.changed) = (releasing, Some(round.now));
        }
    }

    /// Whether free memory is about to grow. Released memory shows only when the machine is measured again.
    fn is_coming(&self, now: Duration) -> bool {
        let within = if self.bytes > 0 { RELEASE_TIMEOUT } else { REPORT_GRACE };
        self.changed.is_some_and(|changed| now.saturating_sub(changed) < within)
    }
}

/// The sort key of a spec.
fn key(spec: &ModelSpec) -> String {
    format!("{spec:?}")
}

impl Leader {
    /// Records that the node `from` needs a model.
    pub fn handle_request(&mut self, from: NodeId, ask: PlacementRequest) {
        let key = key(&ask.spec);
        if self.requests.len() >= REQUESTS_MAX && !self.requests.contains_key(&key) {
            // A node that waits for a model repeats its request.
            return;
        }
        let known = self.requests.entry(key).or_insert_with(|| (ask, BTreeSet::new()));
        known.1.insert(from);
    }

    /// Records that a request of this node uses an instance. Use by other nodes shows in their reports.
    pub fn handle_use(&mut self, id: InstanceId, now: Duration) {
        self.used.insert(id, now);
        self.fresh.remove(&id);
    }

    /// Records that a member joined. It may know nodes that join next.
    pub fn handle_joined(&mut self, now: Duration) {
        self.churn.note(now);
    }

    /// Delays repairs, because this node was suspended or disconnected: the nodes that it misses are probably not lost.
    pub fn handle_suspended(&mut self, now: Duration) {
        self.until = Some(now + PARTITION_GRACE);
    }

    /// Records that a member's process has ended, as the member or its host said. Failures of its devices no longer
    /// count when it returns.
    pub fn handle_ended(&mut self, ended: NodeId, now: Duration) {
        for failed in self.failed.values_mut() {
            failed.retain(|failed| failed.node() != ended);
        }
        self.lost.insert(ended);
        self.churn.note(now);
    }

    /// Records that a member fell silent and `left` members remain, this one included. If most members do, this node
    /// was probably disconnected itself.
    pub fn handle_lost(&mut self, lost: NodeId, now: Duration, left: usize) {
        self.handle_ended(lost, now);
        self.losses.retain(|loss| now.saturating_sub(*loss) < PARTITION_GRACE);
        self.losses.push(now);
        if self.losses.len() > left {
            self.handle_suspended(now);
        }
    }

    /// Records that an entry of an instance arrived: devices that failed the instance long ago may be tried again.
    pub fn handle_placed(&mut self, id: InstanceId, now: Duration) {
        self.forget_failures(id, now);
    }

    /// Makes all decisions that are due, once.
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

    /// Whether a node is lost. A node that other members see is about to connect. So may be a node that was never a
    /// member, since the desired list can arrive before all other members connect.
    fn is_lost(&self, round: &RoundContext<'_>, node: NodeId) -> bool {
        let waited = self.absent.get(&node).map_or(Duration::ZERO, |&since| round.now.saturating_sub(since));
        let is_near = waited < UNREACHABLE_GRACE && round.members.is_seen(node);
        let is_new = waited < CONNECT_GRACE && !self.lost.contains(&node);
        !is_near && !is_new && !round.members.0.contains_key(&node)
    }

    /// Stops the earlier instances of a spec: two parts of a cluster that reconnect may each run one.
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
            if round.desired.find_for(&ask.spec).is_some() {
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
                // The next round tries again: a named node or device may be about to connect, and memory to become
                // free.
                Err(RequestError::Plan(PlanError::NoSuchNode { .. }) | RequestError::NoDevice { .. })
                    if self.churn.is_recent(round.now) => {}
                Err(RequestError::Plan(PlanError::DoesNotFit { .. }))
                    if self.churn.is_recent(round.now)
                        || self.releasing.is_coming(round.now)
                        || self.shorten_for(round, &ask, near, None)
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
        let shards = shard_count(round.members, &ask.spec)?;
        let (offers, (context, demand, placement)) = self.find(round, ask, near, &shards)?;
        let reason = reason(&demand, &placement, &offers, &links, &shards, ask.spec.policy);
        let (spec, model) = (ask.spec.clone(), Model { context, ..ask.model.clone() });
        Ok(Deployment { spec, model, demand, strategy: MoveStrategy::Beside { rollback: None }, placement, reason })
    }

    /// The offers to a request, and where it is placed. CPUs beside better devices are offered only to a model that
    /// does not fit without them.
    fn find(
        &self,
        round: &RoundContext<'_>,
        ask: &PlacementRequest,
        near: NodeId,
        shards: &ShardCount,
    ) -> Result<(Vec<Offer>, Placed), RequestError> {
        let offers = self.offers_for(round, ask, near)?;
        let memory = self.memory(round, &BTreeSet::new());
        Ok(self.with_cpus_if_needed(round, (None, ask), &memory, offers, |offers| {
            ask.place(offers, &round.members.links(), shards)
        })?)
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

    /// The outcome of a placement request now, under each policy.
    pub fn preview(&self, round: &RoundContext<'_>, ask: &PlacementRequest) -> Vec<Preview> {
        let links = round.members.links();
        let of = |policy| {
            let shards = shard_count(round.members, &ask.spec)?;
            let ask = PlacementRequest { spec: ModelSpec { policy, ..ask.spec.clone() }, ..ask.clone() };
            let (offers, (context, demand, placement)) = self.find(round, &ask, round.own, &shards)?;
            Ok(preview(&demand, placement, context, &offers, &links, &shards, policy))
        };
        let refused = |policy, error: RequestError| Preview {
            policy,
            outcome: PreviewOutcome::Refused { error: error.to_string(), remedy: error.remedy().to_owned() },
        };
        let policies = [Policy::Latency, Policy::Throughput, Policy::FewestNodes];
        policies.map(|policy| of(policy).unwrap_or_else(|error| refused(policy, error))).to_vec()
    }

    /// Refuses a request to all nodes that sent it.
    fn refuse(&mut self, round: &mut RoundContext<'_>, key: &str, error: &RequestError) {
        let Some((ask, by)) = self.requests.remove(key) else { return };
        for to in by {
            round.effects.push(Effect::Refused { to, spec: ask.spec.clone(), error: error.clone() });
        }
    }

    /// Stops the idle model that was used longest ago, unless the memory of all idle models together would not suffice.
    /// Returns whether it stopped one. Memory of the instance `own`, which needs the space, counts as free.
    fn unload_for(
        &mut self,
        round: &mut RoundContext<'_>,
        ask: &PlacementRequest,
        near: NodeId,
        own: Option<InstanceId>,
    ) -> bool {
        let used = |id: &InstanceId| self.used.get(id).copied();
        // The node that requested a new instance has not reported yet that it uses the instance.
        let placed = |id: &InstanceId| self.fresh.get(id).copied();
        let is_new = |id: &InstanceId| placed(id).is_some_and(|placed| round.now.saturating_sub(placed) < REPORT_GRACE);
        let running = round.desired.running().map(|(id, ..)| id);
        let is_idle = |id: &InstanceId| Some(*id) != own && !round.members.is_in_use(*id) && !is_new(id);
        let idle: BTreeSet<InstanceId> = running.filter(is_idle).collect();
        let free = idle.iter().copied().chain(own).collect();
        let offers = self.offers(round, own, ask.spec.device.as_ref(), near, &free);
        let fits = || {
            let memory = self.memory(round, &free);
            self.with_cpus_if_needed(round, (own, ask), &memory, offers, |offers| ask.fit(round.members, offers))
                .is_ok()
        };
        let Some(id) = idle.into_iter().min_by_key(used).filter(|_| fits()) else { return false };
        tracing::info!(instance = %id, "unloading an idle model: another model needs its memory");
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
            tracing::info!(instance = %id, "unloading a model: no request has used it for too long");
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
