//! Instances that have lost a shard's place, and those that would be better off elsewhere.

use super::market::memory_by_node;
use super::{Ask, Broken, Leader, World, shard_count};
use crate::core::desired::{Change, Want, Wanted};
use crate::core::plan::{Offer, Placement, PlanError, ShardCount, Stage, fits_beside, mend, place, why_move};
use crate::core::spec::InstanceId;
use crate::request::RequestError;
use exo_net::NodeId;
use std::collections::BTreeSet;
use std::time::Duration;

/// Members must have been the same for so long before anything moves for speed alone.
const SETTLED: Duration = Duration::from_secs(10);

impl Leader {
    /// The owner of an instance, `from`, says that a device has failed it for good.
    pub fn handle_broken(&mut self, world: &mut World<'_>, from: NodeId, broken: Broken) {
        let Broken { instance: id, stamp, node, device, has_run, error } = broken;
        let Some(entry) = world.desired.get(id).filter(|entry| entry.stamp == stamp) else { return };
        let Some(wanted) = entry.wanted().filter(|wanted| wanted.owner() == Some(from)).cloned() else { return };
        let is_here = world.members.0.contains_key(&node);
        if !is_here && self.until.is_some_and(|until| world.now < until) {
            // It is said again as long as it is so.
            return;
        }
        tracing::warn!(instance = %id, node = %node.short(), %device, %error, "a shard needs another place");
        if is_here {
            self.excluded.entry(id).or_default().push(((node, device), world.now));
        }
        if let Change::Beside { back: Some(back) } = &wanted.change
            && !has_run
            && back.stages.iter().all(|stage| world.members.0.contains_key(&stage.node))
        {
            let (placement, reason) = (back.clone(), format!("it could not be moved: {error}"));
            let change = Change::Beside { back: None };
            return world.set(id, Want::Run(Box::new(Wanted { placement, reason, change, ..wanted })));
        }
        self.replace(world, id, &wanted, Some(error));
    }

    pub(super) fn mend_broken(&mut self, world: &mut World<'_>) {
        if self.until.is_some_and(|until| world.now < until) {
            return;
        }
        let members = world.members;
        let is_lost = |wanted: &Wanted| {
            let drains = |node| members.0.get(&node).is_some_and(|report| report.is_draining);
            wanted.placement.stages.iter().any(|stage| self.is_gone(world, stage.node) || drains(stage.node))
        };
        let lost = world.desired.running().filter(|(.., wanted)| is_lost(wanted));
        let lost: Vec<(InstanceId, Wanted)> = lost.map(|(id, _, wanted)| (id, wanted.clone())).collect();
        for (id, wanted) in lost {
            self.replace(world, id, &wanted, None);
        }
    }

    /// Two leaders that did not see each other may both have filled a member: what came last goes elsewhere.
    fn relieve_one(&self, world: &mut World<'_>, node: NodeId) {
        let is_there = |wanted: &Wanted| wanted.placement.stages.iter().any(|stage| stage.node == node);
        let there = world.desired.running().filter(|(.., wanted)| is_there(wanted));
        let Some((id, _, wanted)) = there.max_by_key(|(_, stamp, _)| *stamp) else { return };
        let wanted = wanted.clone();
        let want = match self.afresh(world, id, &wanted, &[id].into()) {
            Ok((placement, _)) => {
                let reason = "two models were to be in one place".to_owned();
                Want::Run(Box::new(Wanted { placement, reason, change: Change::InPlace, ..wanted }))
            }
            Err(error) => Want::Gone { error: Some(error.into()) },
        };
        tracing::warn!(instance = %id, node = %node.short(), "a machine is to hold more than it has: a model moves");
        world.set(id, want);
    }

    /// See `relieve_one`.
    pub(super) fn relieve(&self, world: &mut World<'_>) {
        let promised = memory_by_node(world.desired.running().map(|(.., wanted)| wanted));
        for (node, promised_bytes) in promised {
            let total = world.members.0.get(&node).and_then(|report| report.machine.memory_total_bytes);
            if total.is_some_and(|total| promised_bytes > total) {
                self.relieve_one(world, node);
            }
        }
    }

    /// Where an instance would go if it were asked for now, and what was offered. Memory of instances in `except` counts as
    /// free.
    fn afresh(
        &self,
        world: &World<'_>,
        id: InstanceId,
        wanted: &Wanted,
        except: &BTreeSet<InstanceId>,
    ) -> Result<(Placement, Vec<Offer>), PlanError> {
        let near = wanted.owner().unwrap_or(world.own);
        let offers = self.offers(world, Some(id), wanted.spec.device.as_ref(), near, except);
        let links = world.members.links();
        let placement = place(&wanted.demand, &offers, &links, &ShardCount::Automatic, wanted.spec.policy)?;
        Ok((placement, offers))
    }

    /// Other places for the shards of an instance that have none: beside those that stay, or beside all; where memory does
    /// not suffice for that, what it has goes first.
    fn elsewhere(&self, world: &World<'_>, id: InstanceId, wanted: &Wanted) -> Result<(Placement, Change), PlanError> {
        let near = wanted.owner().unwrap_or(world.own);
        let (device, links) = (wanted.spec.device.as_ref(), world.members.links());
        let nothing = BTreeSet::new();
        let staying = self.offers(world, Some(id), device, near, &nothing);
        // Of a machine that is here and drains, whose shards serve until the move is done.
        let all_here = wanted.placement.stages.iter().all(|stage| world.members.0.contains_key(&stage.node));
        let beside = || Change::Beside { back: all_here.then(|| wanted.placement.clone()) };
        if let Some(mended) = mend(&wanted.demand, &wanted.placement, &staying, &links) {
            return Ok((mended, beside()));
        }
        if let Ok((placement, _)) = self.afresh(world, id, wanted, &nothing) {
            return Ok((placement, beside()));
        }
        self.afresh(world, id, wanted, &[id].into()).map(|(placement, _)| (placement, Change::InPlace))
    }

    /// Finds places for the shards of an instance that have none.
    fn replace(&mut self, world: &mut World<'_>, id: InstanceId, wanted: &Wanted, error: Option<RequestError>) {
        let near = wanted.owner().unwrap_or(world.own);
        match self.elsewhere(world, id, wanted) {
            Ok((placement, _)) if placement == wanted.placement => {}
            Ok((placement, change)) => {
                tracing::info!(instance = %id, stages = ?placement.stages, ?change, "a model goes on elsewhere");
                let reason = "a shard has lost its place".to_owned();
                world.set(id, Want::Run(Box::new(Wanted { placement, change, reason, ..wanted.clone() })));
            }
            // A machine that is to go keeps what has no other place: it is waited for.
            Err(_) if error.is_none() && wanted.placement.stages.iter().all(|s| !self.is_gone(world, s.node)) => {}
            // Whoever has just gone may be about to come back.
            Err(_) if self.unrest.is_on(world.now) => {}
            Err(PlanError::DoesNotFit { .. })
                if self.leaving.is_coming(world.now) || self.make_room(world, &ask_of(wanted), near, Some(id)) => {}
            Err(missing) => {
                // Every device has failed it: why the last one did says more than that none is left.
                let error = error.filter(|_| missing == PlanError::NoDevice).unwrap_or(RequestError::Plan(missing));
                tracing::error!(instance = %id, %error, remedy = error.remedy(), "a model has no place any more");
                world.set(id, Want::Gone { error: Some(error) });
            }
        }
    }

    /// Moves what would be so much better off elsewhere that the move pays for itself: one at a time, for each takes room.
    pub(super) fn rebalance(&mut self, world: &mut World<'_>) {
        let is_settled = self.settled.is_some_and(|since| world.now.saturating_sub(since) > SETTLED);
        if !is_settled || world.members.0.len() < 2 {
            return;
        }
        // Nothing that takes time to find is looked at at every message.
        self.settled = Some(world.now);
        let better = world.desired.running().find_map(|(id, _, wanted)| Some((id, self.better(world, id, wanted)?)));
        if let Some((id, wanted)) = better {
            tracing::info!(instance = %id, why = wanted.reason, "a model moves");
            world.set(id, Want::Run(Box::new(wanted)));
        }
    }

    /// A placement that is worth a move: beside what serves now, and back there if it fails.
    fn better(&self, world: &World<'_>, id: InstanceId, wanted: &Wanted) -> Option<Wanted> {
        let near = wanted.owner().unwrap_or(world.own);
        let device = wanted.spec.device.as_ref();
        let (links, policy) = (world.members.links(), wanted.spec.policy);
        let shards = shard_count(world.members, &wanted.spec).ok()?;
        // What stays just so needs no more memory; whether the rest has room beside it is checked below.
        let offers = self.offers(world, Some(id), device, near, &[id].into());
        let placement = place(&wanted.demand, &offers, &links, &shards, policy).ok()?;
        let current = &wanted.placement;
        if placement == *current || !is_offered(current, &offers) {
            return None;
        }
        let reason = match &shards {
            ShardCount::ByHand(_) => Some("where it was split to by hand".to_owned()),
            ShardCount::Exactly(_) if placement.machines() > current.machines() => Some("on more machines".to_owned()),
            _ => why_move(&wanted.demand, current, &placement, &offers, &links, policy),
        }?;
        let free = self.offers(world, Some(id), device, near, &BTreeSet::new());
        let change = Change::Beside { back: Some(current.clone()) };
        fits_beside(current, &placement, &free).then(|| Wanted { placement, change, reason, ..wanted.clone() })
    }
}

/// Whether all shards are on devices that are offered: what has lost a place is mended, not moved.
fn is_offered(placement: &Placement, offers: &[Offer]) -> bool {
    let is_one = |stage: &Stage| offers.iter().any(|offer| (offer.node, &offer.device) == (stage.node, &stage.device));
    placement.stages.iter().all(is_one)
}

/// What would be asked for if the instance were not there.
fn ask_of(wanted: &Wanted) -> Ask {
    Ask { spec: wanted.spec.clone(), model: wanted.model.clone(), demand: wanted.demand.clone() }
}
