//! The scheduler of a pipeline head: it chooses the rows of the next step and processes the sampled tokens.
//!
//! A state machine without I/O. Its methods form five groups:
//! - getters;
//! - `handle_*`: an input (a request, a cancellation, a result, a draft, a loss of the pipeline);
//! - [`Scheduler::poll_step`]: the next step to send, if one may be sent;
//! - [`Scheduler::poll_draft`]: the next question for the draft model, if the instance has one;
//! - [`Scheduler::poll_event`]: the next event for a request's client.
//!
//! Sequences share steps. Each decoding sequence adds one row to a step, with a draft behind it, and prompts are
//! computed in chunks in the same steps, so a long prompt does not stall other sequences. The head has the same page
//! table as all shards, so it knows what fits without asking them. When pages run out, the newest sequence is
//! preempted: it loses its pages, and is later replayed from its tokens with bit-identical results.
//!
//! A prompt that shares a prefix with a running or cached sequence forks that sequence's pages, and only the rest is
//! computed. The prompt waits while another sequence still computes the shared prefix. The pages of cached sequences
//! are evicted when other sequences need them.
//!
//! A decoding sequence may add rows of drafted tokens (`speculation.rs`): where the model draws the drafted tokens, one
//! step yields several tokens, the same as without drafts.

mod admission;
mod drafting;
mod interface;
mod pacing;
mod prefix_cache;
mod prompt_lookup;
mod rows;
mod speculation;

pub use interface::*;

use drafting::Drafting;
use exo_engines::decoder::PageTable;
use exo_engines::engine::{Operation, PAGE_TOKENS, SeqId};
use exo_engines::sampler::{SampleError, Sampled, SamplerSpec, SamplingParams};
use prefix_cache::PrefixCache;
use std::collections::{BTreeMap, BTreeSet, VecDeque};

/// The scheduler of one instance.
#[derive(Debug)]
pub struct Scheduler {
    limits: Limits,
    pages: PageTable,
    sequences: BTreeMap<SeqId, Sequence>,
    /// In the order of admission.
    waiting: VecDeque<SeqId>,
    /// Oldest first.
    running: Vec<SeqId>,
    /// In the order in which they were sent.
    in_flight: VecDeque<Sent>,
    prefix_cache: PrefixCache,
    /// Sequences whose rejected drafts the shards drop with the next step.
    truncates: BTreeSet<SeqId>,
    /// Sequences that the shards release with the next step.
    releases: Vec<SeqId>,
    /// Sequences whose samplers close with the next step.
    closes: Vec<SeqId>,
    events: VecDeque<Event>,
    /// Questions that the draft model has not been asked yet.
    asks: VecDeque<DraftAsk>,
    drafts: DraftCounts,
}

/// A step in flight.
#[derive(Debug)]
struct Sent {
    rows: usize,
    /// The sequences for which the step draws a token.
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
    /// Tokens in the caches, or in flight to them, since the sequence was last admitted; without drafts.
    sent: usize,
    /// Drafted tokens in flight, which follow the `sent` ones.
    drafted: Vec<u32>,
    drafting: Drafting,
    /// Whether a step in flight will draw the sequence's next token.
    draws: bool,
    /// Whether the client has received [`Event::Admitted`].
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

    /// Rows that the sequence has yet to send.
    fn rows_left(&self) -> usize {
        if self.draws { 0 } else { self.tokens.len() - self.sent }
    }

    /// Whether the sequence's next row draws a token.
    fn decodes(&self) -> bool {
        self.rows_left() == 1
    }
}

impl Scheduler {
    /// Creates a scheduler without requests.
    pub fn new(limits: Limits) -> Self {
        Self {
            pages: PageTable::new(limits.pages),
            limits,
            sequences: BTreeMap::new(),
            waiting: VecDeque::new(),
            running: Vec::new(),
            in_flight: VecDeque::new(),
            prefix_cache: PrefixCache::default(),
            truncates: BTreeSet::new(),
            releases: Vec::new(),
            closes: Vec::new(),
            events: VecDeque::new(),
            asks: VecDeque::new(),
            drafts: DraftCounts::default(),
        }
    }

    /// The drafted tokens so far.
    pub fn draft_counts(&self) -> DraftCounts {
        self.drafts
    }

    /// The number of sequences that prefill or decode.
    pub fn running(&self) -> usize {
        self.running.len()
    }

    /// The number of sequences that wait for pages or for their turn.
    pub fn waiting(&self) -> usize {
        self.waiting.len()
    }

    /// Pages of each shard's cache in use, cached prefixes included.
    pub fn pages_used(&self) -> u32 {
        self.pages.used()
    }

    /// Sets the model's number of tokens as the first shard reports it: the desired list may hold another number.
    pub fn set_vocabulary(&mut self, vocabulary: u32) {
        self.limits.vocabulary = vocabulary;
    }

    /// The number of steps in flight.
    pub fn steps_in_flight(&self) -> usize {
        self.in_flight.len()
    }

    /// Rows of the largest step in flight, 0 if there is none.
    pub fn rows_in_flight_max(&self) -> usize {
        self.in_flight.iter().map(|sent| sent.rows).max().unwrap_or(0)
    }

    /// Adds a request to the queue.
    ///
    /// # Errors
    /// [`AdmitError`] if the request can never run.
    pub fn handle_request(&mut self, request: Request) -> Result<(), AdmitError> {
        let prompt_tokens = request.sampler.prompt.len();
        if prompt_tokens == 0 {
            return Err(AdmitError::EmptyPrompt);
        }
        let SamplerSpec { params, prompt: mut tokens, generated } = request.sampler;
        let room = match self.room_for(prompt_tokens) {
            Err(error) if generated.is_empty() => return Err(error),
            // The answer began where the context was longer.
            room => room.unwrap_or(0),
        };
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
            drafted: Vec::new(),
            drafting: Drafting::default(),
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

    /// Cancels a request and drops its events. An unknown request is ignored.
    pub fn handle_cancel(&mut self, seq: SeqId) {
        self.forget(seq);
        self.events.retain(|event| event.seq() != seq);
    }

    /// Applies the results of the oldest step in flight: for each sequence that draws, a token or an error, and the
    /// tokens of its accepted draft before it.
    pub fn handle_step_done(&mut self, results: Vec<(SeqId, Result<Sampled, SampleError>)>) {
        // The results match the draws of the step: otherwise the engine would have failed the step.
        self.in_flight.pop_front();
        self.settle_drafts(&results);
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
                    // Non-finite values in the cache would spoil each sequence that forks from it.
                    self.drop_cached_prefixes();
                    self.events.push_back(Event::Failed { seq, error });
                }
            }
        }
    }

    /// Takes the draft model's answer to a [`DraftAsk`] about `length` tokens; empty if it drafts nothing, or is late.
    /// An answer that is not awaited is ignored.
    pub fn handle_draft(&mut self, seq: SeqId, length: usize, mut draft: Vec<u32>) {
        // The draft model's vocabulary may be larger.
        let known = draft.iter().take_while(|&&token| token < self.limits.vocabulary).count();
        draft.truncate(known);
        if let Some(sequence) = self.sequences.get_mut(&seq) {
            sequence.drafting.answer(length, draft);
        }
    }

    /// Handles a new incarnation of the pipeline: all steps in flight and all caches are lost. The running sequences
    /// move to the front of the queue, oldest first, and are replayed.
    pub fn handle_pipeline_lost(&mut self) {
        self.in_flight.clear();
        self.truncates.clear();
        self.releases.clear();
        self.closes.clear();
        self.prefix_cache.clear();
        self.pages.clear();
        for seq in std::mem::take(&mut self.running).into_iter().rev() {
            self.preempt(seq);
        }
    }

    /// Handles a pipeline of other limits in place of the one before, whose steps and caches are lost. Sequences for
    /// which the new context is too small end.
    pub fn handle_pipeline_replaced(&mut self, limits: Limits) {
        self.handle_pipeline_lost();
        self.pages = PageTable::new(limits.pages);
        self.limits = limits;
        for seq in self.sequences.keys().copied().collect::<Vec<_>>() {
            let Some(sequence) = self.sequences.get(&seq) else { continue };
            let (prompt_tokens, generated) = (sequence.prompt_tokens, sequence.generated());
            let end = match self.room_for(prompt_tokens) {
                Ok(room) if generated < room as usize => {
                    let sequence = self.sequences.get_mut(&seq);
                    sequence.into_iter().for_each(|sequence| sequence.max_tokens = sequence.max_tokens.min(room));
                    continue;
                }
                Err(error) if generated == 0 => Event::Refused { seq, error },
                _ => Event::Finished { seq, reason: FinishReason::Length },
            };
            self.forget(seq);
            self.events.push_back(end);
        }
    }

    /// The tokens that an answer to a prompt can have.
    fn room_for(&self, prompt_tokens: usize) -> Result<u32, AdmitError> {
        let context = self.limits.context.limited(self.limits.pages.saturating_mul(PAGE_TOKENS));
        let room = (context.tokens as usize).checked_sub(prompt_tokens).filter(|room| *room > 0);
        room.map(|room| room as u32).ok_or(AdmitError::TooLong { prompt_tokens, context })
    }

    /// Drops all requests, and returns their sequences.
    pub fn handle_stop(&mut self) -> Vec<SeqId> {
        let all = self.sequences.keys().copied().collect();
        *self = Self::new(self.limits.clone());
        all
    }

    /// Returns the next question for the draft model.
    pub fn poll_draft(&mut self) -> Option<DraftAsk> {
        self.asks.pop_front()
    }

    /// Returns the next event for a client.
    pub fn poll_event(&mut self) -> Option<Event> {
        self.events.pop_front()
    }

    /// Returns the next step, if one may be sent and there is work.
    pub fn poll_step(&mut self) -> Option<StepPlan> {
        if self.in_flight.len() >= self.limits.steps_in_flight {
            return None;
        }
        let mut plan = StepPlan { operations: Vec::new(), samplers: Vec::new(), rows: Vec::new(), tokens: Vec::new() };
        for seq in std::mem::take(&mut self.truncates) {
            self.truncate(seq, &mut plan);
        }
        for seq in std::mem::take(&mut self.releases) {
            self.release(seq, &mut plan);
        }
        // Forks come before rows, in the order of the shards: a shared page is copied when a row is written to it.
        self.admit_waiting(&mut plan);
        self.add_decodes(&mut plan);
        self.add_prompts(&mut plan);
        if plan.rows.is_empty() && plan.operations.is_empty() && plan.samplers.is_empty() {
            return None;
        }
        let closes = std::mem::take(&mut self.closes).into_iter().map(|seq| SamplerOperation::Close { seq });
        plan.samplers.splice(0..0, closes);
        let mut draws: Vec<SeqId> = plan.rows.iter().filter(|row| row.wants_logits).map(|row| row.seq).collect();
        draws.dedup();
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
            sequence.drafted.clear();
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

    /// Evicts cached sequences other than `except` until `needed` pages are free. Returns whether they are.
    fn free_pages(&mut self, needed: u32, except: Option<SeqId>, plan: &mut StepPlan) -> bool {
        while needed > self.pages.free() {
            let Some(seq) = self.prefix_cache.evict(except) else { return false };
            self.release(seq, plan);
        }
        true
    }
}

#[cfg(test)]
mod tests;
