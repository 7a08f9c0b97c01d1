//! Reads a model from a Hugging Face folder: config.json and safetensors.

use super::families::{self, Biases, Family, Naming, Windows};
use super::hf_config::{Config, ScalingUse};
use super::rope::RopeParameters;
use super::{
    Activation, Architecture, Attention, Experts, FeedForward, Layer, Layout, LongRopes, ModelFiles, Pairing, Role,
    TensorSlice, TokenizerSource, WeightSource, Weighting, names,
};
use crate::format::{ElementType, FormatError, SafeTensors, Writers};
use std::collections::BTreeMap;
use std::path::Path;

/// Prefixes of a language model's tensors: by itself, or inside a multimodal model (new and old layout).
const PREFIXES: [&str; 3] = ["model.", "model.language_model.", "language_model.model."];

pub(super) fn open(folder: &Path) -> Result<ModelFiles, FormatError> {
    let path = folder.join("config.json");
    let outer = Config::read(&path)?;
    let config = outer.nested("text_config");
    let config = config.as_ref().unwrap_or(&outer);
    let model_type = match config.text("model_type")? {
        Some(model_type) => model_type,
        None => outer.text("model_type")?.unwrap_or_default(),
    };
    let family = families::of_model_type(model_type)
        .ok_or_else(|| FormatError::UnknownFamily { path, family: model_type.to_owned() })?;
    let method = match config.nested("quantization_config") {
        Some(method) => Some(method.text("quant_method")?.unwrap_or("unknown").to_owned()),
        None => None,
    };
    let is_mxfp4 = method.as_deref() == Some("mxfp4") && family.naming == Naming::GptOss;
    if let Some(method) = method.filter(|_| !is_mxfp4) {
        return Err(config.bad("quantization_config", format!("names the method `{method}`, which is not supported")));
    }
    let tensors = SafeTensors::open_folder(folder)?;
    let reader = Reader { config, family };
    let architecture = reader.architecture()?.checked(folder)?;
    let tied = config.flag("tie_word_embeddings")?.or(outer.flag("tie_word_embeddings")?);
    let weights = weights(&tensors, &architecture, family, tied.unwrap_or(family.ties_embeddings), folder)?;
    let quantization = match is_mxfp4 {
        true => ElementType::MXFP4,
        false => weights.tensors.get(&Role::TokenEmbedding).map_or(ElementType::F32, |slice| slice.element),
    };
    Ok(ModelFiles {
        path: folder.to_owned(),
        architecture,
        weights,
        tokenizer: TokenizerSource::Folder(folder.to_owned()),
        quantization: quantization.name().to_owned(),
    })
}

fn weights(
    found: &SafeTensors,
    architecture: &Architecture,
    family: &Family,
    tied: bool,
    folder: &Path,
) -> Result<WeightSource, FormatError> {
    let mut schemes = PREFIXES.map(|prefix| names::Safetensors { naming: family.naming, prefix, architecture });
    schemes.sort_by_key(|names| !found.tensors.contains_key(&names.embedding().tensor));
    let names = &schemes[0];
    let mut tensors = BTreeMap::new();
    for role in names::roles(architecture) {
        let places = if role == Role::Output && tied { vec![names.embedding()] } else { names.places(role) };
        let slice = places.iter().find_map(|place| {
            let (file, info) = found.tensors.get(&place.tensor)?;
            place.slice(*file, info)
        });
        let apart = || mxfp4_slice(found, &names.mxfp4(role)?);
        let slice = slice.or_else(apart).ok_or_else(|| FormatError::BadTensor {
            path: folder.to_owned(),
            tensor: places.first().map(|place| place.tensor.clone()).unwrap_or_default(),
            what: "it is missing".to_owned(),
        })?;
        tensors.insert(role, slice);
    }
    Ok(WeightSource {
        files: found.files.iter().map(|file| file.path().to_owned()).collect(),
        tensors,
        writers: Writers::Nobody,
    })
}

/// The slice at `place`; `None` if its two tensors are missing or have too few values.
fn mxfp4_slice(found: &SafeTensors, place: &names::Mxfp4Place) -> Option<TensorSlice> {
    let (file, blocks) = found.bytes.get(&place.blocks)?;
    let (scales_file, scales) = found.bytes.get(&place.scales)?;
    let per_row = place.columns / 32;
    let rows_needed = place.first_row + place.rows.checked_sub(1)?.checked_mul(place.row_step)? + 1;
    let holds = |shape: &[usize], row_bytes: usize| {
        let bytes: usize = shape.iter().product();
        rows_needed.checked_mul(row_bytes).is_some_and(|needed| needed <= bytes)
    };
    if !place.columns.is_multiple_of(32) || !holds(&blocks.shape, per_row * 16) || !holds(&scales.shape, per_row) {
        return None;
    }
    let first = place.first_row as u64;
    Some(TensorSlice {
        name: place.blocks.clone(),
        file: *file,
        element: ElementType::MXFP4,
        rows: place.rows,
        columns: place.columns,
        offset_bytes: blocks.offset_bytes + first * per_row as u64 * 16,
        length_bytes: (place.rows * per_row * ElementType::MXFP4.block_bytes()) as u64,
        layout: Layout::Mxfp4Apart {
            row_step: place.row_step as u64,
            scales_file: *scales_file,
            scales_offset_bytes: scales.offset_bytes + first * per_row as u64,
        },
        kept_as: ElementType::MXFP4,
    })
}

struct Reader<'a> {
    config: &'a Config,
    family: &'a Family,
}

impl Reader<'_> {
    fn architecture(&self) -> Result<Architecture, FormatError> {
        let (config, family) = (self.config, self.family);
        self.check_activation()?;
        let layer_count = config.required("num_hidden_layers")?;
        if layer_count > super::LAYERS_MAX {
            return Err(config.bad("num_hidden_layers", format!("is {layer_count}")));
        }
        let hidden = config.required("hidden_size")?;
        let attention = self.attention(hidden)?;
        let windows = self.windows(layer_count)?;
        let two_ropes = family.sliding_theta.is_some();
        let feed_forwards = self.feed_forwards(layer_count)?;
        let layers = windows.into_iter().zip(feed_forwards).map(|(window, feed_forward)| Layer {
            norms: family.norms,
            attention: Attention { window, rope: usize::from(two_ropes && window.is_some()), ..attention.clone() },
            feed_forward,
        });
        Ok(Architecture {
            family: family.name.to_owned(),
            vocabulary: config.required("vocab_size")?,
            hidden,
            context_tokens: config.count("max_position_embeddings")?.unwrap_or(2048),
            embedding_scale: if family.scales_embedding { (hidden as f32).sqrt() } else { 1.0 },
            norm_offset: if family.norms_less_one { 1.0 } else { 0.0 },
            norm_epsilon: config.float("rms_norm_eps")?.unwrap_or(family.norm_epsilon) as f32,
            logit_softcap: self.softcap("final_logit_softcapping", family.softcaps.logits)?,
            ropes: self.ropes(attention.head_dim)?,
            long_ropes: self.long_ropes(attention.head_dim)?,
            layers: layers.collect(),
        })
    }

    /// A family's own cap, unless the config gives another cap or `null`.
    fn softcap(&self, key: &str, own: Option<f64>) -> Result<Option<f32>, FormatError> {
        let own = own.filter(|_| !self.config.is_null(key));
        Ok(self.config.float(key)?.or(own).map(|cap| cap as f32))
    }

    fn feed_forwards(&self, layers: usize) -> Result<Vec<FeedForward>, FormatError> {
        let (config, family) = (self.config, self.family);
        let bias = match family.biases {
            Biases::AsConfigured => config.flag("mlp_bias")?.unwrap_or(false),
            Biases::Inputs => false,
            Biases::All => true,
        };
        let activation = match (family.activation, config.float("swiglu_limit")?, config.float("swiglu_alpha")?) {
            (Activation::ClampedSwish { slope, limit }, own_limit, own_slope) => Activation::ClampedSwish {
                slope: own_slope.map_or(slope, |slope| slope as f32),
                limit: own_limit.map_or(limit, |limit| limit as f32),
            },
            (activation, ..) => activation,
        };
        let dense = FeedForward { width: config.required("intermediate_size")?, activation, bias, experts: None };
        let Some(experts) = self.experts()? else { return Ok(vec![dense; layers]) };
        let width = config.count("moe_intermediate_size")?.unwrap_or(dense.width);
        // qwen3_moe: each `decoder_sparse_step`-th layer has experts, except those of `mlp_only_layers`.
        let period = config.count("decoder_sparse_step")?.unwrap_or(1).max(1);
        let dense_layers = config.counts("mlp_only_layers")?.unwrap_or_default();
        let of = |layer: usize| match (layer + 1).is_multiple_of(period) && !dense_layers.contains(&layer) {
            true => FeedForward { width, experts: Some(experts.clone()), ..dense.clone() },
            false => dense.clone(),
        };
        Ok((0..layers).map(of).collect())
    }

    fn experts(&self) -> Result<Option<Experts>, FormatError> {
        let config = self.config;
        let count = config.count("num_local_experts")?.or(config.count("num_experts")?).filter(|&count| count > 0);
        let Some(count) = count else { return Ok(None) };
        let weighting = match config.flag("norm_topk_prob")? {
            Some(false) => Weighting::AmongAll,
            Some(true) | None => self.family.weighting,
        };
        let used = config.required("num_experts_per_tok")?;
        Ok(Some(Experts { count, used, weighting, router_bias: self.family.router_bias }))
    }

    fn check_activation(&self) -> Result<(), FormatError> {
        let named = match self.config.text("hidden_act")? {
            Some(named) => Some(named),
            None => self.config.text("hidden_activation")?,
        };
        let expected: &[&str] = match self.family.activation {
            Activation::Silu | Activation::ClampedSwish { .. } => &["silu", "swish"],
            Activation::GeluTanh => &["gelu_pytorch_tanh", "gelu"],
        };
        match named {
            Some(named) if !expected.contains(&named) => Err(self
                .config
                .bad("hidden_act", format!("is `{named}`; {} models have `{}`", self.family.name, expected[0]))),
            _ => Ok(()),
        }
    }

    /// The attention that all layers share, without windows.
    fn attention(&self, hidden: usize) -> Result<Attention, FormatError> {
        let (config, family) = (self.config, self.family);
        if config.flag("use_bidirectional_attention")?.unwrap_or(false) {
            return Err(config.bad("use_bidirectional_attention", "is set: the model is an encoder"));
        }
        let heads = config.required("num_attention_heads")?;
        let head_dim = match config.count("head_dim")?.or(family.head_dim) {
            Some(head_dim) => head_dim,
            None => hidden.checked_div(heads).ok_or_else(|| config.bad("num_attention_heads", "is 0"))?,
        };
        if head_dim > super::HEAD_DIM_MAX {
            return Err(config.bad("head_dim", format!("is {head_dim}")));
        }
        let scalar = match family.scalar {
            Some(_) => config.float("query_pre_attn_scalar")?.or(Some(256.0)),
            None => None,
        };
        let bias = config.flag("attention_bias")?.unwrap_or(false);
        Ok(Attention {
            heads,
            kv_heads: config.count("num_key_value_heads")?.unwrap_or(heads),
            head_dim,
            scale: scalar.unwrap_or(head_dim as f64).sqrt().recip() as f32,
            softcap: self.softcap("attn_logit_softcapping", family.softcaps.attention)?,
            window: None,
            rope: 0,
            query_key_norm: family.query_key_norm,
            input_bias: family.biases != Biases::AsConfigured || bias,
            output_bias: family.biases == Biases::All || family.biases == Biases::AsConfigured && bias,
            sinks: family.sinks,
        })
    }

    fn windows(&self, layers: usize) -> Result<Vec<Option<usize>>, FormatError> {
        let config = self.config;
        let given = config.count("sliding_window")?;
        let types = config.texts("layer_types")?;
        let by_rule = |slides: &dyn Fn(usize) -> bool, window: Option<usize>| -> Vec<Option<usize>> {
            (0..layers).map(|layer| window.filter(|_| slides(layer))).collect()
        };
        let by_types = |window: Option<usize>, rule: &dyn Fn(usize) -> bool| match &types {
            Some(types) if types.len() != layers => {
                Err(config.bad("layer_types", format!("has {} entries for {layers} layers", types.len())))
            }
            Some(types) => Ok(by_rule(&|layer| types[layer] == "sliding_attention", window)),
            None => Ok(by_rule(rule, window)),
        };
        match self.family.windows {
            Windows::Never => Ok(vec![None; layers]),
            Windows::Always { window } => {
                let default = window.filter(|_| !config.is_null("sliding_window"));
                Ok(by_rule(&|_| true, given.or(default)))
            }
            Windows::Upper { from_layer } => {
                let window = given.filter(|_| matches!(config.flag("use_sliding_window"), Ok(Some(true))));
                let from = config.count("max_window_layers")?.unwrap_or(from_layer);
                by_types(window, &|layer| layer >= from)
            }
            Windows::Alternating { period, window } => {
                let period = config.count("sliding_window_pattern")?.unwrap_or(period).max(1);
                by_types(given.or(Some(window)), &|layer| !(layer + 1).is_multiple_of(period))
            }
        }
    }

    fn ropes(&self, head_dim: usize) -> Result<Vec<super::Rope>, FormatError> {
        let full = self.config.rope("full_attention", self.family.theta, head_dim, ScalingUse::Applies)?;
        let mut ropes = vec![full];
        if let Some(default) = self.family.sliding_theta {
            let theta = self.config.float("rope_local_base_freq")?.unwrap_or(default);
            ropes.push(self.config.rope("sliding_attention", theta, head_dim, ScalingUse::IsForOtherLayers)?);
        }
        ropes.iter().map(|rope| self.build(rope)).collect()
    }

    fn long_ropes(&self, head_dim: usize) -> Result<Option<LongRopes>, FormatError> {
        let Some((above_tokens, scaling)) = self.config.long_rope()? else { return Ok(None) };
        let short = self.config.rope("full_attention", self.family.theta, head_dim, ScalingUse::Applies)?;
        Ok(Some(LongRopes { above_tokens, ropes: vec![self.build(&RopeParameters { scaling, ..short })?] }))
    }

    fn build(&self, rope: &RopeParameters) -> Result<super::Rope, FormatError> {
        match rope.is_complete() {
            true => Ok(rope.build(Pairing::Halves)),
            false => Err(self.config.bad("rope_scaling", "does not have one factor for each pair of dimensions")),
        }
    }
}
