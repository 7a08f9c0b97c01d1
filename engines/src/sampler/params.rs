//! What a request asks of the sampler, and what may be asked.

use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;

/// More are of no use to anyone, and each costs time at every token.
const TOP_LOGPROBS_MAX: u32 = 100;
/// As OpenAI bounds it.
const LOGIT_BIAS_MAX: usize = 1024;

/// How tokens are drawn. [`SamplingParams::check`] says what is possible.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct SamplingParams {
    /// 0: always the likeliest.
    pub temperature: f32,
    /// Keep the k likeliest; 0: all.
    pub top_k: u32,
    /// Keep the likeliest that together have this probability.
    pub top_p: f32,
    /// Keep those with at least this share of the likeliest's probability.
    pub min_p: f32,
    /// Logits of tokens seen before are divided by it (multiplied where negative); 1: none.
    pub repetition_penalty: f32,
    /// Taken off the logits of tokens generated before.
    pub presence_penalty: f32,
    /// Taken off for each time that a token was generated.
    pub frequency_penalty: f32,
    /// Added to the logits of single tokens.
    pub logit_bias: BTreeMap<u32, f32>,
    pub seed: u64,
    /// How many of the likeliest tokens are reported with each token.
    pub top_logprobs: u32,
}

impl Default for SamplingParams {
    fn default() -> Self {
        Self::greedy()
    }
}

/// A value that no sampler can follow.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
#[error("{field} is {value}; {range} is possible")]
pub struct ParamsError {
    pub field: &'static str,
    pub value: String,
    pub range: &'static str,
}

impl SamplingParams {
    /// Always the likeliest token.
    pub fn greedy() -> Self {
        Self {
            temperature: 0.0,
            top_k: 0,
            top_p: 1.0,
            min_p: 0.0,
            repetition_penalty: 1.0,
            presence_penalty: 0.0,
            frequency_penalty: 0.0,
            logit_bias: BTreeMap::new(),
            seed: 0,
            top_logprobs: 0,
        }
    }

    /// Whether any value is out of its range.
    ///
    /// # Errors
    /// [`ParamsError`] with the first one.
    pub fn check(&self) -> Result<(), ParamsError> {
        let within = |field, value: f32, range: std::ops::RangeInclusive<f32>, text| {
            // A value that is no number lies in no range.
            match range.contains(&value) {
                true => Ok(()),
                false => Err(ParamsError { field, value: value.to_string(), range: text }),
            }
        };
        within("temperature", self.temperature, 0.0..=100.0, "0 to 100")?;
        within("top_p", self.top_p, f32::MIN_POSITIVE..=1.0, "more than 0, up to 1,")?;
        within("min_p", self.min_p, 0.0..=1.0, "0 to 1")?;
        within("repetition_penalty", self.repetition_penalty, 0.01..=100.0, "0.01 to 100")?;
        within("presence_penalty", self.presence_penalty, -100.0..=100.0, "-100 to 100")?;
        within("frequency_penalty", self.frequency_penalty, -100.0..=100.0, "-100 to 100")?;
        for &bias in self.logit_bias.values() {
            within("logit_bias", bias, -100.0..=100.0, "-100 to 100")?;
        }
        let count = |field, value: usize, limit: usize, range| match value <= limit {
            true => Ok(()),
            false => Err(ParamsError { field, value: value.to_string(), range }),
        };
        count("logit_bias", self.logit_bias.len(), LOGIT_BIAS_MAX, "up to 1024 entries")?;
        count("top_logprobs", self.top_logprobs as usize, TOP_LOGPROBS_MAX as usize, "0 to 100")
    }

    /// Whether logits must be copied before a token is chosen.
    pub(super) fn changes_logits(&self) -> bool {
        self.repetition_penalty != 1.0
            || self.presence_penalty != 0.0
            || self.frequency_penalty != 0.0
            || !self.logit_bias.is_empty()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn absurd_values_are_named() {
        let base = SamplingParams::greedy;
        let cases = [
            (SamplingParams { temperature: f32::NAN, ..base() }, "temperature"),
            (SamplingParams { temperature: -1.0, ..base() }, "temperature"),
            (SamplingParams { top_p: 0.0, ..base() }, "top_p"),
            (SamplingParams { min_p: 1.5, ..base() }, "min_p"),
            (SamplingParams { repetition_penalty: 0.0, ..base() }, "repetition_penalty"),
            (SamplingParams { frequency_penalty: f32::INFINITY, ..base() }, "frequency_penalty"),
            (SamplingParams { top_logprobs: 5000, ..base() }, "top_logprobs"),
            (SamplingParams { logit_bias: [(1, f32::NAN)].into(), ..base() }, "logit_bias"),
        ];
        for (params, field) in cases {
            assert_eq!(params.check().map_err(|error| error.field), Err(field));
        }
        assert_eq!(base().check(), Ok(()));
    }
}
