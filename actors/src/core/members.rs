//! Each member's report, and what the planner derives from all reports.

use crate::core::desired::Stamp;
use crate::core::offer::{MemoryPool, Offer, PoolMemory};
use crate::core::plan::{Link, Links};
use crate::core::spec::InstanceId;
use crate::core::speed::Speed;
use crate::core::status::{GpuStatus, InstanceStatus, KeyClash, Machine};
use exo_engines::engine::{DeviceId, DeviceKind, DeviceMemory, DeviceReport};
use exo_engines::hardware::{GpuSample, PciAddress};
use exo_net::NodeId;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::net::SocketAddr;

/// Memory of a machine that no shard may take, for all other programs.
const RESERVE_BYTES: u64 = 512 << 20;
/// Memory of a graphics card that no shard may take: for the driver's own tables, and for windows on its screens.
const CARD_RESERVE_BYTES: u64 = 256 << 20;
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
    /// The GPUs of the member's machine, with their latest measurements.
    #[serde(default)]
    pub gpus: BTreeMap<PciAddress, GpuStatus>,
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
            self.gpus.len(),
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
        let mut samples = self.gpus.values().filter_map(|gpu| gpu.sample.as_ref());
        let samples = samples.all(GpuSample::is_plausible);
        speeds && links && samples && counts.iter().all(|&count| count <= LISTED_MAX) && self.name.len() <= LISTED_MAX
    }

    /// The CPU that takes the work of the member's best devices when they cannot do it; `None` if there is none, or
    /// if it is the best.
    pub fn fallback(&self) -> Option<&DeviceOffer> {
        let is_cpu = |device: &&DeviceOffer| device.report.kind == DeviceKind::Cpu;
        let cpu = self.devices.iter().find(is_cpu)?;
        (self.devices.first()?.report.engine != cpu.report.engine).then_some(cpu)
    }

    /// The memory that a device of the member uses. A device that has gone has a pool of its own.
    pub fn pool(&self, device: &DeviceId) -> MemoryPool {
        let known = self.devices.iter().find(|offer| offer.report.id == *device);
        known.map_or_else(|| MemoryPool::Card(device.to_string()), |offer| MemoryPool::of(&offer.report))
    }

    /// What is known of the memory of a device.
    fn pool_memory(&self, device: &DeviceReport) -> PoolMemory {
        let DeviceMemory::Dedicated { total_bytes } = device.memory else {
            return PoolMemory {
                total: self.machine.memory_total_bytes,
                free: self.machine.memory_free_bytes,
                own: self.machine.process_bytes,
                reserve: RESERVE_BYTES,
            };
        };
        let sample = device.pci_address().and_then(|address| self.gpus.get(&address)?.sample.as_ref());
        PoolMemory {
            total: Some(total_bytes),
            free: sample.and_then(GpuSample::memory_free_bytes),
            own: sample.and_then(|sample| sample.memory_own_bytes),
            reserve: CARD_RESERVE_BYTES,
        }
    }

    /// The size of a pool of memory; `None` if it is unknown.
    pub fn pool_total_bytes(&self, pool: &MemoryPool) -> Option<u64> {
        let device = self.devices.iter().find(|offer| MemoryPool::of(&offer.report) == *pool);
        self.pool_memory(&device?.report).total
    }

    /// The member's offers of `device` alone, or of all devices of its best engine. `held` tells the promised and the
    /// freed bytes of each pool of its memory. A device that was not measured counts as `guess` bytes per second fast.
    pub fn offers(
        &self,
        node: NodeId,
        held: impl Fn(&MemoryPool) -> (u64, u64),
        promised_bytes: u64,
        device: Option<&DeviceId>,
        guess: Option<f64>,
    ) -> Vec<Offer> {
        let limit = self.memory_limit_bytes.unwrap_or(u64::MAX);
        let within_limit = limit.saturating_sub(promised_bytes.saturating_add(self.releasing_bytes));
        let free_bytes = |device: &DeviceReport| {
            let (promised, freed) = held(&MemoryPool::of(device));
            // Which pool stopped shards still hold is not known, so it counts for each.
            let promised = promised.saturating_add(self.releasing_bytes);
            self.pool_memory(device).free_bytes(promised, freed).min(within_limit)
        };
        let best = self.devices.first().map(|device| &device.report.engine);
        let is_wanted = |offer: &&DeviceOffer| match device {
            Some(id) => offer.report.id == *id,
            None => Some(&offer.report.engine) == best,
        };
        let guessed = Speed { bytes_per_s: guess.unwrap_or(SPEED_GUESS_BYTES_PER_S), spread: SPREAD_OF_GUESS };
        let offer = |offer: &DeviceOffer| Offer {
            node,
            device: offer.report.id.clone(),
            pool: MemoryPool::of(&offer.report),
            free_bytes: free_bytes(&offer.report),
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

/// A GPU of Intel.
#[cfg(test)]
pub(crate) fn gpu_at(address: &str) -> exo_engines::hardware::Gpu {
    exo_engines::hardware::Gpu {
        address: address.parse().expect("an address"),
        id: exo_engines::hardware::PciId { vendor: 0x8086, product: 0xe20b },
        name: Some("Intel Arc B580".to_owned()),
        driver: None,
        render_node: None,
        is_integrated: Some(false),
        memory_bytes: None,
    }
}

/// The report of a graphics card.
#[cfg(test)]
pub(crate) fn card_at(address: &str, total_bytes: u64) -> DeviceReport {
    let gpu = exo_engines::engine::GpuReport { pci_address: address.parse().ok(), ..Default::default() };
    DeviceReport {
        id: DeviceId("intel:0".to_owned()),
        kind: DeviceKind::Gpu,
        engine: "intel".to_owned(),
        memory: DeviceMemory::Dedicated { total_bytes },
        gpu: Some(Box::new(gpu)),
        ..DeviceReport::of_cpu("", "", "")
    }
}

#[cfg(test)]
impl MemberReport {
    /// The report of a member with one CPU and no shards.
    pub(crate) fn of_cpu(memory_bytes: u64, bytes_per_s: f64) -> Self {
        let report = DeviceReport::of_cpu("cpu", "cpu", "");
        let (memory_total_bytes, memory_free_bytes) = (Some(memory_bytes), Some(memory_bytes));
        Self {
            name: String::new(),
            addresses: Vec::new(),
            devices: vec![DeviceOffer { report, speed: Some(Speed { bytes_per_s, spread: 1.0 }) }],
            gpus: BTreeMap::new(),
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

    /// R1.5, R7.1–R7.5: a card's memory is its own, and counts once, whichever engines see the card; an integrated
    /// GPU's memory is the machine's.
    #[test]
    fn each_pool_of_memory_counts_once() {
        let mut member = report("a");
        let card = |engine: &str| {
            let gpu = card_at("0000:03:00.0", 8 << 30);
            let (id, engine) = (DeviceId(format!("{engine}:0")), engine.to_owned());
            DeviceReport { id, engine, ..gpu }
        };
        let integrated = DeviceReport { memory: DeviceMemory::Shared, ..card("integrated") };
        let devices = [card("intel"), card("vulkan"), integrated];
        member.devices.extend(devices.map(|report| DeviceOffer { report, speed: None }));
        let of = |id: &str| member.pool(&DeviceId(id.to_owned()));
        assert_eq!(of("intel:0"), of("vulkan:0"));
        assert_eq!(of("integrated:0"), MemoryPool::Machine);
        assert_eq!(member.pool_total_bytes(&of("gone:7")), None, "a device that has gone takes no one's memory");
        assert_eq!(member.pool_total_bytes(&of("intel:0")), Some(8 << 30));

        let node = exo_net::Identity::ephemeral().expect("random bytes").node_id();
        let id = DeviceId("intel:0".to_owned());
        let free = |member: &MemberReport| {
            let held = |pool: &MemoryPool| if *pool == MemoryPool::Machine { (0, 0) } else { (3 << 30, 0) };
            member.offers(node, held, 3 << 30, Some(&id), None)[0].free_bytes + CARD_RESERVE_BYTES
        };
        assert_eq!(free(&member), 5 << 30, "what is promised is not free, also where the driver does not tell");
        let sample = GpuSample {
            memory_total_bytes: Some(8 << 30),
            memory_used_bytes: Some(6 << 30),
            memory_own_bytes: Some(3 << 30),
            ..GpuSample::default()
        };
        let gpu = gpu_at("0000:03:00.0");
        let status = GpuStatus { gpu: gpu.clone(), unused: None, sample: Some(sample) };
        member.gpus.insert(gpu.address, status);
        assert_eq!(free(&member), 2 << 30, "other programs use three");
        member.memory_limit_bytes = Some(4 << 30);
        assert_eq!(free(&member), (1 << 30) + CARD_RESERVE_BYTES, "the user's limit is on all models together");
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
