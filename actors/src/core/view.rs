//! What is known of the node, as one value that facts change.
//!
//! Subscribers get the state once and then the facts; applying these gives them the same state that the node has.

use super::circle::Apart;
use super::members::MemberReport;
use super::plan::Placement;
use super::spec::{InstanceId, Model};
use super::state::{InstanceState, Load, Machine, Phase, Totals};
use exo_engines::engine::DeviceReport;
use exo_net::NodeId;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::net::SocketAddr;

/// Something that happened.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub enum Fact {
    DeviceFound(DeviceReport),
    MachineMeasured(Machine),
    InstancePlaced {
        instance: InstanceId,
        model: Model,
        placement: Placement,
    },
    ShardFetching {
        instance: InstanceId,
        stage: usize,
        fetched_bytes: u64,
        total_bytes: u64,
    },
    ShardLoading {
        instance: InstanceId,
        stage: usize,
        loaded_bytes: u64,
        total_bytes: u64,
    },
    InstanceReady {
        instance: InstanceId,
        epoch: u64,
    },
    ShardFailed {
        instance: InstanceId,
        stage: usize,
        error: String,
    },
    InstanceStopped {
        instance: InstanceId,
        error: Option<String>,
    },
    RequestsChanged {
        instance: InstanceId,
        load: Load,
        totals: Totals,
    },
    /// Another member has told of itself.
    MemberReported {
        node: NodeId,
        report: Box<MemberReport>,
    },
    MemberGone {
        node: NodeId,
    },
    /// Another node is here, and plans without this one.
    MemberApart {
        node: NodeId,
        apart: Apart,
    },
}

/// The node as people see it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct State {
    pub node: NodeId,
    /// As its user calls it.
    pub name: String,
    /// Where others reach it; none where it is alone.
    pub addresses: Vec<SocketAddr>,
    pub devices: Vec<DeviceReport>,
    pub machine: Machine,
    /// Those whose head is on this node.
    pub instances: BTreeMap<InstanceId, InstanceState>,
    /// The other members that are here, with the instances whose heads they have.
    pub members: BTreeMap<NodeId, MemberReport>,
    /// Nodes that are here and no members, for not all reach each other.
    pub apart: BTreeMap<NodeId, Apart>,
    /// Facts applied so far.
    pub version: u64,
}

/// Instances that have stopped stay to be seen, but not all of them for ever.
const STOPPED_KEPT: usize = 16;

impl State {
    /// The state before any fact.
    pub fn new(node: NodeId, name: String, addresses: Vec<SocketAddr>) -> Self {
        let (devices, machine) = (Vec::new(), Machine::default());
        Self {
            node,
            name,
            addresses,
            devices,
            machine,
            instances: BTreeMap::new(),
            members: BTreeMap::new(),
            apart: BTreeMap::new(),
            version: 0,
        }
    }

    /// Instances that have not stopped.
    pub fn live(&self) -> impl Iterator<Item = (InstanceId, &InstanceState)> {
        let instances = self.instances.iter().map(|(&id, instance)| (id, instance));
        instances.filter(|(_, instance)| !matches!(instance.phase, Phase::Stopped { .. }))
    }

    /// Instances that have not stopped, those of other members included, as those tell of them every second.
    pub fn everywhere(&self) -> impl Iterator<Item = (InstanceId, &InstanceState)> {
        let owned = self.members.values().flat_map(|member| &member.owned);
        self.live().chain(owned.filter_map(|(&id, owned)| Some((id, owned.state.as_ref()?))))
    }

    /// Takes one fact into account. Facts about an instance that is not there change nothing.
    pub fn apply(&mut self, fact: &Fact) {
        self.version += 1;
        match fact {
            Fact::DeviceFound(report) => {
                self.devices.retain(|device| device.id != report.id);
                self.devices.push(report.clone());
            }
            Fact::MachineMeasured(machine) => self.machine = machine.clone(),
            Fact::InstancePlaced { instance, model, placement } => self.placed(*instance, model, placement),
            Fact::ShardLoading { instance, stage, loaded_bytes, total_bytes } => {
                self.change(*instance, |state| state.loading(*stage, *loaded_bytes, *total_bytes))
            }
            Fact::ShardFetching { instance, stage, fetched_bytes, total_bytes } => {
                self.change(*instance, |state| state.fetching(*stage, *fetched_bytes, *total_bytes))
            }
            Fact::InstanceReady { instance, epoch } => self.change(*instance, |state| {
                state.phase = Phase::Ready;
                state.epoch = *epoch;
            }),
            Fact::ShardFailed { instance, error, .. } => self.change(*instance, |state| {
                state.phase = Phase::Recovering { error: error.clone() };
            }),
            Fact::InstanceStopped { instance, error } => {
                self.change(*instance, |state| state.phase = Phase::Stopped { error: error.clone() });
                self.forget_old();
            }
            Fact::MemberReported { node, report } => {
                self.apart.remove(node);
                self.members.insert(*node, MemberReport::clone(report));
            }
            Fact::MemberGone { node } => {
                self.apart.remove(node);
                self.members.remove(node);
            }
            Fact::MemberApart { node, apart } => {
                self.members.remove(node);
                self.apart.insert(*node, apart.clone());
            }
            Fact::RequestsChanged { instance, load, totals } => self.change(*instance, |state| {
                state.requests_running = load.running;
                state.requests_waiting = load.waiting;
                state.pages_used = load.pages_used;
                state.pages_total = load.pages_total;
                state.totals = *totals;
            }),
        }
    }

    fn change(&mut self, instance: InstanceId, change: impl FnOnce(&mut InstanceState)) {
        if let Some(state) = self.instances.get_mut(&instance) {
            change(state);
        }
    }

    fn placed(&mut self, instance: InstanceId, model: &Model, placement: &Placement) {
        let known = self.instances.get_mut(&instance);
        if let Some(state) = known.filter(|state| !matches!(state.phase, Phase::Stopped { .. })) {
            return state.moves(placement.clone());
        }
        self.instances.insert(instance, InstanceState::new(model.clone(), placement.clone()));
    }

    fn forget_old(&mut self) {
        let stopped = self.instances.iter().filter(|(_, state)| matches!(state.phase, Phase::Stopped { .. }));
        let stopped: Vec<InstanceId> = stopped.map(|(&id, _)| id).collect();
        for id in stopped.iter().take(stopped.len().saturating_sub(STOPPED_KEPT)) {
            self.instances.remove(id);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::core::spec::FilesId;

    #[test]
    fn facts_tell_an_instance_s_life() {
        let node = exo_net::Identity::ephemeral().expect("random bytes").node_id();
        let mut state = State::new(node, "here".to_owned(), Vec::new());
        let instance = InstanceId(1);
        let phase = |state: &State| state.instances[&instance].phase.clone();
        state.apply(&Fact::ShardLoading { instance, stage: 0, loaded_bytes: 1, total_bytes: 2 });
        assert!(state.instances.is_empty());
        let model = Model {
            name: "m".to_owned(),
            family: String::new(),
            quantization: String::new(),
            context_tokens: 1,
            vocabulary: 256,
            files: FilesId([0; 32]),
        };
        let placement = Placement { stages: Vec::new() };
        state.apply(&Fact::InstancePlaced { instance, model: model.clone(), placement });
        state.apply(&Fact::ShardFetching { instance, stage: 0, fetched_bytes: 5, total_bytes: 9 });
        assert_eq!(phase(&state), Phase::Fetching { fetched_bytes: 5, total_bytes: 9 });
        state.apply(&Fact::ShardFetching { instance, stage: 0, fetched_bytes: 9, total_bytes: 9 });
        state.apply(&Fact::ShardLoading { instance, stage: 0, loaded_bytes: 1, total_bytes: 2 });
        state.apply(&Fact::ShardLoading { instance, stage: 1, loaded_bytes: 3, total_bytes: 4 });
        assert_eq!(phase(&state), Phase::Loading { loaded_bytes: 4, total_bytes: 6 });
        state.apply(&Fact::InstanceReady { instance, epoch: 1 });
        assert_eq!(phase(&state), Phase::Ready);
        state.apply(&Fact::ShardFailed { instance, stage: 1, error: "gone".to_owned() });
        assert_eq!(phase(&state), Phase::Recovering { error: "gone".to_owned() });
        for id in 2..100 {
            let instance = InstanceId(id);
            state.apply(&Fact::InstancePlaced {
                instance,
                model: model.clone(),
                placement: Placement { stages: Vec::new() },
            });
            state.apply(&Fact::InstanceStopped { instance, error: None });
        }
        assert_eq!(state.instances.len(), STOPPED_KEPT + 1);
    }
}
