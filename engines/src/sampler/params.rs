//! The sampling parameters of a request, and their valid ranges.

use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;

/// Most log-probabilities per token. More are useless, and each costs time at every token.
const TOP_LOGPROBS_MAX: u32 = 100;
/// Most entries of a logit bias, as in OpenAI's API.
const LOGIT_BIAS_MAX: usize = 1024;

/// The parameters of sampling. [`SamplingParams::check`] enforces their ranges.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct SamplingParams {
    /// The divisor of the logits, 0 to 100; 0 always takes the likeliest token.
    pub temperature: f32,
    /// The number of likeliest tokens to keep, of any size; 0 keeps all.
    pub top_k: u32,
    /// Keeps the likeliest tokens that together have this probability: more than 0, up to 1, which keeps all.
    pub top_p: f32,
    /// Keeps tokens with at least this share of the likeliest token's probability, 0 to 1; 0 keeps all.
    pub min_p: f32,
    /// The divisor of positive logits, and factor of negative logits, of tokens seen before: 0.01 to 100; 1 means no
    /// penalty.
    pub repetition_penalty: f32,
    /// Subtracted from the logits of tokens generated before; −100 to 100.
    pub presence_penalty: f32,
    /// Subtracted from a token's logit once for each time that the token was generated; −100 to 100.
    pub frequency_penalty: f32,
    /// Added to the logits of individual tokens, by id: up to 1024 entries of −100 to 100.
    pub logit_bias: BTreeMap<u32, f32>,
    /// The seed of the random draws, of any value.
    pub seed: u64,
    /// The number of likeliest tokens to report with each token, 0 to 100.
    pub top_logprobs: u32,
}

impl Default for SamplingParams {
    fn default() -> Self {
        Self::greedy()
    }
}

/// A parameter that is out of its range.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
#[error("{field} is {value}; the valid range is {range}")]
pub struct ParamsError {
    /// The parameter's name, as in [`SamplingParams`].
    pub field: &'static str,
    /// The given value; for a list that is too long, its length.
    pub value: String,
    /// The valid range, in words.
    pub range: &'static str,
}

impl SamplingParams {
    /// Returns parameters that always take the likeliest token.
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

    /// Checks that all values are in their ranges.
    ///
    /// # Errors
    /// [`ParamsError`] with the first value out of its range.
    pub fn check(&self) -> Result<(), ParamsError> {
        let within = |field, value: f32, range: std::ops::RangeInclusive<f32>, text| {
            // NaN is in no range.
            match range.contains(&value) {
                true => Ok(()),
                false => Err(ParamsError { field, value: value.to_string(), range: text }),
            }
        };
        within("temperature", self.temperature, 0.0..=100.0, "0 to 100")?;
        within("top_p", self.top_p, f32::MIN_POSITIVE..=1.0, "more than 0, up to 1")?;
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

    /// Returns whether penalties or bias change the logits, which must then be copied.
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
    fn check_names_the_field_that_is_out_of_range() {
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
