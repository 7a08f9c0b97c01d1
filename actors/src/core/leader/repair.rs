//! Repairs of instances that lost a shard's device, and moves of instances to better placements.

use super::capacity::memory_by_pool;
use super::{BrokenShard, Leader, PlacementRequest, RoundContext, shard_count};
use crate::core::desired::{Deployment, MoveStrategy, Target};
use crate::core::offer::{MemoryPool, Offer};
use crate::core::plan::{Placement, PlanError, ShardCount, Stage, fits_beside, place, repair, why_move};
use crate::core::request::RequestError;
use crate::core::spec::{InstanceId, Model};
use exo_net::NodeId;
use std::collections::BTreeSet;
use std::time::Duration;

/// How long the members must stay the same before an instance moves for speed alone.
const SETTLED: Duration = Duration::from_secs(10);

impl Leader {
    /// Handles the report of an instance's owner, `from`, that a shard cannot run on its device any more.
    pub fn handle_broken(&mut self, round: &mut RoundContext<'_>, from: NodeId, broken: BrokenShard) {
        let BrokenShard { instance: id, stamp, node, device, has_run, error } = broken;
        let Some(entry) = round.desired.get(id).filter(|entry| entry.stamp == stamp) else { return };
        let Some(deployment) = entry.deployment().filter(|deployment| deployment.owner() == Some(from)).cloned() else {
            return;
        };
        let is_here = round.members.0.contains_key(&node);
        if !is_here && self.until.is_some_and(|until| round.now < until) {
            // The owner repeats the report as long as it holds.
            return;
        }
        tracing::info!(instance = %id, node = %node.short(), %device, %error, "a shard cannot run on its device");
        if is_here {
            self.note_failure(id, &deployment, (node, device), &error, round.now);
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
            deployment.placement.stages.iter().any(|stage| self.is_lost(round, stage.node) || drains(stage.node))
        };
        let lost = round.desired.running().filter(|(.., deployment)| is_lost(deployment));
        let lost: Vec<(InstanceId, Deployment)> = lost.map(|(id, _, deployment)| (id, deployment.clone())).collect();
        for (id, deployment) in lost {
            self.replace(round, id, &deployment, None);
        }
    }

    /// Shortens the context of the latest instance in an overcommitted pool of memory, or moves the instance out of it,
    /// or stops it: two leaders that did not see each other may both have filled the pool.
    fn move_off(&self, round: &mut RoundContext<'_>, node: NodeId, pool: &MemoryPool) {
        let uses = |stage: &Stage| {
            let member = round.members.0.get(&node);
            stage.node == node && member.is_some_and(|member| member.pool(&stage.device) == *pool)
        };
        let is_there = |deployment: &Deployment| deployment.placement.stages.iter().any(uses);
        let there = round.desired.running().filter(|(.., deployment)| is_there(deployment));
        let Some((id, _, deployment)) = there.max_by_key(|(_, stamp, _)| *stamp) else { return };
        let deployment = deployment.clone();
        let moved = || self.place_again(round, id, &deployment, &[id].into());
        let target = match deployment.with_least_context().map_or_else(moved, Ok) {
            Ok(deployment) => {
                let reason = "the models on a machine did not fit its memory together".to_owned();
                Target::Run(Box::new(Deployment { reason, strategy: MoveStrategy::InPlace, ..deployment }))
            }
            Err(error) => Target::Stopped { error: Some(PlanError::into(error)) },
        };
        tracing::info!(instance = %id, node = %node.short(), "models exceed a machine's memory: the latest gives way");
        round.set(id, target);
    }

    /// Moves an instance out of each pool of memory of which more is promised than there is.
    pub(super) fn resolve_overcommit(&self, round: &mut RoundContext<'_>) {
        let promised = memory_by_pool(round.members, round.desired.running().map(|(.., deployment)| deployment));
        for ((node, pool), promised_bytes) in promised {
            let total = round.members.0.get(&node).and_then(|report| report.pool_total_bytes(&pool));
            if total.is_some_and(|total| promised_bytes > total) {
                self.move_off(round, node, &pool);
            }
        }
    }

    /// The deployment that the instance would get if it were requested now, with at most the context that it has.
    /// Memory of the instances in `except` counts as free.
    fn place_again(
        &self,
        round: &RoundContext<'_>,
        id: InstanceId,
        deployment: &Deployment,
        except: &BTreeSet<InstanceId>,
    ) -> Result<Deployment, PlanError> {
        let memory = self.memory(round, except);
        let offers = self.offers_anew(round, id, deployment, &memory);
        let ask = ask_of(deployment);
        let (_, (context, demand, placement)) =
            self.with_cpus_if_needed(round, (Some(id), &ask), &memory, offers, |offers| {
                ask.place(offers, &round.members.links(), &ShardCount::Automatic)
            })?;
        let model = Model { context, ..deployment.model.clone() };
        Ok(Deployment { model, demand, placement, strategy: MoveStrategy::InPlace, ..deployment.clone() })
    }

    /// A placement for an instance with shards that lost their device: only those shards move; or else all may, beside
    /// the old shards; or else, for lack of memory, after the old shards stop, if need be with a shorter context.
    fn find_replacement(
        &self,
        round: &RoundContext<'_>,
        id: InstanceId,
        deployment: &Deployment,
    ) -> Result<Deployment, PlanError> {
        let near = deployment.owner().unwrap_or(round.own);
        let (device, links) = (deployment.spec.device.as_ref(), round.members.links());
        let nothing = BTreeSet::new();
        let is_excluded = |node, device: &_| self.is_excluded(round, id, node, device);
        let mut staying = self.all_offers(round, device, near, &self.memory(round, &nothing));
        self.add_used(round, deployment, &self.memory(round, &nothing), &mut staying);
        staying.retain(|offer| !is_excluded(offer.node, &offer.device));
        // If all nodes are still members, for example if one drains, the old shards can serve until the move is done.
        let can_serve =
            |stage: &Stage| round.members.0.contains_key(&stage.node) && !is_excluded(stage.node, &stage.device);
        let all_here = deployment.placement.stages.iter().all(can_serve);
        let beside = |placement| {
            let strategy = MoveStrategy::Beside { rollback: all_here.then(|| deployment.placement.clone()) };
            Deployment { placement, strategy, ..deployment.clone() }
        };
        if let Some(repaired) = repair(&deployment.demand, &deployment.placement, &staying, &links) {
            return Ok(beside(repaired));
        }
        // Shards with another cache are loaded anew, so they do not load beside those that serve.
        let has_context = |moved: &Deployment| moved.model.context == deployment.model.context;
        if let Some(moved) = self.place_again(round, id, deployment, &nothing).ok().filter(has_context) {
            return Ok(beside(moved.placement));
        }
        self.place_again(round, id, deployment, &[id].into())
    }

    /// Moves an instance off lost devices and draining nodes, or stops it if no placement is left.
    fn replace(
        &mut self,
        round: &mut RoundContext<'_>,
        id: InstanceId,
        deployment: &Deployment,
        error: Option<RequestError>,
    ) {
        let near = deployment.owner().unwrap_or(round.own);
        match self.find_replacement(round, id, deployment) {
            Ok(found) if found.placement == deployment.placement => {}
            Ok(found) => {
                let (stages, strategy) = (&found.placement.stages, &found.strategy);
                tracing::info!(instance = %id, ?stages, ?strategy, "moving a model to new devices");
                let reason = "a shard needed another device".to_owned();
                round.set(id, Target::Run(Box::new(Deployment { reason, ..found })));
            }
            // A draining machine keeps a model that fits nowhere else, and waits.
            Err(_) if error.is_none() && deployment.placement.stages.iter().all(|s| !self.is_lost(round, s.node)) => {}
            // A node that was just lost may return.
            Err(_) if self.churn.is_recent(round.now) => {}
            Err(PlanError::DoesNotFit { .. })
                if self.releasing.is_coming(round.now)
                    || self.shorten_for(round, &ask_of(deployment), near, Some(id))
                    || self.unload_for(round, &ask_of(deployment), near, Some(id)) => {}
            Err(missing) => {
                // Every device failed the instance: the last failure says more than that no device is left.
                let error = error.filter(|_| missing == PlanError::NoDevice).unwrap_or(RequestError::Plan(missing));
                tracing::info!(instance = %id, %error, remedy = error.remedy(), "a model cannot be placed any more");
                round.set(id, Target::Stopped { error: Some(error) });
            }
        }
    }

    /// Moves an instance to a placement so much better that the move pays for itself: one instance at a time, since
    /// each move takes memory.
    pub(super) fn rebalance(&mut self, round: &mut RoundContext<'_>) {
        let is_settled = self.settled.is_some_and(|since| round.now.saturating_sub(since) > SETTLED);
        if !is_settled || round.members.0.len() < 2 {
            return;
        }
        // The search takes too long to run at every message.
        self.settled = Some(round.now);
        let better = round
            .desired
            .running()
            .find_map(|(id, _, deployment)| Some((id, self.find_better(round, id, deployment)?)));
        if let Some((id, deployment)) = better {
            tracing::info!(instance = %id, why = deployment.reason, "moving a model to a better placement");
            round.set(id, Target::Run(Box::new(deployment)));
        }
    }

    /// A placement that is worth a move. It loads beside the current one, which is its rollback.
    fn find_better(&self, round: &RoundContext<'_>, id: InstanceId, deployment: &Deployment) -> Option<Deployment> {
        let (links, policy) = (round.members.links(), deployment.spec.policy);
        let shards = shard_count(round.members, &deployment.spec).ok()?;
        // Shards that stay need no more memory; whether the others fit beside the current ones is checked below.
        let offers = self.offers_anew(round, id, deployment, &self.memory(round, &[id].into()));
        let placement = place(&deployment.demand, &offers, &links, &shards, policy).ok()?;
        let current = &deployment.placement;
        if placement == *current || !is_offered(current, &offers) {
            return None;
        }
        let reason = match &shards {
            ShardCount::ByHand(_) => Some("as it was split by hand".to_owned()),
            ShardCount::Exactly(_) if placement.machines() > current.machines() => Some("on more machines".to_owned()),
            _ => why_move(&deployment.demand, current, &placement, &offers, &links, policy),
        }?;
        let free = self.offers_anew(round, id, deployment, &self.memory(round, &BTreeSet::new()));
        let strategy = MoveStrategy::Beside { rollback: Some(current.clone()) };
        fits_beside(current, &placement, &free).then(|| Deployment {
            placement,
            strategy,
            reason,
            ..deployment.clone()
        })
    }
}

/// Whether all shards are on offered devices: an instance that lost a device is repaired, not rebalanced.
fn is_offered(placement: &Placement, offers: &[Offer]) -> bool {
    let is_one = |stage: &Stage| offers.iter().any(|offer| (offer.node, &offer.device) == (stage.node, &stage.device));
    placement.stages.iter().all(is_one)
}

/// The request that would place the deployment if it did not exist.
fn ask_of(deployment: &Deployment) -> PlacementRequest {
    PlacementRequest {
        spec: deployment.spec.clone(),
        model: deployment.model.clone(),
        demand: deployment.demand.clone(),
    }
}
