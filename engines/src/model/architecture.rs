//! What a decoder-only transformer is made of, as data.
//!
//! A family ([`super::families`]) reads it from a file's metadata; the decoder walks it; a backend is handed the
//! parts of one layer at a time. Lengths are in elements, positions in tokens.

use serde::{Deserialize, Serialize};

/// A whole model's shape. Plain data: it crosses to worker processes and to other nodes.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Architecture {
    /// The family's name, as files give it (`llama`, `gemma3`, …).
    pub family: String,
    /// Rows of the embedding table.
    pub vocabulary: usize,
    /// Width of the residual stream.
    pub hidden: usize,
    /// Positions that the model was trained for.
    pub context_tokens: usize,
    /// What embeddings are multiplied by: √hidden for Gemma, else 1.
    pub embedding_scale: f32,
    /// Added to every norm weight on loading: 1 for Gemma's safetensors, else 0.
    pub norm_offset: f32,
    /// ε of every RMS norm.
    pub norm_epsilon: f32,
    /// logits = cap · tanh(logits / cap).
    pub logit_softcap: Option<f32>,
    /// The rotary tables that layers refer to.
    pub ropes: Vec<Rope>,
    /// Others in their place, where contexts are longer than so many tokens (LongRoPE).
    pub long_ropes: Option<LongRopes>,
    pub layers: Vec<Layer>,
}

/// One decoder layer.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Layer {
    pub norms: NormPlacement,
    pub attention: Attention,
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
    pub fn before(self) -> bool {
        self != Self::After
    }

    pub fn after(self) -> bool {
        self != Self::Before
    }
}

/// Grouped-query attention: query head h reads key/value head h / (heads / kv_heads).
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Attention {
    pub heads: usize,
    pub kv_heads: usize,
    pub head_dim: usize,
    /// Scores are multiplied by it.
    pub scale: f32,
    /// scores = cap · tanh(scores / cap), before the mask.
    pub softcap: Option<f32>,
    /// Keys that a query sees, its own counted: positions p − window + 1 … p. `None`: all up to p.
    pub window: Option<usize>,
    /// Index into [`Architecture::ropes`].
    pub rope: usize,
    pub query_key_norm: Option<QueryKeyNorm>,
    /// Whether the query, key and value projections have biases.
    pub input_bias: bool,
    /// Whether the output projection has one.
    pub output_bias: bool,
    /// Whether each head has a sink: a score of its own that takes part in the softmax, and has no value.
    pub sinks: bool,
}

impl Attention {
    /// Width of the queries of one row.
    pub fn query_width(&self) -> usize {
        self.heads * self.head_dim
    }

    /// Width of the keys (or values) of one row.
    pub fn kv_width(&self) -> usize {
        self.kv_heads * self.head_dim
    }

    /// Query heads that share a key head.
    pub fn group(&self) -> usize {
        self.heads / self.kv_heads
    }
}

/// What an RMS norm of queries and keys, before their rotation, spans.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum QueryKeyNorm {
    /// Each head by itself (qwen3, gemma3).
    PerHead,
    /// All heads of a row together (olmo2).
    Projection,
}

/// A gated feed-forward, down(activation(gate x, up x)), or experts that each are one.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct FeedForward {
    /// Of the inner row; an expert's where there are experts.
    pub width: usize,
    pub activation: Activation,
    pub bias: bool,
    pub experts: Option<Experts>,
}

/// A mixture of experts: a linear router chooses `used` of `count` for each row.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Experts {
    pub count: usize,
    pub used: usize,
    pub weighting: Weighting,
    pub router_bias: bool,
}

/// What the outputs of the chosen experts are multiplied by.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Weighting {
    /// A softmax over the chosen.
    AmongChosen,
    /// A softmax over all, of which the chosen keep their part.
    AmongAll,
}

/// How gate and up projections become the inner row.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub enum Activation {
    /// gate · σ(gate) · up.
    Silu,
    /// GELU(gate) · up, in the tanh approximation.
    GeluTanh,
    /// g · σ(slope · g) · (u + 1), with g = min(gate, limit) and u = up within ±limit (gpt_oss).
    ClampedSwish { slope: f32, limit: f32 },
}

/// A rotary position embedding. Pair i of a head is turned by position · `frequencies[i]`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Rope {
    pub pairing: Pairing,
    /// Radians per position; half as many as rotated dimensions. Dimensions behind them pass through.
    pub frequencies: Vec<f32>,
    /// cos and sin are multiplied by it (YaRN's attention factor), else 1.
    pub magnitude: f32,
}

/// Rotary tables of long contexts.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct LongRopes {
    /// Contexts of more tokens have them.
    pub above_tokens: usize,
    /// In the order of [`Architecture::ropes`].
    pub ropes: Vec<Rope>,
}

/// Which dimensions a rotation pairs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Pairing {
    /// (i, i + half): Hugging Face's, and GGUF's for most families.
    Halves,
    /// (2i, 2i + 1): GGUF's for llama.
    Neighbours,
}

impl Architecture {
    /// The architecture of a model that serves contexts of up to `context_tokens`.
    ///
    /// LongRoPE has one table for short and one for long sequences. A sequence that grew from one into the other would
    /// have keys of both; so which one it is depends on the longest sequence that there can be.
    pub fn for_context(&self, context_tokens: usize) -> Self {
        let mut architecture = self.clone();
        architecture.context_tokens = self.context_tokens.min(context_tokens);
        if let Some(long) = architecture.long_ropes.take_if(|long| architecture.context_tokens > long.above_tokens) {
            architecture.ropes = long.ropes;
        }
        architecture.long_ropes = None;
        architecture
    }

    /// Bytes of keys and values that one token takes in the layers `range`, at `element_bytes` each.
    pub fn kv_bytes_per_token(&self, range: std::ops::Range<usize>, element_bytes: usize) -> u64 {
        let widths = self.layers[range].iter().map(|layer| 2 * layer.attention.kv_width());
        widths.map(|width| (width * element_bytes) as u64).sum()
    }
}
