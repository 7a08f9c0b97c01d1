//! What each member reports of itself, and what the planner derives from the reports.

use crate::core::desired::Stamp;
use crate::core::plan::{Link, Links, Offer};
use crate::core::spec::InstanceId;
use crate::core::status::{InstanceStatus, Machine};
use exo_engines::engine::{DeviceId, DeviceReport};
use exo_net::NodeId;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::net::SocketAddr;

/// Memory that is left to everything else on a machine.
const RESERVE_BYTES: u64 = 512 << 20;
/// A processor's guess until one is measured: what a desktop's memory delivers in a second.
const SPEED_GUESS_BYTES_PER_S: f64 = 2e10;
/// Devices, instances and links of one member: more are not believed.
pub(super) const LISTED_MAX: usize = 256;

/// Two nodes, the lower id first.
pub type Pair = (NodeId, NodeId);

/// The pair of two nodes.
pub(super) fn pair(one: NodeId, other: NodeId) -> Pair {
    (one.min(other), one.max(other))
}

/// A device, as the planner sees it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct DeviceOffer {
    pub report: DeviceReport,
    /// Work, in bytes, that it goes through in a second of decoding; `None`: it has not been measured.
    pub bytes_per_s: Option<f64>,
}

/// An instance that a member has the head of.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct OwnedInstance {
    pub stamp: Stamp,
    /// Whether requests can be sent to it.
    pub is_ready: bool,
    /// Whether requests of anyone are on their way in it.
    pub is_in_use: bool,
    pub state: Option<InstanceStatus>,
}

/// What a member tells of itself, every second and when it changes.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct MemberReport {
    /// As its user calls it.
    pub name: String,
    /// Where it can be reached.
    pub addresses: Vec<SocketAddr>,
    /// Best first.
    pub devices: Vec<DeviceOffer>,
    pub machine: Machine,
    /// Memory of all models together, where its user bounds it.
    pub memory_limit_bytes: Option<u64>,
    /// Memory of shards that are stopping and have not released it yet.
    #[serde(rename = "leaving_bytes")]
    pub releasing_bytes: u64,
    /// Its user takes it out: nothing new is put on it.
    pub is_draining: bool,
    /// Those that it has the head of.
    pub owned: BTreeMap<InstanceId, OwnedInstance>,
    /// Those that are used through it.
    pub in_use: Vec<InstanceId>,
    /// Of its list: see [`Desired::digest`](super::desired::Desired::digest).
    pub list: u64,
    /// How it sees the others.
    pub links: BTreeMap<NodeId, Link>,
    /// Where it sees them.
    pub peers: Vec<SocketAddr>,
    /// Peers that it excludes from its clique: see [`Clique`](super::clique::Clique).
    #[serde(rename = "apart")]
    pub outside: Vec<NodeId>,
    /// Pairs that cannot connect, as far as it sees.
    pub cuts: Vec<Pair>,
}

impl MemberReport {
    /// Whether a member could have said that.
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
        ];
        let speeds =
            self.devices.iter().filter_map(|device| device.bytes_per_s).all(|speed| speed.is_finite() && speed > 0.0);
        let links = self.links.values().all(|link| {
            let is_speed = link.bytes_per_s.is_none_or(|speed| speed.is_finite() && speed > 0.0);
            is_speed && link.rtt_s.is_finite() && link.rtt_s >= 0.0
        });
        speeds && links && counts.iter().all(|&count| count <= LISTED_MAX) && self.name.len() <= LISTED_MAX
    }

    /// What its devices can still take, where `promised_bytes` of its memory are promised, and `freed_bytes` of what is
    /// used now would be free. A device that was not measured is taken for as fast as `guess`. All share the machine's
    /// memory as long as all are processors.
    pub fn offers(
        &self,
        node: NodeId,
        promised_bytes: u64,
        freed_bytes: u64,
        device: Option<&DeviceId>,
        guess: Option<f64>,
    ) -> Vec<Offer> {
        let promised = promised_bytes.saturating_add(self.releasing_bytes);
        let free = self.machine.memory_free_bytes.unwrap_or(u64::MAX).saturating_add(freed_bytes);
        let total = self.machine.memory_total_bytes.unwrap_or(u64::MAX);
        // What has been promised counts even where it has not been touched yet.
        let free_bytes = free.min(total.saturating_sub(promised)).saturating_sub(RESERVE_BYTES);
        let limit = self.memory_limit_bytes.unwrap_or(u64::MAX);
        let free_bytes = free_bytes.min(limit.saturating_sub(promised));
        let best = self.devices.first().map(|device| &device.report.engine);
        let is_wanted = |offer: &&DeviceOffer| match device {
            Some(id) => offer.report.id == *id,
            None => Some(&offer.report.engine) == best,
        };
        let offer = |offer: &DeviceOffer| Offer {
            node,
            device: offer.report.id.clone(),
            free_bytes,
            bytes_per_s: offer.bytes_per_s.or(guess).unwrap_or(SPEED_GUESS_BYTES_PER_S),
        };
        self.devices.iter().filter(is_wanted).map(offer).collect()
    }
}

/// The members that are here, this one included.
#[derive(Debug, Clone, Default)]
pub struct Members(pub BTreeMap<NodeId, MemberReport>);

impl Members {
    /// Who plans: of those that stay, the one with the lowest id.
    pub fn leader(&self) -> Option<NodeId> {
        let stays = self.0.iter().find(|(_, report)| !report.is_draining);
        stays.or_else(|| self.0.iter().next()).map(|(&id, _)| id)
    }

    /// Whether someone who is here sees `node`, and does not take it for apart: it is not gone, though it and we may not
    /// have met yet.
    pub fn is_seen(&self, node: NodeId) -> bool {
        let sees = |report: &MemberReport| report.links.contains_key(&node) && !report.outside.contains(&node);
        self.0.contains_key(&node) || self.0.values().any(sees)
    }

    /// The member that someone calls `name`: by its name, or its id or the beginning of it. `None` where none or
    /// several are called so.
    pub fn find_by_name(&self, name: &str) -> Option<NodeId> {
        let is_called = |(id, report): &(&NodeId, &MemberReport)| {
            report.name == name || name.len() >= 4 && id.to_string().starts_with(name)
        };
        let mut found = self.0.iter().filter(is_called).map(|(&id, _)| id);
        found.next().filter(|_| found.next().is_none())
    }

    /// The ways between all pairs.
    pub fn links(&self) -> Links {
        let of_one = |(&from, report): (&NodeId, &MemberReport)| {
            report.links.iter().map(move |(&to, &link)| ((from, to), link)).collect::<Vec<_>>()
        };
        Links(self.0.iter().flat_map(of_one).collect())
    }

    /// Whether anyone uses an instance.
    pub fn is_in_use(&self, id: InstanceId) -> bool {
        let uses = |report: &MemberReport| {
            report.in_use.contains(&id) || report.owned.get(&id).is_some_and(|owned| owned.is_in_use)
        };
        self.0.values().any(uses)
    }
}

#[cfg(test)]
impl MemberReport {
    /// A member with one processor, and nothing on it.
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
            devices: vec![DeviceOffer { report, bytes_per_s: Some(bytes_per_s) }],
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

    #[test]
    fn the_lowest_id_that_stays_leads() {
        let mut members = members(&["a", "b", "c"]);
        let ids: Vec<NodeId> = members.0.keys().copied().collect();
        assert_eq!(members.leader(), Some(ids[0]));
        for (index, id) in ids.iter().enumerate() {
            members.0.get_mut(id).expect("there").is_draining = true;
            let next = ids.get(index + 1).unwrap_or(&ids[0]);
            assert_eq!(members.leader(), Some(*next));
        }
    }

    #[test]
    fn a_name_that_two_have_names_nobody() {
        let members = members(&["laptop", "desktop", "desktop"]);
        assert!(members.find_by_name("laptop").is_some());
        assert_eq!(members.find_by_name("desktop"), None);
        let id = *members.0.keys().next().expect("there");
        assert_eq!(members.find_by_name(&id.to_string()[..20]), Some(id));
    }
}
