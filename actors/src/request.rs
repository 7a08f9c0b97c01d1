//! What a request asks, and what comes back.

use crate::core::plan::{PlanError, ShardCount};
use crate::core::schedule::{AdmitError, FinishReason};
use crate::models::ModelError;
use exo_engines::engine::DeviceId;
use exo_engines::model::Recipe;
use exo_engines::sampler::{ParamsError, Sampled, SamplingParams};
use exo_engines::template::Conversation;
use serde::{Deserialize, Serialize};

/// Which model, and how it is to be run. Requests with equal specs share an instance.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct ModelSpec {
    /// A catalogue name, a hub name, or a path.
    pub model: String,
    /// `None`: one, or as few as fit.
    pub shards: Option<usize>,
    /// `None`: the best there is.
    pub device: Option<DeviceId>,
    /// Tokens of one sequence; `None`: the model's, up to a default bound.
    pub context_tokens: Option<u32>,
    /// What dense weights are quantised to while they are loaded.
    pub quantize: Option<Recipe>,
}

impl ModelSpec {
    /// The model as the node would run it by itself. A name may end with the recipe that the weights are quantised
    /// by: `owner/model@q4_k`.
    pub fn new(model: impl Into<String>) -> Self {
        let model = model.into();
        let (model, quantize) = match model.rsplit_once('@').map(|(name, recipe)| (name, recipe.parse())) {
            Some((name, Ok(recipe))) => (name.to_owned(), Some(recipe)),
            _ => (model, None),
        };
        Self { model, shards: None, device: None, context_tokens: None, quantize }
    }

    pub(crate) fn shard_count(&self) -> ShardCount {
        self.shards.map_or(ShardCount::Automatic, ShardCount::Exactly)
    }
}

/// The model's name, its recipe included.
impl std::fmt::Display for ModelSpec {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self.quantize {
            Some(recipe) => write!(f, "{}@{recipe}", self.model),
            None => f.write_str(&self.model),
        }
    }
}

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
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum RequestError {
    #[error(transparent)]
    Model(#[from] ModelError),
    #[error(transparent)]
    Plan(#[from] PlanError),
    #[error("no device `{device}` here")]
    NoDevice { device: String },
    #[error(transparent)]
    Params(#[from] ParamsError),
    #[error("the prompt cannot be used: {what}")]
    BadPrompt { what: String },
    #[error(transparent)]
    Admit(#[from] AdmitError),
    #[error("`{model}` needs {needed_bytes} bytes, which other models use now")]
    Crowded { model: String, needed_bytes: u64 },
    #[error("{requests} requests are running: no more are taken now")]
    Overloaded { requests: usize },
    #[error("the model's shards failed: {what}")]
    Engine { what: String, remedy: &'static str },
    #[error("the tokenizer is not ready")]
    NotReady,
    #[error("the node is shutting down")]
    ShuttingDown,
}

impl RequestError {
    /// What the user can do about it.
    pub fn remedy(&self) -> &'static str {
        match self {
            Self::Model(error) => error.remedy(),
            Self::Plan(PlanError::DoesNotFit { .. }) => {
                "close other programs, take a smaller quantisation, or a smaller --context"
            }
            Self::Plan(PlanError::TooManyShards { .. }) => "ask for at most one shard per layer, and at least one",
            Self::Plan(PlanError::NoDevice) | Self::NoDevice { .. } => "leave --device out to take the best there is",
            Self::Params(_) | Self::BadPrompt { .. } => "change the request",
            Self::Admit(AdmitError::EmptyPrompt) => "give a prompt",
            Self::Admit(AdmitError::TooLong { .. }) => "shorten the prompt, or start the model with a larger --context",
            Self::Overloaded { .. } | Self::NotReady | Self::Crowded { .. } => "try again in a moment",
            Self::Engine { remedy, .. } => remedy,
            Self::ShuttingDown => "start the node again",
        }
    }
}
