//! What a request asks, and what comes back.

use crate::core::plan::PlanError;
use crate::core::schedule::{AdmitError, FinishReason};
pub use crate::core::spec::ModelSpec;
use crate::models::error::ModelError;
use exo_engines::sampler::{ParamsError, Sampled, SamplingParams};
use exo_engines::template::Conversation;
use serde::{Deserialize, Serialize};
use std::borrow::Cow;

/// What is to be continued.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Prompt {
    /// Rendered by the model's chat template; a base model continues the texts plainly.
    Chat(Conversation),
    /// Plain text, behind the model's first token.
    Text(String),
    /// Exactly these.
    Tokens(Vec<u32>),
}

/// A request to generate.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct GenerateRequest {
    pub model: ModelSpec,
    pub prompt: Prompt,
    pub params: SamplingParams,
    /// Tokens to generate at most; `None`: until the context is full.
    pub max_tokens: Option<u32>,
    /// Texts that end the answer; they are not part of it.
    pub stop: Vec<String>,
}

/// A seed that nobody else has; of use for ids, too. Not a secret.
pub fn fresh_seed() -> u64 {
    use std::hash::{BuildHasher, Hasher};
    // std's hashers are keyed at random.
    std::collections::hash_map::RandomState::new().build_hasher().finish()
}

/// What a request's stream gives, in this order: `Started`, tokens, `Finished`; or an error at any point.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Generated {
    Started {
        prompt_tokens: Vec<u32>,
    },
    Token {
        sampled: Sampled,
        /// Names of the token and of the likeliest ones, in order.
        names: Vec<String>,
        /// Text that may be shown now; empty while a character or a stop string may be unfinished.
        text: String,
    },
    Finished {
        reason: FinishReason,
        /// What was held back.
        text: String,
        /// Tokens of the prompt that had been computed before, for a request that began likewise.
        reused_tokens: usize,
    },
}

/// Why a request failed.
#[derive(Debug, Clone, PartialEq, thiserror::Error, Serialize, Deserialize)]
#[non_exhaustive]
pub enum RequestError {
    #[error(transparent)]
    Model(#[from] ModelError),
    #[error(transparent)]
    Plan(#[from] PlanError),
    #[error("no device `{device}` here")]
    NoDevice { device: String },
    #[error("the prompt cannot be used: {what}")]
    BadPrompt { what: String },
    #[error(transparent)]
    Admit(#[from] AdmitError),
    #[error("`{model}` needs {needed_bytes} bytes, which other models use now")]
    Crowded { model: String, needed_bytes: u64 },
    #[error("{requests} requests are running: no more are taken now")]
    Overloaded { requests: usize },
    #[error("the model's shards failed: {what}")]
    Engine { what: String, remedy: Cow<'static, str> },
    #[error("the model has moved to another machine")]
    Moved,
    #[error("the tokenizer is not ready")]
    NotReady,
    #[error("the node is shutting down")]
    ShuttingDown,
    #[error("this node is a member of no cluster")]
    Alone,
    /// Told at once, and never from node to node. The last one: what is left out of a format that counts variants shifts
    /// those behind it.
    #[error(transparent)]
    #[serde(skip)]
    Params(#[from] ParamsError),
}

impl RequestError {
    /// What the user can do about it.
    pub fn remedy(&self) -> &str {
        match self {
            Self::Model(error) => error.remedy(),
            Self::Plan(PlanError::DoesNotFit { .. }) => {
                "close other programs, take a smaller quantisation, or a smaller --context"
            }
            Self::Plan(PlanError::TooManyShards { .. }) => "ask for at most one shard per layer, and at least one",
            Self::Plan(PlanError::NoDevice) | Self::NoDevice { .. } => "leave --device out to take the best there is",
            Self::Params(_) | Self::BadPrompt { .. } | Self::Admit(AdmitError::NoSuchToken { .. }) => {
                "change the request"
            }
            Self::Admit(AdmitError::EmptyPrompt) => "give a prompt",
            Self::Admit(AdmitError::TooLong { .. }) => "shorten the prompt, or start the model with a larger --context",
            Self::Plan(PlanError::BadSplit { .. }) => "give each layer once: --split laptop:0-11,desktop:12-29",
            Self::Plan(PlanError::NoSuchNode { .. }) => "`exo-node status` lists the members' names",
            Self::Plan(PlanError::Leaving { .. }) => "start it anew, or split the model over others",
            Self::Overloaded { .. } | Self::NotReady | Self::Crowded { .. } | Self::Moved => "try again in a moment",
            Self::Engine { remedy, .. } => remedy,
            Self::Alone => "start it without `--listen none`",
            Self::ShuttingDown => "start the node again",
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use exo_net::wire;

    /// What one node says is what another one hears.
    #[test]
    fn errors_travel_as_they_are() {
        let engine = RequestError::Engine { what: "w".to_owned(), remedy: "r".into() };
        let plan = RequestError::Plan(PlanError::DoesNotFit { needed_bytes: 3, free_bytes: 2, missing_bytes: 1 });
        let others = [RequestError::Moved, RequestError::NotReady, RequestError::ShuttingDown];
        let model = RequestError::Model(ModelError::Unknown { model: "m".to_owned() });
        for error in [engine, plan, model, RequestError::Overloaded { requests: 7 }].into_iter().chain(others) {
            let bytes = wire::encode(&error).expect("it is written");
            assert_eq!(wire::decode::<RequestError>(&bytes), Ok(error));
        }
    }
}
