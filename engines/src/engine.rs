//! The port between actors and engines.
//!
//! ```text
//! EngineFactory ─probe─► DeviceReport     ─open─► Engine ─load─► warm_up ─► forward(Step, Input) → Output, again and
//! again
//! ```
//! All message types are plain data, so an engine can run in another thread or another process.
//! A [`Step`] carries operations on sequences, then the rows to compute, in order: batching, chunked prefill and replay
//! after a failure differ only in their rows.

use crate::error::EngineError;
use crate::model::{Architecture, WeightSource};
use serde::{Deserialize, Serialize};
use std::ops::{ControlFlow, Range};
use std::time::Duration;

/// Tokens in one page of the KV cache.
pub const PAGE_TOKENS: u32 = 32;

/// A compute device of this machine, such as `cpu` or `opencl:0`.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct DeviceId(pub String);

impl std::fmt::Display for DeviceId {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.0)
    }
}

/// The kind of a compute device.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum DeviceKind {
    Cpu,
    Gpu,
}

/// A device on which an engine can be opened.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct DeviceReport {
    pub id: DeviceId,
    pub kind: DeviceKind,
    /// The engine's name.
    pub engine: String,
    /// The vendor's name of the device.
    pub name: String,
    /// Number of cores, or of the vendor's equivalent units.
    pub compute_units: Option<u32>,
    /// The name of the kernel tier in use.
    pub tier: String,
}

/// The id of a token sequence, which has its own KV cache.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct SeqId(pub u64);

/// The number of a step within its incarnation.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct StepId(pub u64);

/// One incarnation of an instance. Ordered by epoch, then owner; a shard refuses steps of a lower incarnation than it
/// has seen.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Incarnation {
    pub epoch: u64,
    /// The bytes of the owning node's id. Engines only compare them.
    pub owner: [u8; 32],
}

/// The element type of cached keys and values.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum KvElement {
    F16,
    F32,
}

impl KvElement {
    pub fn bytes(self) -> usize {
        match self {
            Self::F16 => 2,
            Self::F32 => 4,
        }
    }

    pub fn name(self) -> &'static str {
        match self {
            Self::F16 => "f16",
            Self::F32 => "f32",
        }
    }
}

/// The part of each matrix that a shard holds: rank `rank` of `of` ranks.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct TensorRank {
    pub rank: u32,
    pub of: u32,
}

impl TensorRank {
    /// The rank of a shard that holds every matrix whole.
    pub const WHOLE: Self = Self { rank: 0, of: 1 };
}

/// The part of a model that one engine computes.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct ShardSpec {
    pub architecture: Architecture,
    /// Half-open range of layers. The shard of layer 0 takes tokens; the shard of the last layer returns logits.
    pub layers: Range<usize>,
    pub tensor: TensorRank,
    pub kv_element: KvElement,
    /// The cache's capacity, in pages of [`PAGE_TOKENS`] tokens, shared by all sequences.
    pub kv_pages: u32,
}

impl ShardSpec {
    pub fn is_first(&self) -> bool {
        self.layers.start == 0
    }

    pub fn is_last(&self) -> bool {
        self.layers.end == self.architecture.layers.len()
    }

    /// The cache's capacity, in bytes.
    pub fn kv_bytes(&self) -> u64 {
        let per_token = self.architecture.kv_bytes_per_token(self.layers.clone(), self.kv_element.bytes());
        per_token * u64::from(PAGE_TOKENS) * u64::from(self.kv_pages)
    }
}

/// The progress of a load.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct LoadProgress {
    pub loaded_bytes: u64,
    pub total_bytes: u64,
}

/// The result of a load.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct LoadReport {
    /// The size of the weights in the engine's own layout.
    pub weight_bytes: u64,
    /// The cache's capacity.
    pub kv_bytes: u64,
    /// Engine, version, kernel tier and KV type. Engines with equal fingerprints compute the same bits.
    pub fingerprint: String,
    pub elapsed: Duration,
}

/// The first timing of a loaded engine.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct WarmUpReport {
    /// The time to compute one row in all layers of the shard.
    pub row: Duration,
}

/// A change to sequences, applied before the rows of a step.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Operation {
    /// Drops all positions of `seq` from `length_tokens` on.
    Truncate { seq: SeqId, length_tokens: u32 },
    /// Makes a new sequence `to` share the first `length_tokens` positions of `from`.
    Fork { from: SeqId, to: SeqId, length_tokens: u32 },
    /// Drops `seq` from the cache.
    Release { seq: SeqId },
}

/// One token of one sequence.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Row {
    pub seq: SeqId,
    /// Absolute position. Rows of one sequence are adjacent and in order, and start where its cache ends.
    pub position: u32,
    /// Whether the last shard computes this row's logits.
    pub wants_logits: bool,
}

/// One forward pass of a shard.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Step {
    pub incarnation: Incarnation,
    pub id: StepId,
    pub operations: Vec<Operation>,
    pub rows: Vec<Row>,
}

/// The input of a shard: one token, or one hidden row, for each row of the step.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub enum Input {
    Tokens(Vec<u32>),
    /// Rows of the residual stream: \[rows]\[hidden], f32.
    Hidden(Vec<f32>),
}

/// The output of a shard.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub enum OutputRows {
    /// All rows of the residual stream: \[rows]\[hidden], f32.
    Hidden(Vec<f32>),
    /// One row of logits over the vocabulary for each row that wants logits, in order.
    Logits(Vec<f32>),
}

/// The result of a step.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Output {
    pub rows: OutputRows,
    /// Device memory in use by the engine.
    pub memory_bytes: u64,
    /// Cache pages in use.
    pub pages_used: u32,
}

/// Finds devices of one kind and opens engines on them.
pub trait EngineFactory: Send + Sync + std::fmt::Debug {
    /// The engine's name: `cpu`, `candle`, …
    fn name(&self) -> &'static str;

    /// Lists usable devices, best first.
    fn probe(&self) -> Vec<DeviceReport>;

    /// Opens an engine with nothing loaded on `device`.
    ///
    /// # Errors
    /// [`EngineError::NoDevice`] if the factory has no such device.
    fn open(&self, device: &DeviceId) -> Result<Box<dyn Engine>, EngineError>;
}

/// Computes one shard on one device. An engine is created, used and dropped on one thread.
pub trait Engine {
    /// Reads the shard's weights and reserves its cache. Reports progress to `on` after each tensor; `on` returns
    /// whether to continue.
    ///
    /// # Errors
    /// [`EngineError`] if weights are missing, malformed or not finite, or memory does not suffice;
    /// [`EngineError::Interrupted`] if `on` returned `Break`.
    fn load(
        &mut self,
        shard: &ShardSpec,
        weights: &WeightSource,
        on: &mut dyn FnMut(LoadProgress) -> ControlFlow<()>,
    ) -> Result<LoadReport, EngineError>;

    /// Computes one row, checks that the result is finite, and times it. Leaves the cache empty.
    ///
    /// # Errors
    /// [`EngineError::SelfTest`] if the result is not finite.
    fn warm_up(&mut self) -> Result<WarmUpReport, EngineError>;

    /// Applies the step's operations, then computes its rows.
    ///
    /// # Errors
    /// [`EngineError::StaleIncarnation`] for a step of an older incarnation; a newer one empties the cache first.
    /// [`EngineError::BadStep`] for rows that do not start where their sequences end.
    /// [`EngineError::CacheFull`] if the pages do not suffice: nothing is computed, and the sequences are unchanged.
    fn forward(&mut self, step: &Step, input: Input) -> Result<Output, EngineError>;
}
