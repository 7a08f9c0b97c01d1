//! The rotary embedding that a GGUF file's metadata describes.
//!
//! Source: `llama-model.cpp` and `llama-context.cpp` of llama.cpp for the keys and for what absent keys mean. A key
//! that would change the frequencies and is not understood is refused by name.

use super::gguf::Metadata;
use super::rope::{RopeParameters, Scaling};
use super::{LongRopes, Rope};
use crate::format::blocks::dequantise_row;
use crate::format::{FormatError, Value};

/// The keys below `rope.` that are read here.
const KNOWN: [&str; 11] = [
    "dimension_count",
    "freq_base",
    "freq_base_swa",
    "scale_linear",
    "scaling.type",
    "scaling.factor",
    "scaling.attn_factor",
    "scaling.original_context_length",
    "scaling.yarn_beta_fast",
    "scaling.yarn_beta_slow",
    "scaling.yarn_attn_factor",
];
/// Keys that change nothing: how the model was trained.
const IGNORED: [&str; 1] = ["scaling.finetuned"];
/// Keys that are understood at one value only, which changes nothing.
const NEUTRAL: [(&str, f64); 2] = [("scaling.yarn_ext_factor", 1.0), ("scaling.yarn_log_multiplier", 0.0)];

/// The scaling of all frequencies, whatever its type.
struct Stretch {
    /// How many times the context was stretched; 1: not.
    factor: f64,
    /// The factor of cos and sin.
    magnitude: f64,
}

impl Metadata<'_> {
    /// The table of all layers, followed by the table of sliding layers if the family has one.
    pub(super) fn ropes(&self, head_dim: usize) -> Result<Vec<Rope>, FormatError> {
        self.check_rope_keys()?;
        let dimensions = self.rope_dimensions(head_dim)?;
        let theta = self.theta()?;
        let mut ropes = vec![RopeParameters { theta, dimensions, scaling: self.scaling(dimensions)? }];
        let sliding_theta = self.float("rope.freq_base_swa")?;
        match (self.family.sliding_theta, sliding_theta) {
            (Some(default), sliding) => {
                let theta = sliding.unwrap_or(default);
                ropes.push(RopeParameters { theta, dimensions, scaling: Scaling::None });
            }
            (None, Some(sliding)) if sliding != theta => {
                let what = format!("is {sliding}; {} models have one base for all layers", self.family.name);
                return Err(self.bad(&self.key("rope.freq_base_swa"), &what));
            }
            (None, _) => {}
        }
        ropes.iter().map(|rope| self.build(rope)).collect()
    }

    /// LongRoPE's table for long contexts, if the file has one.
    pub(super) fn long_ropes(&self, head_dim: usize) -> Result<Option<LongRopes>, FormatError> {
        let Some(divisors) = self.divisors("rope_factors_long.weight")? else { return Ok(None) };
        let rope = RopeParameters {
            theta: self.theta()?,
            dimensions: self.rope_dimensions(head_dim)?,
            scaling: self.divided(divisors)?,
        };
        let above_tokens = match self.optional("rope.scaling.original_context_length")? {
            Some(tokens) => tokens,
            None => self.required("context_length")?,
        };
        Ok(Some(LongRopes { above_tokens, ropes: vec![self.build(&rope)?] }))
    }

    fn check_rope_keys(&self) -> Result<(), FormatError> {
        let prefix = self.key("rope.");
        for key in self.file.keys().filter(|key| key.starts_with(&prefix)) {
            let name = &key[prefix.len()..];
            let neutral = NEUTRAL.iter().find(|(known, _)| *known == name).map(|&(_, value)| value);
            let is_neutral = neutral.is_some() && self.file.get(key, Value::as_f64)? == neutral;
            if !KNOWN.contains(&name) && !IGNORED.contains(&name) && !is_neutral {
                return Err(self.bad(key, "is not supported: answers would be wrong without it"));
            }
        }
        Ok(())
    }

    fn rope_dimensions(&self, head_dim: usize) -> Result<usize, FormatError> {
        let dimensions = self.optional("rope.dimension_count")?.unwrap_or(head_dim);
        match dimensions > head_dim {
            true => {
                let what = format!("is {dimensions}, more than the head dimension {head_dim}");
                Err(self.bad(&self.key("rope.dimension_count"), &what))
            }
            false => Ok(dimensions),
        }
    }

    fn theta(&self) -> Result<f64, FormatError> {
        Ok(self.float("rope.freq_base")?.unwrap_or(10_000.0))
    }

    fn build(&self, rope: &RopeParameters) -> Result<Rope, FormatError> {
        match rope.is_complete() {
            true => Ok(rope.build(self.family.gguf_pairing)),
            false => {
                let what = "of frequencies, such as rope_freqs.weight, are not one for each pair of dimensions";
                Err(self.bad("divisors", what))
            }
        }
    }

    fn divisors(&self, tensor: &str) -> Result<Option<Vec<f32>>, FormatError> {
        let Some(info) = self.file.tensors.get(tensor) else { return Ok(None) };
        let range = info.offset_bytes..info.offset_bytes + info.length_bytes;
        let mut divisors = vec![0.0; info.shape.iter().product()];
        dequantise_row(info.element, &self.file.file.read(range, tensor)?, &mut divisors);
        Ok(Some(divisors))
    }

    /// The factor of `rope.scaling.factor`, or of the older `rope.scale_linear`, and the factor of cos and sin. A
    /// factor of 0 means no stretch.
    fn stretch(&self) -> Result<Stretch, FormatError> {
        let factor = match self.float("rope.scaling.factor")? {
            Some(factor) => factor,
            None => self.float("rope.scale_linear")?.unwrap_or(1.0),
        };
        let factor = if factor == 0.0 { 1.0 } else { factor };
        if !(factor.is_finite() && factor > 0.0) {
            return Err(self.bad(&self.key("rope.scaling.factor"), &format!("is {factor}")));
        }
        Ok(Stretch { factor, magnitude: self.float("rope.scaling.attn_factor")?.unwrap_or(1.0) })
    }

    /// Divisors of single frequencies, which a factor multiplies.
    fn divided(&self, divisors: Vec<f32>) -> Result<Scaling, FormatError> {
        let Stretch { factor, magnitude } = self.stretch()?;
        let divisors = divisors.into_iter().map(|divisor| (f64::from(divisor) * factor) as f32).collect();
        Ok(Scaling::Divisors { divisors, magnitude })
    }

    fn scaling(&self, dimensions: usize) -> Result<Scaling, FormatError> {
        let key = self.key("rope.scaling.type");
        // Files without a type are scaled linearly.
        let kind = self.file.get(&key, Value::as_text)?.unwrap_or("linear");
        let divisors = match self.divisors("rope_freqs.weight")? {
            Some(divisors) => Some(divisors),
            None => self.divisors("rope_factors_short.weight")?,
        };
        match (kind, divisors) {
            ("linear" | "longrope", Some(divisors)) => self.divided(divisors),
            ("none", Some(divisors)) => Ok(Scaling::Divisors { divisors, magnitude: self.stretch()?.magnitude }),
            ("linear", None) => match self.stretch()? {
                Stretch { factor: 1.0, magnitude: 1.0 } => Ok(Scaling::None),
                Stretch { factor, magnitude: 1.0 } => Ok(Scaling::Linear { factor }),
                Stretch { factor, magnitude } => {
                    Ok(Scaling::Divisors { divisors: vec![factor as f32; dimensions / 2], magnitude })
                }
            },
            ("none", None) => match self.stretch()?.magnitude {
                1.0 => Ok(Scaling::None),
                magnitude => Ok(Scaling::Divisors { divisors: vec![1.0; dimensions / 2], magnitude }),
            },
            ("yarn", None) => self.yarn(),
            ("yarn", Some(_)) => {
                Err(self.bad(&key, "is `yarn` beside divisors of frequencies, which is not supported"))
            }
            ("longrope", None) => {
                Err(self.bad(&key, "is `longrope`, but the tensor `rope_factors_short.weight` is missing"))
            }
            (other, _) => Err(self.bad(&key, &format!("is `{other}`, which is not supported"))),
        }
    }

    fn yarn(&self) -> Result<Scaling, FormatError> {
        let context = match self.optional("rope.scaling.original_context_length")? {
            Some(context) => context,
            None => self.required("context_length")?,
        };
        let Stretch { factor, magnitude } = self.stretch()?;
        // Newer files name the whole factor of cos and sin.
        let attention_factor = match self.float("rope.scaling.yarn_attn_factor")? {
            Some(whole) => whole * magnitude,
            None => (0.1 * libm::log(factor.max(1.0)) + 1.0) * magnitude,
        };
        Ok(Scaling::Yarn {
            factor,
            beta_fast: self.float("rope.scaling.yarn_beta_fast")?.unwrap_or(32.0),
            beta_slow: self.float("rope.scaling.yarn_beta_slow")?.unwrap_or(1.0),
            original_context: context as f64,
            truncate: self.family.truncates_yarn,
            attention_factor: Some(attention_factor),
        })
    }
}
