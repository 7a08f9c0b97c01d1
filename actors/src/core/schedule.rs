//! The head of a pipeline: which rows go into the next step, and what becomes of their tokens.
//!
//! A state machine without I/O. Its methods come in four families:
//! - getters;
//! - `handle_*`: something happened (a request, a cancellation, a result, a loss of the pipeline);
//! - [`Schedule::poll_step`]: the next step to send, if one may be sent;
//! - [`Schedule::poll_event`]: the next thing to tell a request's client.
//!
//! Sequences share steps: each decodes one row at a time, and prompts go in chunks between them, so that a long
//! prompt stalls nobody. The head keeps the page table that all shards keep, so it knows what fits without asking;
//! when pages run out the newest sequence gives its up and is replayed later, from its tokens, to the same bits.

use exo_engines::decoder::PageTable;
use exo_engines::engine::{Operation, PAGE_TOKENS, Row, SeqId};
use exo_engines::sampler::{SampleError, Sampled, SamplerSpec};
use serde::{Deserialize, Serialize};
use std::collections::{BTreeMap, BTreeSet, VecDeque};

/// Bounds of a schedule.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Limits {
    /// Pages of each shard's cache.
    pub pages: u32,
    /// Tokens of one sequence, prompt and answer.
    pub context_tokens: u32,
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
    /// The next token of the answer.
    Token { seq: SeqId, sampled: Sampled },
    /// No more tokens come.
    Finished { seq: SeqId, reason: FinishReason },
    /// No token can be drawn any more.
    Failed { seq: SeqId, error: SampleError },
}

/// The state machine.
#[derive(Debug)]
pub struct Schedule {
    limits: Limits,
    pages: PageTable,
    sequences: BTreeMap<SeqId, Sequence>,
    /// In the order in which they will be taken up.
    waiting: VecDeque<SeqId>,
    /// Oldest first.
    running: Vec<SeqId>,
    /// What each step in flight will give back, first sent first.
    in_flight: VecDeque<Vec<SeqId>>,
    /// Sequences to be forgotten by the shards with the next step.
    releases: Vec<SeqId>,
    events: VecDeque<Event>,
}

#[derive(Debug)]
struct Sequence {
    sampler: SamplerSpec,
    max_tokens: u32,
    ends: BTreeSet<u32>,
    /// Tokens sent into the pipeline since it was last taken up.
    sent: usize,
    /// Whether a step in flight will draw its next token.
    draws: bool,
}

impl Sequence {
    fn length(&self) -> usize {
        self.sampler.prompt.len() + self.sampler.generated.len()
    }

    fn token(&self, position: usize) -> u32 {
        let prompt = &self.sampler.prompt;
        prompt.get(position).copied().unwrap_or_else(|| self.sampler.generated[position - prompt.len()])
    }

    /// Rows that it has to send.
    fn rows_left(&self) -> usize {
        if self.draws { 0 } else { self.length() - self.sent }
    }

    /// Whether its next row is the one that draws.
    fn decodes(&self) -> bool {
        self.rows_left() == 1
    }
}

impl Schedule {
    /// A schedule with nothing to do.
    pub fn new(limits: Limits) -> Self {
        Self {
            pages: PageTable::new(limits.pages),
            limits,
            sequences: BTreeMap::new(),
            waiting: VecDeque::new(),
            running: Vec::new(),
            in_flight: VecDeque::new(),
            releases: Vec::new(),
            events: VecDeque::new(),
        }
    }

    /// Sequences that have pages.
    pub fn running(&self) -> usize {
        self.running.len()
    }

    /// Sequences that wait for pages or for their turn.
    pub fn waiting(&self) -> usize {
        self.waiting.len()
    }

    pub fn pages_used(&self) -> u32 {
        self.pages.used()
    }

    pub fn steps_in_flight(&self) -> usize {
        self.in_flight.len()
    }

    /// Takes a request.
    ///
    /// # Errors
    /// [`AdmitError`] where it could never run.
    pub fn handle_request(&mut self, request: Request) -> Result<(), AdmitError> {
        let prompt_tokens = request.sampler.prompt.len();
        if prompt_tokens == 0 {
            return Err(AdmitError::EmptyPrompt);
        }
        let context_tokens = self.limits.context_tokens.min(self.limits.pages.saturating_mul(PAGE_TOKENS));
        if prompt_tokens >= context_tokens as usize {
            return Err(AdmitError::TooLong { prompt_tokens, context_tokens });
        }
        let room = context_tokens - prompt_tokens as u32;
        let sequence = Sequence {
            max_tokens: request.max_tokens.min(room),
            sampler: request.sampler,
            ends: request.ends,
            sent: 0,
            draws: false,
        };
        if sequence.sampler.generated.len() >= sequence.max_tokens as usize {
            self.events.push_back(Event::Finished { seq: request.seq, reason: FinishReason::Length });
            return Ok(());
        }
        self.sequences.insert(request.seq, sequence);
        self.waiting.push_back(request.seq);
        Ok(())
    }

    /// Forgets a request: no more events come of it. No error where it is not there.
    pub fn handle_cancel(&mut self, seq: SeqId) {
        self.forget(seq);
        self.events.retain(|event| match event {
            Event::Token { seq: other, .. } | Event::Finished { seq: other, .. } | Event::Failed { seq: other, .. } => {
                *other != seq
            }
        });
    }

    /// Takes the tokens that the oldest step in flight drew.
    pub fn handle_step_done(&mut self, results: Vec<(SeqId, Result<Sampled, SampleError>)>) {
        // What was asked for and what came agree, or the engine would have failed the step.
        self.in_flight.pop_front();
        for (seq, result) in results {
            let Some(sequence) = self.sequences.get_mut(&seq) else { continue };
            sequence.draws = false;
            match result {
                Ok(sampled) => self.drawn(seq, sampled),
                Err(error) => {
                    self.forget(seq);
                    self.events.push_back(Event::Failed { seq, error });
                }
            }
        }
    }

    /// The pipeline begins a new life: everything in flight and in the caches is gone. Running sequences go first in
    /// the queue, oldest first, and are replayed.
    pub fn handle_pipeline_lost(&mut self) {
        self.in_flight.clear();
        self.releases.clear();
        self.pages.clear();
        for seq in std::mem::take(&mut self.running).into_iter().rev() {
            self.wait_again(seq);
        }
    }

    /// Fails every request; gives their sequences.
    pub fn handle_stop(&mut self) -> Vec<SeqId> {
        let all = self.sequences.keys().copied().collect();
        *self = Self::new(self.limits.clone());
        all
    }

    /// The next thing to tell a client.
    pub fn poll_event(&mut self) -> Option<Event> {
        self.events.pop_front()
    }

    /// The next step, where one may be sent and there is something to do.
    pub fn poll_step(&mut self) -> Option<StepPlan> {
        if self.in_flight.len() >= self.limits.steps_in_flight {
            return None;
        }
        let mut plan = StepPlan { operations: Vec::new(), samplers: Vec::new(), rows: Vec::new(), tokens: Vec::new() };
        for seq in std::mem::take(&mut self.releases) {
            self.release(seq, &mut plan);
        }
        self.add_decodes(&mut plan);
        self.add_prompts(&mut plan);
        self.take_up(&mut plan);
        if plan.rows.is_empty() && plan.operations.is_empty() {
            return None;
        }
        let drawn = plan.rows.iter().filter(|row| row.wants_logits).map(|row| row.seq).collect();
        self.in_flight.push_back(drawn);
        Some(plan)
    }

    fn drawn(&mut self, seq: SeqId, sampled: Sampled) {
        let Some(sequence) = self.sequences.get_mut(&seq) else { return };
        if sequence.ends.contains(&sampled.token) {
            self.forget(seq);
            self.events.push_back(Event::Finished { seq, reason: FinishReason::Stop });
            return;
        }
        sequence.sampler.generated.push(sampled.token);
        let is_full = sequence.sampler.generated.len() >= sequence.max_tokens as usize;
        self.events.push_back(Event::Token { seq, sampled });
        if is_full {
            self.forget(seq);
            self.events.push_back(Event::Finished { seq, reason: FinishReason::Length });
        }
    }

    fn forget(&mut self, seq: SeqId) {
        if self.sequences.remove(&seq).is_none() {
            return;
        }
        self.waiting.retain(|&other| other != seq);
        if self.running.contains(&seq) {
            self.running.retain(|&other| other != seq);
            self.releases.push(seq);
        }
    }

    fn wait_again(&mut self, seq: SeqId) {
        if let Some(sequence) = self.sequences.get_mut(&seq) {
            sequence.sent = 0;
            sequence.draws = false;
            self.waiting.push_front(seq);
        }
    }

    fn release(&mut self, seq: SeqId, plan: &mut StepPlan) {
        let operation = Operation::Release { seq };
        // Releasing never fails.
        let _ = self.pages.apply(operation);
        plan.operations.push(operation);
        plan.samplers.push(SamplerOperation::Close { seq });
    }

    /// One row for each sequence that decodes, oldest first; the newest give way where pages run out.
    fn add_decodes(&mut self, plan: &mut StepPlan) {
        for seq in self.running.clone() {
            let decodes = self.sequences.get(&seq).is_some_and(Sequence::decodes);
            if decodes && self.running.contains(&seq) && self.make_room(seq, plan) {
                self.add_rows(seq, 1, plan);
            }
        }
    }

    /// Chunks of the prompts of running sequences, oldest first, in what is left of the step.
    fn add_prompts(&mut self, plan: &mut StepPlan) {
        for seq in self.running.clone() {
            let left = self.sequences.get(&seq).map_or(0, Sequence::rows_left);
            let in_plan = plan.rows.iter().any(|row| row.seq == seq);
            let rows = left.min(self.room(plan));
            if rows == 0 || in_plan {
                continue;
            }
            if self.pages.pages_needed(seq, rows as u32) <= self.pages.free() {
                self.add_rows(seq, rows, plan);
            }
        }
    }

    /// Takes up waiting sequences, in order, while their tokens so far fit the free pages.
    fn take_up(&mut self, plan: &mut StepPlan) {
        while let Some(&seq) = self.waiting.front() {
            let Some(sequence) = self.sequences.get(&seq) else {
                self.waiting.pop_front();
                continue;
            };
            let tokens = sequence.length() as u32;
            // Room for the next token, too: else it would be the first to give way again.
            let fits = (tokens + 1).div_ceil(PAGE_TOKENS) + self.promised() <= self.pages.free();
            let rows = sequence.length().min(self.room(plan));
            if !fits || rows == 0 || self.running.len() >= self.limits.running {
                return;
            }
            plan.samplers.push(SamplerOperation::Open { seq, spec: sequence.sampler.clone() });
            self.waiting.pop_front();
            self.running.push(seq);
            self.add_rows(seq, rows, plan);
        }
    }

    /// Pages that running sequences will still take for tokens that they have.
    fn promised(&self) -> u32 {
        let needed = |seq: &SeqId| {
            let rows = self.sequences.get(seq).map_or(0, |sequence| sequence.length() - sequence.sent);
            self.pages.pages_needed(*seq, rows as u32)
        };
        self.running.iter().map(needed).sum()
    }

    /// Rows that the step has room for.
    fn room(&self, plan: &StepPlan) -> usize {
        let others = self.running.iter().filter(|seq| self.sequences.get(seq).is_some_and(|s| s.draws || s.decodes()));
        let limit = if others.count() > 0 || plan.rows.iter().any(|row| row.wants_logits) {
            self.limits.rows_shared
        } else {
            self.limits.rows_alone
        };
        limit.saturating_sub(plan.rows.len())
    }

    /// Frees a page for the next row of `seq`, if it needs one. The newest sequences give way, first the newest; one
    /// that is in flight, or in this step, cannot.
    fn make_room(&mut self, seq: SeqId, plan: &mut StepPlan) -> bool {
        while self.pages.pages_needed(seq, 1) > self.pages.free() {
            let gives_way = |other: &&SeqId| {
                let idle = self.sequences.get(other).is_some_and(|sequence| !sequence.draws);
                idle && !self.is_in_flight(**other) && !plan.rows.iter().any(|row| row.seq == **other)
            };
            let Some(&newest) = self.running.iter().rev().find(gives_way) else { return false };
            self.running.retain(|&other| other != newest);
            self.release(newest, plan);
            self.wait_again(newest);
            if newest == seq {
                return false;
            }
        }
        true
    }

    fn is_in_flight(&self, seq: SeqId) -> bool {
        self.in_flight.iter().any(|seqs| seqs.contains(&seq))
    }

    fn add_rows(&mut self, seq: SeqId, rows: usize, plan: &mut StepPlan) {
        let Some(sequence) = self.sequences.get_mut(&seq) else { return };
        // There is room, as the callers saw; copies are the shards' own affair.
        if self.pages.extend(seq, rows as u32).is_err() {
            return;
        }
        for position in sequence.sent..sequence.sent + rows {
            let wants_logits = position + 1 == sequence.length();
            plan.rows.push(Row { seq, position: position as u32, wants_logits });
            plan.tokens.push(sequence.token(position));
            sequence.draws |= wants_logits;
        }
        sequence.sent += rows;
    }
}
