//! The port between actors and engines.
//!
//! ```text
//! EngineFactory ─probe─► DeviceReport     ─open─► Engine ─load─► warm_up ─► forward(Step, Input) → Output, again and again
//! ```
//! Every type here is plain data, so that an engine behind a thread and one behind a process are the same to its user.
//! A [`Step`] carries the operations on sequences and then the rows to compute, in one order: batching, chunked
//! prefill and replay after a failure are all just rows.

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

/// What kind of processor a device is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum DeviceKind {
    Cpu,
    Gpu,
}

/// A device that an engine can be opened on.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct DeviceReport {
    pub id: DeviceId,
    pub kind: DeviceKind,
    /// The engine's name.
    pub engine: String,
    /// As the vendor calls it.
    pub name: String,
    /// Cores, or what the vendor counts instead.
    pub compute_units: Option<u32>,
    /// The kernel tier in use.
    pub tier: String,
}

/// A sequence of tokens with a cache of its own.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct SeqId(pub u64);

/// Counts steps within an incarnation.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct StepId(pub u64);

/// One life of an instance. Totally ordered, epoch first: a shard refuses steps of a lower one than it has seen.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Incarnation {
    pub epoch: u64,
    /// The bytes of the owning node's id. Engines only compare it.
    pub owner: [u8; 32],
}

/// How keys and values are stored.
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

/// Which part of each matrix a shard has: rank `rank` of `of`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct TensorRank {
    pub rank: u32,
    pub of: u32,
}

impl TensorRank {
    /// The whole of every matrix.
    pub const WHOLE: Self = Self { rank: 0, of: 1 };
}

/// The part of a model that one engine computes.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct ShardSpec {
    pub architecture: Architecture,
    /// Layers, first included, last not. The shard of layer 0 takes tokens, that of the last layer gives logits.
    pub layers: Range<usize>,
    pub tensor: TensorRank,
    pub kv_element: KvElement,
    /// The bound of the cache, in pages of [`PAGE_TOKENS`] tokens, shared by all sequences.
    pub kv_pages: u32,
}

impl ShardSpec {
    pub fn is_first(&self) -> bool {
        self.layers.start == 0
    }

    pub fn is_last(&self) -> bool {
        self.layers.end == self.architecture.layers.len()
    }

    /// The bound of the cache, in bytes.
    pub fn kv_bytes(&self) -> u64 {
        let per_token = self.architecture.kv_bytes_per_token(self.layers.clone(), self.kv_element.bytes());
        per_token * u64::from(PAGE_TOKENS) * u64::from(self.kv_pages)
    }
}

/// How far a load is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct LoadProgress {
    pub loaded_bytes: u64,
    pub total_bytes: u64,
}

/// What a load came to.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct LoadReport {
    /// Weights, as the engine keeps them.
    pub weight_bytes: u64,
    /// The bound of the cache.
    pub kv_bytes: u64,
    /// Engine, version, kernel tier and KV type. Equal fingerprints compute equal bits.
    pub fingerprint: String,
    pub elapsed: Duration,
}

/// The first timing of a loaded engine.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct WarmUpReport {
    /// One row through all of the shard's layers.
    pub row: Duration,
}

/// A change to sequences, before the rows of a step.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Operation {
    /// Forgets all positions of `seq` from `length_tokens` on.
    Truncate { seq: SeqId, length_tokens: u32 },
    /// Makes `to`, which is empty, share the first `length_tokens` positions of `from`.
    Fork { from: SeqId, to: SeqId, length_tokens: u32 },
    /// Forgets `seq`.
    Release { seq: SeqId },
}

/// One token of one sequence.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Row {
    pub seq: SeqId,
    /// Absolute. Rows of one sequence stand together, in order, and go on where its cache ends.
    pub position: u32,
    /// Whether the last shard computes this row's logits.
    pub wants_logits: bool,
}

/// One pass through a shard.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Step {
    pub incarnation: Incarnation,
    pub id: StepId,
    pub operations: Vec<Operation>,
    pub rows: Vec<Row>,
}

/// What goes into a shard: one token, or one hidden row, for each row of the step.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub enum Input {
    Tokens(Vec<u32>),
    /// Rows of the residual stream, f32, side by side.
    Hidden(Vec<f32>),
}

/// What comes out of a shard.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub enum OutputRows {
    /// All rows of the residual stream, f32, side by side.
    Hidden(Vec<f32>),
    /// One vocabulary row for each row that wants logits, in order.
    Logits(Vec<f32>),
}

/// A step's result.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Output {
    pub rows: OutputRows,
    /// Device memory that the engine has in use.
    pub memory_bytes: u64,
    /// Pages of the cache in use.
    pub pages_used: u32,
}

/// Finds devices of one kind and opens engines on them.
pub trait EngineFactory: Send + Sync + std::fmt::Debug {
    /// The engine's name: `cpu`, `candle`, …
    fn name(&self) -> &'static str;

    /// Usable devices, best first.
    fn probe(&self) -> Vec<DeviceReport>;

    /// An empty engine on `device`.
    ///
    /// # Errors
    /// [`EngineError::NoDevice`] where the factory has no such device.
    fn open(&self, device: &DeviceId) -> Result<Box<dyn Engine>, EngineError>;
}

/// One device's compute for one shard. Made, used and dropped on one thread.
pub trait Engine {
    /// Reads the shard's weights and reserves its cache. `on` hears of progress after each tensor, and says whether the
    /// shard is still wanted.
    ///
    /// # Errors
    /// [`EngineError`] where weights are missing, malformed or not finite, or memory does not suffice;
    /// [`EngineError::Interrupted`] where `on` broke off.
    fn load(
        &mut self,
        shard: &ShardSpec,
        weights: &WeightSource,
        on: &mut dyn FnMut(LoadProgress) -> ControlFlow<()>,
    ) -> Result<LoadReport, EngineError>;

    /// Computes one row, checks that it is finite, and times it. Leaves no trace in the cache.
    ///
    /// # Errors
    /// [`EngineError::SelfTest`] where the result is not finite.
    fn warm_up(&mut self) -> Result<WarmUpReport, EngineError>;

    /// Applies the step's operations, then computes its rows.
    ///
    /// # Errors
    /// [`EngineError::StaleIncarnation`] for a step of a past life; a step of a later one empties the cache first.
    /// [`EngineError::BadStep`] for rows that do not go on where their sequences end.
    /// [`EngineError::CacheFull`] where the pages do not suffice: nothing was computed, and nothing is lost.
    fn forward(&mut self, step: &Step, input: Input) -> Result<Output, EngineError>;
}
