//! Each member's report, and what the planner derives from all reports.

use crate::core::desired::Stamp;
use crate::core::plan::{Link, Links, Offer};
use crate::core::spec::InstanceId;
use crate::core::speed::Speed;
use crate::core::status::{InstanceStatus, KeyClash, Machine};
use exo_engines::engine::{DeviceId, DeviceKind, DeviceReport};
use exo_net::NodeId;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::net::SocketAddr;

/// Memory of a machine that no shard may take, for all other programs.
const RESERVE_BYTES: u64 = 512 << 20;
/// The assumed speed of a CPU until a device is measured: what a desktop's memory delivers per second.
const SPEED_GUESS_BYTES_PER_S: f64 = 2e10;
/// How far a guessed speed may be off.
const SPREAD_OF_GUESS: f64 = 4.0;
/// The most items of each list of a report, and bytes of its name: a larger report is ignored.
pub(super) const LISTED_MAX: usize = 256;

/// Two nodes, the lower id first.
pub type Pair = (NodeId, NodeId);

/// The pair of two nodes.
pub(super) fn pair(one: NodeId, other: NodeId) -> Pair {
    (one.min(other), one.max(other))
}

/// A device, as its node reports it to the planner.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct DeviceOffer {
    /// The device's description.
    pub report: DeviceReport,
    /// Bytes of work that the device computes per second of decoding; `None`: not measured yet.
    pub speed: Option<Speed>,
}

/// A member's report of an instance whose head it runs.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct OwnedInstance {
    /// The stamp of the placement that the head runs.
    pub stamp: Stamp,
    /// Whether the head accepts requests.
    pub is_ready: bool,
    /// Whether the head has requests, of any node.
    pub is_in_use: bool,
    /// The status of the instance, for users.
    pub state: Option<InstanceStatus>,
}

/// A member's report of itself, sent every second and on changes.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct MemberReport {
    /// The member's name, as its user chose it.
    pub name: String,
    /// The addresses at which the member can be reached.
    pub addresses: Vec<SocketAddr>,
    /// The member's devices, best first.
    pub devices: Vec<DeviceOffer>,
    /// The latest measurement of the member's machine.
    pub machine: Machine,
    /// The user's limit on the memory of all models together; `None`: no limit.
    pub memory_limit_bytes: Option<u64>,
    /// Memory that stopped instances and earlier placements have not released yet.
    #[serde(rename = "leaving_bytes")]
    pub releasing_bytes: u64,
    /// Whether the member drains: no new shard is placed on it.
    pub is_draining: bool,
    /// Instances whose head the member runs.
    pub owned: BTreeMap<InstanceId, OwnedInstance>,
    /// Instances that requests of the member use.
    pub in_use: Vec<InstanceId>,
    /// The digest of the member's desired list: see [`Desired::digest`](super::desired::Desired::digest).
    pub list: u64,
    /// The member's links to the peers that it sees.
    pub links: BTreeMap<NodeId, Link>,
    /// The addresses at which the member sees its peers.
    pub peers: Vec<SocketAddr>,
    /// Peers that the member excludes from its clique: see [`Clique`](super::clique::Clique).
    #[serde(rename = "apart")]
    pub outside: Vec<NodeId>,
    /// Pairs that cannot connect, as far as the member knows.
    pub cuts: Vec<Pair>,
    /// Pairs of nodes with the same key that the member has seen lately.
    #[serde(default)]
    pub clashes: Vec<KeyClash>,
}

impl MemberReport {
    /// Whether the report's sizes, speeds and times are possible.
    pub fn is_plausible(&self) -> bool {
        let counts = [
            self.devices.len(),
            self.owned.len(),
            self.in_use.len(),
            self.links.len(),
            self.peers.len(),
            self.addresses.len(),
            self.outside.len(),
            self.cuts.len(),
            self.clashes.len(),
        ];
        let speeds = self.devices.iter().filter_map(|device| device.speed).all(|speed| speed.is_plausible());
        let links = self.links.values().all(|link| {
            let is_speed = link.bytes_per_s.is_none_or(|speed| speed.is_finite() && speed > 0.0)
                && link.spread.is_finite()
                && link.spread >= 1.0;
            is_speed && link.rtt_s.is_finite() && link.rtt_s >= 0.0
        });
        speeds && links && counts.iter().all(|&count| count <= LISTED_MAX) && self.name.len() <= LISTED_MAX
    }

    /// The CPU that takes the work of the member's best devices when they cannot do it; `None` if there is none, or
    /// if it is the best.
    pub fn fallback(&self) -> Option<&DeviceOffer> {
        let is_cpu = |device: &&DeviceOffer| device.report.kind == DeviceKind::Cpu;
        let cpu = self.devices.iter().find(is_cpu)?;
        (self.devices.first()?.report.engine != cpu.report.engine).then_some(cpu)
    }

    /// The member's offers of `device` alone, or of all devices of its best engine. `promised_bytes` of its memory are
    /// promised to shards; `freed_bytes` of the memory in use count as free. A device that was not measured counts as
    /// `guess` bytes per second fast. Each offer has all free memory of the machine, which its CPU devices share.
    pub fn offers(
        &self,
        node: NodeId,
        promised_bytes: u64,
        freed_bytes: u64,
        device: Option<&DeviceId>,
        guess: Option<f64>,
    ) -> Vec<Offer> {
        let promised = promised_bytes.saturating_add(self.releasing_bytes);
        // Reserved cache pages take memory only as they fill: what is not touched yet is free now, and soon is not.
        let held = promised.saturating_add(freed_bytes);
        let untouched = self.machine.process_bytes.map_or(0, |process| held.saturating_sub(process));
        let free = self.machine.memory_free_bytes.unwrap_or(u64::MAX);
        let free = free.saturating_sub(untouched).saturating_add(freed_bytes);
        let total = self.machine.memory_total_bytes.unwrap_or(u64::MAX);
        // Promised memory counts as used before a shard touches it.
        let free_bytes = free.min(total.saturating_sub(promised)).saturating_sub(RESERVE_BYTES);
        let limit = self.memory_limit_bytes.unwrap_or(u64::MAX);
        let free_bytes = free_bytes.min(limit.saturating_sub(promised));
        let best = self.devices.first().map(|device| &device.report.engine);
        let is_wanted = |offer: &&DeviceOffer| match device {
            Some(id) => offer.report.id == *id,
            None => Some(&offer.report.engine) == best,
        };
        let guessed = Speed { bytes_per_s: guess.unwrap_or(SPEED_GUESS_BYTES_PER_S), spread: SPREAD_OF_GUESS };
        let offer = |offer: &DeviceOffer| Offer {
            node,
            device: offer.report.id.clone(),
            free_bytes,
            speed: offer.speed.unwrap_or(guessed),
        };
        self.devices.iter().filter(is_wanted).map(offer).collect()
    }
}

/// The latest report of each connected member, this one included.
#[derive(Debug, Clone, Default)]
pub struct Members(pub BTreeMap<NodeId, MemberReport>);

impl Members {
    /// The member that plans: the lowest id among members that do not drain, or among all if all drain.
    pub fn leader(&self) -> Option<NodeId> {
        let stays = self.0.iter().find(|(_, report)| !report.is_draining);
        stays.or_else(|| self.0.iter().next()).map(|(&id, _)| id)
    }

    /// Whether `node` is a member, or a member sees it and does not exclude it: then it is not lost, although this node
    /// may not be connected to it yet.
    pub fn is_seen(&self, node: NodeId) -> bool {
        let sees = |report: &MemberReport| report.links.contains_key(&node) && !report.outside.contains(&node);
        self.0.contains_key(&node) || self.0.values().any(sees)
    }

    /// The member whose name is `name`, or whose id begins with `name`, of at least 4 characters. `None` if no member
    /// or several match.
    pub fn find_by_name(&self, name: &str) -> Option<NodeId> {
        let is_called = |(id, report): &(&NodeId, &MemberReport)| {
            report.name == name || name.len() >= 4 && id.to_string().starts_with(name)
        };
        let mut found = self.0.iter().filter(is_called).map(|(&id, _)| id);
        found.next().filter(|_| found.next().is_none())
    }

    /// The links of all members.
    pub fn links(&self) -> Links {
        let of_one = |(&from, report): (&NodeId, &MemberReport)| {
            report.links.iter().map(move |(&to, &link)| ((from, to), link)).collect::<Vec<_>>()
        };
        Links(self.0.iter().flat_map(of_one).collect())
    }

    /// Whether any member reports requests in an instance.
    pub fn is_in_use(&self, id: InstanceId) -> bool {
        let uses = |report: &MemberReport| {
            report.in_use.contains(&id) || report.owned.get(&id).is_some_and(|owned| owned.is_in_use)
        };
        self.0.values().any(uses)
    }
}

#[cfg(test)]
impl MemberReport {
    /// The report of a member with one CPU and no shards.
    pub(crate) fn of_cpu(memory_bytes: u64, bytes_per_s: f64) -> Self {
        let report = DeviceReport {
            id: DeviceId("cpu".to_owned()),
            kind: exo_engines::engine::DeviceKind::Cpu,
            engine: "cpu".to_owned(),
            name: String::new(),
            compute_units: None,
            tier: String::new(),
        };
        let (memory_total_bytes, memory_free_bytes) = (Some(memory_bytes), Some(memory_bytes));
        Self {
            name: String::new(),
            addresses: Vec::new(),
            devices: vec![DeviceOffer { report, speed: Some(Speed { bytes_per_s, spread: 1.0 }) }],
            machine: Machine { memory_total_bytes, memory_free_bytes, ..Machine::default() },
            memory_limit_bytes: None,
            releasing_bytes: 0,
            is_draining: false,
            owned: BTreeMap::new(),
            in_use: Vec::new(),
            list: 0,
            links: BTreeMap::new(),
            peers: Vec::new(),
            outside: Vec::new(),
            cuts: Vec::new(),
            clashes: Vec::new(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn report(name: &str) -> MemberReport {
        MemberReport { name: name.to_owned(), ..MemberReport::of_cpu(1 << 30, 1e10) }
    }

    fn members(names: &[&str]) -> Members {
        let id = || exo_net::Identity::ephemeral().expect("random bytes").node_id();
        Members(names.iter().map(|name| (id(), report(name))).collect())
    }

    /// Pages that are reserved and not touched yet are no free memory.
    #[test]
    fn reserved_memory_is_not_free() {
        let gigabytes = |bytes: u64| bytes << 30;
        let mut member = report("a");
        member.machine = Machine {
            memory_total_bytes: Some(gigabytes(16)),
            memory_free_bytes: Some(gigabytes(7)),
            process_bytes: Some(gigabytes(2)),
            ..Machine::default()
        };
        let node = exo_net::Identity::ephemeral().expect("random bytes").node_id();
        let free = |promised, freed| {
            let offers = member.offers(node, gigabytes(promised), gigabytes(freed), None, None);
            offers[0].free_bytes.saturating_add(RESERVE_BYTES)
        };
        assert_eq!(free(6, 0), gigabytes(3), "four of the six promised are not touched yet");
        assert_eq!(free(0, 6), gigabytes(9), "stopping the instance gives back what it holds, and what it would touch");
    }

    #[test]
    fn the_lowest_id_that_does_not_drain_leads() {
        let mut members = members(&["a", "b", "c"]);
        let ids: Vec<NodeId> = members.0.keys().copied().collect();
        assert_eq!(members.leader(), Some(ids[0]));
        for (index, id) in ids.iter().enumerate() {
            members.0.get_mut(id).expect("a member").is_draining = true;
            let next = ids.get(index + 1).unwrap_or(&ids[0]);
            assert_eq!(members.leader(), Some(*next));
        }
    }

    #[test]
    fn a_name_of_two_members_finds_neither() {
        let members = members(&["laptop", "desktop", "desktop"]);
        assert!(members.find_by_name("laptop").is_some());
        assert_eq!(members.find_by_name("desktop"), None);
        let id = *members.0.keys().next().expect("a member");
        assert_eq!(members.find_by_name(&id.to_string()[..20]), Some(id));
    }
}
