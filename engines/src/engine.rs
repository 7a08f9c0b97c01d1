//! The port between actors and engines.
//!
//! ```text
//! EngineFactory ─probe─► DeviceReport
//!               ─open──► Engine ─self_test─► load ─► warm_up ─► forward(Step, Input, queries) → Output, repeatedly
//! ```
//! All message types are plain data, so an engine can run in another thread or another process.
//! A [`Step`] carries operations on sequences, then the rows to compute, in order: batching, chunked prefill and replay
//! after a failure differ only in their rows.

pub use crate::activation_bits::{ActivationBits, UnknownActivationBits};
pub use crate::device::{ComputeUnits, DeviceId, DeviceKind, DeviceMemory, DeviceReport, GpuReport};
pub use crate::hardware::{PlatformDevice, PlatformReport, Runtime};
pub use crate::kv_element::{KvElement, UnknownKvElement};
pub use crate::scores::{RowQuery, RowScores, Scores, TopLogits, TopQuery};

use crate::error::EngineError;
use crate::model::{Architecture, WeightSource};
use crate::profile::Profile;
use serde::{Deserialize, Serialize};
use std::ops::{ControlFlow, Range};
use std::sync::Arc;
use std::time::Duration;

/// Tokens in one page of the KV cache.
pub const PAGE_TOKENS: u32 = 32;

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
    /// The first key of the order.
    pub epoch: u64,
    /// The bytes of the owning node's id. Engines only compare them.
    pub owner: [u8; 32],
}

/// The part of each matrix that a shard holds: rank `rank` of `of` ranks.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct TensorRank {
    /// The shard's rank, 0 to `of` − 1.
    pub rank: u32,
    /// The number of ranks, at least 1.
    pub of: u32,
}

impl TensorRank {
    /// The rank of a shard that holds every matrix whole.
    pub const WHOLE: Self = Self { rank: 0, of: 1 };
}

/// The part of a model that one engine computes.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct ShardSpec {
    /// The architecture of the whole model.
    pub architecture: Architecture,
    /// Half-open range of layers, not empty. The shard of layer 0 takes tokens; the shard of the last layer returns
    /// logits.
    pub layers: Range<usize>,
    /// The part of each matrix in these layers. The decoder computes whole matrices only.
    pub tensor: TensorRank,
    /// The element type of the cache.
    pub kv_element: KvElement,
    /// The precision of activations in matrix products.
    pub activations: ActivationBits,
    /// The cache's capacity, in pages of [`PAGE_TOKENS`] tokens, shared by all sequences; at least 1.
    pub kv_pages: u32,
}

impl ShardSpec {
    /// Returns whether the shard has layer 0, and so takes tokens.
    pub fn is_first(&self) -> bool {
        self.layers.start == 0
    }

    /// Returns whether the shard has the model's last layer, and so returns logits.
    pub fn is_last(&self) -> bool {
        self.layers.end == self.architecture.layers.len()
    }

    /// Returns the cache's capacity, in bytes.
    pub fn kv_bytes(&self) -> u64 {
        let per_token = self.architecture.kv_bytes_per_token(self.layers.clone(), self.kv_element);
        per_token * u64::from(PAGE_TOKENS) * u64::from(self.kv_pages)
    }
}

/// The progress of a load.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct LoadProgress {
    /// Bytes, as stored in the files, of the tensors loaded so far: 0 to `total_bytes`.
    pub loaded_bytes: u64,
    /// Bytes, as stored in the files, of all tensors of the shard.
    pub total_bytes: u64,
}

/// The result of a load.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct LoadReport {
    /// Bytes of the weights in the engine's own layout.
    pub weight_bytes: u64,
    /// Bytes of the cache's capacity.
    pub kv_bytes: u64,
    /// The arithmetic, its version, and the KV type. Engines with equal fingerprints compute the same bits.
    pub fingerprint: String,
    /// The duration of the load.
    pub elapsed: Duration,
}

/// The result of a self-test.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct SelfTestReport {
    /// The time of a step of a tiny model: what the device takes for any step.
    pub step: Duration,
}

/// What a device does at most, measured. `None`: it was not measured.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize, Deserialize)]
pub struct DeviceRates {
    /// Bytes that it reads from its memory per second.
    pub read_bytes_per_s: Option<f64>,
    /// Products of a 4-bit weight and a 16-bit activation per second, in matrix products of many rows.
    pub multiplications_per_s: Option<f64>,
}

/// The first timing of a loaded engine.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct WarmUpReport {
    /// The least time to compute one row in all layers of the shard, of a few rows.
    pub row: Duration,
}

/// A change to sequences, applied before the rows of a step.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Operation {
    /// Drops all positions of `seq` from `length_tokens` on.
    Truncate {
        /// The sequence to shorten.
        seq: SeqId,
        /// Tokens that remain, at most the sequence's length.
        length_tokens: u32,
    },
    /// Makes a new sequence `to` share the first `length_tokens` positions of `from`.
    Fork {
        /// The sequence to share from.
        from: SeqId,
        /// The new sequence; its id is not in the cache yet.
        to: SeqId,
        /// Tokens to share, at most the length of `from`.
        length_tokens: u32,
    },
    /// Drops `seq` from the cache; an unknown sequence is not an error.
    Release {
        /// The sequence to drop.
        seq: SeqId,
    },
}

/// One token of one sequence.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Row {
    /// The token's sequence.
    pub seq: SeqId,
    /// Position in the sequence, from 0. Rows of one sequence are adjacent and in order, and start where its cache
    /// ends.
    pub position: u32,
    /// Whether the last shard computes this row's logits.
    pub wants_logits: bool,
}

/// One forward pass of a shard.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Step {
    /// The incarnation of the instance that sends the step.
    pub incarnation: Incarnation,
    /// The number of the step.
    pub id: StepId,
    /// Changes to sequences, applied in order before the rows.
    pub operations: Vec<Operation>,
    /// The tokens to compute; may be empty.
    pub rows: Vec<Row>,
}

/// The input of a shard: one token, or one hidden row, for each row of the step.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub enum Input {
    /// One token id for each row, less than the vocabulary's size: the input of the first shard.
    Tokens(Vec<u32>),
    /// Rows of the residual stream, \[rows]\[hidden], f32: the input of every other shard.
    Hidden(Vec<f32>),
}

/// The output of a shard.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub enum OutputRows {
    /// All rows of the residual stream: \[rows]\[hidden], f32.
    Hidden(Vec<f32>),
    /// The answers to the step's queries.
    Scores(Scores),
}

/// The result of a step.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Output {
    /// The hidden rows, or the scores.
    pub rows: OutputRows,
    /// Bytes of device memory in use: the weights, the cache pages in use, pools and staging.
    pub memory_bytes: u64,
    /// Cache pages in use, 0 to [`ShardSpec::kv_pages`].
    pub pages_used: u32,
}

/// The process of an engine that has one of its own.
#[derive(Clone)]
pub struct EngineProcess {
    id: u32,
    kill: Arc<dyn Fn() + Send + Sync>,
}

impl EngineProcess {
    /// Creates the handle of the process with the number `id`. `kill` ends it, and must not block.
    pub fn new(id: u32, kill: impl Fn() + Send + Sync + 'static) -> Self {
        Self { id, kill: Arc::new(kill) }
    }

    /// Returns the number of the process.
    pub fn id(&self) -> u32 {
        self.id
    }

    /// Kills the process, from any thread. The call of the engine that runs then fails. Does not wait for the end of
    /// the process; does nothing if it has ended.
    pub fn kill(&self) {
        (self.kill)();
    }
}

impl std::fmt::Debug for EngineProcess {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_tuple("EngineProcess").field(&self.id).finish()
    }
}

/// Whether an engine needs a process of its own, which can be killed when the engine hangs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ProcessNeed {
    /// The engine runs on a thread; users may ask for a process.
    Optional,
    /// The engine can fail in a way that only a new process mends; users may ask for a thread.
    Preferred,
    /// The engine can hang for ever in a driver: it never runs on a thread of the node.
    Required,
}

/// Finds devices of one kind and opens engines on them.
pub trait EngineFactory: Send + Sync + std::fmt::Debug {
    /// The engine's name: `cpu`, `candle`, …
    fn name(&self) -> &'static str;

    /// Whether the engines need processes of their own.
    fn process_need(&self) -> ProcessNeed {
        ProcessNeed::Optional
    }

    /// Lists usable devices, best first.
    fn probe(&self) -> Vec<DeviceReport>;

    /// What the engine needs at run time, and what is there of it: it says why a GPU is not among the devices.
    fn runtime(&self) -> Runtime {
        Runtime::BuiltIn
    }

    /// Opens an engine with nothing loaded on `device`.
    ///
    /// # Errors
    /// [`EngineError::NoDevice`] if the factory has no such device; an engine in a process of its own may say so later.
    fn open(&self, device: &DeviceId) -> Result<Box<dyn Engine>, EngineError>;
}

/// Computes one shard on one device. An engine is created, used and dropped on one thread.
pub trait Engine {
    /// Computes a tiny model with known numbers, before a shard is loaded.
    ///
    /// # Errors
    /// [`EngineError::SelfTest`] if the numbers are others; an error of the device.
    fn self_test(&mut self) -> Result<SelfTestReport, EngineError>;

    /// Measures what the device does at most, for a diagnosis. A loaded shard is dropped. Nothing is known of an engine
    /// that does not measure.
    ///
    /// # Errors
    /// An error of the device.
    fn measure(&mut self) -> Result<DeviceRates, EngineError> {
        Ok(DeviceRates::default())
    }

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

    /// Applies the step's operations, then computes its rows. The last shard answers `queries`, one for each row that
    /// wants logits, in order; other shards get none. When the call returns, the device has done all work of the step.
    ///
    /// # Errors
    /// [`EngineError::StaleIncarnation`] for a step of an older incarnation; a newer one empties the cache first.
    /// [`EngineError::BadStep`] for rows that do not start where their sequences end.
    /// [`EngineError::CacheFull`] if the pages do not suffice: nothing is computed, and the sequences are unchanged.
    fn forward(&mut self, step: &Step, input: Input, queries: &[RowQuery]) -> Result<Output, EngineError>;

    /// Returns all logits of one row of the last step, \[vocabulary]. `row` counts the step's queries. It is called
    /// when an answer to [`RowQuery::Top`] did not suffice.
    ///
    /// # Errors
    /// [`EngineError::BadStep`] if the last step computed no logits for the row; always, for an engine that answers all
    /// queries with all logits.
    fn logits(&mut self, row: usize) -> Result<Vec<f32>, EngineError> {
        Err(EngineError::BadStep { what: format!("query {row} was answered with all logits") })
    }

    /// Returns the engine's process; `None` for an engine in this process.
    fn process(&self) -> Option<EngineProcess> {
        None
    }

    /// Returns where the time of steps went since the last call; empty for an engine that does not count.
    fn take_profile(&mut self) -> Profile {
        Profile::default()
    }
}
