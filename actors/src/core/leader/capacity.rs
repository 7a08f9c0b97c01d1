//! Offers of members, less the memory that is promised and the devices that failed.

use super::{Leader, PlacementRequest, RoundContext};
use crate::core::desired::Deployment;
use crate::core::members::{MemberReport, Members};
use crate::core::offer::{MemoryPool, Offer};
use crate::core::plan::{PlanError, Stage};
use crate::core::spec::InstanceId;
use crate::core::speed::Speed;
use exo_engines::engine::DeviceId;
use exo_net::NodeId;
use std::collections::{BTreeMap, BTreeSet};

/// The assumed speed of a CPU that was not measured, relative to the slowest better device of its node: about what the
/// bandwidths of their memories differ by at least.
const CPU_SPEED_GUESS: f64 = 0.25;

/// Bytes in each pool of memory of each node.
pub(super) type PoolBytes = BTreeMap<(NodeId, MemoryPool), u64>;

/// Memory of each pool, in bytes.
#[derive(Debug)]
pub(super) struct Memory {
    /// Bytes that deployments promise to shards.
    promised: PoolBytes,
    /// Bytes that shards hold, and that count as free.
    freed: PoolBytes,
}

impl Memory {
    /// Counts the memory that a deployment holds `before` and not `after` as free.
    pub(super) fn give_back(&mut self, before: &PoolBytes, after: &PoolBytes) {
        for (pool, before) in before {
            let saved = before.saturating_sub(after.get(pool).copied().unwrap_or(0));
            let promised = self.promised.entry(pool.clone()).or_default();
            *promised = promised.saturating_sub(saved);
            let freed = self.freed.entry(pool.clone()).or_default();
            *freed = freed.saturating_add(saved);
        }
    }
}

impl Leader {
    /// The memory that running instances hold. Memory of the instances in `except` counts as free.
    pub(super) fn memory(&self, round: &RoundContext<'_>, except: &BTreeSet<InstanceId>) -> Memory {
        let others = round.desired.running().filter(|(id, ..)| !except.contains(id));
        let promised = memory_by_pool(round.members, others.map(|(.., deployment)| deployment));
        let excepted = except.iter().filter_map(|id| round.desired.get(*id)?.deployment());
        let freed = memory_by_pool(round.members, excepted);
        Memory { promised, freed }
    }

    /// The offers of members that do not drain to an instance, the node `near` first, without devices that failed the
    /// instance lately. Memory of the instances in `except` counts as free.
    pub(super) fn offers(
        &self,
        round: &RoundContext<'_>,
        for_instance: Option<InstanceId>,
        device: Option<&DeviceId>,
        near: NodeId,
        except: &BTreeSet<InstanceId>,
    ) -> Vec<Offer> {
        self.offers_of(round, for_instance, device, near, &self.memory(round, except))
    }

    /// [`Leader::offers`], with the memory that counts as held and as free.
    pub(super) fn offers_of(
        &self,
        round: &RoundContext<'_>,
        for_instance: Option<InstanceId>,
        device: Option<&DeviceId>,
        near: NodeId,
        memory: &Memory,
    ) -> Vec<Offer> {
        let mut offers = self.all_offers(round, device, near, memory);
        offers.retain(|offer| !for_instance.is_some_and(|id| self.is_excluded(round, id, offer.node, &offer.device)));
        offers
    }

    /// The offers with which `place` places a model, and its result: with CPUs beside better devices only if the model
    /// does not fit without them, and names no device. `ask` is for `for_instance`, if that exists.
    pub(super) fn with_cpus_if_needed<T>(
        &self,
        round: &RoundContext<'_>,
        (for_instance, ask): (Option<InstanceId>, &PlacementRequest),
        memory: &Memory,
        offers: Vec<Offer>,
        place: impl Fn(&[Offer]) -> Result<T, PlanError>,
    ) -> Result<(Vec<Offer>, T), PlanError> {
        match place(&offers) {
            Err(PlanError::DoesNotFit { .. }) if ask.spec.device.is_none() => {
                let offers = self.with_cpus(round, for_instance, memory, &offers);
                let placed = place(&offers)?;
                Ok((offers, placed))
            }
            placed => Ok((offers, placed?)),
        }
    }

    /// The offers, with the CPU of each node whose better devices have memory of their own: a model that these cannot
    /// hold takes the machine's memory, too.
    fn with_cpus(
        &self,
        round: &RoundContext<'_>,
        for_instance: Option<InstanceId>,
        memory: &Memory,
        offers: &[Offer],
    ) -> Vec<Offer> {
        let mut all = offers.to_vec();
        for (&node, member) in &round.members.0 {
            let Some(cpu) = member.fallback().map(|cpu| &cpu.report.id) else { continue };
            let mut here = offers.iter().filter(|offer| offer.node == node).peekable();
            let is_offered = here.peek().is_some() && here.all(|offer| offer.pool != MemoryPool::Machine);
            if !is_offered || for_instance.is_some_and(|id| self.is_excluded(round, id, node, cpu)) {
                continue;
            }
            let cpus = self.all_offers(round, Some(cpu), node, memory);
            let own = cpus.into_iter().filter(|offer| offer.node == node);
            // The user's limit is on all devices of the node together.
            let taken = offers.iter().filter(|offer| offer.node == node).map(|offer| offer.free_bytes);
            let taken = member.memory_limit_bytes.map_or(0, |_| taken.fold(0, u64::saturating_add));
            all.extend(own.map(|offer| {
                let offer = guess_cpu(round.members, offer, offers);
                Offer { free_bytes: offer.free_bytes.saturating_sub(taken), ..offer }
            }));
        }
        all
    }

    pub(super) fn all_offers(
        &self,
        round: &RoundContext<'_>,
        device: Option<&DeviceId>,
        near: NodeId,
        memory: &Memory,
    ) -> Vec<Offer> {
        let Memory { promised, freed } = memory;
        let guess = speed_guess(round.members);
        let mut members: Vec<_> = round.members.0.iter().filter(|(_, report)| !report.is_draining).collect();
        members.sort_by_key(|(node, _)| **node != near);
        let mut offers = Vec::new();
        for (node, report) in members {
            let of = |bytes: &PoolBytes, pool: &MemoryPool| bytes.get(&(*node, pool.clone())).copied().unwrap_or(0);
            let here = promised.iter().filter(|((of, _), _)| of == node).map(|(_, bytes)| *bytes);
            let all_promised = here.fold(0, u64::saturating_add);
            let held = |pool: &MemoryPool| (of(promised, pool), of(freed, pool));
            offers.extend(report.offers(*node, held, all_promised, device, guess));
        }
        offers
    }
}

/// The memory that a stage uses. That of a node which is no member does not matter.
pub(super) fn pool_of(members: &Members, stage: &Stage) -> (NodeId, MemoryPool) {
    let member = members.0.get(&stage.node);
    (stage.node, member.map_or(MemoryPool::Machine, |member| member.pool(&stage.device)))
}

/// The bytes that deployments promise to shards in each pool of memory.
pub(super) fn memory_by_pool<'a>(members: &Members, deployments: impl Iterator<Item = &'a Deployment>) -> PoolBytes {
    let mut promised = PoolBytes::new();
    for stage in deployments.flat_map(|deployment| &deployment.placement.stages) {
        let bytes = promised.entry(pool_of(members, stage)).or_default();
        *bytes = bytes.saturating_add(stage.memory_bytes);
    }
    promised
}

/// The offer, with a guessed speed if it is that of a fallback that was not measured: the speed of the slowest of the
/// `others` of its node, times a guess.
pub(super) fn guess_cpu(members: &Members, offer: Offer, others: &[Offer]) -> Offer {
    let fallback = members.0.get(&offer.node).and_then(MemberReport::fallback);
    let is_unmeasured = fallback.is_some_and(|cpu| cpu.report.id == offer.device && cpu.speed.is_none());
    let of_node = others.iter().filter(|other| other.node == offer.node).map(|other| other.speed);
    match of_node.min_by(|a, b| a.bytes_per_s.total_cmp(&b.bytes_per_s)) {
        Some(Speed { bytes_per_s, spread }) if is_unmeasured => {
            Offer { speed: Speed { bytes_per_s: bytes_per_s * CPU_SPEED_GUESS, spread }, ..offer }
        }
        _ => offer,
    }
}

/// The assumed speed of a device that was not measured: the median of the measured ones, in bytes per second.
fn speed_guess(members: &Members) -> Option<f64> {
    let devices = members.0.values().flat_map(|report| &report.devices);
    let mut known: Vec<f64> = devices.filter_map(|device| Some(device.speed?.bytes_per_s)).collect();
    known.sort_by(f64::total_cmp);
    known.get(known.len() / 2).copied()
}
