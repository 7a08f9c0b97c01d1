//! Devices that failed an instance, and what they and their nodes offer it since.

use super::capacity::{Memory, guess_cpu};
use super::{Leader, RoundContext};
use crate::core::desired::Deployment;
use crate::core::members::MemberReport;
use crate::core::offer::{MemoryPool, Offer};
use crate::core::request::RequestError;
use crate::core::spec::InstanceId;
use exo_engines::engine::DeviceId;
use exo_net::NodeId;
use std::collections::BTreeMap;
use std::time::Duration;

/// How long a device that failed an instance is not tried again for it.
const EXCLUDED_FOR: Duration = Duration::from_secs(60);
/// How long the memory that a device had when it ran out of it bounds what is placed there. Each try in vain loads a
/// model and lets its users wait.
const BOUNDED_FOR: Duration = Duration::from_secs(3600);

/// A device that failed an instance.
#[derive(Debug)]
pub(super) struct Failed {
    node: NodeId,
    device: DeviceId,
    at: Duration,
    cause: Cause,
}

/// Why a device failed an instance.
#[derive(Debug, Clone, Copy)]
enum Cause {
    /// It ran out of memory. It had `free_bytes`, if that is known.
    Memory {
        free_bytes: Option<u64>,
    },
    Other,
}

impl Failed {
    /// Whether the failure still counts.
    fn counts(&self, now: Duration) -> bool {
        let lasts = match self.cause {
            Cause::Memory { .. } => BOUNDED_FOR,
            Cause::Other => EXCLUDED_FOR,
        };
        now.saturating_sub(self.at) < lasts
    }

    pub(super) fn node(&self) -> NodeId {
        self.node
    }
}

impl Leader {
    /// Records that a device failed an instance that has `deployment`.
    pub(super) fn note_failure(
        &mut self,
        id: InstanceId,
        deployment: &Deployment,
        (node, device): (NodeId, DeviceId),
        error: &RequestError,
        now: Duration,
    ) {
        let cause = match error {
            RequestError::DeviceMemory { free_bytes, .. } => {
                // Less than was planned, so that the same placement is not found again.
                let mut stages = deployment.placement.stages.iter();
                let planned = stages.find(|stage| (stage.node, &stage.device) == (node, &device));
                let below = planned.map_or(0, |stage| stage.memory_bytes.saturating_sub(1));
                Cause::Memory { free_bytes: free_bytes.map(|bytes| bytes.min(below)) }
            }
            _ => Cause::Other,
        };
        let failed = self.failed.entry(id).or_default();
        failed.retain(|failed| (failed.node, &failed.device) != (node, &device));
        failed.push(Failed { node, device, at: now, cause });
    }

    /// Forgets failures that do not count any more.
    pub(super) fn forget_failures(&mut self, id: InstanceId, now: Duration) {
        if let Some(failed) = self.failed.get_mut(&id) {
            failed.retain(|failed| failed.counts(now));
        }
    }

    /// The failure of a device that still counts for an instance.
    fn failure(&self, round: &RoundContext<'_>, id: InstanceId, node: NodeId, device: &DeviceId) -> Option<&Failed> {
        let failed = self.failed.get(&id)?.iter().find(|failed| (failed.node, &failed.device) == (node, device));
        failed.filter(|failed| failed.counts(round.now))
    }

    /// Whether a device failed an instance so lately that it is not tried again.
    pub(super) fn is_excluded(
        &self,
        round: &RoundContext<'_>,
        id: InstanceId,
        node: NodeId,
        device: &DeviceId,
    ) -> bool {
        let failure = self.failure(round, id, node, device);
        failure.is_some_and(|failed| round.now.saturating_sub(failed.at) < EXCLUDED_FOR)
    }

    /// The offers for a new placement of an instance, without devices that failed it lately. A device that ran out of
    /// memory offers what it had, and its node offers the CPU, too. The devices that the instance has now are offered
    /// even where their node prefers others.
    pub(super) fn offers_anew(
        &self,
        round: &RoundContext<'_>,
        id: InstanceId,
        deployment: &Deployment,
        memory: &Memory,
    ) -> Vec<Offer> {
        let device = deployment.spec.device.as_ref();
        let near = deployment.owner().unwrap_or(round.own);
        let mut offers = self.all_offers(round, device, near, memory);
        self.add_used(round, deployment, memory, &mut offers);
        // By node: the bytes of the machine's memory that devices offer which ran out of it. The CPU shares it.
        let mut short: BTreeMap<NodeId, u64> = BTreeMap::new();
        let mut left = Vec::new();
        for mut offer in offers {
            match self.failure(round, id, offer.node, &offer.device).map(|failed| failed.cause) {
                None => left.push(offer),
                Some(Cause::Other) => {}
                Some(Cause::Memory { free_bytes }) => {
                    offer.free_bytes = offer.free_bytes.min(free_bytes.unwrap_or(0));
                    let shared = if offer.pool == MemoryPool::Machine { offer.free_bytes } else { 0 };
                    *short.entry(offer.node).or_default() += shared;
                    left.push(offer);
                }
            }
        }
        if device.is_none() {
            for (node, used_bytes) in short {
                self.add_fallback(round, id, (node, used_bytes), memory, &mut left);
            }
        }
        left
    }

    /// Adds the devices that an instance has to `offers`.
    pub(super) fn add_used(
        &self,
        round: &RoundContext<'_>,
        deployment: &Deployment,
        memory: &Memory,
        offers: &mut Vec<Offer>,
    ) {
        for stage in &deployment.placement.stages {
            let is_its = |offer: &Offer| (offer.node, &offer.device) == (stage.node, &stage.device);
            if !offers.iter().any(is_its) {
                let of_all = self.all_offers(round, Some(&stage.device), stage.node, memory);
                let Some(offer) = of_all.into_iter().find(is_its) else { continue };
                offers.push(guess_cpu(round.members, offer, offers));
            }
        }
    }

    /// Adds the CPU of a node whose better devices use `used_bytes` to `offers`, unless it has failed.
    fn add_fallback(
        &self,
        round: &RoundContext<'_>,
        id: InstanceId,
        (node, used_bytes): (NodeId, u64),
        memory: &Memory,
        offers: &mut Vec<Offer>,
    ) {
        let fallback = round.members.0.get(&node).and_then(MemberReport::fallback);
        let Some(device) = fallback.map(|cpu| &cpu.report.id) else { return };
        let is_its = |offer: &Offer| (offer.node, &offer.device) == (node, device);
        offers.retain(|offer| !is_its(offer));
        if self.failure(round, id, node, device).is_some() {
            return;
        }
        let Some(offer) = self.all_offers(round, Some(device), node, memory).into_iter().find(is_its) else { return };
        let offer = guess_cpu(round.members, offer, offers);
        offers.push(Offer { free_bytes: offer.free_bytes.saturating_sub(used_bytes), ..offer });
    }
}
