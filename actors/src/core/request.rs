//! Requests to generate, the events of their answers, and their errors.

use crate::core::model_error::ModelError;
use crate::core::plan::{Placement, PlanError};
use crate::core::scheduler::{AdmitError, FinishReason};
use crate::core::spec::InstanceId;
pub use crate::core::spec::ModelSpec;
use exo_engines::EngineError;
use exo_engines::sampler::{ParamsError, Sampled, SamplingParams};
use exo_engines::template::Conversation;
use serde::{Deserialize, Serialize};
use std::borrow::Cow;

/// The text that a model continues.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Prompt {
    /// A conversation, rendered by the model's chat template. A model without a template continues the messages' texts.
    Chat(Conversation),
    /// Plain text. The model's first token (BOS), where it has one, is put before it.
    Text(String),
    /// Token ids, used unchanged.
    Tokens(Vec<u32>),
}

/// A request to generate one answer.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct GenerateRequest {
    /// The model, and how it runs.
    pub model: ModelSpec,
    /// The prompt.
    pub prompt: Prompt,
    /// How tokens are sampled.
    pub params: SamplingParams,
    /// Tokens to generate at most; `None`: until the context is full.
    pub max_tokens: Option<u32>,
    /// Strings that end the answer; the answer does not contain them.
    pub stop: Vec<String>,
}

/// What answers a request: an instance of a model.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Answerer {
    /// Its id.
    pub instance: InstanceId,
    /// The model's name, with the recipe that its weights are quantised by.
    pub model: String,
    /// How most of its weights are stored: `Q4_K`, `F16`, ….
    pub quantization: String,
    /// Where its shards ran when the answer began.
    pub placement: Placement,
}

/// An event of an answer's stream. In order: `Started`, tokens, `Finished`; an error can come at any point.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Generated {
    /// The model's head accepted the request.
    Started {
        /// What answers.
        by: Box<Answerer>,
        /// The prompt, encoded.
        prompt_tokens: Vec<u32>,
        /// Whether the prompt ends with `<think>`: the answer begins within a thought.
        #[serde(default)]
        opens_thought: bool,
    },
    /// The next token.
    Token {
        /// The token, and the requested log-probabilities.
        sampled: Sampled,
        /// The names of the token and of the likeliest ones, in the order of `sampled`.
        names: Vec<String>,
        /// Text that can be shown now; empty while a character or a stop string may be incomplete.
        text: String,
    },
    /// The answer is complete.
    Finished {
        /// Why it ended.
        reason: FinishReason,
        /// The text that was held back.
        text: String,
        /// Tokens of the prompt found in the prefix cache.
        #[serde(rename = "reused_tokens")]
        cached_tokens: usize,
    },
}

/// Why a request failed.
#[derive(Debug, Clone, PartialEq, thiserror::Error, Serialize, Deserialize)]
#[non_exhaustive]
pub enum RequestError {
    /// The model's files are not available.
    #[error(transparent)]
    Model(#[from] ModelError),
    /// The model cannot be placed.
    #[error(transparent)]
    Plan(#[from] PlanError),
    /// The request names a device that no member has.
    #[error("no member has a device `{device}`")]
    NoDevice {
        /// The device's id.
        device: String,
    },
    /// The prompt cannot be rendered or encoded.
    #[error("the prompt cannot be used: {what}")]
    BadPrompt {
        /// What is wrong with it.
        what: String,
    },
    /// The scheduler does not accept the request.
    #[error(transparent)]
    Admit(#[from] AdmitError),
    /// The request demands a longer context than the model's own.
    #[error("the requested context has {requested_tokens} tokens, more than the {model_tokens} of the model's own")]
    ContextTooLong {
        /// The requested context.
        requested_tokens: u32,
        /// The model's own context.
        model_tokens: u32,
    },
    /// Other models that are in use hold the memory that the model needs.
    #[error("`{model}` needs {needed_bytes} bytes, which other models use now")]
    MemoryBusy {
        /// The model's name.
        model: String,
        /// The memory that it needs.
        needed_bytes: u64,
    },
    /// The node already runs as many requests as it admits.
    #[error("the node runs {requests} requests, and admits no more now")]
    Overloaded {
        /// The limit.
        requests: usize,
    },
    /// The model's shards failed for good.
    #[error("the model's shards failed: {what}")]
    Engine {
        /// What failed.
        what: String,
        /// What the user can do about it.
        remedy: Cow<'static, str>,
    },
    /// A device has less memory than was planned, and no other placement is left.
    #[error("a device ran out of memory: {what}")]
    DeviceMemory {
        /// What needed the memory.
        what: String,
        /// What the user can do about it.
        remedy: Cow<'static, str>,
        /// The memory that the device had, in bytes; `None`: unknown.
        free_bytes: Option<u64>,
    },
    /// The head has moved to another node.
    #[error("the model has moved to another machine")]
    Moved,
    /// The tokenizer is not open yet.
    #[error("the tokenizer is not ready")]
    NotReady,
    /// The node is shutting down.
    #[error("the node is shutting down")]
    ShuttingDown,
    /// The node has no cluster.
    #[error("this node is a member of no cluster")]
    NotClustered,
    /// A model cannot draft for another.
    #[error("`{draft}` cannot draft for `{model}`: {what}")]
    BadDraft {
        /// The model's name.
        model: String,
        /// The draft model's name.
        draft: String,
        /// Why not.
        what: Cow<'static, str>,
    },
    /// A sampling parameter is out of range. The check runs before a request leaves its node, so this error is never
    /// encoded. It stays the last variant: a skipped variant would shift the numbers of later ones.
    #[error(transparent)]
    #[serde(skip)]
    Params(#[from] ParamsError),
}

impl RequestError {
    /// The error of a spec whose draft model cannot draft for its model.
    pub(crate) fn bad_draft(spec: &ModelSpec, what: &'static str) -> Self {
        let draft = spec.draft.clone().unwrap_or_default();
        Self::BadDraft { model: spec.to_string(), draft, what: what.into() }
    }

    /// The error of requests to a model whose engine has failed for good.
    pub(crate) fn of_engine(error: &EngineError) -> Self {
        let (what, remedy) = (error.to_string(), error.remedy().into());
        match error {
            EngineError::OutOfMemory { free_bytes, .. } => {
                Self::DeviceMemory { what, remedy, free_bytes: Some(*free_bytes).filter(|&bytes| bytes > 0) }
            }
            _ => Self::Engine { what, remedy },
        }
    }

    /// Returns what the caller can do about the error.
    pub fn remedy(&self) -> &str {
        match self {
            Self::Model(error) => error.remedy(),
            Self::Plan(error) => error.remedy(),
            Self::ContextTooLong { .. } => "request no context, or at most the model's own",
            Self::NoDevice { .. } => "name no device to use the best one",
            Self::Params(_) | Self::BadPrompt { .. } | Self::Admit(AdmitError::NoSuchToken { .. }) => {
                "change the request"
            }
            Self::Admit(AdmitError::EmptyPrompt) => "give a prompt",
            Self::Admit(AdmitError::TooLong { context, .. }) => context.remedy(),
            Self::Overloaded { .. } | Self::NotReady | Self::MemoryBusy { .. } | Self::Moved => "try again in a moment",
            Self::Engine { remedy, .. } | Self::DeviceMemory { remedy, .. } => remedy,
            Self::NotClustered => "start the node with a network",
            Self::BadDraft { .. } => "name a smaller model of the same family as the draft model",
            Self::ShuttingDown => "start the node again",
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use exo_net::wire;

    /// Encoding and decoding an error gives the same error.
    #[test]
    fn errors_survive_encoding_and_decoding() {
        let engine = RequestError::Engine { what: "w".to_owned(), remedy: "r".into() };
        let plan = RequestError::Plan(PlanError::DoesNotFit { needed_bytes: 3, free_bytes: 2, missing_bytes: 1 });
        let others = [RequestError::Moved, RequestError::NotReady, RequestError::ShuttingDown];
        let model = RequestError::Model(ModelError::Unknown { model: "m".to_owned() });
        for error in [engine, plan, model, RequestError::Overloaded { requests: 7 }].into_iter().chain(others) {
            let bytes = wire::encode(&error).expect("the error is encodable");
            assert_eq!(wire::decode::<RequestError>(&bytes), Ok(error));
        }
    }
}
