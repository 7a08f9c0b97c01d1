//! Instances that have lost a shard's place, and those that would be better off elsewhere.

use super::market::memory_by_node;
use super::{Leader, World};
use crate::core::desired::{Stamp, Want, Wanted};
use crate::core::plan::{Offer, Placement, PlanError, ShardCount, mend, pays_for_itself, place, token_seconds};
use crate::core::spec::{InstanceId, ModelSpec};
use crate::request::RequestError;
use exo_engines::engine::DeviceId;
use exo_net::NodeId;
use std::collections::BTreeSet;
use std::time::Duration;

/// Members must have been the same for so long before anything moves for speed alone.
const SETTLED: Duration = Duration::from_secs(10);

impl Leader {
    /// The owner of an instance says that a device of `node` has failed it for good.
    pub fn handle_broken(
        &mut self,
        world: &mut World<'_>,
        from: NodeId,
        (id, stamp): (InstanceId, Stamp),
        device: (NodeId, DeviceId),
        error: RequestError,
    ) {
        let Some(entry) = world.desired.get(id).filter(|entry| entry.stamp == stamp) else { return };
        let Some(wanted) = entry.wanted().filter(|wanted| wanted.owner() == Some(from)).cloned() else { return };
        tracing::warn!(instance = %id, node = %device.0.short(), device = %device.1, %error, "a shard needs another place");
        self.excluded.entry(id).or_default().push((device, world.now));
        self.replace(world, id, &wanted, Some(error));
    }

    pub(super) fn mend_broken(&self, world: &mut World<'_>) {
        if self.until.is_some_and(|until| world.now < until) {
            return;
        }
        let members = world.members;
        let is_lost = |wanted: &Wanted| {
            let gone = |node: NodeId| members.0.get(&node).is_none_or(|report| report.is_draining);
            wanted.placement.stages.iter().any(|stage| gone(stage.node))
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
        let want = match self.afresh(world, id, &wanted) {
            Ok((placement, _)) => {
                let reason = "two models were to be in one place".to_owned();
                Want::Run(Box::new(Wanted { placement, reason, ..wanted }))
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

    /// Where an instance would go if it were asked for now, its own memory counted as free; and what was offered.
    fn afresh(&self, world: &World<'_>, id: InstanceId, wanted: &Wanted) -> Result<(Placement, Vec<Offer>), PlanError> {
        let near = wanted.owner().unwrap_or(world.own);
        let offers = self.offers(world, Some(id), wanted.spec.device.as_ref(), near, &[id].into());
        let links = world.members.links();
        let placement = place(&wanted.demand, &offers, &links, &ShardCount::Automatic, wanted.spec.policy)?;
        Ok((placement, offers))
    }

    /// Finds places for the shards of an instance that have none.
    fn replace(&self, world: &mut World<'_>, id: InstanceId, wanted: &Wanted, error: Option<RequestError>) {
        let near = wanted.owner().unwrap_or(world.own);
        let (device, links) = (wanted.spec.device.as_ref(), world.members.links());
        let staying = self.offers(world, Some(id), device, near, &BTreeSet::new());
        let mended = mend(&wanted.demand, &wanted.placement, &staying, &links);
        let afresh = || self.afresh(world, id, wanted).map(|(placement, _)| placement);
        let placement = mended.map_or_else(afresh, Ok);
        match placement {
            Ok(placement) if placement == wanted.placement => {}
            Ok(placement) => {
                tracing::info!(instance = %id, stages = ?placement.stages, "a model goes on elsewhere");
                let reason = "a shard has lost its place".to_owned();
                world.set(id, Want::Run(Box::new(Wanted { placement, reason, ..wanted.clone() })));
            }
            // A machine that is alone, and is to go, keeps what it has.
            Err(_) if error.is_none() && world.members.0.contains_key(&near) && all_drain(world) => {}
            Err(missing) => {
                // Every device has failed it: why the last one did says more than that none is left.
                let error = error.filter(|_| missing == PlanError::NoDevice).unwrap_or(RequestError::Plan(missing));
                tracing::error!(instance = %id, %error, remedy = error.remedy(), "a model has no place any more");
                world.set(id, Want::Gone { error: Some(error) });
            }
        }
    }

    /// Moves what would be so much faster elsewhere that the move pays for itself.
    pub(super) fn rebalance(&mut self, world: &mut World<'_>) {
        let is_settled = self.settled.is_some_and(|since| world.now.saturating_sub(since) > SETTLED);
        let is_free = |spec: &ModelSpec| spec.shards.is_none() && spec.split.is_none();
        if !is_settled || world.members.0.len() < 2 {
            return;
        }
        // Nothing that takes time to find is looked for at every message.
        self.settled = Some(world.now);
        let links = world.members.links();
        let mut moves = Vec::new();
        for (id, _, wanted) in world.desired.running().filter(|(.., wanted)| is_free(&wanted.spec)) {
            let Ok((better, offers)) = self.afresh(world, id, wanted) else { continue };
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
            world.set(id, Want::Run(Box::new(wanted)));
        }
    }
}

fn all_drain(world: &World<'_>) -> bool {
    world.members.0.values().all(|report| report.is_draining)
}
