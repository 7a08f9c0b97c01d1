//! Which waiting sequence begins, and from what.

use super::prefix_cache::{PREFIX_TOKENS_MIN, common_tokens};
use super::{Event, SamplerOperation, Scheduler, StepPlan};
use exo_engines::engine::{Operation, PAGE_TOKENS, SeqId};

/// Waiting sequences that are looked at for one that can be taken up, where the first ones wait for a beginning.
const LOOKED_AT_MAX: usize = 16;

impl Scheduler {
    /// Takes up waiting sequences, in order, while their tokens so far fit the free pages.
    pub(super) fn admit_waiting(&mut self, plan: &mut StepPlan) {
        let mut at = 0;
        while let Some(&seq) = self.waiting.get(at) {
            let Some(sequence) = self.sequences.get(&seq) else {
                self.waiting.remove(at);
                continue;
            };
            if self.running.len() >= self.limits.running || at >= LOOKED_AT_MAX {
                return;
            }
            let donor = self.donor(&sequence.tokens);
            if self.is_being_computed(&sequence.tokens, donor.map_or(0, |(_, tokens)| tokens)) {
                at += 1;
                continue;
            }
            let Some(donor) = self.reserve_pages(sequence.tokens.len(), donor, plan) else { return };
            self.waiting.remove(at);
            self.begin(seq, donor, plan);
        }
    }

    /// The sequence that has most of the beginning of `tokens` in the caches, and how many tokens of it are of use:
    /// at least one is left to be computed.
    fn donor(&self, tokens: &[u32]) -> Option<(SeqId, usize)> {
        let running = self.running.iter().filter_map(|&seq| {
            let sequence = self.sequences.get(&seq)?;
            Some((seq, common_tokens(&sequence.tokens[..sequence.sent], tokens)))
        });
        let best = running.chain(self.prefix_cache.best(tokens)).max_by_key(|&(_, common)| common);
        let usable = best.map(|(seq, common)| (seq, common.min(tokens.len() - 1)));
        usable.filter(|&(_, common)| common >= PREFIX_TOKENS_MIN)
    }

    /// Whether a running sequence will soon have much more of the beginning of `tokens` than the `found` tokens that
    /// there are.
    fn is_being_computed(&self, tokens: &[u32], found: usize) -> bool {
        self.running.iter().filter_map(|seq| self.sequences.get(seq)).any(|sequence| {
            // Most sequences part early: what they have in common already tells.
            let soon = common_tokens(&sequence.tokens, tokens).min(tokens.len() - 1);
            sequence.sent < soon && soon >= found + PREFIX_TOKENS_MIN
        })
    }

    /// Makes room for a sequence of `length` tokens and its next one (else it would be the first to give way again)
    /// that forks from `donor`. Gives the donor that is left; `None` where there is no room.
    #[allow(clippy::option_option)] // No room, and room without a donor.
    fn reserve_pages(
        &mut self,
        length: usize,
        donor: Option<(SeqId, usize)>,
        plan: &mut StepPlan,
    ) -> Option<Option<(SeqId, usize)>> {
        let whole = (length as u32 + 1).div_ceil(PAGE_TOKENS) + self.promised();
        let shared = donor.map_or(0, |(_, tokens)| tokens as u32 / PAGE_TOKENS);
        if self.free_pages(whole - shared, donor.map(|(seq, _)| seq), plan) {
            return Some(donor);
        }
        // The donor's own pages are the last that can be had.
        self.free_pages(whole, None, plan).then_some(None)
    }

    fn begin(&mut self, seq: SeqId, donor: Option<(SeqId, usize)>, plan: &mut StepPlan) {
        let Some(sequence) = self.sequences.get_mut(&seq) else { return };
        plan.samplers.push(SamplerOperation::Open { seq, spec: sequence.sampler() });
        self.running.push(seq);
        let mut cached_tokens = 0;
        if let Some((from, length)) = donor {
            let operation = Operation::Fork { from, to: seq, length_tokens: length as u32 };
            // The donor is there, and the sequence is not.
            if self.pages.apply(operation).is_ok() {
                plan.operations.push(operation);
                self.prefix_cache.touch(from);
                sequence.sent = length;
                cached_tokens = length;
            }
        }
        if !sequence.is_told {
            sequence.is_told = true;
            self.events.push_back(Event::Admitted { seq, cached_tokens });
        }
    }

    /// Pages that running sequences will still take for tokens that they have.
    fn promised(&self) -> u32 {
        let needed = |seq: &SeqId| {
            let rows = self.sequences.get(seq).map_or(0, |sequence| sequence.tokens.len() - sequence.sent);
            self.pages.pages_needed(*seq, rows as u32)
        };
        self.running.iter().map(needed).sum()
    }
}
