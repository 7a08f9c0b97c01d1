//! How a machine and an instance are, as people see it and members tell each other.

use super::plan::Placement;
use super::spec::Model;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;

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

impl Phase {
    /// Whether it is on its way into memory.
    pub fn is_coming(&self) -> bool {
        matches!(self, Self::Fetching { .. } | Self::Loading { .. })
    }
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

impl InstanceState {
    /// An instance of which nothing is loaded yet.
    pub(super) fn new(model: Model, placement: Placement) -> Self {
        Self {
            model,
            placement,
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

    /// It goes on elsewhere, and serves where it is until then.
    pub(super) fn moves(&mut self, placement: Placement) {
        self.placement = placement;
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
