//! Rotary frequencies from the parameters in model files.
//!
//! Formulas: `modeling_rope_utils.py` of Hugging Face transformers 5.23. With base θ and d rotated dimensions,
//! fᵢ = θ^(−2i/d); a scaling changes these frequencies.

use super::{Pairing, Rope};
use libm::log;
use std::f64::consts::PI;

/// A rotary embedding as a file describes it.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct RopeParameters {
    pub(super) theta: f64,
    /// Rotated dimensions of a head.
    pub(super) dimensions: usize,
    pub(super) scaling: Scaling,
}

#[derive(Debug, Clone, PartialEq)]
pub(super) enum Scaling {
    None,
    Linear {
        factor: f64,
    },
    Llama3 {
        factor: f64,
        low_frequency_factor: f64,
        high_frequency_factor: f64,
        original_context: f64,
    },
    Yarn {
        factor: f64,
        beta_fast: f64,
        beta_slow: f64,
        original_context: f64,
        /// Whether the ends of the ramp are rounded to whole dimensions.
        truncate: bool,
        /// The factor of cos and sin; `None`: 0.1 ln factor + 1.
        attention_factor: Option<f64>,
    },
    /// Each frequency is divided by its own divisor.
    Divisors {
        divisors: Vec<f32>,
        /// The factor of cos and sin.
        magnitude: f64,
    },
}

/// LongRoPE's factor of cos and sin, for a model whose context was stretched `factor`-fold from
/// `original_context` (Ding et al. 2024).
pub(super) fn long_magnitude(factor: f64, original_context: f64) -> f64 {
    if factor <= 1.0 { 1.0 } else { (1.0 + log(factor) / log(original_context)).sqrt() }
}

impl RopeParameters {
    /// Whether there is one divisor for each frequency; true for scalings without divisors.
    pub(super) fn is_complete(&self) -> bool {
        match &self.scaling {
            Scaling::Divisors { divisors, .. } => divisors.len() == self.dimensions / 2,
            _ => true,
        }
    }

    pub(super) fn build(&self, pairing: Pairing) -> Rope {
        let half = self.dimensions / 2;
        let plain = (0..half).map(|i| libm::pow(self.theta, -2.0 * i as f64 / self.dimensions as f64));
        let mut magnitude = 1.0;
        let frequencies: Vec<f64> = match &self.scaling {
            Scaling::None => plain.collect(),
            Scaling::Linear { factor } => plain.map(|f| f / factor).collect(),
            Scaling::Divisors { divisors, magnitude: by } => {
                magnitude = *by;
                plain.zip(divisors).map(|(f, &d)| f / f64::from(d)).collect()
            }
            Scaling::Llama3 { factor, low_frequency_factor: low, high_frequency_factor: high, original_context } => {
                let scale = |f: f64| {
                    let wavelength = 2.0 * PI / f;
                    let smooth = ((original_context / wavelength - low) / (high - low)).clamp(0.0, 1.0);
                    (1.0 - smooth) * f / factor + smooth * f
                };
                plain.map(scale).collect()
            }
            Scaling::Yarn { factor, attention_factor, .. } => {
                let default = if *factor <= 1.0 { 1.0 } else { 0.1 * log(*factor) + 1.0 };
                magnitude = attention_factor.unwrap_or(default);
                let (low, high) = self.yarn_ramp();
                let scale = |(i, f): (usize, f64)| {
                    let ramp = ((i as f64 - low) / (high - low)).clamp(0.0, 1.0);
                    f / factor * ramp + f * (1.0 - ramp)
                };
                plain.enumerate().map(scale).collect()
            }
        };
        Rope { pairing, frequencies: frequencies.into_iter().map(|f| f as f32).collect(), magnitude: magnitude as f32 }
    }

    /// The dimensions between which YaRN changes from kept to stretched frequencies (Peng et al. 2023, §3.2).
    fn yarn_ramp(&self) -> (f64, f64) {
        let Scaling::Yarn { beta_fast, beta_slow, original_context, truncate, .. } = self.scaling else {
            return (0.0, 1.0);
        };
        let d = self.dimensions as f64;
        let dimension_of = |turns: f64| d * log(original_context / (2.0 * PI * turns)) / (2.0 * log(self.theta));
        let (mut low, mut high) = (dimension_of(beta_fast), dimension_of(beta_slow));
        if truncate {
            (low, high) = (low.floor(), high.ceil());
        }
        (low, high) = (low.max(0.0), high.min(d - 1.0));
        if low == high { (low, high + 0.001) } else { (low, high) }
    }
}
