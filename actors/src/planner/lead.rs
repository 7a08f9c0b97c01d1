//! What the leader does: places what is asked for, mends what is broken, lets go of what nobody uses.

use super::PlannerState;
use crate::core::desired::{Stamp, Want, Wanted};
use crate::core::plan::{
    Offer, PlanError, Policy, Preview, PreviewOutcome, ShardCount, mend, pays_for_itself, place, preview, reason,
    token_seconds,
};
use crate::core::spec::ModelSpec;
use crate::core::view::InstanceId;
use crate::models::ResolvedModel;
use crate::protocol::{Ask, ControlMessage};
use crate::request::{RequestError, fresh_seed};
use exo_engines::engine::DeviceId;
use exo_net::NodeId;
use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::time::{Duration, Instant};

/// A device that has failed an instance is not tried again for so long.
const EXCLUDED_FOR: Duration = Duration::from_secs(60);
/// Who has lost most of the others at once is probably the one who was away.
const ALONE_WAIT: Duration = Duration::from_secs(3);
/// Members must have been the same for so long before anything moves for speed alone.
const SETTLED: Duration = Duration::from_secs(10);

/// A device that has failed, and when.
type Excluded = ((NodeId, DeviceId), Instant);

/// What the leader remembers beside what all know.
#[derive(Debug, Default)]
pub(super) struct Lead {
    asks: HashMap<ModelSpec, (Ask, BTreeSet<NodeId>)>,
    /// Devices that have failed an instance, since when.
    excluded: HashMap<InstanceId, Vec<Excluded>>,
    used: HashMap<InstanceId, Instant>,
    /// Nothing is mended before.
    until: Option<Instant>,
    /// When members were lost, of late.
    losses: Vec<Instant>,
    members: Vec<NodeId>,
    settled: Option<Instant>,
}

impl Lead {
    /// Somebody needs a model.
    pub(super) fn take(&mut self, from: NodeId, ask: Ask) {
        let known = self.asks.entry(ask.spec.clone()).or_insert_with(|| (ask, BTreeSet::new()));
        known.1.insert(from);
    }

    /// A request of this node uses it now. What others use is seen in their reports.
    pub(super) fn note_use(&mut self, id: InstanceId) {
        self.used.insert(id, Instant::now());
    }

    pub(super) fn wait(&mut self, now: Instant) {
        self.until = Some(now + ALONE_WAIT);
    }

    /// A member is gone, and `left` are here, this one included.
    pub(super) fn on_node_down(&mut self, now: Instant, left: usize) {
        self.losses.retain(|loss| now.duration_since(*loss) < ALONE_WAIT);
        self.losses.push(now);
        if self.losses.len() > left {
            self.wait(now);
        }
    }

    pub(super) fn forget_exclusions(&mut self, id: InstanceId) {
        if let Some(excluded) = self.excluded.get_mut(&id) {
            excluded.retain(|(_, since)| since.elapsed() < EXCLUDED_FOR);
        }
    }

    fn excludes(&self, id: InstanceId, node: NodeId, device: &DeviceId) -> bool {
        let of = self.excluded.get(&id).into_iter().flatten();
        of.into_iter().any(|((n, d), since)| (*n, d) == (node, device) && since.elapsed() < EXCLUDED_FOR)
    }
}

impl PlannerState {
    /// One round of everything that the leader looks after.
    pub(super) fn lead(&mut self) {
        self.note_members();
        self.end_doubles();
        self.mend_broken();
        self.unload_idle();
        self.place_asked();
        self.rebalance();
    }

    fn note_members(&mut self) {
        let members: Vec<NodeId> = self.members.0.keys().copied().collect();
        if members != self.lead.members {
            self.lead.members = members;
            self.lead.settled = Some(Instant::now());
        }
    }

    /// Two parts of a cluster that meet again may both run a model: the later one stays.
    fn end_doubles(&mut self) {
        let earlier: Vec<InstanceId> = self
            .desired
            .running()
            .filter(|(id, _, wanted)| self.desired.find(&wanted.spec).is_some_and(|(kept, ..)| kept != *id))
            .map(|(id, ..)| id)
            .collect();
        for id in earlier {
            self.set(id, Want::Gone { error: None });
        }
    }

    /// What members offer to an instance, the asker's own node first. Memory of shards in `except` counts as free.
    fn offers(
        &self,
        for_instance: Option<InstanceId>,
        device: Option<&DeviceId>,
        near: NodeId,
        except: Option<InstanceId>,
    ) -> Vec<Offer> {
        let mut promised: BTreeMap<NodeId, u64> = BTreeMap::new();
        for (.., wanted) in self.desired.running().filter(|(id, ..)| Some(*id) != except) {
            for stage in &wanted.placement.stages {
                *promised.entry(stage.node).or_default() += stage.memory_bytes;
            }
        }
        let mut own_bytes: BTreeMap<NodeId, u64> = BTreeMap::new();
        if let Some(wanted) = except.and_then(|id| self.desired.get(id)).and_then(|entry| entry.wanted()) {
            for stage in &wanted.placement.stages {
                *own_bytes.entry(stage.node).or_default() += stage.memory_bytes;
            }
        }
        let guess = self.speed_guess();
        let mut members: Vec<_> = self.members.0.iter().filter(|(_, report)| !report.is_draining).collect();
        members.sort_by_key(|(node, _)| **node != near);
        let mut offers = Vec::new();
        for (node, report) in members {
            let promised = promised.get(node).copied().unwrap_or(0);
            let freed = own_bytes.get(node).copied().unwrap_or(0);
            offers.extend(report.offers(*node, promised, freed, device, guess));
        }
        let is_excluded =
            |offer: &Offer| for_instance.is_some_and(|id| self.lead.excludes(id, offer.node, &offer.device));
        offers.retain(|offer| !is_excluded(offer));
        offers
    }

    /// What a device that was not measured is taken for: the middle of those that were.
    fn speed_guess(&self) -> Option<f64> {
        let devices = self.members.0.values().flat_map(|report| &report.devices);
        let mut known: Vec<f64> = devices.filter_map(|device| device.bytes_per_s).collect();
        known.sort_by(f64::total_cmp);
        known.get(known.len() / 2).copied()
    }

    fn shard_count(&self, spec: &ModelSpec) -> Result<ShardCount, PlanError> {
        let Some(split) = &spec.split else {
            return Ok(spec.shards.map_or(ShardCount::Automatic, ShardCount::Exactly));
        };
        let part = |(name, layers): &(String, std::ops::Range<usize>)| match self.members.called(name) {
            Some(node) => Ok((node, layers.clone())),
            None => Err(PlanError::NoSuchNode { node: name.clone() }),
        };
        split.0.iter().map(part).collect::<Result<_, _>>().map(ShardCount::ByHand)
    }

    fn place_asked(&mut self) {
        let asked: Vec<ModelSpec> = self.lead.asks.keys().cloned().collect();
        for spec in asked {
            if self.desired.find(&spec).is_some() {
                self.lead.asks.remove(&spec);
                continue;
            }
            let Some((ask, by)) = self.lead.asks.get(&spec).cloned() else { continue };
            match self.plan(&ask, &by) {
                Ok(wanted) => {
                    self.lead.asks.remove(&spec);
                    // Short enough to be read aloud; of no meaning.
                    let id = InstanceId(fresh_seed() >> 32);
                    tracing::info!(instance = %id, model = wanted.model.name, why = wanted.reason, "placed a model");
                    self.set(id, Want::Run(Box::new(wanted)));
                }
                // When others have left, it is tried again.
                Err(RequestError::Plan(PlanError::DoesNotFit { .. })) if self.make_room() => {}
                Err(RequestError::Plan(PlanError::DoesNotFit { needed_bytes, .. }))
                    if self.desired.running().next().is_some() =>
                {
                    self.refuse(&spec, &RequestError::Crowded { model: ask.model.name.clone(), needed_bytes });
                }
                Err(error) => self.refuse(&spec, &error),
            }
        }
    }

    fn plan(&self, ask: &Ask, by: &BTreeSet<NodeId>) -> Result<Wanted, RequestError> {
        let near = by.iter().next().copied().unwrap_or(self.args.node);
        let (offers, shards, links) = (self.offers_for(ask, near)?, self.shard_count(&ask.spec)?, self.members.links());
        let placement = place(&ask.demand, &offers, &links, &shards, ask.spec.policy)?;
        let reason = reason(&ask.demand, &placement, &offers, &links, &shards, ask.spec.policy);
        Ok(Wanted {
            spec: ask.spec.clone(),
            model: ask.model.clone(),
            kv_pages: ask.kv_pages,
            demand: ask.demand.clone(),
            placement,
            reason,
        })
    }

    fn offers_for(&self, ask: &Ask, near: NodeId) -> Result<Vec<Offer>, RequestError> {
        let offers = self.offers(None, ask.spec.device.as_ref(), near, None);
        match &ask.spec.device {
            Some(device) if offers.is_empty() => Err(RequestError::NoDevice { device: device.to_string() }),
            _ => Ok(offers),
        }
    }

    /// What would become of a model that was asked for now, by each policy. Nothing is placed by it.
    pub(super) fn preview(&self, spec: &ModelSpec, model: &ResolvedModel) -> Vec<Preview> {
        let ask = super::wanting::ask(spec, model);
        let links = self.members.links();
        let of = |policy| {
            let (offers, shards) = (self.offers_for(&ask, self.args.node)?, self.shard_count(spec)?);
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
    fn refuse(&mut self, spec: &ModelSpec, error: &RequestError) {
        let Some((_, by)) = self.lead.asks.remove(spec) else { return };
        for node in by {
            let message = ControlMessage::Refused { spec: spec.clone(), error: error.clone() };
            self.args.post.tell(node, message);
        }
    }

    /// Whether a model is leaving, or is made to: the one of those that nobody uses that was used longest ago.
    fn make_room(&mut self) -> bool {
        if self.members.0.values().any(|report| report.leaving_bytes > 0) {
            return true;
        }
        let idle = self.desired.running().map(|(id, ..)| id).filter(|id| !self.members.use_instance(*id));
        let Some(id) = idle.min_by_key(|id| self.lead.used.get(id).copied()) else { return false };
        tracing::info!(instance = %id, "unloading a model: another one needs its room");
        self.set(id, Want::Gone { error: None });
        self.renew_report();
        true
    }

    fn unload_idle(&mut self) {
        let now = Instant::now();
        let running: BTreeSet<InstanceId> = self.desired.running().map(|(id, ..)| id).collect();
        self.lead.used.retain(|id, _| running.contains(id));
        let mut over = Vec::new();
        for id in running {
            let is_used = self.members.use_instance(id);
            let used = self.lead.used.entry(id).or_insert(now);
            if is_used {
                *used = now;
            }
            if self.args.limits.idle.is_some_and(|limit| now.duration_since(*used) >= limit) {
                over.push(id);
            }
        }
        for id in over {
            tracing::info!(instance = %id, "unloading a model: nobody uses it");
            self.set(id, Want::Gone { error: None });
        }
    }

    /// A stage has no place where it is.
    pub(super) fn on_broken(
        &mut self,
        from: NodeId,
        id: InstanceId,
        stamp: Stamp,
        device: (NodeId, DeviceId),
        error: RequestError,
    ) {
        let Some(entry) = self.desired.get(id).filter(|entry| entry.stamp == stamp) else { return };
        let Some(wanted) = entry.wanted().filter(|wanted| wanted.owner() == Some(from)).cloned() else { return };
        if !self.is_leader() {
            return;
        }
        tracing::warn!(instance = %id, node = %device.0.short(), device = %device.1, %error, "a shard needs another place");
        self.lead.excluded.entry(id).or_default().push((device, Instant::now()));
        self.replace(id, &wanted, Some(error));
    }

    fn mend_broken(&mut self) {
        if self.lead.until.is_some_and(|until| Instant::now() < until) {
            return;
        }
        let is_lost = |wanted: &Wanted| {
            let gone = |node: NodeId| self.members.0.get(&node).is_none_or(|report| report.is_draining);
            wanted.placement.stages.iter().any(|stage| gone(stage.node))
        };
        let lost: Vec<(InstanceId, Wanted)> =
            self.desired.running().filter(|(.., w)| is_lost(w)).map(|(id, _, w)| (id, w.clone())).collect();
        for (id, wanted) in lost {
            self.replace(id, &wanted, None);
        }
    }

    /// Finds places for the shards of an instance that have none.
    fn replace(&mut self, id: InstanceId, wanted: &Wanted, error: Option<RequestError>) {
        let near = wanted.owner().unwrap_or(self.args.node);
        let (device, links) = (wanted.spec.device.as_ref(), self.members.links());
        let staying = self.offers(Some(id), device, near, None);
        let mended = mend(&wanted.demand, &wanted.placement, &staying, &links);
        let afresh = || {
            let offers = self.offers(Some(id), device, near, Some(id));
            place(&wanted.demand, &offers, &links, &ShardCount::Automatic, wanted.spec.policy)
        };
        let placement = mended.map_or_else(afresh, Ok);
        match placement {
            Ok(placement) if placement == wanted.placement => {}
            Ok(placement) => {
                tracing::info!(instance = %id, stages = ?placement.stages, "a model goes on elsewhere");
                let reason = "a shard has lost its place".to_owned();
                self.set(id, Want::Run(Box::new(Wanted { placement, reason, ..wanted.clone() })));
            }
            // A machine that is alone, and is to go, keeps what it has.
            Err(_) if error.is_none() && self.members.0.contains_key(&near) && self.is_draining_alone() => {}
            Err(missing) => {
                // Every device has failed it: why the last one did says more than that none is left.
                let error = error.filter(|_| missing == PlanError::NoDevice).unwrap_or(RequestError::Plan(missing));
                tracing::error!(instance = %id, %error, remedy = error.remedy(), "a model has no place any more");
                self.set(id, Want::Gone { error: Some(error) });
            }
        }
    }

    fn is_draining_alone(&self) -> bool {
        self.members.0.values().all(|report| report.is_draining)
    }

    /// Moves what would be so much faster elsewhere that the move pays for itself.
    fn rebalance(&mut self) {
        let is_settled = self.lead.settled.is_some_and(|since| since.elapsed() > SETTLED);
        let is_free = |spec: &ModelSpec| spec.shards.is_none() && spec.split.is_none();
        if !is_settled || self.members.0.len() < 2 {
            return;
        }
        let links = self.members.links();
        let mut moves = Vec::new();
        for (id, _, wanted) in self.desired.running().filter(|(.., wanted)| is_free(&wanted.spec)) {
            let near = wanted.owner().unwrap_or(self.args.node);
            let offers = self.offers(Some(id), wanted.spec.device.as_ref(), near, Some(id));
            let better = place(&wanted.demand, &offers, &links, &ShardCount::Automatic, wanted.spec.policy);
            let Ok(better) = better else { continue };
            if better != wanted.placement
                && pays_for_itself(&wanted.demand, &wanted.placement, &better, &offers, &links)
            {
                let ratio = token_seconds(&wanted.demand, &wanted.placement, &offers, &links)
                    / token_seconds(&wanted.demand, &better, &offers, &links);
                let reason = format!("{ratio:.1} times as fast as where it was");
                moves.push((id, Wanted { placement: better, reason, ..wanted.clone() }));
            }
        }
        for (id, wanted) in moves {
            tracing::info!(instance = %id, why = wanted.reason, "a model moves");
            self.set(id, Want::Run(Box::new(wanted)));
            self.lead.settled = Some(Instant::now());
        }
    }
}
