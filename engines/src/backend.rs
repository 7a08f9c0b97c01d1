//! The operations that a decoder needs from a device.
//!
//! One call covers half a layer, so that a backend can fuse the operations inside, and nothing within a layer returns
//! to the host. All data that depends on the rows of
//! a step (positions, page tables, rotations) is passed once, to [`Backend::begin`]. A backend knows a model family
//! only as data of [`Architecture`](crate::model::Architecture).
//!
//! A backend must compute each row independently: a row's result must not depend on the other rows.

use crate::engine::{ActivationBits, DeviceRates, KvElement, TopLogits, TopQuery};
use crate::error::EngineError;
use crate::format::{ElementType, TensorBytes};
use crate::model::{Activation, Attention, Experts, Rope};
use crate::profile::Profile;
use std::ops::Range;

/// The stored bytes of a tensor, with its type and shape.
#[derive(Debug)]
pub struct TensorData<'a> {
    /// The name for error messages.
    pub name: &'a str,
    /// The element type of `bytes`.
    pub element: ElementType,
    /// Number of rows: the outputs of a projection, or the vocabulary of an embedding.
    pub rows: usize,
    /// Values in a row: the inputs of a projection, or the hidden width of an embedding.
    pub columns: usize,
    /// The rows in order, \[rows]\[columns], encoded as `element`.
    pub bytes: TensorBytes<'a>,
}

/// The rows of a step, grouped by sequence.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Batch {
    /// Number of rows, at least 1.
    pub rows: usize,
    /// Spans in row order, which cover all rows.
    pub spans: Vec<Span>,
}

/// Successive rows of one sequence.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Span {
    /// Indices of the rows in the step, half-open.
    pub rows: Range<usize>,
    /// Position of the first row in its sequence, from 0.
    pub first_position: usize,
    /// The sequence's cache pages, in order of position, up to the page of the last row.
    pub pages: Vec<u32>,
}

/// The weight and epsilon of an RMS norm.
#[derive(Debug)]
pub struct Norm<B: Backend> {
    /// The factor of each value: \[width of the norm], with the model's norm offset added.
    pub weight: B::Vector,
    /// The number that is added to the mean of the squares.
    pub epsilon: f32,
}

/// The data of a linear projection: y = x · Wᵀ + b.
#[derive(Debug)]
pub struct LinearData<'a> {
    /// W: \[outputs]\[inputs].
    pub weight: TensorData<'a>,
    /// b: \[outputs]; `None` for a projection without bias.
    pub bias: Option<Vec<f32>>,
}

/// A linear projection that a backend keeps apart from the others. A backend that fuses none has a list of these as its
/// [`Backend::Linears`].
#[derive(Debug)]
pub struct Linear<B: Backend> {
    /// W: \[outputs]\[inputs].
    pub weight: B::Matrix,
    /// b: \[outputs].
    pub bias: Option<B::Vector>,
    /// The size of both in memory, in bytes.
    pub bytes: u64,
}

impl<B: Backend> Linear<B> {
    /// Copies each of `parts` into the layout of `backend`, as [`Backend::linears`] does.
    pub(crate) fn each(
        backend: &mut B,
        parts: &mut dyn Iterator<Item = Result<LinearData<'_>, EngineError>>,
    ) -> Result<Vec<Self>, EngineError> {
        let copied = parts.map(|part| {
            let LinearData { weight, bias } = part?;
            let weight = backend.matrix(&weight)?;
            let bias_bytes = bias.as_ref().map_or(0, |bias| size_of_val(bias.as_slice()) as u64);
            let bytes = B::matrix_bytes(&weight) + bias_bytes;
            Ok(Self { weight, bias: bias.map(|bias| backend.vector(bias)).transpose()?, bytes })
        });
        copied.collect()
    }

    /// Returns the size of projections in memory, in bytes.
    pub(crate) fn bytes_of(linears: &[Self]) -> u64 {
        linears.iter().map(|linear| linear.bytes).sum()
    }
}

/// The type and shape of a matrix, known before its bytes are read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MatrixShape {
    /// The element type in which the matrix is handed over.
    pub element: ElementType,
    /// Number of rows: the outputs of a projection.
    pub rows: usize,
    /// Values in a row: the inputs of a projection.
    pub columns: usize,
}

/// Weights of the half-layer that mixes the tokens of a sequence. Layers with a recurrent state, and layers of latent
/// attention, are further variants.
#[derive(Debug)]
pub enum MixerWeights<B: Backend> {
    /// Softmax attention over keys and values.
    Attention(AttentionWeights<B>),
}

/// What a layer keeps of the earlier tokens of a sequence. A recurrent state, of which each sequence has one, is a
/// further variant.
#[derive(Debug, Clone, Copy)]
pub enum LayerState<'a> {
    /// A key and a value for each token and key/value head, in pages.
    KeysAndValues(&'a Attention),
}

/// Weights of an attention half-layer.
#[derive(Debug)]
pub struct AttentionWeights<B: Backend> {
    /// The heads, widths and options of the attention.
    pub spec: Attention,
    /// The norm of the input, of the hidden width; `None` in a model that norms only outputs.
    pub norm: Option<Norm<B>>,
    /// Three projections: query, \[query width]\[hidden]; key and value, \[key/value width]\[hidden].
    pub query_key_value: B::Linears,
    /// The norm of queries before their rotation, of the width of one head or of all query heads.
    pub query_norm: Option<Norm<B>>,
    /// The norm of keys before their rotation, of the width of one head or of all key heads.
    pub key_norm: Option<Norm<B>>,
    /// One attention-sink score for each query head: \[heads].
    pub sinks: Option<B::Vector>,
    /// One projection, to the output: \[hidden]\[query width].
    pub output: B::Linears,
}

/// Weights of a feed-forward half-layer: down(activation(gate x, up x)), of every row or of a row's experts.
#[derive(Debug)]
pub struct FeedForwardWeights<B: Backend> {
    /// The function of the gate and up projections.
    pub activation: Activation,
    /// The norm of the input, of the hidden width; `None` in a model that norms only outputs.
    pub norm: Option<Norm<B>>,
    /// The router of a mixture of experts; `None`: the only feed-forward computes every row.
    pub router: Option<Router<B>>,
    /// Two projections for each expert, gate then up: \[inner width]\[hidden]. One expert without a router.
    pub gate_up: B::Linears,
    /// One projection for each expert: \[hidden]\[inner width].
    pub down: B::Linears,
}

/// The router of a mixture of experts. [`route`](crate::expert_routing::route) defines the experts of a row and their
/// weights; a backend reads the weights of the chosen experts only.
#[derive(Debug)]
pub struct Router<B: Backend> {
    /// The number of experts, and how a row's experts are chosen and weighted.
    pub spec: Experts,
    /// One projection, to one logit for each expert: \[experts]\[hidden].
    pub linear: B::Linears,
}

/// A device's kernels and memory.
pub trait Backend: Sized {
    /// An embedding, or the head's matrix, in the backend's own layout.
    type Matrix: std::fmt::Debug;
    /// Linear projections that share their input or are the same projection of several experts, so that a backend can
    /// fuse them and choose among them on the device.
    type Linears: std::fmt::Debug;
    /// The weight of a norm, or attention sinks.
    type Vector: std::fmt::Debug;
    /// Rows of f32 activations: \[row]\[width].
    type Buffer;
    /// Logits of a step, on the device: \[row]\[vocabulary].
    type Logits;
    /// What all layers of a shard keep of sequences.
    type Cache;
    /// A [`Batch`] in the backend's own form, with its rotations.
    type Batch;

    /// Returns where the time went since the last call; empty for a backend that does not count.
    fn take_profile(&mut self) -> Profile {
        Profile::default()
    }

    /// Measures what the device does at most; nothing for a backend that does not measure.
    ///
    /// # Errors
    /// An error of the device.
    fn measure(&mut self) -> Result<DeviceRates, EngineError> {
        Ok(DeviceRates::default())
    }

    /// Chooses the precision of activations in matrix products, before a model is loaded.
    ///
    /// # Errors
    /// [`EngineError::Unsupported`] if the backend has no such products.
    fn set_activations(&mut self, bits: ActivationBits) -> Result<(), EngineError>;

    /// Returns the name and the version of the backend's arithmetic: equal names mean equal bits.
    fn fingerprint(&self) -> String;

    /// Copies a matrix into the backend's layout.
    fn matrix(&mut self, tensor: &TensorData<'_>) -> Result<Self::Matrix, EngineError>;

    /// Returns the size of a matrix in memory, in bytes.
    fn matrix_bytes(matrix: &Self::Matrix) -> u64;

    /// Copies projections into the backend's layout, one after the other. `parts` yields one projection for each shape,
    /// in order; reading a part may fail, and the error is returned.
    fn linears(
        &mut self,
        shapes: &[MatrixShape],
        parts: &mut dyn Iterator<Item = Result<LinearData<'_>, EngineError>>,
    ) -> Result<Self::Linears, EngineError>;

    /// Returns the size of projections in memory, biases included, in bytes.
    fn linears_bytes(linears: &Self::Linears) -> u64;

    /// Returns the bytes that the backend holds beside weights and caches: pools, scratch, staging.
    fn memory_bytes(&self) -> u64;

    /// Moves a vector into the backend.
    fn vector(&mut self, values: Vec<f32>) -> Result<Self::Vector, EngineError>;

    /// Reserves a cache of `pages` pages of [`PAGE_TOKENS`](crate::engine::PAGE_TOKENS) tokens for each of `layers`.
    fn cache(&mut self, layers: &[LayerState<'_>], element: KvElement, pages: u32) -> Result<Self::Cache, EngineError>;

    /// Copies whole pages in every layer; each copy is (from, to), as page numbers.
    fn copy_pages(&mut self, cache: &mut Self::Cache, copies: &[(u32, u32)]) -> Result<(), EngineError>;

    /// Prepares for the rows of one step. `ropes` are the tables of
    /// [`Architecture::ropes`](crate::model::Architecture::ropes), in order.
    fn begin(&mut self, batch: Batch, ropes: &[Rope]) -> Result<Self::Batch, EngineError>;

    /// Returns the rows `tokens` of `table`, times `scale`: \[token]\[hidden]. Every token is less than the table's
    /// number of rows.
    fn embed(&mut self, table: &Self::Matrix, tokens: &[u32], scale: f32) -> Result<Self::Buffer, EngineError>;

    /// Moves rows of `width` values, \[row]\[width], to the device.
    fn upload(&mut self, values: Vec<f32>, width: usize) -> Result<Self::Buffer, EngineError>;

    /// Returns the rows of a buffer: \[row]\[width].
    fn download(&mut self, buffer: Self::Buffer) -> Result<Vec<f32>, EngineError>;

    /// Computes the half-layer that mixes tokens; for attention: norm, projections, rotation, cache write, attention
    /// over layer `layer` of `cache`, output projection. `layer` counts from the shard's first layer. `hidden` and the
    /// result are \[row]\[hidden].
    fn mix(
        &mut self,
        weights: &MixerWeights<Self>,
        cache: &mut Self::Cache,
        layer: usize,
        batch: &Self::Batch,
        hidden: &Self::Buffer,
    ) -> Result<Self::Buffer, EngineError>;

    /// Computes norm, gate and up projections, activation, down projection; in a mixture, with each row's experts.
    /// `hidden` and the result are \[row]\[hidden].
    fn feed_forward(
        &mut self,
        weights: &FeedForwardWeights<Self>,
        hidden: &Self::Buffer,
    ) -> Result<Self::Buffer, EngineError>;

    /// Adds norm(delta) to `hidden`, or delta itself without a norm; both are \[row]\[hidden].
    fn add(
        &mut self,
        hidden: &mut Self::Buffer,
        delta: Self::Buffer,
        norm: Option<&Norm<Self>>,
    ) -> Result<(), EngineError>;

    /// Returns `rows`, indices into `hidden`, after the final norm: \[row]\[hidden].
    fn final_rows(&mut self, norm: &Norm<Self>, hidden: &Self::Buffer, rows: &[usize])
    -> Result<Vec<f32>, EngineError>;

    /// Computes the logits of `rows`, indices into `hidden`, after the final norm, each capped by
    /// [`softcap`](crate::arithmetic::functions::softcap) if `cap` is given: \[row]\[vocabulary].
    fn logits(
        &mut self,
        norm: &Norm<Self>,
        head: &Self::Matrix,
        hidden: Self::Buffer,
        rows: &[usize],
        cap: Option<f32>,
    ) -> Result<Self::Logits, EngineError>;

    /// Answers queries about rows of `logits`, in order.
    fn top_logits(
        &mut self,
        logits: &Self::Logits,
        queries: &[(usize, &TopQuery)],
    ) -> Result<Vec<TopLogits>, EngineError>;

    /// Returns rows of `logits`: \[row]\[vocabulary].
    fn logit_rows(&mut self, logits: &Self::Logits, rows: &[usize]) -> Result<Vec<f32>, EngineError>;

    /// Ends a step: waits until all queued work is done. Errors of that work belong to this step.
    fn finish(&mut self) -> Result<(), EngineError>;
}
