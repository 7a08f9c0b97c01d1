//! The status of a node, as one value that facts change.
//!
//! A subscriber gets the status once and then the facts. Applying the facts gives it the same status that the node has.

pub use crate::core::fact::{DeviceTrouble, Fact};

use crate::core::clique::Outside;
use crate::core::members::MemberReport;
use crate::core::memory_watch::MemoryGrowth;
use crate::core::spec::InstanceId;
use crate::core::status::{GpuStatus, InstanceStatus, KeyClash, Machine, Phase, Totals, measured};
use exo_engines::engine::{DeviceId, DeviceReport};
use exo_engines::hardware::PciAddress;
use exo_net::NodeId;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::net::SocketAddr;

/// The status of a node, and of its cluster as the node sees it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct NodeStatus {
    /// The node's id.
    pub node: NodeId,
    /// The node's name, as its user chose it.
    pub name: String,
    /// The addresses at which other nodes reach this one; empty without a network.
    pub addresses: Vec<SocketAddr>,
    /// The node's devices, best first.
    pub devices: Vec<DeviceReport>,
    /// The GPUs of the machine, with their latest measurements.
    #[serde(default)]
    pub gpus: BTreeMap<PciAddress, GpuStatus>,
    /// The devices that have failed. Their shards run on the fallback.
    #[serde(default)]
    pub failed_devices: BTreeMap<DeviceId, DeviceTrouble>,
    /// The latest growth of memory that nothing on the machine accounts for.
    #[serde(default)]
    pub machine_leak: Option<MemoryGrowth>,
    /// The latest measurement of its machine.
    pub machine: Machine,
    /// The instances whose head is on this node, and the latest that have stopped, at most 16.
    pub instances: BTreeMap<InstanceId, InstanceStatus>,
    /// The other members of this node's clique, each with the instances whose heads it has.
    pub members: BTreeMap<NodeId, MemberReport>,
    /// Connected peers outside this node's clique.
    #[serde(rename = "apart")]
    pub outside: BTreeMap<NodeId, Outside>,
    /// Members that have gone, and have not come back.
    #[serde(default)]
    pub gone: BTreeMap<NodeId, Gone>,
    /// Addresses where no member answers, and why.
    #[serde(default)]
    pub unreached: BTreeMap<SocketAddr, String>,
    /// Pairs of running nodes that have the same key, by the address of the second.
    #[serde(default)]
    pub same_key: BTreeMap<SocketAddr, KeyClash>,
    /// Nodes that are not admitted, and the name of the member whose user evicted each.
    #[serde(default)]
    pub evicted: BTreeMap<NodeId, String>,
    /// What the heads of this node have done since it started, by the model's name.
    #[serde(default)]
    pub totals: BTreeMap<String, Totals>,
    /// The number of facts applied so far.
    pub version: u64,
}

/// A member that has gone.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Gone {
    /// Its name.
    pub name: String,
    /// Why.
    pub reason: String,
    /// When, in seconds since 1970.
    pub at_s: u64,
}

/// The most addresses that are listed as without a member, and of nodes with a copied key.
const TROUBLES_MAX: usize = 64;
/// The most models whose totals are kept by name.
const COUNTED_MAX: usize = 256;
/// How many stopped instances stay visible.
const STOPPED_KEPT: usize = 16;

impl NodeStatus {
    /// Creates the status before any fact.
    pub fn new(node: NodeId, name: String, addresses: Vec<SocketAddr>) -> Self {
        let (devices, machine) = (Vec::new(), Machine::default());
        Self {
            node,
            name,
            addresses,
            devices,
            gpus: BTreeMap::new(),
            failed_devices: BTreeMap::new(),
            machine_leak: None,
            machine,
            instances: BTreeMap::new(),
            members: BTreeMap::new(),
            outside: BTreeMap::new(),
            gone: BTreeMap::new(),
            unreached: BTreeMap::new(),
            same_key: BTreeMap::new(),
            evicted: BTreeMap::new(),
            totals: BTreeMap::new(),
            version: 0,
        }
    }

    /// The member that plans: see [`Members::leader`](crate::core::members::Members::leader). This node counts as one
    /// that does not drain.
    pub fn leader(&self) -> NodeId {
        let others = self.members.iter().filter(|(_, member)| !member.is_draining).map(|(&id, _)| id);
        others.chain([self.node]).min().unwrap_or(self.node)
    }

    /// The instances with a head on this node that have not stopped.
    pub fn live(&self) -> impl Iterator<Item = (InstanceId, &InstanceStatus)> {
        let instances = self.instances.iter().map(|(&id, instance)| (id, instance));
        instances.filter(|(_, instance)| !matches!(instance.phase, Phase::Stopped { .. }))
    }

    /// The live instances of this node and of all other members. The states of other members' instances are at most a
    /// second old.
    pub fn everywhere(&self) -> impl Iterator<Item = (InstanceId, &InstanceStatus)> {
        let owned = self.members.values().flat_map(|member| &member.owned);
        self.live().chain(owned.filter_map(|(&id, owned)| Some((id, owned.state.as_ref()?))))
    }

    /// Applies a fact. A fact about an unknown instance changes only the version.
    pub fn apply(&mut self, fact: &Fact) {
        self.version += 1;
        match fact {
            Fact::DeviceFound(report) => {
                self.devices.retain(|device| device.id != report.id);
                self.devices.push(report.clone());
            }
            Fact::GpuFound(status) => drop(self.gpus.insert(status.gpu.address, GpuStatus::clone(status))),
            Fact::GpusMeasured(samples) => measured(&mut self.gpus, samples),
            Fact::DeviceFailed { device, trouble } => {
                self.failed_devices.insert(device.clone(), trouble.clone());
            }
            Fact::DeviceRecovered(device) => drop(self.failed_devices.remove(device)),
            Fact::MachineLeaks(growth) => self.machine_leak = *growth,
            Fact::MachineMeasured(machine) => self.machine = machine.clone(),
            Fact::InstancePlaced { instance, model, placement } => {
                let known = self.instances.get_mut(instance);
                match known.filter(|status| !matches!(status.phase, Phase::Stopped { .. })) {
                    Some(status) => status.apply(fact),
                    None => {
                        self.instances.insert(*instance, InstanceStatus::new(model.clone(), placement.clone()));
                    }
                }
            }
            Fact::ShardFetching { instance, .. }
            | Fact::ShardLoading { instance, .. }
            | Fact::ShardLoaded { instance, .. }
            | Fact::ShardSpeed { instance, .. }
            | Fact::ShardLeaks { instance, .. }
            | Fact::InstanceReady { instance, .. }
            | Fact::ShardFailed { instance, .. }
            | Fact::InstanceStopped { instance, .. }
            | Fact::RequestsChanged { instance, .. } => {
                if let Some(status) = self.instances.get_mut(instance) {
                    let before = status.totals;
                    status.apply(fact);
                    let (name, done) = (status.model.name.clone(), status.totals.since(before));
                    self.count(name, done);
                }
                if matches!(fact, Fact::InstanceStopped { .. }) {
                    self.forget_old();
                }
            }
            Fact::MemberReported { node, report } => {
                self.outside.remove(node);
                self.gone.remove(node);
                self.members.insert(*node, MemberReport::clone(report));
            }
            Fact::MemberLost { node, reason, at_s } => {
                self.outside.remove(node);
                if let Some(member) = self.members.remove(node) {
                    self.gone.insert(*node, Gone { name: member.name, reason: reason.clone(), at_s: *at_s });
                    while self.gone.len() > TROUBLES_MAX {
                        let oldest = self.gone.iter().min_by_key(|(_, gone)| gone.at_s).map(|(&id, _)| id);
                        oldest.map(|id| self.gone.remove(&id));
                    }
                }
            }
            Fact::AddressesChanged(addresses) => self.addresses.clone_from(addresses),
            Fact::AddressTried { address, failure: None } => drop(self.unreached.remove(address)),
            Fact::AddressTried { address, failure: Some(failure) } => {
                if self.unreached.len() < TROUBLES_MAX || self.unreached.contains_key(address) {
                    self.unreached.insert(*address, failure.clone());
                }
            }
            Fact::EvictionsChanged(nodes) => self.evicted.clone_from(nodes),
            Fact::SameKeyOver(clash) => drop(self.same_key.remove(&clash.second)),
            Fact::SameKey(clash) => {
                if self.same_key.len() < TROUBLES_MAX || self.same_key.contains_key(&clash.second) {
                    self.same_key.insert(clash.second, *clash);
                }
            }
            Fact::PeerOutside { node, outside } => {
                self.members.remove(node);
                self.outside.insert(*node, outside.clone());
            }
        }
    }

    /// Adds what a head has done to the node's totals, which outlive heads and instances.
    fn count(&mut self, model: String, done: Totals) {
        if done == Totals::default() || self.totals.len() >= COUNTED_MAX && !self.totals.contains_key(&model) {
            return;
        }
        self.totals.entry(model).or_default().add(done);
    }

    /// Drops the stopped instances beyond [`STOPPED_KEPT`], lowest ids first.
    fn forget_old(&mut self) {
        let stopped = self.instances.iter().filter(|(_, status)| matches!(status.phase, Phase::Stopped { .. }));
        let stopped: Vec<InstanceId> = stopped.map(|(&id, _)| id).collect();
        for id in stopped.iter().take(stopped.len().saturating_sub(STOPPED_KEPT)) {
            self.instances.remove(id);
        }
    }
}

impl InstanceStatus {
    /// Applies a fact about this instance; facts of other kinds change nothing. A stopped instance changes its phase
    /// only when it is placed again: its shards may still report.
    pub(crate) fn apply(&mut self, fact: &Fact) {
        let is_stopped = matches!(self.phase, Phase::Stopped { .. });
        match fact {
            Fact::InstancePlaced { model, placement, .. } => {
                self.model.clone_from(model);
                self.move_to(placement.clone());
            }
            Fact::ShardLoading { .. }
            | Fact::ShardFetching { .. }
            | Fact::ShardLoaded { .. }
            | Fact::ShardSpeed { .. }
            | Fact::ShardLeaks { .. }
            | Fact::InstanceReady { .. }
            | Fact::ShardFailed { .. }
                if is_stopped => {}
            Fact::ShardLoaded { stage, device, .. } => {
                self.devices.insert(*stage, device.clone());
                self.slow.remove(stage);
                self.leaks.remove(stage);
            }
            Fact::ShardLeaks { stage, growth: Some(growth), .. } => drop(self.leaks.insert(*stage, *growth)),
            Fact::ShardLeaks { stage, growth: None, .. } => drop(self.leaks.remove(stage)),
            Fact::ShardSpeed { stage, slow_down: None, .. } => drop(self.slow.remove(stage)),
            Fact::ShardSpeed { stage, slow_down: Some(slow_down), .. } => drop(self.slow.insert(*stage, *slow_down)),
            Fact::ShardLoading { stage, loaded_bytes, total_bytes, .. } => {
                self.loading(*stage, *loaded_bytes, *total_bytes);
            }
            Fact::ShardFetching { stage, fetched_bytes, total_bytes, .. } => {
                self.fetching(*stage, *fetched_bytes, *total_bytes);
            }
            Fact::InstanceReady { epoch, .. } => (self.phase, self.epoch) = (Phase::Ready, *epoch),
            Fact::ShardFailed { error, .. } => self.phase = Phase::Recovering { error: error.clone() },
            Fact::InstanceStopped { error, .. } => self.phase = Phase::Stopped { error: error.clone() },
            Fact::RequestsChanged { load, totals, .. } => {
                self.requests_running = load.running;
                self.requests_waiting = load.waiting;
                self.pages_used = load.pages_used;
                self.pages_total = load.pages_total;
                self.totals = *totals;
            }
            Fact::DeviceFound(_)
            | Fact::GpuFound(_)
            | Fact::GpusMeasured(_)
            | Fact::DeviceFailed { .. }
            | Fact::DeviceRecovered(_)
            | Fact::MachineLeaks(_)
            | Fact::MachineMeasured(_)
            | Fact::MemberReported { .. }
            | Fact::MemberLost { .. }
            | Fact::AddressesChanged(_)
            | Fact::AddressTried { .. }
            | Fact::SameKey(_)
            | Fact::SameKeyOver(_)
            | Fact::EvictionsChanged(_)
            | Fact::PeerOutside { .. } => {}
        }
    }
}

#[cfg(test)]
mod tests;
