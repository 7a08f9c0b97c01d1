//! The contexts of instances: as long as memory allows, and shorter where something else needs the memory.

use super::capacity::{memory_by_pool, pool_of};
use super::{Leader, PlacementRequest, RoundContext, shard_count};
use crate::core::context::Context;
use crate::core::desired::{Deployment, MoveStrategy, Target};
use crate::core::members::Members;
use crate::core::offer::{MemoryPool, Offer};
use crate::core::plan::{Demand, Links, Placement, PlanError, ShardCount, place};
use crate::core::spec::InstanceId;
use exo_engines::engine::PAGE_TOKENS;
use exo_net::NodeId;
use std::collections::BTreeSet;

/// The search for the largest context tries multiples of this many tokens.
const STEP_TOKENS: u32 = 1024;

/// The most halvings of the range in which the largest context lies: each is a search for a placement.
const HALVINGS_MAX: usize = 10;

/// A placement, and the context and the demand that it is for.
pub(super) type Placed = (Context, Demand, Placement);

impl PlacementRequest {
    /// The demand of the model with its [least context](Context::least).
    pub(super) fn least_demand(&self) -> Demand {
        self.demand.with_pages(self.model.context.least().cache_pages())
    }

    /// Where the model would run with its least context.
    pub(super) fn fit(&self, members: &Members, offers: &[Offer]) -> Result<Placement, PlanError> {
        let shards = shard_count(members, &self.spec)?;
        place(&self.least_demand(), offers, &members.links(), &shards, self.spec.policy)
    }

    /// Places the model with the largest context that needs no more devices than its least context does.
    pub(super) fn place(&self, offers: &[Offer], links: &Links, shards: &ShardCount) -> Result<Placed, PlanError> {
        let (largest, policy) = (self.model.context, self.spec.policy);
        let (least, demand) = (largest.least(), self.least_demand());
        let base = place(&demand, offers, links, shards, policy)?;
        let used: Vec<Offer> = offers.iter().filter(|offer| base.uses(offer.node, &offer.device)).cloned().collect();
        let fits = |tokens: u32| {
            let context = largest.limited(tokens);
            let demand = self.demand.with_pages(context.cache_pages());
            let placement = place(&demand, &used, links, shards, policy).ok()?;
            (placement.devices() <= base.devices()).then_some((context, demand, placement))
        };
        if let Some(placed) = fits(largest.tokens) {
            return Ok(placed);
        }
        let mut best = None;
        // No cache takes more than all memory.
        let page_bytes =
            self.demand.kv_bytes.iter().copied().fold(0, u64::saturating_add) / u64::from(self.demand.kv_pages.max(1));
        let free_bytes = used.iter().map(|offer| offer.free_bytes).fold(0, u64::saturating_add);
        let affordable =
            (free_bytes / page_bytes.max(1)).saturating_mul(u64::from(PAGE_TOKENS)) / u64::from(STEP_TOKENS) + 1;
        let roof = largest.tokens.div_ceil(STEP_TOKENS).min(u32::try_from(affordable).unwrap_or(u32::MAX));
        let (mut fitting, mut failing) = (least.tokens / STEP_TOKENS, roof);
        for _ in 0..HALVINGS_MAX {
            if failing.saturating_sub(fitting) <= 1 {
                break;
            }
            let middle = fitting.midpoint(failing);
            match fits(middle * STEP_TOKENS) {
                Some(placed) => (best, fitting) = (Some(placed), middle),
                None => failing = middle,
            }
        }
        Ok(best.unwrap_or((least, demand, base)))
    }
}

impl Leader {
    /// Shortens the context of the instance that gives back most memory, unless the memory that all instances together
    /// can give back would not suffice for `ask`. Returns whether it shortened one. Memory of the instance `own`, which
    /// needs the space, counts as free.
    pub(super) fn shorten_for(
        &mut self,
        round: &mut RoundContext<'_>,
        ask: &PlacementRequest,
        near: NodeId,
        own: Option<InstanceId>,
    ) -> bool {
        let running = round.desired.running().filter(|(id, ..)| Some(*id) != own);
        let shorter: Vec<(InstanceId, Deployment, u64)> = running
            .filter_map(|(id, _, deployment)| {
                let shorter = deployment.with_least_context()?;
                let saved = deployment.memory_bytes().saturating_sub(shorter.memory_bytes());
                Some((id, shorter, saved))
            })
            .collect();
        let mut memory = self.memory(round, &own.into_iter().collect());
        for (id, deployment, _) in &shorter {
            let current = round.desired.get(*id).and_then(|entry| entry.deployment());
            let before = memory_by_pool(round.members, current.into_iter());
            let after = memory_by_pool(round.members, std::iter::once(deployment));
            memory.give_back(&before, &after);
        }
        let offers = self.offers_of(round, own, ask.spec.device.as_ref(), near, &memory);
        let fit = |offers: &[Offer]| ask.fit(round.members, offers);
        let Ok((_, wanted)) = self.with_cpus_if_needed(round, (own, ask), &memory, offers, fit) else { return false };
        // Memory of other pools would not help.
        let pools = |placement: &Placement| -> BTreeSet<(NodeId, MemoryPool)> {
            placement.stages.iter().map(|stage| pool_of(round.members, stage)).collect()
        };
        let wanted = pools(&wanted);
        let helps =
            |(_, deployment, _): &(InstanceId, Deployment, u64)| !pools(&deployment.placement).is_disjoint(&wanted);
        let largest = shorter.into_iter().filter(helps).max_by_key(|(_, _, saved)| *saved);
        let Some((id, deployment, _)) = largest else { return false };
        tracing::info!(instance = %id, "shortening a model's context: another model needs its memory");
        self.releasing.changed = Some(round.now);
        let reason = "another model needed the memory of its longer context".to_owned();
        let target = Deployment { reason, strategy: MoveStrategy::InPlace, ..deployment };
        round.set(id, Target::Run(Box::new(target)));
        true
    }
}
