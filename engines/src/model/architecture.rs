//! The architecture of a decoder-only transformer, as data.
//!
//! A family ([`super::families`]) builds it from a file's metadata, the decoder walks it, and a backend receives the
//! parts of one layer at a time. Lengths are in elements, positions in tokens.

use crate::kv_element::KvElement;
use serde::{Deserialize, Serialize};

/// The architecture of a whole model. Plain data, which is sent to worker processes and to other nodes.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Architecture {
    /// The family's name (`llama`, `gemma3`, …).
    pub family: String,
    /// Rows of the embedding table, 1 to 2²².
    pub vocabulary: usize,
    /// Width of the residual stream in elements, 1 to 2²⁰.
    pub hidden: usize,
    /// Positions that the model was trained for, 1 to 2²⁸ tokens.
    pub context_tokens: usize,
    /// The factor of embeddings: √hidden for Gemma, else 1.
    pub embedding_scale: f32,
    /// The number added to every norm weight on loading: 1 for Gemma's safetensors, else 0.
    pub norm_offset: f32,
    /// ε of every RMS norm, between 0 and 1.
    pub norm_epsilon: f32,
    /// The cap of logits: logits = cap · tanh(logits / cap). `None`: no cap.
    pub logit_softcap: Option<f32>,
    /// The rotary tables, to which layers refer by index.
    pub ropes: Vec<Rope>,
    /// The rotary tables that replace `ropes` in contexts above a number of tokens (LongRoPE).
    pub long_ropes: Option<LongRopes>,
    /// The layers in their order, 1 to [`LAYERS_MAX`](super::LAYERS_MAX).
    pub layers: Vec<Layer>,
}

/// One decoder layer.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Layer {
    /// The sides of attention and feed-forward that have a norm.
    pub norms: NormPlacement,
    /// The attention block.
    pub attention: Attention,
    /// The feed-forward block, with or without experts.
    pub feed_forward: FeedForward,
}

/// Which sides of attention and feed-forward have a norm.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum NormPlacement {
    /// On the input of each (llama).
    Before,
    /// On the output of each, before it is added (olmo2).
    After,
    /// On both (gemma).
    Both,
}

impl NormPlacement {
    /// Whether inputs are normed.
    pub fn before(self) -> bool {
        self != Self::After
    }

    /// Whether outputs are normed.
    pub fn after(self) -> bool {
        self != Self::Before
    }
}

/// Grouped-query attention: query head h reads key/value head h / (heads / kv_heads).
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Attention {
    /// Query heads, 1 to 4096.
    pub heads: usize,
    /// Key/value heads; a divisor of `heads`.
    pub kv_heads: usize,
    /// Width of a head in elements, 1 to 4096.
    pub head_dim: usize,
    /// The factor of attention scores; finite.
    pub scale: f32,
    /// The cap of scores, above 0: scores = cap · tanh(scores / cap), before the mask. `None`: no cap.
    pub softcap: Option<f32>,
    /// Keys that a query at position p sees, its own included: positions p − window + 1 … p. At least 1.
    /// `None`: all up to p.
    pub window: Option<usize>,
    /// Index into [`Architecture::ropes`].
    pub rope: usize,
    /// The norm of queries and keys; `None`: no norm.
    pub query_key_norm: Option<QueryKeyNorm>,
    /// Whether the query, key and value projections have biases.
    pub input_bias: bool,
    /// Whether the output projection has a bias.
    pub output_bias: bool,
    /// Whether each head has a sink: an extra score that takes part in the softmax and has no value vector.
    pub sinks: bool,
}

impl Attention {
    /// Width of the queries of one row: `heads` · `head_dim` elements.
    pub fn query_width(&self) -> usize {
        self.heads * self.head_dim
    }

    /// Width of the keys (or values) of one row: `kv_heads` · `head_dim` elements.
    pub fn kv_width(&self) -> usize {
        self.kv_heads * self.head_dim
    }

    /// Query heads that share a key head, 1 to `heads`.
    pub fn group(&self) -> usize {
        self.heads / self.kv_heads
    }
}

/// The span of the RMS norm of queries and keys, which is applied before their rotation.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum QueryKeyNorm {
    /// Each head separately (qwen3, gemma3).
    PerHead,
    /// All heads of a row together (olmo2).
    Projection,
}

/// A gated feed-forward, down(activation(gate x, up x)), or experts, each of which is such a feed-forward.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct FeedForward {
    /// Width of the inner row in elements, 1 to 2²⁰; with experts, the inner width of one expert.
    pub width: usize,
    /// The function of the gate and up projections.
    pub activation: Activation,
    /// Whether the gate, up and down projections have biases.
    pub bias: bool,
    /// The mixture of experts; `None` for a dense feed-forward.
    pub experts: Option<Experts>,
}

/// A mixture of experts: a linear router chooses `used` of `count` for each row.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Experts {
    /// Experts of the layer, 1 to 1024.
    pub count: usize,
    /// Experts that compute a row, 1 to `count`.
    pub used: usize,
    /// The weights of the chosen experts' outputs.
    pub weighting: Weighting,
    /// Whether the router has a bias.
    pub router_bias: bool,
}

/// The weights of the outputs of the chosen experts.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Weighting {
    /// A softmax over the chosen experts.
    AmongChosen,
    /// A softmax over all experts, of which the chosen experts keep their shares.
    AmongAll,
}

/// The function that turns gate and up projections into the inner row.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub enum Activation {
    /// gate · σ(gate) · up.
    Silu,
    /// GELU(gate) · up, in the tanh approximation.
    GeluTanh,
    /// g · σ(slope · g) · (u + 1), with g = min(gate, limit) and u = up within ±limit (gpt_oss).
    ClampedSwish {
        /// The factor of g inside σ; 1.702 for gpt_oss by default.
        slope: f32,
        /// The bound of gate and up; 7 for gpt_oss by default.
        limit: f32,
    },
}

/// A rotary position embedding. Pair i of a head is rotated by position · `frequencies[i]`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Rope {
    /// The dimensions that form a pair.
    pub pairing: Pairing,
    /// Radians per position; half as many as rotated dimensions. The dimensions after the rotated ones do not change.
    pub frequencies: Vec<f32>,
    /// The factor of cos and sin: the attention factor of YaRN or LongRoPE, else 1.
    pub magnitude: f32,
}

/// Rotary tables for long contexts.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct LongRopes {
    /// The tables apply to contexts of more tokens than this.
    pub above_tokens: usize,
    /// Tables in the order of [`Architecture::ropes`].
    pub ropes: Vec<Rope>,
}

/// The dimensions that a rotation pairs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Pairing {
    /// (i, i + half): in Hugging Face's files, and in GGUF for most families.
    Halves,
    /// (2i, 2i + 1): in GGUF for llama.
    Neighbours,
}

impl Architecture {
    /// Returns the architecture of a model that serves contexts of up to `context_tokens`.
    ///
    /// LongRoPE has one table for short and one for long sequences. A sequence that outgrew the short table would have
    /// keys of both tables, so the longest possible sequence decides which table applies.
    pub fn for_context(&self, context_tokens: usize) -> Self {
        let mut architecture = self.clone();
        architecture.context_tokens = self.context_tokens.min(context_tokens);
        if let Some(long) = architecture.long_ropes.take_if(|long| architecture.context_tokens > long.above_tokens) {
            architecture.ropes = long.ropes;
        }
        architecture.long_ropes = None;
        architecture
    }

    /// Bytes of one token's keys and values in the layers `range`.
    pub fn kv_bytes_per_token(&self, range: std::ops::Range<usize>, element: KvElement) -> u64 {
        let attention = self.layers[range].iter().map(|layer| &layer.attention);
        attention.map(|spec| (2 * spec.kv_heads * element.vector_bytes(spec.head_dim)) as u64).sum()
    }
}
