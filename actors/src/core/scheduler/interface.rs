//! What goes into a schedule and what comes out.

use exo_engines::engine::{Operation, Row, SeqId};
use exo_engines::sampler::{SampleError, Sampled, SamplerSpec};
use serde::{Deserialize, Serialize};
use std::collections::BTreeSet;

/// Bounds of a schedule.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Limits {
    /// Pages of each shard's cache.
    pub pages: u32,
    /// Tokens of one sequence, prompt and answer.
    pub context_tokens: u32,
    /// Tokens below this number are the model's.
    pub vocabulary: u32,
    /// Steps in flight: as many as there are stages.
    pub steps_in_flight: usize,
    /// Sequences that decode together.
    pub running: usize,
    /// Rows of a step that nobody waits behind.
    pub rows_alone: usize,
    /// Rows of a step while other sequences decode: what a long prompt may hold them up by.
    pub rows_shared: usize,
}

/// A request to generate.
#[derive(Debug, Clone, PartialEq)]
pub struct Request {
    pub seq: SeqId,
    /// Parameters and prompt, and tokens that were generated before where a request is resumed.
    pub sampler: SamplerSpec,
    /// Tokens to generate at most.
    pub max_tokens: u32,
    /// Tokens that end the answer; they are not part of it.
    pub ends: BTreeSet<u32>,
}

/// Why a request was not taken.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error, Serialize, Deserialize)]
pub enum AdmitError {
    #[error("the prompt is empty")]
    EmptyPrompt,
    #[error("the prompt has {prompt_tokens} tokens, and the context {context_tokens}: at least one must be left")]
    TooLong { prompt_tokens: usize, context_tokens: u32 },
    #[error("token {token} is not one of the model's {vocabulary}")]
    NoSuchToken { token: u32, vocabulary: u32 },
}

/// Why an answer ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum FinishReason {
    /// The model ended it.
    Stop,
    /// `max_tokens`, or the context, is full.
    Length,
}

/// A change of the samplers beside the last shard, in band with the step that needs it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub enum SamplerOperation {
    Open { seq: SeqId, spec: SamplerSpec },
    Close { seq: SeqId },
}

/// What goes into the pipeline next.
#[derive(Debug, Clone, PartialEq)]
pub struct StepPlan {
    pub operations: Vec<Operation>,
    pub samplers: Vec<SamplerOperation>,
    pub rows: Vec<Row>,
    /// One for each row.
    pub tokens: Vec<u32>,
}

/// Something to tell a client.
#[derive(Debug, Clone, PartialEq)]
pub enum Event {
    /// Its prompt is being computed now, but for the first tokens, which had been computed for others.
    Admitted { seq: SeqId, cached_tokens: usize },
    /// The next token of the answer.
    Token { seq: SeqId, sampled: Sampled },
    /// No more tokens come.
    Finished { seq: SeqId, reason: FinishReason },
    /// No token can be drawn any more.
    Failed { seq: SeqId, error: SampleError },
}

impl Event {
    /// Whose client is to be told.
    pub fn seq(&self) -> SeqId {
        match self {
            Self::Admitted { seq, .. }
            | Self::Token { seq, .. }
            | Self::Finished { seq, .. }
            | Self::Failed { seq, .. } => *seq,
        }
    }
}
