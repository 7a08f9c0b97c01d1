//! A model out of a Hugging Face folder: config.json and safetensors.

use super::families::{self, Biases, Family, Windows};
use super::hf_config::{Config, ScalingUse};
use super::{
    Architecture, Attention, FeedForward, Layer, ModelFiles, Pairing, Role, TensorSlice, TokenizerSource, WeightSource,
    names,
};
use crate::format::{ElementType, FormatError, SafeTensors};
use std::collections::BTreeMap;
use std::path::Path;

/// Where a language model's tensors lie: by itself, or inside a multimodal one (new and old layout).
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
    if let Some(method) = config.nested("quantization_config") {
        let method = method.text("quant_method")?.unwrap_or("unknown").to_owned();
        return Err(config.bad("quantization_config", format!("names the method `{method}`, which is not supported")));
    }
    let tensors = SafeTensors::open_folder(folder)?;
    let reader = Reader { config, family };
    let architecture = reader.architecture()?;
    let tied = config.flag("tie_word_embeddings")?.or(outer.flag("tie_word_embeddings")?);
    let weights = weights(&tensors, &architecture, family, tied.unwrap_or(family.ties_embeddings), folder)?;
    let quantization = weights.tensors.get(&Role::TokenEmbedding).map_or(ElementType::F32, |slice| slice.element);
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
    let has = |name: &str| found.tensors.contains_key(name);
    let embedding = |prefix: &str| names::safetensors(Role::TokenEmbedding, family.norms, prefix);
    let prefix = PREFIXES.into_iter().find(|prefix| has(&embedding(prefix))).unwrap_or(PREFIXES[0]);
    let mut tensors = BTreeMap::new();
    for role in names::roles(architecture) {
        let mut name = names::safetensors(role, family.norms, prefix);
        if role == Role::Output && (tied || !has(&name)) {
            name = embedding(prefix);
        }
        let (file, info) = found.tensors.get(&name).ok_or_else(|| FormatError::BadTensor {
            path: folder.to_owned(),
            tensor: name.clone(),
            what: "it is missing".to_owned(),
        })?;
        tensors.insert(role, TensorSlice::whole(&name, *file, info));
    }
    Ok(WeightSource { files: found.files.iter().map(|file| file.path().to_owned()).collect(), tensors })
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
        let feed_forward = FeedForward {
            width: config.required("intermediate_size")?,
            activation: family.activation,
            bias: family.biases == Biases::AsConfigured && config.flag("mlp_bias")?.unwrap_or(false),
        };
        let layers = windows.into_iter().map(|window| Layer {
            norms: family.norms,
            attention: Attention { window, rope: usize::from(two_ropes && window.is_some()), ..attention.clone() },
            feed_forward: feed_forward.clone(),
        });
        Ok(Architecture {
            family: family.name.to_owned(),
            vocabulary: config.required("vocab_size")?,
            hidden,
            context_tokens: config.count("max_position_embeddings")?.unwrap_or(2048),
            embedding_scale: if family.scales_embedding { (hidden as f32).sqrt() } else { 1.0 },
            norm_offset: if family.norms_less_one { 1.0 } else { 0.0 },
            norm_epsilon: config.float("rms_norm_eps")?.unwrap_or(1e-6) as f32,
            logit_softcap: config.float("final_logit_softcapping")?.map(|cap| cap as f32),
            ropes: self.ropes(attention.head_dim)?,
            layers: layers.collect(),
        })
    }

    fn check_activation(&self) -> Result<(), FormatError> {
        let named = match self.config.text("hidden_act")? {
            Some(named) => Some(named),
            None => self.config.text("hidden_activation")?,
        };
        let expected: &[&str] = match self.family.activation {
            super::Activation::Silu => &["silu", "swish"],
            super::Activation::GeluTanh => &["gelu_pytorch_tanh", "gelu"],
        };
        match named {
            Some(named) if !expected.contains(&named) => Err(self
                .config
                .bad("hidden_act", format!("is `{named}`; {} models have `{}`", self.family.name, expected[0]))),
            _ => Ok(()),
        }
    }

    /// Attention as all layers have it, but for windows.
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
        let scalar =
            if family.scales_by_scalar { config.float("query_pre_attn_scalar")?.or(Some(256.0)) } else { None };
        let bias = config.flag("attention_bias")?.unwrap_or(false);
        Ok(Attention {
            heads,
            kv_heads: config.count("num_key_value_heads")?.unwrap_or(heads),
            head_dim,
            scale: scalar.unwrap_or(head_dim as f64).sqrt().recip() as f32,
            softcap: None,
            window: None,
            rope: 0,
            query_key_norm: family.query_key_norm,
            input_bias: family.biases == Biases::Inputs || bias,
            output_bias: family.biases == Biases::AsConfigured && bias,
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
                let default = (!config.is_null("sliding_window")).then_some(window);
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
            let mut sliding = self.config.rope("sliding_attention", theta, head_dim, ScalingUse::IsForOtherLayers)?;
            // In the old layout `rope_theta` is the full layers' alone.
            if self.config.nested("rope_parameters").is_none() {
                sliding.theta = theta;
            }
            ropes.push(sliding);
        }
        Ok(ropes.iter().map(|rope| rope.build(Pairing::Halves)).collect())
    }
}
