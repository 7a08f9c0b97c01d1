//! The families that can be run: one row of data each.
//!
//! A row says what a family's files leave unsaid. Sources: the modelling code of Hugging Face transformers 5.23
//! for safetensors, llama.cpp's loader and converter for GGUF.

use super::{Activation, NormPlacement, Pairing, QueryKeyNorm};

/// What all models of a family share.
#[derive(Debug, Clone, Copy)]
pub struct Family {
    /// `general.architecture` in GGUF, and the name that users see.
    pub name: &'static str,
    /// Whether GGUF files of this name exist: some families' files carry another's.
    pub in_gguf: bool,
    /// `model_type` in config.json.
    pub model_types: &'static [&'static str],
    /// How GGUF files of the family pair rotated dimensions. Safetensors always have halves.
    pub gguf_pairing: Pairing,
    pub norms: NormPlacement,
    pub activation: Activation,
    pub query_key_norm: Option<QueryKeyNorm>,
    pub biases: Biases,
    /// Whether embeddings are multiplied by √hidden.
    pub scales_embedding: bool,
    /// Whether safetensors hold norm weights less one.
    pub norms_less_one: bool,
    /// Head dimension where config.json names none; `None`: hidden / heads.
    pub head_dim: Option<usize>,
    /// Attention scale: from `query_pre_attn_scalar`, where a model has it.
    pub scales_by_scalar: bool,
    /// Rotary base where files name none.
    pub theta: f64,
    /// Rotary base of sliding layers, where it is another.
    pub sliding_theta: Option<f64>,
    pub windows: Windows,
    /// `tie_word_embeddings` where config.json does not say.
    pub ties_embeddings: bool,
}

/// Which projections have biases.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Biases {
    /// `attention_bias` (query, key, value and output) and `mlp_bias` in config.json; none in GGUF but for
    /// tensors that are there.
    AsConfigured,
    /// Query, key and value, always.
    Inputs,
}

/// Which layers see a window only.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Windows {
    Never,
    /// All, where `sliding_window` is a number; this many where config.json does not say.
    Always {
        window: usize,
    },
    /// Where `use_sliding_window` is set: layers from `max_window_layers` on.
    Upper {
        from_layer: usize,
    },
    /// All but each `period`-th.
    Alternating {
        period: usize,
        window: usize,
    },
}

const LLAMA: Family = Family {
    name: "llama",
    in_gguf: true,
    model_types: &["llama"],
    gguf_pairing: Pairing::Neighbours,
    norms: NormPlacement::Before,
    activation: Activation::Silu,
    query_key_norm: None,
    biases: Biases::AsConfigured,
    scales_embedding: false,
    norms_less_one: false,
    head_dim: None,
    scales_by_scalar: false,
    theta: 10_000.0,
    sliding_theta: None,
    windows: Windows::Never,
    ties_embeddings: false,
};

/// Every family, in the order in which they are listed to users.
pub const FAMILIES: &[Family] = &[
    LLAMA,
    Family {
        name: "mistral",
        in_gguf: false,
        model_types: &["mistral"],
        windows: Windows::Always { window: 4096 },
        ..LLAMA
    },
    Family {
        name: "qwen2",
        model_types: &["qwen2"],
        gguf_pairing: Pairing::Halves,
        biases: Biases::Inputs,
        windows: Windows::Upper { from_layer: 28 },
        ..LLAMA
    },
    Family {
        name: "qwen3",
        model_types: &["qwen3"],
        gguf_pairing: Pairing::Halves,
        query_key_norm: Some(QueryKeyNorm::PerHead),
        head_dim: Some(128),
        windows: Windows::Upper { from_layer: 28 },
        ..LLAMA
    },
    Family {
        name: "gemma3",
        model_types: &["gemma3_text", "gemma3"],
        gguf_pairing: Pairing::Halves,
        norms: NormPlacement::Both,
        activation: Activation::GeluTanh,
        query_key_norm: Some(QueryKeyNorm::PerHead),
        scales_embedding: true,
        norms_less_one: true,
        head_dim: Some(256),
        scales_by_scalar: true,
        theta: 1_000_000.0,
        sliding_theta: Some(10_000.0),
        windows: Windows::Alternating { period: 6, window: 4096 },
        ties_embeddings: true,
        ..LLAMA
    },
];

/// The family of a GGUF file's `general.architecture`.
pub(super) fn of_gguf(name: &str) -> Option<&'static Family> {
    FAMILIES.iter().find(|family| family.in_gguf && family.name == name)
}

/// The family of a config.json's `model_type`.
pub(super) fn of_model_type(model_type: &str) -> Option<&'static Family> {
    FAMILIES.iter().find(|family| family.model_types.contains(&model_type))
}
