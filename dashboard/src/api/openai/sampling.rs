//! The sampling fields that both completion endpoints share.

use crate::api::error::ApiError;
use exo_actors::{GenerateRequest, ModelSpec, Prompt, SamplingParams, fresh_seed};
use serde::Deserialize;
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
    top_k: Option<i64>,
    min_p: Option<f32>,
    #[serde(alias = "repeat_penalty")]
    repetition_penalty: Option<f32>,
    presence_penalty: Option<f32>,
    frequency_penalty: Option<f32>,
    logit_bias: Option<BTreeMap<String, f32>>,
    seed: Option<i64>,
    max_tokens: Option<u32>,
    max_completion_tokens: Option<u32>,
    stop: Option<Stop>,
    n: Option<u32>,
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
                    max_tokens: self.max_tokens()?.or(default_max_tokens),
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
            Some(n) if (1..=CHOICES_MAX).contains(&n) => Ok(n),
            Some(n) => Err(ApiError::bad_value("n", format!("is {n}, not 1 to {CHOICES_MAX}"))),
        }
    }

    fn max_tokens(&self) -> Result<Option<u32>, ApiError> {
        match self.max_completion_tokens.or(self.max_tokens) {
            Some(0) => Err(ApiError::bad_value("max_tokens", "is 0; an answer has at least one token")),
            limit => Ok(limit),
        }
    }

    fn stop(&self) -> Result<Vec<String>, ApiError> {
        let stops = match self.stop.clone() {
            None => Vec::new(),
            Some(Stop::One(text)) => vec![text],
            Some(Stop::Several(texts)) => texts,
        };
        if stops.len() > STOPS_MAX {
            return Err(ApiError::bad_value("stop", format!("has {} strings, not 0 to {STOPS_MAX}", stops.len())));
        }
        match stops.iter().any(String::is_empty) {
            true => Err(ApiError::bad_value("stop", "has an empty string")),
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
        let params = SamplingParams {
            temperature: self.temperature.unwrap_or(1.0),
            top_k: u32::try_from(self.top_k.unwrap_or(0).max(0)).unwrap_or(u32::MAX),
            top_p: self.top_p.unwrap_or(1.0),
            min_p: self.min_p.unwrap_or(0.0),
            repetition_penalty: self.repetition_penalty.unwrap_or(1.0),
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
