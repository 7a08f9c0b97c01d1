//! The inputs and outputs of the scheduler.

use crate::core::context::Context;
use exo_engines::engine::{Operation, Row, SeqId};
use exo_engines::sampler::{SampleError, Sampled, SamplerSpec};
use serde::{Deserialize, Serialize};
use std::collections::BTreeSet;

/// Limits of the scheduler.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Limits {
    /// Pages of each shard's cache.
    pub pages: u32,
    /// Tokens of one sequence at most, prompt and answer.
    pub context: Context,
    /// The number of the model's tokens; valid ids are below it.
    pub vocabulary: u32,
    /// Steps in flight at most: the number of stages.
    pub steps_in_flight: usize,
    /// Running sequences at most.
    pub running: usize,
    /// Rows of a step at most while no other sequence decodes.
    pub rows_alone: usize,
    /// Rows of a step at most while other sequences decode: limits the delay that a long prompt causes them.
    pub rows_shared: usize,
    /// Rows of a step up to which decoding sequences add drafts; 0 for no drafts.
    pub draft_rows: usize,
    /// Whether drafts come from the tokens of the sequence itself.
    pub has_lookup: bool,
    /// Whether a draft model answers [`DraftAsk`]s.
    pub has_draft_model: bool,
}

/// A request to generate.
#[derive(Debug, Clone, PartialEq)]
pub struct Request {
    /// The sequence.
    pub seq: SeqId,
    /// Parameters and prompt, and for a resumed request the tokens generated before.
    pub sampler: SamplerSpec,
    /// Tokens to generate at most.
    pub max_tokens: u32,
    /// Tokens that end the answer, which does not contain them.
    pub ends: BTreeSet<u32>,
}

/// Why a request was not admitted.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error, Serialize, Deserialize)]
pub enum AdmitError {
    /// The prompt has no tokens.
    #[error("the prompt is empty")]
    EmptyPrompt,
    /// The prompt leaves no space for an answer.
    #[error("the prompt has {prompt_tokens} tokens, which leaves no room for an answer in the context: {context}")]
    TooLong {
        /// Tokens of the prompt.
        prompt_tokens: usize,
        /// The context, or the whole cache if that is smaller.
        context: Context,
    },
    /// A token is outside the model's vocabulary.
    #[error("token {token} is not one of the model's {vocabulary} tokens")]
    NoSuchToken {
        /// The token id.
        token: u32,
        /// The number of the model's tokens.
        vocabulary: u32,
    },
}

/// Why an answer ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum FinishReason {
    /// The model ended it.
    Stop,
    /// The answer reached `max_tokens`, or the context is full.
    Length,
}

/// A change of the samplers at the last shard, sent with the step that needs it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub enum SamplerOperation {
    /// Creates the sampler of a sequence.
    Open {
        /// The sequence.
        seq: SeqId,
        /// The sampler's parameters, prompt and generated tokens.
        spec: SamplerSpec,
    },
    /// Drops the sampler of a sequence.
    Close {
        /// The sequence.
        seq: SeqId,
    },
    /// The step's last rows of a sequence are a draft: a row counts only if the tokens drawn before it are the drafted
    /// ones.
    Draft {
        /// The sequence.
        seq: SeqId,
        /// The drafted tokens, those of the rows that follow the first one with logits.
        tokens: Vec<u32>,
    },
}

/// A question for the draft model. Its sequence waits for the answer, so there must be one:
/// [`Scheduler::handle_draft`](super::Scheduler::handle_draft).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DraftAsk {
    /// The sequence.
    pub seq: SeqId,
    /// All tokens of the sequence.
    pub tokens: Vec<u32>,
    /// The most tokens of the draft.
    pub count: usize,
}

/// The drafted tokens of a scheduler so far.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct DraftCounts {
    /// Tokens that were drafted.
    pub drafted: u64,
    /// Drafted tokens that the model drew.
    pub accepted: u64,
}

/// The next step for the pipeline.
#[derive(Debug, Clone, PartialEq)]
pub struct StepPlan {
    /// Forks, truncations and releases of pages, applied before the rows.
    pub operations: Vec<Operation>,
    /// Changes of the samplers.
    pub samplers: Vec<SamplerOperation>,
    /// The rows to compute.
    pub rows: Vec<Row>,
    /// The token of each row.
    pub tokens: Vec<u32>,
}

/// An event for the client of a request.
#[derive(Debug, Clone, PartialEq)]
pub enum Event {
    /// The request was admitted: its prompt is computed, except for a cached prefix.
    Admitted {
        /// The sequence.
        seq: SeqId,
        /// Tokens of the prompt found in the caches.
        cached_tokens: usize,
    },
    /// The next token of the answer.
    Token {
        /// The sequence.
        seq: SeqId,
        /// The token.
        sampled: Sampled,
    },
    /// The answer is complete.
    Finished {
        /// The sequence.
        seq: SeqId,
        /// Why it ended.
        reason: FinishReason,
    },
    /// The request can no longer run: the pipeline that replaced its own has a smaller context.
    Refused {
        /// The sequence.
        seq: SeqId,
        /// Why.
        error: AdmitError,
    },
    /// The answer ends because no valid token was drawn.
    Failed {
        /// The sequence.
        seq: SeqId,
        /// Why.
        error: SampleError,
    },
}

impl Event {
    /// The sequence of the event.
    pub fn seq(&self) -> SeqId {
        match self {
            Self::Admitted { seq, .. }
            | Self::Token { seq, .. }
            | Self::Finished { seq, .. }
            | Self::Refused { seq, .. }
            | Self::Failed { seq, .. } => *seq,
        }
    }
}
