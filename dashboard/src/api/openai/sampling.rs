//! The sampling fields that both completion endpoints share.

use crate::api::error::ApiError;
use exo_actors::{GenerateRequest, ModelSpec, Prompt, SamplingParams, fresh_seed};
use serde::de::Error as _;
use serde::{Deserialize, Deserializer};
use std::collections::BTreeMap;

/// The most answers to one prompt: each counts as one of the node's requests.
const CHOICES_MAX: u32 = 16;
/// The most stop strings: each is searched for at every token.
const STOPS_MAX: usize = 16;

/// OpenAI's fields, and the extra fields of local servers. Unknown fields are ignored.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(default)]
pub(super) struct Sampling {
    temperature: Option<f32>,
    top_p: Option<f32>,
    /// 0 or less: all tokens.
    #[serde(deserialize_with = "whole")]
    top_k: Option<i64>,
    min_p: Option<f32>,
    repetition_penalty: Option<f32>,
    /// Another name of `repetition_penalty`, which takes precedence.
    repeat_penalty: Option<f32>,
    presence_penalty: Option<f32>,
    frequency_penalty: Option<f32>,
    logit_bias: Option<BTreeMap<String, f32>>,
    #[serde(deserialize_with = "whole")]
    seed: Option<i64>,
    /// Less than 0: no limit.
    #[serde(deserialize_with = "whole")]
    max_tokens: Option<i64>,
    /// The newer name of `max_tokens`; takes precedence.
    #[serde(deserialize_with = "whole")]
    max_completion_tokens: Option<i64>,
    stop: Option<Stop>,
    #[serde(deserialize_with = "whole")]
    n: Option<i64>,
    stream: Option<bool>,
    stream_options: Option<StreamOptions>,
}

#[derive(Debug, Clone, Deserialize)]
#[serde(untagged)]
enum Stop {
    One(String),
    Several(Vec<String>),
}

#[derive(Debug, Clone, Default, Deserialize)]
#[serde(default)]
struct StreamOptions {
    include_usage: Option<bool>,
}

/// A whole number, which some clients write as `256.0`.
fn whole<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<i64>, D::Error> {
    let Some(number) = Option::<serde_json::Number>::deserialize(deserializer)? else { return Ok(None) };
    let float = || number.as_f64().filter(|float| float.fract() == 0.0 && float.abs() < 1e18);
    let whole = number.as_i64().or_else(|| number.as_u64().map(u64::cast_signed)).or_else(|| float().map(|f| f as i64));
    whole.map(Some).ok_or_else(|| D::Error::custom(format!("{number} is not a whole number")))
}

impl Sampling {
    pub(super) fn is_streamed(&self) -> bool {
        self.stream.unwrap_or(false)
    }

    pub(super) fn includes_usage(&self) -> bool {
        self.stream_options.as_ref().and_then(|options| options.include_usage).unwrap_or(false)
    }

    /// The requests for all answers, grouped by prompt. The endpoint gives `top_logprobs`, and `default_max_tokens` for
    /// clients that set no limit.
    ///
    /// # Errors
    /// 400 for a field with an invalid value.
    pub(super) fn requests(
        &self,
        model: &ModelSpec,
        prompts: &[Prompt],
        top_logprobs: u32,
        default_max_tokens: Option<u32>,
    ) -> Result<Vec<GenerateRequest>, ApiError> {
        let choices = self.choices()?;
        let fresh = fresh_seed();
        let mut requests = Vec::new();
        for prompt in prompts {
            for choice in 0..choices {
                requests.push(GenerateRequest {
                    model: model.clone(),
                    prompt: prompt.clone(),
                    params: self.params(choice, top_logprobs, fresh)?,
                    max_tokens: self.max_tokens(default_max_tokens)?,
                    stop: self.stop()?,
                });
            }
        }
        Ok(requests)
    }

    /// The number of answers to each prompt.
    ///
    /// # Errors
    /// 400 where `n` is not 1 to [`CHOICES_MAX`].
    pub(super) fn choices(&self) -> Result<u32, ApiError> {
        match self.n {
            None => Ok(1),
            Some(n) if (1..=i64::from(CHOICES_MAX)).contains(&n) => Ok(n as u32),
            Some(n) => Err(ApiError::bad_value("n", format!("is {n}, not 1 to {CHOICES_MAX}"))),
        }
    }

    /// The most tokens of an answer; `default` where the client names none. Other local servers read −1 as no limit.
    fn max_tokens(&self, default: Option<u32>) -> Result<Option<u32>, ApiError> {
        match self.max_completion_tokens.or(self.max_tokens) {
            None => Ok(default),
            Some(0) => Err(ApiError::bad_value("max_tokens", "is 0; an answer has at least one token")),
            Some(limit) => Ok(u32::try_from(limit).ok()),
        }
    }

    fn stop(&self) -> Result<Vec<String>, ApiError> {
        let mut stops = match self.stop.clone() {
            None => Vec::new(),
            Some(Stop::One(text)) => vec![text],
            Some(Stop::Several(texts)) => texts,
        };
        // Clients send an empty string for no stop.
        stops.retain(|stop| !stop.is_empty());
        match stops.len() > STOPS_MAX {
            true => Err(ApiError::bad_value("stop", format!("has {} strings, not 0 to {STOPS_MAX}", stops.len()))),
            false => Ok(stops),
        }
    }

    /// The parameters of answer number `choice` to a prompt. `fresh` is the seed where the client gives none.
    fn params(&self, choice: u32, top_logprobs: u32, fresh: u64) -> Result<SamplingParams, ApiError> {
        let mut logit_bias = BTreeMap::new();
        for (token, bias) in self.logit_bias.iter().flatten() {
            let id = token.parse().map_err(|_| {
                ApiError::bad_value("logit_bias", format!("has the key `{token}`, which is not a token id"))
            })?;
            logit_bias.insert(id, *bias);
        }
        // Of the likeliest tokens that make up a share of 0, one is left.
        let (top_p, is_greedy) = match self.top_p {
            Some(0.0) => (1.0, true),
            top_p => (top_p.unwrap_or(1.0), false),
        };
        let params = SamplingParams {
            temperature: if is_greedy { 0.0 } else { self.temperature.unwrap_or(1.0) },
            top_k: u32::try_from(self.top_k.unwrap_or(0).max(0)).unwrap_or(u32::MAX),
            top_p,
            min_p: self.min_p.unwrap_or(0.0),
            repetition_penalty: self.repetition_penalty.or(self.repeat_penalty).unwrap_or(1.0),
            presence_penalty: self.presence_penalty.unwrap_or(0.0),
            frequency_penalty: self.frequency_penalty.unwrap_or(0.0),
            logit_bias,
            // Negative seeds are valid.
            seed: self.seed.map_or(fresh, i64::cast_unsigned).wrapping_add(u64::from(choice)),
            top_logprobs,
        };
        params.check().map_err(exo_actors::RequestError::from)?;
        Ok(params)
    }
}
