//! What is known of the node, as one value that facts change.
//!
//! Subscribers get the state once and then the facts; applying these gives them the same state that the node has.

use super::members::MemberReport;
use super::plan::Placement;
use super::spec::FilesId;
use exo_engines::engine::DeviceReport;
use exo_net::NodeId;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::net::SocketAddr;

/// One running or starting model.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct InstanceId(pub u64);

impl std::fmt::Display for InstanceId {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}", self.0)
    }
}

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
}

/// What is run.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Model {
    /// As it was asked for, its recipe included.
    pub name: String,
    pub family: String,
    /// How most of its weights are kept.
    pub quantization: String,
    /// Tokens of one sequence at most.
    pub context_tokens: u32,
    pub files: FilesId,
}

/// What an instance has to do now.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Load {
    pub running: usize,
    pub waiting: usize,
    pub pages_used: u32,
    pub pages_total: u32,
}

/// What an instance has done.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Totals {
    /// That have ended, in whatever way.
    pub requests: u64,
    pub prompt_tokens: u64,
    /// Of the prompts' tokens, those that had been computed for others.
    pub reused_tokens: u64,
    pub generated_tokens: u64,
}

/// Measurements of this machine. What cannot be read is `None`, never 0.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Machine {
    pub memory_total_bytes: Option<u64>,
    pub memory_free_bytes: Option<u64>,
    /// Resident memory of this process.
    pub process_bytes: Option<u64>,
    /// 0 to 1, over all cores.
    pub cpu_utilisation: Option<f32>,
}

/// Where an instance is in its life.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Phase {
    /// Weights come from other nodes, or from a source.
    Fetching {
        fetched_bytes: u64,
        total_bytes: u64,
    },
    Loading {
        loaded_bytes: u64,
        total_bytes: u64,
    },
    Ready,
    /// A shard failed and is being replaced; requests wait.
    Recovering {
        error: String,
    },
    Stopped {
        error: Option<String>,
    },
}

/// One instance as people see it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct InstanceState {
    pub model: Model,
    pub placement: Placement,
    pub phase: Phase,
    pub epoch: u64,
    /// Bytes fetched for each stage, and to fetch.
    fetching: BTreeMap<usize, (u64, u64)>,
    /// Bytes loaded by each stage, and to load.
    loading: BTreeMap<usize, (u64, u64)>,
    pub requests_running: usize,
    pub requests_waiting: usize,
    pub pages_used: u32,
    pub pages_total: u32,
    pub totals: Totals,
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
            Fact::MemberReported { node, report } => drop(self.members.insert(*node, MemberReport::clone(report))),
            Fact::MemberGone { node } => drop(self.members.remove(node)),
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
            // It goes on elsewhere, and serves where it is until then.
            state.placement = placement.clone();
            state.loading.clear();
            state.fetching.clear();
            return;
        }
        let state = InstanceState {
            model: model.clone(),
            placement: placement.clone(),
            phase: Phase::Loading { loaded_bytes: 0, total_bytes: 0 },
            epoch: 0,
            fetching: BTreeMap::new(),
            loading: BTreeMap::new(),
            requests_running: 0,
            requests_waiting: 0,
            pages_used: 0,
            pages_total: 0,
            totals: Totals::default(),
        };
        self.instances.insert(instance, state);
    }

    fn forget_old(&mut self) {
        let stopped = self.instances.iter().filter(|(_, state)| matches!(state.phase, Phase::Stopped { .. }));
        let stopped: Vec<InstanceId> = stopped.map(|(&id, _)| id).collect();
        for id in stopped.iter().take(stopped.len().saturating_sub(STOPPED_KEPT)) {
            self.instances.remove(id);
        }
    }
}

impl InstanceState {
    fn fetching(&mut self, stage: usize, fetched: u64, total: u64) {
        self.fetching.insert(stage, (fetched, total));
        if matches!(self.phase, Phase::Loading { .. } | Phase::Fetching { .. }) {
            let (fetched_bytes, total_bytes) = sum(&self.fetching);
            self.phase = Phase::Fetching { fetched_bytes, total_bytes };
        }
    }

    fn loading(&mut self, stage: usize, loaded: u64, total: u64) {
        self.loading.insert(stage, (loaded, total));
        let is_fetched = self.fetching.values().all(|(fetched, total)| fetched >= total);
        let is_loading =
            matches!(self.phase, Phase::Loading { .. }) || is_fetched && matches!(self.phase, Phase::Fetching { .. });
        if is_loading {
            let (loaded_bytes, total_bytes) = sum(&self.loading);
            self.phase = Phase::Loading { loaded_bytes, total_bytes };
        }
    }
}

fn sum(parts: &BTreeMap<usize, (u64, u64)>) -> (u64, u64) {
    parts.values().fold((0, 0), |(done, total), part| (done + part.0, total + part.1))
}

#[cfg(test)]
mod tests {
    use super::*;

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
