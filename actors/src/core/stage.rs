//! The messages between an instance's owner and the nodes of its stages.

use crate::core::desired::Stamp;
use crate::core::memory_watch::MemoryGrowth;
use crate::core::plan::{KV_PAGES_MAX, SHARD_BYTES_MAX};
use crate::core::request::RequestError;
use crate::core::spec::{FilesId, InstanceId, ModelSpec};
use crate::core::step_times::SlowDown;
use exo_engines::EngineError;
use exo_engines::engine::{DeviceId, Incarnation};
use exo_engines::model::LAYERS_MAX;
use serde::{Deserialize, Serialize};
use std::ops::Range;

/// A shard that a stage's node is to load.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(crate) struct StageTask {
    pub instance: InstanceId,
    pub stamp: Stamp,
    pub stage: usize,
    pub spec: ModelSpec,
    /// The identity of the model's files: other files with the same name are another model.
    pub files: FilesId,
    pub layers: Range<usize>,
    pub device: DeviceId,
    /// Tokens of one sequence at most: some models compute positions by it.
    pub context_tokens: u32,
    pub kv_pages: u32,
    /// Planned bytes of the weights and the cache.
    pub memory_bytes: u64,
}

impl StageTask {
    /// Whether a leader could have placed the shard.
    pub(crate) fn is_plausible(&self) -> bool {
        !self.layers.is_empty()
            && self.layers.end <= LAYERS_MAX
            && self.stage < LAYERS_MAX
            && self.kv_pages <= KV_PAGES_MAX
            && self.memory_bytes <= SHARD_BYTES_MAX
    }
}

/// What the node of a stage reports to the instance's owner.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) enum StageEvent {
    /// The node fetches the shard's weights.
    Fetching { stage: usize, fetched_bytes: u64, total_bytes: u64 },
    /// The shard's engine loads the weights.
    Loading { stage: usize, loaded_bytes: u64, total_bytes: u64 },
    /// The shard is loaded on `device`: its own, or the fallback of its node. `load` is the number of the load on
    /// that node. If another load serves, this one takes over when the shards are connected again.
    Up { stage: usize, device: DeviceId, load: u64 },
    /// The shard has become slow; `None`: it is as fast as before again.
    Speed { stage: usize, slow_down: Option<SlowDown> },
    /// The shard's process holds memory that nothing explains; `None`: it has given it back.
    Leaks { stage: usize, growth: Option<MemoryGrowth> },
    /// The shard is connected for this incarnation.
    Wired { stage: usize, incarnation: Incarnation },
    /// The shard's engine failed; its node starts another one.
    Down { stage: usize, error: EngineError },
    /// The shard failed for good on this node.
    Lost { stage: usize, error: EngineError },
    /// The node cannot get the model's files.
    NoModel { stage: usize, error: RequestError },
    /// The shard's link to the next stage broke.
    Cut { stage: usize, incarnation: Incarnation, what: String },
}

impl StageEvent {
    pub(crate) fn stage(&self) -> usize {
        match self {
            Self::Fetching { stage, .. }
            | Self::Loading { stage, .. }
            | Self::Up { stage, .. }
            | Self::Speed { stage, .. }
            | Self::Leaks { stage, .. }
            | Self::Wired { stage, .. }
            | Self::Down { stage, .. }
            | Self::Lost { stage, .. }
            | Self::NoModel { stage, .. }
            | Self::Cut { stage, .. } => *stage,
        }
    }
}
