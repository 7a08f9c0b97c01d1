//! Reads a model from a GGUF file's metadata.
//!
//! Sources: `docs/gguf.md` of the ggml project for the keys, the loader of llama.cpp for what the keys do not say.

use super::families::{self, Biases, Family, Windows};
use super::{Architecture, Attention, Experts, FeedForward, Layer, ModelFiles, TokenizerSource, WeightSource, names};
use crate::format::{ElementType, FormatError, Gguf, Value, Writers};
use std::collections::BTreeMap;
use std::path::Path;

pub(super) fn open(path: &Path) -> Result<ModelFiles, FormatError> {
    let file = Gguf::open(path)?;
    let name = file.get("general.architecture", Value::as_text)?.unwrap_or_default();
    let family = families::of_gguf(name)
        .ok_or_else(|| FormatError::UnknownFamily { path: path.to_owned(), family: name.to_owned() })?;
    if file.get("split.count", Value::as_u64)?.unwrap_or(1) > 1 {
        return Err(FormatError::BadConfig {
            path: path.to_owned(),
            key: "split.count".to_owned(),
            what: "says that the model is in several files: join them with llama.cpp's gguf-split --merge".to_owned(),
        });
    }
    let reader = Metadata { file: &file, family };
    let architecture = reader.architecture()?.checked(path)?;
    let weights = weights(&file, &architecture)?;
    Ok(ModelFiles {
        path: path.to_owned(),
        architecture,
        weights,
        tokenizer: TokenizerSource::Gguf(path.to_owned()),
        quantization: quantization(&file)?,
    })
}

fn weights(file: &Gguf, architecture: &Architecture) -> Result<WeightSource, FormatError> {
    let mut tensors = BTreeMap::new();
    for role in names::roles(architecture) {
        let places = names::gguf(role, architecture);
        let slice = places.iter().find_map(|place| place.slice(0, file.tensors.get(&place.tensor)?));
        let slice = slice.ok_or_else(|| FormatError::BadTensor {
            path: file.file.path().to_owned(),
            tensor: places.first().map(|place| place.tensor.clone()).unwrap_or_default(),
            what: "it is missing".to_owned(),
        })?;
        tensors.insert(role, slice);
    }
    Ok(WeightSource { files: vec![file.file.path().to_owned()], tensors, writers: Writers::Nobody })
}

/// The keys of a GGUF file of a family.
pub(super) struct Metadata<'a> {
    pub(super) file: &'a Gguf,
    pub(super) family: &'a Family,
}

impl Metadata<'_> {
    pub(super) fn bad(&self, key: &str, what: &str) -> FormatError {
        FormatError::BadConfig { path: self.file.file.path().to_owned(), key: key.to_owned(), what: what.to_owned() }
    }

    pub(super) fn key(&self, key: &str) -> String {
        format!("{}.{key}", self.family.gguf_name.unwrap_or(self.family.name))
    }

    pub(super) fn optional(&self, key: &str) -> Result<Option<usize>, FormatError> {
        let key = self.key(key);
        Ok(self.file.get(&key, Value::as_u64)?.map(|v| usize::try_from(v).unwrap_or(usize::MAX)))
    }

    pub(super) fn required(&self, key: &str) -> Result<usize, FormatError> {
        self.optional(key)?.ok_or_else(|| self.bad(&self.key(key), "is missing"))
    }

    pub(super) fn float(&self, key: &str) -> Result<Option<f64>, FormatError> {
        self.file.get(&self.key(key), Value::as_f64)
    }

    /// Reads one number for all layers, or a list with one number for each layer.
    fn per_layer(&self, key: &str, layers: usize, default: Option<usize>) -> Result<Vec<usize>, FormatError> {
        let full = self.key(key);
        let values = match self.file.value(&full) {
            None => vec![default.ok_or_else(|| self.bad(&full, "is missing"))?; layers],
            Some(Value::List(values)) => values
                .map(|value| value.as_u64().map(|v| v as usize))
                .collect::<Option<Vec<_>>>()
                .ok_or_else(|| self.bad(&full, "is not a list of counts"))?,
            Some(value) => {
                let value = value.as_u64().ok_or_else(|| self.bad(&full, "is not a count"))?;
                vec![value as usize; layers]
            }
        };
        match values.len() == layers {
            true => Ok(values),
            false => Err(self.bad(&full, &format!("has {} numbers for {layers} layers", values.len()))),
        }
    }

    fn architecture(&self) -> Result<Architecture, FormatError> {
        let layer_count = self.required("block_count")?;
        if layer_count > super::LAYERS_MAX {
            return Err(self.bad(&self.key("block_count"), &format!("is {layer_count}")));
        }
        let hidden = self.required("embedding_length")?;
        let heads = self.per_layer("attention.head_count", layer_count, None)?;
        let first_heads = heads.first().copied().filter(|&h| h > 0);
        let first_heads = first_heads.ok_or_else(|| self.bad(&self.key("attention.head_count"), "is 0"))?;
        let head_dim = self.optional("attention.key_length")?.unwrap_or(hidden / first_heads);
        if head_dim > super::HEAD_DIM_MAX {
            return Err(self.bad(&self.key("attention.key_length"), &format!("is {head_dim}")));
        }
        if self.optional("attention.value_length")?.unwrap_or(head_dim) != head_dim {
            return Err(self.bad(&self.key("attention.value_length"), "differs from key_length"));
        }
        let kv_heads = self.per_layer("attention.head_count_kv", layer_count, Some(first_heads))?;
        let feed_forwards = self.feed_forwards(layer_count)?;
        let (ropes, windows) = (self.ropes(head_dim)?, self.windows(layer_count)?);
        let scaled = self.family.sliding_theta.is_some();
        let softcap = self.softcap("attn_logit_softcapping", self.family.softcaps.attention)?;
        let layers = feed_forwards.into_iter().enumerate().map(|(index, feed_forward)| Layer {
            norms: self.family.norms,
            attention: Attention {
                heads: heads[index],
                kv_heads: kv_heads[index],
                head_dim,
                scale: self.scale(hidden, heads[index], head_dim, layer_count),
                softcap,
                window: windows[index],
                rope: usize::from(scaled && windows[index].is_some()),
                query_key_norm: self.family.query_key_norm,
                input_bias: self.has_bias(index, "attn_q"),
                output_bias: self.has_bias(index, "attn_output"),
                sinks: self.family.sinks,
            },
            feed_forward,
        });
        Ok(Architecture {
            family: self.family.name.to_owned(),
            vocabulary: self.vocabulary()?,
            hidden,
            context_tokens: self.required("context_length")?,
            embedding_scale: if self.family.scales_embedding { (hidden as f32).sqrt() } else { 1.0 },
            norm_offset: 0.0,
            norm_epsilon: self.float("attention.layer_norm_rms_epsilon")?.unwrap_or(1e-5) as f32,
            logit_softcap: self.softcap("final_logit_softcapping", self.family.softcaps.logits)?,
            ropes,
            long_ropes: self.long_ropes(head_dim)?,
            layers: layers.collect(),
        })
    }

    fn softcap(&self, key: &str, own: Option<f64>) -> Result<Option<f32>, FormatError> {
        Ok(self.float(key)?.or(own).filter(|&cap| cap > 0.0).map(|cap| cap as f32))
    }

    fn feed_forwards(&self, layers: usize) -> Result<Vec<FeedForward>, FormatError> {
        let widths = self.per_layer("feed_forward_length", layers, None)?;
        let count = self.optional("expert_count")?.filter(|&count| count > 0);
        let experts = match count {
            Some(count) => Some(Experts {
                count,
                used: self.required("expert_used_count")?,
                weighting: self.family.weighting,
                router_bias: self.family.router_bias,
            }),
            None => None,
        };
        let own_width = self.optional("expert_feed_forward_length")?;
        let of = |layer: usize| {
            // A layer with its own gate tensor is dense.
            let experts = experts.clone().filter(|_| !self.has(layer, "ffn_gate.weight"));
            FeedForward {
                width: own_width.filter(|_| experts.is_some()).unwrap_or(widths[layer]),
                activation: self.family.activation,
                bias: self.has(layer, "ffn_gate.bias") || self.has(layer, "ffn_gate_exps.bias"),
                experts,
            }
        };
        Ok((0..layers).map(of).collect())
    }

    /// The attention scale, which GGUF does not store: see [`Scalar`](families::Scalar).
    fn scale(&self, hidden: usize, heads: usize, head_dim: usize, layers: usize) -> f32 {
        let is_other = self.family.scalar.is_some_and(|scalar| scalar.layers == layers);
        let by = if is_other { hidden / heads.max(1) } else { head_dim };
        (by as f32).sqrt().recip()
    }

    fn has(&self, layer: usize, tensor: &str) -> bool {
        self.file.tensors.contains_key(&format!("blk.{layer}.{tensor}"))
    }

    fn has_bias(&self, layer: usize, part: &str) -> bool {
        let always = self.family.biases == Biases::Inputs && part == "attn_q";
        let fused = part == "attn_q" && self.has(layer, "attn_qkv.bias");
        always || fused || self.has(layer, &format!("{part}.bias"))
    }

    /// The number of rows of the embedding; `vocab_size` and the token list may be padded differently.
    fn vocabulary(&self) -> Result<usize, FormatError> {
        let embedding = self.file.tensors.get("token_embd.weight");
        embedding.and_then(|info| info.shape.first().copied()).ok_or_else(|| FormatError::BadTensor {
            path: self.file.file.path().to_owned(),
            tensor: "token_embd.weight".to_owned(),
            what: "it is missing".to_owned(),
        })
    }

    fn windows(&self, layers: usize) -> Result<Vec<Option<usize>>, FormatError> {
        let window = self.optional("attention.sliding_window")?.filter(|&window| window > 0);
        let pattern = self.key("attention.sliding_window_pattern");
        if self.family.windows == Windows::Never && window.is_some() && self.file.value(&pattern).is_some() {
            // OLMo 3 has OLMo 2's name in GGUF.
            let what = format!("is there; {} models with sliding windows are not supported", self.family.name);
            return Err(self.bad(&pattern, &what));
        }
        let period = match self.family.windows {
            Windows::Alternating { period, .. } => period,
            // In files of these families the key holds for all layers.
            Windows::Always { .. } => return Ok(vec![window; layers]),
            Windows::Never | Windows::Upper { .. } => return Ok(vec![None; layers]),
        };
        let key = self.key("attention.sliding_window_pattern");
        let slides: Vec<bool> = match self.file.value(&key) {
            Some(Value::List(flags)) => {
                let flags: Option<Vec<bool>> = flags.map(Value::as_bool).collect();
                flags
                    .filter(|flags| flags.len() == layers)
                    .ok_or_else(|| self.bad(&key, "is not a list of one flag per layer"))?
            }
            other => {
                let period = other.and_then(Value::as_u64).map_or(period, |p| p as usize).max(1);
                (0..layers).map(|layer| !(layer + 1).is_multiple_of(period)).collect()
            }
        };
        Ok(slides.into_iter().map(|slides| window.filter(|_| slides)).collect())
    }
}

/// The name of the file's mixture of types (`llama_ftype` of llama.cpp), or of the type with the most bytes.
fn quantization(file: &Gguf) -> Result<String, FormatError> {
    let named = match file.get("general.file_type", Value::as_u64)? {
        Some(0) => "F32",
        Some(1) => "F16",
        Some(2) => "Q4_0",
        Some(3) => "Q4_1",
        Some(7) => "Q8_0",
        Some(8) => "Q5_0",
        Some(9) => "Q5_1",
        Some(14) => "Q4_K_S",
        Some(15) => "Q4_K_M",
        Some(16) => "Q5_K_S",
        Some(17) => "Q5_K_M",
        Some(10) => "Q2_K",
        Some(11) => "Q3_K_S",
        Some(12) => "Q3_K_M",
        Some(13) => "Q3_K_L",
        Some(18) => "Q6_K",
        Some(25) => "IQ4_NL",
        Some(30) => "IQ4_XS",
        Some(38) => "MXFP4",
        Some(32) => "BF16",
        _ => {
            let mut bytes: BTreeMap<ElementType, u64> = BTreeMap::new();
            for info in file.tensors.values() {
                *bytes.entry(info.element).or_default() += info.length_bytes;
            }
            let most = bytes.into_iter().max_by_key(|&(_, bytes)| bytes);
            most.map_or("F32", |(element, _)| element.name())
        }
    };
    Ok(named.to_owned())
}
