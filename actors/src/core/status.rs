//! The status of a machine and of an instance, as users see it and members report it.

use crate::core::memory_watch::MemoryGrowth;
use crate::core::plan::Placement;
use crate::core::spec::Model;
use crate::core::step_times::SlowDown;
use exo_engines::engine::DeviceId;
use exo_engines::hardware::{Gpu, GpuSample, PciAddress};
use exo_net::NodeId;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::net::SocketAddr;

/// The present load of an instance.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Load {
    /// Requests that prefill or decode.
    pub running: usize,
    /// Requests that wait for pages, or for their turn.
    pub waiting: usize,
    /// Pages of each shard's cache in use, cached prefixes included.
    pub pages_used: u32,
    /// Pages of each shard's cache.
    pub pages_total: u32,
}

/// What an instance has done since its head started.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Totals {
    /// Requests that have ended, successfully or not.
    pub requests: u64,
    /// Tokens of the prompts that were admitted to the pipeline.
    pub prompt_tokens: u64,
    /// Tokens of prompts found in the prefix cache.
    #[serde(rename = "reused_tokens")]
    pub cached_tokens: u64,
    /// Sampled tokens.
    pub generated_tokens: u64,
    /// Drafted tokens, which were computed before their turn.
    #[serde(default)]
    pub drafted_tokens: u64,
    /// Drafted tokens that the model drew.
    #[serde(default)]
    pub accepted_tokens: u64,
}

impl Totals {
    /// What was done since `before`. A head that has started again counts from 0.
    pub(crate) fn since(self, before: Self) -> Self {
        if self.requests < before.requests || self.generated_tokens < before.generated_tokens {
            return self;
        }
        Self {
            requests: self.requests - before.requests,
            prompt_tokens: self.prompt_tokens.saturating_sub(before.prompt_tokens),
            cached_tokens: self.cached_tokens.saturating_sub(before.cached_tokens),
            generated_tokens: self.generated_tokens - before.generated_tokens,
            drafted_tokens: self.drafted_tokens.saturating_sub(before.drafted_tokens),
            accepted_tokens: self.accepted_tokens.saturating_sub(before.accepted_tokens),
        }
    }

    pub(crate) fn add(&mut self, done: Self) {
        self.requests += done.requests;
        self.prompt_tokens += done.prompt_tokens;
        self.cached_tokens += done.cached_tokens;
        self.generated_tokens += done.generated_tokens;
        self.drafted_tokens += done.drafted_tokens;
        self.accepted_tokens += done.accepted_tokens;
    }
}

/// Two running nodes with the same key: the data folder of one is a copy of the other's.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct KeyClash {
    /// The id of both.
    pub node: NodeId,
    /// The address of the node that stays connected.
    pub first: SocketAddr,
    /// The address of the node that is refused.
    pub second: SocketAddr,
}

/// A measurement of a machine. A value that cannot be read is `None`, never 0.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Machine {
    /// The machine's memory.
    pub memory_total_bytes: Option<u64>,
    /// The machine's memory that programs can still use.
    pub memory_free_bytes: Option<u64>,
    /// Resident memory of this process and of those of its engines.
    pub process_bytes: Option<u64>,
    /// The share of all cores in use, 0 to 1.
    pub cpu_utilisation: Option<f32>,
    /// Memory that neither processes nor caches account for, such as that of drivers.
    #[serde(default)]
    pub unaccounted_bytes: Option<u64>,
}

/// A GPU of a machine, whether an engine uses it or not.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct GpuStatus {
    /// What the kernel tells about it.
    pub gpu: Gpu,
    /// Why no engine uses it; `None`: one does.
    pub unused: Option<Unused>,
    /// Its latest measurement; `None` before the first one.
    pub sample: Option<GpuSample>,
}

/// Enters measurements. A GPU that was not found when the node started has none.
pub(crate) fn measured(gpus: &mut BTreeMap<PciAddress, GpuStatus>, samples: &BTreeMap<PciAddress, GpuSample>) {
    for (address, sample) in samples {
        if let Some(status) = gpus.get_mut(address) {
            status.sample = Some(sample.clone());
        }
    }
}

/// Why no engine uses a GPU.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Unused {
    /// What is missing.
    pub error: String,
    /// Advice for the user.
    pub remedy: String,
}

/// The phase of an instance.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Phase {
    /// Its nodes fetch weights, from each other or from a source.
    Fetching {
        /// Bytes fetched by all stages.
        fetched_bytes: u64,
        /// Bytes that all stages fetch.
        total_bytes: u64,
    },
    /// Its shards load weights.
    Loading {
        /// Bytes loaded by all stages.
        loaded_bytes: u64,
        /// Bytes that all stages load.
        total_bytes: u64,
    },
    /// It serves.
    Ready,
    /// A shard failed and is being replaced; requests wait.
    Recovering {
        /// What failed.
        error: String,
    },
    /// It has stopped.
    Stopped {
        /// Why, if it failed.
        error: Option<String>,
    },
}

impl Phase {
    /// Whether weights are being fetched or loaded.
    pub fn is_loading(&self) -> bool {
        matches!(self, Self::Fetching { .. } | Self::Loading { .. })
    }
}

/// The status of one instance.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct InstanceStatus {
    /// What it runs.
    pub model: Model,
    /// Where it runs, or is to run.
    pub placement: Placement,
    /// The device on which each stage's shard was last loaded, by the stage's position: another than that of the
    /// placement while that one is not well.
    #[serde(default)]
    pub devices: BTreeMap<usize, DeviceId>,
    /// The stages whose shards have become slow, by their position.
    #[serde(default)]
    pub slow: BTreeMap<usize, SlowDown>,
    /// The stages whose processes hold memory that nothing explains, by their position.
    #[serde(default)]
    pub leaks: BTreeMap<usize, MemoryGrowth>,
    /// Its phase.
    pub phase: Phase,
    /// The epoch of its latest incarnation.
    pub epoch: u64,
    /// For each stage, bytes fetched and bytes to fetch.
    fetching: BTreeMap<usize, (u64, u64)>,
    /// For each stage, bytes loaded and bytes to load.
    loading: BTreeMap<usize, (u64, u64)>,
    /// Requests that prefill or decode.
    pub requests_running: usize,
    /// Requests that wait for pages, or for their turn.
    pub requests_waiting: usize,
    /// Pages of each shard's cache in use, cached prefixes included.
    pub pages_used: u32,
    /// Pages of each shard's cache.
    pub pages_total: u32,
    /// What it has done so far.
    pub totals: Totals,
}

impl InstanceStatus {
    /// Creates the status of an instance that has loaded nothing yet.
    pub(crate) fn new(model: Model, placement: Placement) -> Self {
        Self {
            model,
            placement,
            devices: BTreeMap::new(),
            slow: BTreeMap::new(),
            leaks: BTreeMap::new(),
            phase: Phase::Loading { loaded_bytes: 0, total_bytes: 0 },
            epoch: 0,
            fetching: BTreeMap::new(),
            loading: BTreeMap::new(),
            requests_running: 0,
            requests_waiting: 0,
            pages_used: 0,
            pages_total: 0,
            totals: Totals::default(),
        }
    }

    /// Moves the instance to a new placement. The phase stays: it may serve at the old placement until the new one is
    /// loaded.
    pub(super) fn move_to(&mut self, placement: Placement) {
        self.placement = placement;
        self.devices.clear();
        self.slow.clear();
        self.leaks.clear();
        self.loading.clear();
        self.fetching.clear();
    }

    pub(super) fn fetching(&mut self, stage: usize, fetched: u64, total: u64) {
        self.fetching.insert(stage, (fetched, total));
        if matches!(self.phase, Phase::Loading { .. } | Phase::Fetching { .. }) {
            let (fetched_bytes, total_bytes) = sum(&self.fetching);
            self.phase = Phase::Fetching { fetched_bytes, total_bytes };
        }
    }

    pub(super) fn loading(&mut self, stage: usize, loaded: u64, total: u64) {
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
    let add =
        |(done, total): (u64, u64), part: &(u64, u64)| (done.saturating_add(part.0), total.saturating_add(part.1));
    parts.values().fold((0, 0), add)
}
