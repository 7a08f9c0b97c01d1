//! Offers of members, less the memory that is promised and the devices that failed.

use super::{Leader, RoundContext};
use crate::core::desired::Deployment;
use crate::core::members::Members;
use crate::core::plan::Offer;
use crate::core::spec::InstanceId;
use exo_engines::engine::DeviceId;
use exo_net::NodeId;
use std::collections::{BTreeMap, BTreeSet};

/// Memory of each node, in bytes.
#[derive(Debug)]
pub(super) struct Memory {
    /// Bytes that deployments promise to shards.
    promised: BTreeMap<NodeId, u64>,
    /// Bytes that shards hold, and that count as free.
    freed: BTreeMap<NodeId, u64>,
}

impl Memory {
    /// Counts the memory that a deployment holds `before` and not `after` as free.
    pub(super) fn give_back(&mut self, before: &BTreeMap<NodeId, u64>, after: &BTreeMap<NodeId, u64>) {
        for (node, before) in before {
            let saved = before.saturating_sub(after.get(node).copied().unwrap_or(0));
            let promised = self.promised.entry(*node).or_default();
            *promised = promised.saturating_sub(saved);
            let freed = self.freed.entry(*node).or_default();
            *freed = freed.saturating_add(saved);
        }
    }
}

impl Leader {
    /// The memory that running instances hold. Memory of the instances in `except` counts as free.
    pub(super) fn memory(&self, round: &RoundContext<'_>, except: &BTreeSet<InstanceId>) -> Memory {
        let others = round.desired.running().filter(|(id, ..)| !except.contains(id));
        let promised = memory_by_node(others.map(|(.., deployment)| deployment));
        let freed = memory_by_node(except.iter().filter_map(|id| round.desired.get(*id)?.deployment()));
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
            let promised = promised.get(node).copied().unwrap_or(0);
            let freed = freed.get(node).copied().unwrap_or(0);
            offers.extend(report.offers(*node, promised, freed, device, guess));
        }
        offers
    }
}

/// The bytes that deployments promise to shards on each node.
pub(super) fn memory_by_node<'a>(deployment: impl Iterator<Item = &'a Deployment>) -> BTreeMap<NodeId, u64> {
    let mut promised = BTreeMap::new();
    for stage in deployment.flat_map(|deployment| &deployment.placement.stages) {
        let bytes: &mut u64 = promised.entry(stage.node).or_default();
        *bytes = bytes.saturating_add(stage.memory_bytes);
    }
    promised
}

/// The assumed speed of a device that was not measured: the median of the measured ones, in bytes per second.
fn speed_guess(members: &Members) -> Option<f64> {
    let devices = members.0.values().flat_map(|report| &report.devices);
    let mut known: Vec<f64> = devices.filter_map(|device| Some(device.speed?.bytes_per_s)).collect();
    known.sort_by(f64::total_cmp);
    known.get(known.len() / 2).copied()
}
