//! The operations that a decoder needs from a device.
//!
//! One call covers half a layer, so that a backend can fuse the operations inside. All data that depends on the rows of
//! a step (positions, page tables, rotations) is passed once, to [`Backend::begin`]. A backend knows a model family
//! only as data of [`Architecture`](crate::model::Architecture).
//!
//! A backend must compute each row independently: a row's result must not depend on the other rows.

use crate::engine::KvElement;
use crate::error::EngineError;
use crate::format::ElementType;
use crate::model::{Activation, Attention, Experts, Rope, TensorBytes};
use std::ops::Range;

/// The stored bytes of a tensor, with its type and shape.
#[derive(Debug)]
pub struct TensorData<'a> {
    /// The name for error messages.
    pub name: &'a str,
    pub element: ElementType,
    pub rows: usize,
    pub columns: usize,
    pub bytes: TensorBytes<'a>,
}

/// The rows of a step, grouped by sequence.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Batch {
    pub rows: usize,
    /// Spans in row order, which cover all rows.
    pub spans: Vec<Span>,
}

/// Successive rows of one sequence.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Span {
    pub rows: Range<usize>,
    /// Position of the first row.
    pub first_position: usize,
    /// The sequence's cache pages, in order of position, up to the page of the last row.
    pub pages: Vec<u32>,
}

/// The weight and epsilon of an RMS norm.
#[derive(Debug)]
pub struct Norm<B: Backend> {
    pub weight: B::Vector,
    pub epsilon: f32,
}

/// A linear projection: y = x · Wᵀ + b.
#[derive(Debug)]
pub struct Linear<B: Backend> {
    pub weight: B::Matrix,
    pub bias: Option<B::Vector>,
}

/// Weights of an attention half-layer.
#[derive(Debug)]
pub struct AttentionWeights<B: Backend> {
    pub spec: Attention,
    pub norm: Option<Norm<B>>,
    pub query: Linear<B>,
    pub key: Linear<B>,
    pub value: Linear<B>,
    pub query_norm: Option<Norm<B>>,
    pub key_norm: Option<Norm<B>>,
    /// One attention-sink score for each head.
    pub sinks: Option<B::Vector>,
    pub output: Linear<B>,
}

/// Weights of a feed-forward half-layer.
#[derive(Debug)]
pub struct FeedForwardWeights<B: Backend> {
    pub activation: Activation,
    pub norm: Option<Norm<B>>,
    pub kind: FeedForwardKind<B>,
}

/// A dense feed-forward, or a mixture of experts.
#[derive(Debug)]
pub enum FeedForwardKind<B: Backend> {
    Dense(Gated<B>),
    Mixture(Mixture<B>),
}

/// One gated feed-forward.
#[derive(Debug)]
pub struct Gated<B: Backend> {
    pub gate: Linear<B>,
    pub up: Linear<B>,
    pub down: Linear<B>,
}

/// A router and its experts. [`route`](crate::expert_routing::route) chooses the experts of a row; a backend reads the
/// weights of the chosen experts only.
#[derive(Debug)]
pub struct Mixture<B: Backend> {
    pub spec: Experts,
    pub router: Linear<B>,
    pub experts: Vec<Gated<B>>,
}

/// A device's kernels and memory.
pub trait Backend: Sized {
    /// A weight matrix in the backend's own layout.
    type Matrix: std::fmt::Debug;
    /// A bias, or the weight of a norm.
    type Vector: std::fmt::Debug;
    /// Rows of f32 activations.
    type Buffer;
    /// Keys and values of all layers of a shard.
    type Cache;
    /// A [`Batch`] in the backend's own form, with its rotations.
    type Batch;

    /// Returns name, version and kernel tier.
    fn fingerprint(&self) -> String;

    /// Copies a matrix into the backend's layout.
    fn matrix(&mut self, tensor: &TensorData<'_>) -> Result<Self::Matrix, EngineError>;

    /// Returns the memory size of a matrix.
    fn matrix_bytes(matrix: &Self::Matrix) -> u64;

    /// Moves a vector into the backend.
    fn vector(&mut self, values: Vec<f32>) -> Result<Self::Vector, EngineError>;

    /// Reserves a cache of `pages` pages for each of `layers`.
    fn cache(&mut self, layers: &[Attention], element: KvElement, pages: u32) -> Result<Self::Cache, EngineError>;

    /// Copies whole pages in every layer; each copy is (from, to).
    fn copy_pages(&mut self, cache: &mut Self::Cache, copies: &[(u32, u32)]) -> Result<(), EngineError>;

    /// Prepares for the rows of one step.
    fn begin(&mut self, batch: Batch, ropes: &[Rope]) -> Result<Self::Batch, EngineError>;

    /// Returns the rows `tokens` of `table`, times `scale`. Every token is less than the table's number of rows.
    fn embed(&mut self, table: &Self::Matrix, tokens: &[u32], scale: f32) -> Result<Self::Buffer, EngineError>;

    /// Moves rows of `width` values to the device.
    fn upload(&mut self, values: Vec<f32>, width: usize) -> Result<Self::Buffer, EngineError>;

    /// Returns the rows of a buffer: \[row]\[width].
    fn download(&mut self, buffer: Self::Buffer) -> Result<Vec<f32>, EngineError>;

    /// Computes norm, projections, rotation, cache write, attention over layer `layer` of `cache`, output projection.
    fn attention(
        &mut self,
        weights: &AttentionWeights<Self>,
        cache: &mut Self::Cache,
        layer: usize,
        batch: &Self::Batch,
        hidden: &Self::Buffer,
    ) -> Result<Self::Buffer, EngineError>;

    /// Computes norm, gate and up projections, activation, down projection; in a mixture, with each row's experts.
    fn feed_forward(
        &mut self,
        weights: &FeedForwardWeights<Self>,
        hidden: &Self::Buffer,
    ) -> Result<Self::Buffer, EngineError>;

    /// Adds norm(delta) to `hidden`, or delta itself without a norm.
    fn add(
        &mut self,
        hidden: &mut Self::Buffer,
        delta: Self::Buffer,
        norm: Option<&Norm<Self>>,
    ) -> Result<(), EngineError>;

    /// Returns the logits of `rows` of `hidden` after the final norm: \[row]\[vocabulary].
    fn logits(
        &mut self,
        norm: &Norm<Self>,
        head: &Self::Matrix,
        hidden: &Self::Buffer,
        rows: &[usize],
    ) -> Result<Vec<f32>, EngineError>;
}
