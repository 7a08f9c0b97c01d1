//! What a decoder asks of a device.
//!
//! Calls are as coarse as a layer's halves, so that a backend can fuse what lies between two of them. Everything
//! that depends on the rows of a step (positions, page tables, rotations) is handed over once, by
//! [`Backend::begin`]. A family's traits reach a backend only as data of [`Architecture`](crate::model::Architecture).
//!
//! Row independence is every backend's duty: what it computes for a row must not depend on the other rows.

use crate::engine::KvElement;
use crate::error::EngineError;
use crate::format::ElementType;
use crate::model::{Activation, Attention, Experts, Rope, TensorBytes};
use std::ops::Range;

/// A tensor's bytes as stored, with what they mean.
#[derive(Debug)]
pub struct TensorData<'a> {
    /// For errors.
    pub name: &'a str,
    pub element: ElementType,
    pub rows: usize,
    pub columns: usize,
    pub bytes: TensorBytes<'a>,
}

/// The rows of a step, by sequence.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Batch {
    pub rows: usize,
    /// In row order, covering all rows.
    pub spans: Vec<Span>,
}

/// Successive rows of one sequence.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Span {
    pub rows: Range<usize>,
    /// Position of the first of them.
    pub first_position: usize,
    /// Pages of the sequence's cache, in order of position, up to the last row's.
    pub pages: Vec<u32>,
}

/// An RMS norm's weight.
#[derive(Debug)]
pub struct Norm<B: Backend> {
    pub weight: B::Vector,
    pub epsilon: f32,
}

/// y = x · Wᵀ + b.
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
    /// A score for each head.
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

/// What a feed-forward is made of.
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

/// A router and its experts. Which of them a row goes to is [`route`](crate::expert_routing::route)'s; a backend reads the
/// weights of no others.
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
    /// A norm's weight or a bias.
    type Vector: std::fmt::Debug;
    /// Rows of f32 activations.
    type Buffer;
    /// Keys and values of all layers of a shard.
    type Cache;
    /// A [`Batch`] as the backend wants it, rotations included.
    type Batch;

    /// Name, version and kernel tier.
    fn fingerprint(&self) -> String;

    /// Takes a matrix over.
    fn matrix(&mut self, tensor: &TensorData<'_>) -> Result<Self::Matrix, EngineError>;

    /// Memory that a matrix takes.
    fn matrix_bytes(matrix: &Self::Matrix) -> u64;

    /// Takes a vector over.
    fn vector(&mut self, values: Vec<f32>) -> Result<Self::Vector, EngineError>;

    /// Reserves `pages` pages for each of `layers`.
    fn cache(&mut self, layers: &[Attention], element: KvElement, pages: u32) -> Result<Self::Cache, EngineError>;

    /// Copies whole pages, (from, to), in every layer.
    fn copy_pages(&mut self, cache: &mut Self::Cache, copies: &[(u32, u32)]) -> Result<(), EngineError>;

    /// Prepares for the rows of one step.
    fn begin(&mut self, batch: Batch, ropes: &[Rope]) -> Result<Self::Batch, EngineError>;

    /// Rows `tokens` of `table`, times `scale`. Tokens are below the table's rows.
    fn embed(&mut self, table: &Self::Matrix, tokens: &[u32], scale: f32) -> Result<Self::Buffer, EngineError>;

    /// Takes rows of `width` values over.
    fn upload(&mut self, values: Vec<f32>, width: usize) -> Result<Self::Buffer, EngineError>;

    /// Gives rows back, side by side.
    fn download(&mut self, buffer: Self::Buffer) -> Result<Vec<f32>, EngineError>;

    /// Norm, projections, rotation, cache write, attention over layer `layer` of `cache`, output projection.
    fn attention(
        &mut self,
        weights: &AttentionWeights<Self>,
        cache: &mut Self::Cache,
        layer: usize,
        batch: &Self::Batch,
        hidden: &Self::Buffer,
    ) -> Result<Self::Buffer, EngineError>;

    /// Norm, gate and up projections, activation, down projection; of each row's experts where there are any.
    fn feed_forward(
        &mut self,
        weights: &FeedForwardWeights<Self>,
        hidden: &Self::Buffer,
    ) -> Result<Self::Buffer, EngineError>;

    /// hidden += norm(delta), or delta itself where there is no norm.
    fn add(
        &mut self,
        hidden: &mut Self::Buffer,
        delta: Self::Buffer,
        norm: Option<&Norm<Self>>,
    ) -> Result<(), EngineError>;

    /// The logits of `rows` of `hidden`, side by side, after the final norm.
    fn logits(
        &mut self,
        norm: &Norm<Self>,
        head: &Self::Matrix,
        hidden: &Self::Buffer,
        rows: &[usize],
    ) -> Result<Vec<f32>, EngineError>;
}
