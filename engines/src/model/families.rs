//! The supported model families: one row of data each.
//!
//! A row supplies what a family's files do not say. Sources: the modelling code of Hugging Face transformers 5.23
//! for safetensors, llama.cpp's loader and converter for GGUF.

use super::{Activation, NormPlacement, Pairing, QueryKeyNorm, Weighting};

/// The properties that all models of a family share.
#[derive(Debug, Clone, Copy)]
pub struct Family {
    /// The name that users see.
    pub name: &'static str,
    /// `general.architecture` in GGUF; `None` for a family whose GGUF files name another family.
    pub gguf_name: Option<&'static str>,
    /// `model_type` in config.json.
    pub model_types: &'static [&'static str],
    /// How GGUF files of the family pair rotated dimensions. Safetensors always pair halves.
    pub gguf_pairing: Pairing,
    /// The sides of attention and feed-forward that have a norm.
    pub norms: NormPlacement,
    /// ε of the norms if files name none.
    pub norm_epsilon: f64,
    /// The function of the gate and up projections.
    pub activation: Activation,
    /// The norm of queries and keys; `None`: no norm.
    pub query_key_norm: Option<QueryKeyNorm>,
    /// The projections that have biases.
    pub biases: Biases,
    /// Whether embeddings are multiplied by √hidden.
    pub scales_embedding: bool,
    /// Whether safetensors hold norm weights minus one.
    pub norms_less_one: bool,
    /// Head dimension if config.json names none; `None`: hidden / heads.
    pub head_dim: Option<usize>,
    /// `Some` if `query_pre_attn_scalar` sets the attention scale; supplies what GGUF does not say about it.
    pub scalar: Option<Scalar>,
    /// Caps of attention scores and of logits if files name none.
    pub softcaps: Softcaps,
    /// Whether attention heads have sinks.
    pub sinks: bool,
    /// The weighting of experts, in models with experts.
    pub weighting: Weighting,
    /// Whether the router has a bias, in models with experts.
    pub router_bias: bool,
    /// Whether the ends of YaRN's ramp are rounded to whole dimensions, which GGUF does not say.
    pub truncates_yarn: bool,
    /// Rotary base if files name none.
    pub theta: f64,
    /// Rotary base of sliding-window layers, if it differs.
    pub sliding_theta: Option<f64>,
    /// The layers with a sliding window.
    pub windows: Windows,
    /// `tie_word_embeddings` if config.json does not say.
    pub ties_embeddings: bool,
    /// How safetensors name the tensors of a layer.
    pub naming: Naming,
}

/// Gemma's attention scale in GGUF: 1/√head_dim, but 1/√(hidden / heads) for one size of each Gemma family.
#[derive(Debug, Clone, Copy)]
pub struct Scalar {
    /// Number of layers of that size.
    pub layers: usize,
}

/// A family's caps if config.json does not say.
#[derive(Debug, Clone, Copy)]
pub struct Softcaps {
    /// The cap of attention scores; `None`: no cap.
    pub attention: Option<f64>,
    /// The cap of logits; `None`: no cap.
    pub logits: Option<f64>,
}

/// Naming schemes of tensors, as far as they do not follow from a family's other properties.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Naming {
    /// `mlp.gate_proj`, `mlp.experts.0.gate_proj`, `mlp.gate`.
    Llama,
    /// `block_sparse_moe.experts.0.w1`.
    Mixtral,
    /// `mlp.experts.gate_up_proj`, the transposed matrices of all experts; or blocks and scales of MXFP4.
    GptOss,
}

/// Which projections have biases.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Biases {
    /// As `attention_bias` (query, key, value and output) and `mlp_bias` in config.json say; in GGUF, as bias
    /// tensors exist.
    AsConfigured,
    /// Always for query, key and value.
    Inputs,
    /// Always for query, key, value, output and the feed-forward.
    All,
}

/// The layers that attend to a sliding window only.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Windows {
    /// No layer.
    Never,
    /// All layers, if `sliding_window` is a number; `window` if config.json has no such key.
    Always {
        /// The default window in tokens.
        window: Option<usize>,
    },
    /// The layers from `max_window_layers` on (`from_layer` by default), if `use_sliding_window` is set.
    Upper {
        /// The default of `max_window_layers`, counted from 0.
        from_layer: usize,
    },
    /// All layers except each `period`-th.
    Alternating {
        /// Layers from one with full attention to the next.
        period: usize,
        /// The window in tokens if config.json names none.
        window: usize,
    },
}

const LLAMA: Family = Family {
    name: "llama",
    gguf_name: Some("llama"),
    model_types: &["llama"],
    gguf_pairing: Pairing::Neighbours,
    norms: NormPlacement::Before,
    norm_epsilon: 1e-6,
    activation: Activation::Silu,
    query_key_norm: None,
    biases: Biases::AsConfigured,
    scales_embedding: false,
    norms_less_one: false,
    head_dim: None,
    scalar: None,
    softcaps: Softcaps { attention: None, logits: None },
    sinks: false,
    weighting: Weighting::AmongChosen,
    router_bias: false,
    truncates_yarn: true,
    theta: 10_000.0,
    sliding_theta: None,
    windows: Windows::Never,
    ties_embeddings: false,
    naming: Naming::Llama,
};

const QWEN3: Family = Family {
    name: "qwen3",
    gguf_name: Some("qwen3"),
    model_types: &["qwen3"],
    gguf_pairing: Pairing::Halves,
    query_key_norm: Some(QueryKeyNorm::PerHead),
    head_dim: Some(128),
    windows: Windows::Upper { from_layer: 28 },
    ..LLAMA
};

const GEMMA2: Family = Family {
    name: "gemma2",
    gguf_name: Some("gemma2"),
    model_types: &["gemma2"],
    gguf_pairing: Pairing::Halves,
    norms: NormPlacement::Both,
    activation: Activation::GeluTanh,
    scales_embedding: true,
    norms_less_one: true,
    head_dim: Some(256),
    scalar: Some(Scalar { layers: 46 }),
    softcaps: Softcaps { attention: Some(50.0), logits: Some(30.0) },
    windows: Windows::Alternating { period: 2, window: 4096 },
    ties_embeddings: true,
    ..LLAMA
};

/// Every family, in the order in which users see them.
pub const FAMILIES: &[Family] = &[
    LLAMA,
    Family {
        name: "mistral",
        gguf_name: None,
        model_types: &["mistral"],
        windows: Windows::Always { window: Some(4096) },
        ..LLAMA
    },
    Family {
        name: "mixtral",
        gguf_name: None,
        model_types: &["mixtral"],
        norm_epsilon: 1e-5,
        theta: 1_000_000.0,
        windows: Windows::Always { window: None },
        naming: Naming::Mixtral,
        ..LLAMA
    },
    Family {
        name: "qwen2",
        gguf_name: Some("qwen2"),
        model_types: &["qwen2"],
        gguf_pairing: Pairing::Halves,
        biases: Biases::Inputs,
        windows: Windows::Upper { from_layer: 28 },
        ..LLAMA
    },
    QWEN3,
    Family {
        name: "qwen3_moe",
        gguf_name: Some("qwen3moe"),
        model_types: &["qwen3_moe"],
        windows: Windows::Never,
        ..QWEN3
    },
    GEMMA2,
    Family {
        name: "gemma3",
        gguf_name: Some("gemma3"),
        model_types: &["gemma3_text", "gemma3"],
        query_key_norm: Some(QueryKeyNorm::PerHead),
        scalar: Some(Scalar { layers: 62 }),
        softcaps: Softcaps { attention: None, logits: None },
        theta: 1_000_000.0,
        sliding_theta: Some(10_000.0),
        windows: Windows::Alternating { period: 6, window: 4096 },
        ..GEMMA2
    },
    Family {
        name: "phi3",
        gguf_name: Some("phi3"),
        model_types: &["phi3"],
        gguf_pairing: Pairing::Halves,
        norm_epsilon: 1e-5,
        windows: Windows::Always { window: None },
        ..LLAMA
    },
    Family {
        name: "olmo2",
        gguf_name: Some("olmo2"),
        model_types: &["olmo2"],
        gguf_pairing: Pairing::Halves,
        norms: NormPlacement::After,
        norm_epsilon: 1e-5,
        query_key_norm: Some(QueryKeyNorm::Projection),
        ..LLAMA
    },
    Family {
        name: "gpt_oss",
        gguf_name: Some("gpt-oss"),
        model_types: &["gpt_oss"],
        gguf_pairing: Pairing::Halves,
        norm_epsilon: 1e-5,
        activation: Activation::ClampedSwish { slope: 1.702, limit: 7.0 },
        biases: Biases::All,
        head_dim: Some(64),
        sinks: true,
        router_bias: true,
        truncates_yarn: false,
        theta: 150_000.0,
        windows: Windows::Alternating { period: 2, window: 128 },
        naming: Naming::GptOss,
        ..LLAMA
    },
];

/// The family of a GGUF file's `general.architecture`.
pub(super) fn of_gguf(name: &str) -> Option<&'static Family> {
    FAMILIES.iter().find(|family| family.gguf_name == Some(name))
}

/// The family of a config.json's `model_type`.
pub(super) fn of_model_type(model_type: &str) -> Option<&'static Family> {
    FAMILIES.iter().find(|family| family.model_types.contains(&model_type))
}
