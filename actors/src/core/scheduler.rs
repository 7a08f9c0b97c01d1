//! The head of a pipeline: which rows go into the next step, and what becomes of their tokens.
//!
//! A state machine without I/O. Its methods come in four families:
//! - getters;
//! - `handle_*`: something happened (a request, a cancellation, a result, a loss of the pipeline);
//! - [`Scheduler::poll_step`]: the next step to send, if one may be sent;
//! - [`Scheduler::poll_event`]: the next thing to tell a request's client.
//!
//! Sequences share steps: each decodes one row at a time, and prompts go in chunks between them, so that a long
//! prompt stalls nobody. The head keeps the page table that all shards keep, so it knows what fits without asking;
//! when pages run out the newest sequence gives its up and is replayed later, from its tokens, to the same bits.
//!
//! A prompt that begins as another sequence does, one that runs or one that is over and kept, forks that one's pages
//! and is computed from where they part. It waits while that beginning is still being computed for another. Pages of
//! kept sequences are free for whoever needs them.

mod admission;
mod interface;
mod prefix_cache;

pub use interface::*;

use exo_engines::decoder::PageTable;
use exo_engines::engine::{Operation, PAGE_TOKENS, Row, SeqId};
use exo_engines::sampler::{SampleError, Sampled, SamplerSpec, SamplingParams};
use prefix_cache::PrefixCache;
use std::collections::{BTreeMap, BTreeSet, VecDeque};

/// The state machine.
#[derive(Debug)]
pub struct Scheduler {
    limits: Limits,
    pages: PageTable,
    sequences: BTreeMap<SeqId, Sequence>,
    /// In the order in which they will be taken up.
    waiting: VecDeque<SeqId>,
    /// Oldest first.
    running: Vec<SeqId>,
    /// First sent first.
    in_flight: VecDeque<Sent>,
    prefix_cache: PrefixCache,
    /// Sequences to be forgotten by the shards with the next step.
    releases: Vec<SeqId>,
    /// Those whose samplers are.
    closes: Vec<SeqId>,
    events: VecDeque<Event>,
}

/// A step that is on its way.
#[derive(Debug)]
struct Sent {
    rows: usize,
    /// Those that it draws a token for.
    draws: Vec<SeqId>,
}

#[derive(Debug)]
struct Sequence {
    params: SamplingParams,
    /// Prompt and answer.
    tokens: Vec<u32>,
    prompt_tokens: usize,
    max_tokens: u32,
    ends: BTreeSet<u32>,
    /// Tokens that are in the caches, or on their way there, since it was last taken up.
    sent: usize,
    /// Whether a step in flight will draw its next token.
    draws: bool,
    /// Whether its client knows that it was taken up.
    is_told: bool,
}

impl Sequence {
    fn generated(&self) -> usize {
        self.tokens.len() - self.prompt_tokens
    }

    fn sampler(&self) -> SamplerSpec {
        let (prompt, generated) = self.tokens.split_at(self.prompt_tokens);
        SamplerSpec { params: self.params.clone(), prompt: prompt.to_vec(), generated: generated.to_vec() }
    }

    /// Rows that it has to send.
    fn rows_left(&self) -> usize {
        if self.draws { 0 } else { self.tokens.len() - self.sent }
    }

    /// Whether its next row is the one that draws.
    fn decodes(&self) -> bool {
        self.rows_left() == 1
    }
}

impl Scheduler {
    /// A schedule with nothing to do.
    pub fn new(limits: Limits) -> Self {
        Self {
            pages: PageTable::new(limits.pages),
            limits,
            sequences: BTreeMap::new(),
            waiting: VecDeque::new(),
            running: Vec::new(),
            in_flight: VecDeque::new(),
            prefix_cache: PrefixCache::default(),
            releases: Vec::new(),
            closes: Vec::new(),
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

    /// The pipeline has another number of stages now; nothing is in flight.
    pub fn set_steps_in_flight(&mut self, steps: usize) {
        self.limits.steps_in_flight = steps;
    }

    /// The model has so many tokens, as its first shard says: entries of the list may say otherwise.
    pub fn set_vocabulary(&mut self, vocabulary: u32) {
        self.limits.vocabulary = vocabulary;
    }

    pub fn steps_in_flight(&self) -> usize {
        self.in_flight.len()
    }

    /// Rows of the largest step that is on its way.
    pub fn rows_in_flight_max(&self) -> usize {
        self.in_flight.iter().map(|sent| sent.rows).max().unwrap_or(0)
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
        let SamplerSpec { params, prompt: mut tokens, generated } = request.sampler;
        tokens.extend(generated);
        let vocabulary = self.limits.vocabulary;
        if let Some(&token) = tokens.iter().find(|&&token| token >= vocabulary) {
            return Err(AdmitError::NoSuchToken { token, vocabulary });
        }
        let sequence = Sequence {
            params,
            tokens,
            prompt_tokens,
            max_tokens: request.max_tokens.min(room),
            ends: request.ends,
            sent: 0,
            draws: false,
            is_told: false,
        };
        if sequence.generated() >= sequence.max_tokens as usize {
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
        self.events.retain(|event| event.seq() != seq);
    }

    /// Takes the tokens that the oldest step in flight drew.
    pub fn handle_step_done(&mut self, results: Vec<(SeqId, Result<Sampled, SampleError>)>) {
        // What was asked for and what came agree, or the engine would have failed the step.
        self.in_flight.pop_front();
        for (seq, result) in results {
            let Some(sequence) = self.sequences.get_mut(&seq) else { continue };
            sequence.draws = false;
            let is_token = |sampled: Sampled| match sampled.token < self.limits.vocabulary {
                true => Ok(sampled),
                false => Err(SampleError::NoSuchToken { seq, token: sampled.token }),
            };
            match result.and_then(is_token) {
                Ok(sampled) => self.drawn(seq, sampled),
                Err(error) => {
                    self.forget(seq);
                    // What is not finite for this one would not be for whoever goes on from it.
                    self.drop_cached_prefixes();
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
        self.closes.clear();
        self.prefix_cache.clear();
        self.pages.clear();
        for seq in std::mem::take(&mut self.running).into_iter().rev() {
            self.preempt(seq);
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
        // Forks come before rows, as the shards will apply them: a page that is shared is copied when it is written.
        self.admit_waiting(&mut plan);
        self.add_decodes(&mut plan);
        self.add_prompts(&mut plan);
        if plan.rows.is_empty() && plan.operations.is_empty() && plan.samplers.is_empty() {
            return None;
        }
        let closes = std::mem::take(&mut self.closes).into_iter().map(|seq| SamplerOperation::Close { seq });
        plan.samplers.splice(0..0, closes);
        let draws = plan.rows.iter().filter(|row| row.wants_logits).map(|row| row.seq).collect();
        self.in_flight.push_back(Sent { rows: plan.rows.len(), draws });
        Some(plan)
    }

    fn drawn(&mut self, seq: SeqId, sampled: Sampled) {
        let Some(sequence) = self.sequences.get_mut(&seq) else { return };
        if sequence.ends.contains(&sampled.token) {
            self.forget(seq);
            self.events.push_back(Event::Finished { seq, reason: FinishReason::Stop });
            return;
        }
        sequence.tokens.push(sampled.token);
        let is_full = sequence.generated() >= sequence.max_tokens as usize;
        self.events.push_back(Event::Token { seq, sampled });
        if is_full {
            self.forget(seq);
            self.events.push_back(Event::Finished { seq, reason: FinishReason::Length });
        }
    }

    fn forget(&mut self, seq: SeqId) {
        let Some(sequence) = self.sequences.remove(&seq) else { return };
        self.waiting.retain(|&other| other != seq);
        if self.running.contains(&seq) {
            self.running.retain(|&other| other != seq);
            self.closes.push(seq);
            let Sequence { mut tokens, sent, .. } = sequence;
            tokens.truncate(sent);
            let over = self.prefix_cache.insert(seq, tokens);
            self.releases.extend(over);
        }
    }

    fn drop_cached_prefixes(&mut self) {
        self.releases.extend(self.prefix_cache.sequences());
        self.prefix_cache.clear();
    }

    fn preempt(&mut self, seq: SeqId) {
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
    }

    /// Lets go of kept sequences, but not of `except`, until `needed` pages are free; tells whether they are.
    fn free_pages(&mut self, needed: u32, except: Option<SeqId>, plan: &mut StepPlan) -> bool {
        while needed > self.pages.free() {
            let Some(seq) = self.prefix_cache.evict(except) else { return false };
            self.release(seq, plan);
        }
        true
    }

    /// One row for each sequence that decodes, oldest first; the newest give way where pages run out. Where several
    /// steps may be in flight, each takes its share of them, so that no stage waits for another.
    fn add_decodes(&mut self, plan: &mut StepPlan) {
        let is_decoding = |seq: &&SeqId| self.sequences.get(seq).is_some_and(|s| s.draws || s.decodes());
        let share = self.running.iter().filter(is_decoding).count().div_ceil(self.limits.steps_in_flight.max(1));
        for seq in self.running.clone() {
            if plan.rows.len() >= share {
                return;
            }
            let decodes = self.sequences.get(&seq).is_some_and(Sequence::decodes);
            if decodes && self.running.contains(&seq) && self.free_page_for(seq, plan) {
                self.add_rows(seq, 1, plan);
            }
        }
    }

    /// Chunks of the prompts of running sequences, oldest first, in what is left of the step.
    fn add_prompts(&mut self, plan: &mut StepPlan) {
        for seq in self.running.clone() {
            // One that decodes has its turn in the step that it falls to.
            let prompt = self.sequences.get(&seq).filter(|sequence| !sequence.decodes());
            let left = prompt.map_or(0, Sequence::rows_left);
            let rows = left.min(self.room(plan));
            if rows == 0 {
                continue;
            }
            if self.free_pages(self.pages.pages_needed(seq, rows as u32), None, plan) {
                self.add_rows(seq, rows, plan);
            }
        }
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
    fn free_page_for(&mut self, seq: SeqId, plan: &mut StepPlan) -> bool {
        while !self.free_pages(self.pages.pages_needed(seq, 1), None, plan) {
            let gives_way = |other: &&SeqId| {
                let idle = self.sequences.get(other).is_some_and(|sequence| !sequence.draws);
                idle && !self.is_in_flight(**other) && !plan.rows.iter().any(|row| row.seq == **other)
            };
            let Some(&newest) = self.running.iter().rev().find(gives_way) else { return false };
            self.running.retain(|&other| other != newest);
            self.release(newest, plan);
            // What this very step was to open is not opened.
            plan.samplers
                .retain(|operation| !matches!(operation, SamplerOperation::Open { seq, .. } if *seq == newest));
            self.closes.push(newest);
            self.preempt(newest);
            if newest == seq {
                return false;
            }
        }
        true
    }

    fn is_in_flight(&self, seq: SeqId) -> bool {
        self.in_flight.iter().any(|sent| sent.draws.contains(&seq))
    }

    fn add_rows(&mut self, seq: SeqId, rows: usize, plan: &mut StepPlan) {
        let Some(sequence) = self.sequences.get_mut(&seq) else { return };
        // There is room, as the callers saw; copies are the shards' own affair.
        if self.pages.extend(seq, rows as u32).is_err() {
            return;
        }
        for position in sequence.sent..sequence.sent + rows {
            let wants_logits = position + 1 == sequence.tokens.len();
            plan.rows.push(Row { seq, position: position as u32, wants_logits });
            plan.tokens.push(sequence.tokens[position]);
            sequence.draws |= wants_logits;
        }
        sequence.sent += rows;
    }
}

#[cfg(test)]
mod tests;
