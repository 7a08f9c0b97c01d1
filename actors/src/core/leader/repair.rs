//! Instances that have lost a shard's place, and those that would be better off elsewhere.

use super::capacity::memory_by_node;
use super::{BrokenShard, Leader, PlacementRequest, RoundContext, shard_count};
use crate::core::desired::{Deployment, MoveStrategy, Target};
use crate::core::plan::{Offer, Placement, PlanError, ShardCount, Stage, fits_beside, place, repair, why_move};
use crate::core::request::RequestError;
use crate::core::spec::InstanceId;
use exo_net::NodeId;
use std::collections::BTreeSet;
use std::time::Duration;

/// Members must have been the same for so long before anything moves for speed alone.
const SETTLED: Duration = Duration::from_secs(10);

impl Leader {
    /// The owner of an instance, `from`, says that a device has failed it for good.
    pub fn handle_broken(&mut self, round: &mut RoundContext<'_>, from: NodeId, broken: BrokenShard) {
        let BrokenShard { instance: id, stamp, node, device, has_run, error } = broken;
        let Some(entry) = round.desired.get(id).filter(|entry| entry.stamp == stamp) else { return };
        let Some(deployment) = entry.deployment().filter(|deployment| deployment.owner() == Some(from)).cloned() else {
            return;
        };
        let is_here = round.members.0.contains_key(&node);
        if !is_here && self.until.is_some_and(|until| round.now < until) {
            // It is said again as long as it is so.
            return;
        }
        tracing::warn!(instance = %id, node = %node.short(), %device, %error, "a shard needs another place");
        if is_here {
            self.excluded.entry(id).or_default().push(((node, device), round.now));
        }
        if let MoveStrategy::Beside { rollback: Some(rollback) } = &deployment.strategy
            && !has_run
            && rollback.stages.iter().all(|stage| round.members.0.contains_key(&stage.node))
        {
            let (placement, reason) = (rollback.clone(), format!("the move failed: {error}"));
            let strategy = MoveStrategy::Beside { rollback: None };
            return round.set(id, Target::Run(Box::new(Deployment { placement, reason, strategy, ..deployment })));
        }
        self.replace(round, id, &deployment, Some(error));
    }

    pub(super) fn repair_broken(&mut self, round: &mut RoundContext<'_>) {
        if self.until.is_some_and(|until| round.now < until) {
            return;
        }
        let members = round.members;
        let is_lost = |deployment: &Deployment| {
            let drains = |node| members.0.get(&node).is_some_and(|report| report.is_draining);
            deployment.placement.stages.iter().any(|stage| self.is_gone(round, stage.node) || drains(stage.node))
        };
        let lost = round.desired.running().filter(|(.., deployment)| is_lost(deployment));
        let lost: Vec<(InstanceId, Deployment)> = lost.map(|(id, _, deployment)| (id, deployment.clone())).collect();
        for (id, deployment) in lost {
            self.replace(round, id, &deployment, None);
        }
    }

    /// Two leaders that did not see each other may both have filled a member: what came last goes elsewhere.
    fn move_off(&self, round: &mut RoundContext<'_>, node: NodeId) {
        let is_there = |deployment: &Deployment| deployment.placement.stages.iter().any(|stage| stage.node == node);
        let there = round.desired.running().filter(|(.., deployment)| is_there(deployment));
        let Some((id, _, deployment)) = there.max_by_key(|(_, stamp, _)| *stamp) else { return };
        let deployment = deployment.clone();
        let target = match self.place_again(round, id, &deployment, &[id].into()) {
            Ok((placement, _)) => {
                let reason = "two models were to be in one place".to_owned();
                Target::Run(Box::new(Deployment { placement, reason, strategy: MoveStrategy::InPlace, ..deployment }))
            }
            Err(error) => Target::Stopped { error: Some(error.into()) },
        };
        tracing::warn!(instance = %id, node = %node.short(), "a machine is to hold more than it has: a model moves");
        round.set(id, target);
    }

    /// See `move_off`.
    pub(super) fn resolve_overcommit(&self, round: &mut RoundContext<'_>) {
        let promised = memory_by_node(round.desired.running().map(|(.., deployment)| deployment));
        for (node, promised_bytes) in promised {
            let total = round.members.0.get(&node).and_then(|report| report.machine.memory_total_bytes);
            if total.is_some_and(|total| promised_bytes > total) {
                self.move_off(round, node);
            }
        }
    }

    /// Where an instance would go if it were asked for now, and what was offered. Memory of instances in `except` counts as
    /// free.
    fn place_again(
        &self,
        round: &RoundContext<'_>,
        id: InstanceId,
        deployment: &Deployment,
        except: &BTreeSet<InstanceId>,
    ) -> Result<(Placement, Vec<Offer>), PlanError> {
        let near = deployment.owner().unwrap_or(round.own);
        let offers = self.offers(round, Some(id), deployment.spec.device.as_ref(), near, except);
        let links = round.members.links();
        let placement = place(&deployment.demand, &offers, &links, &ShardCount::Automatic, deployment.spec.policy)?;
        Ok((placement, offers))
    }

    /// Other places for the shards of an instance that have none: beside those that stay, or beside all; where memory does
    /// not suffice for that, what it has goes first.
    fn find_replacement(
        &self,
        round: &RoundContext<'_>,
        id: InstanceId,
        deployment: &Deployment,
    ) -> Result<(Placement, MoveStrategy), PlanError> {
        let near = deployment.owner().unwrap_or(round.own);
        let (device, links) = (deployment.spec.device.as_ref(), round.members.links());
        let nothing = BTreeSet::new();
        let staying = self.offers(round, Some(id), device, near, &nothing);
        // Of a machine that is here and drains, whose shards serve until the move is done.
        let all_here = deployment.placement.stages.iter().all(|stage| round.members.0.contains_key(&stage.node));
        let beside = || MoveStrategy::Beside { rollback: all_here.then(|| deployment.placement.clone()) };
        if let Some(repaired) = repair(&deployment.demand, &deployment.placement, &staying, &links) {
            return Ok((repaired, beside()));
        }
        if let Ok((placement, _)) = self.place_again(round, id, deployment, &nothing) {
            return Ok((placement, beside()));
        }
        self.place_again(round, id, deployment, &[id].into()).map(|(placement, _)| (placement, MoveStrategy::InPlace))
    }

    /// Finds places for the shards of an instance that have none.
    fn replace(
        &mut self,
        round: &mut RoundContext<'_>,
        id: InstanceId,
        deployment: &Deployment,
        error: Option<RequestError>,
    ) {
        let near = deployment.owner().unwrap_or(round.own);
        match self.find_replacement(round, id, deployment) {
            Ok((placement, _)) if placement == deployment.placement => {}
            Ok((placement, strategy)) => {
                tracing::info!(instance = %id, stages = ?placement.stages, ?strategy, "a model moves to other devices");
                let reason = "a shard has lost its place".to_owned();
                round.set(id, Target::Run(Box::new(Deployment { placement, strategy, reason, ..deployment.clone() })));
            }
            // A machine that is to go keeps what has no other place: it is waited for.
            Err(_) if error.is_none() && deployment.placement.stages.iter().all(|s| !self.is_gone(round, s.node)) => {}
            // Whoever has just gone may be about to come back.
            Err(_) if self.churn.is_recent(round.now) => {}
            Err(PlanError::DoesNotFit { .. })
                if self.releasing.is_coming(round.now)
                    || self.unload_for(round, &ask_of(deployment), near, Some(id)) => {}
            Err(missing) => {
                // Every device has failed it: why the last one did says more than that none is left.
                let error = error.filter(|_| missing == PlanError::NoDevice).unwrap_or(RequestError::Plan(missing));
                tracing::error!(instance = %id, %error, remedy = error.remedy(), "a model has no place any more");
                round.set(id, Target::Stopped { error: Some(error) });
            }
        }
    }

    /// Moves what would be so much better off elsewhere that the move pays for itself: one at a time, for each takes room.
    pub(super) fn rebalance(&mut self, round: &mut RoundContext<'_>) {
        let is_settled = self.settled.is_some_and(|since| round.now.saturating_sub(since) > SETTLED);
        if !is_settled || round.members.0.len() < 2 {
            return;
        }
        // Nothing that takes time to find is looked at at every message.
        self.settled = Some(round.now);
        let better = round
            .desired
            .running()
            .find_map(|(id, _, deployment)| Some((id, self.find_better(round, id, deployment)?)));
        if let Some((id, deployment)) = better {
            tracing::info!(instance = %id, why = deployment.reason, "a model moves");
            round.set(id, Target::Run(Box::new(deployment)));
        }
    }

    /// A placement that is worth a move: beside what serves now, and back there if it fails.
    fn find_better(&self, round: &RoundContext<'_>, id: InstanceId, deployment: &Deployment) -> Option<Deployment> {
        let near = deployment.owner().unwrap_or(round.own);
        let device = deployment.spec.device.as_ref();
        let (links, policy) = (round.members.links(), deployment.spec.policy);
        let shards = shard_count(round.members, &deployment.spec).ok()?;
        // What stays just so needs no more memory; whether the rest has room beside it is checked below.
        let offers = self.offers(round, Some(id), device, near, &[id].into());
        let placement = place(&deployment.demand, &offers, &links, &shards, policy).ok()?;
        let current = &deployment.placement;
        if placement == *current || !is_offered(current, &offers) {
            return None;
        }
        let reason = match &shards {
            ShardCount::ByHand(_) => Some("where it was split to by hand".to_owned()),
            ShardCount::Exactly(_) if placement.machines() > current.machines() => Some("on more machines".to_owned()),
            _ => why_move(&deployment.demand, current, &placement, &offers, &links, policy),
        }?;
        let free = self.offers(round, Some(id), device, near, &BTreeSet::new());
        let strategy = MoveStrategy::Beside { rollback: Some(current.clone()) };
        fits_beside(current, &placement, &free).then(|| Deployment {
            placement,
            strategy,
            reason,
            ..deployment.clone()
        })
    }
}

/// Whether all shards are on devices that are offered: what has lost a place is mended, not moved.
fn is_offered(placement: &Placement, offers: &[Offer]) -> bool {
    let is_one = |stage: &Stage| offers.iter().any(|offer| (offer.node, &offer.device) == (stage.node, &stage.device));
    placement.stages.iter().all(is_one)
}

/// What would be asked for if the instance were not there.
fn ask_of(deployment: &Deployment) -> PlacementRequest {
    PlacementRequest {
        spec: deployment.spec.clone(),
        model: deployment.model.clone(),
        demand: deployment.demand.clone(),
    }
}
