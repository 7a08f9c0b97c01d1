//! The admission of waiting sequences, and the cached prefixes from which they start.

use super::prefix_cache::{PREFIX_TOKENS_MIN, common_tokens};
use super::{Event, SamplerOperation, Scheduler, StepPlan};
use exo_engines::engine::{Operation, PAGE_TOKENS, SeqId};

/// How many waiting sequences are checked for one to admit while the first ones wait for a shared prefix.
const LOOKED_AT_MAX: usize = 16;

impl Scheduler {
    /// Admits waiting sequences, in order, while their tokens so far fit the free pages.
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

    /// The sequence that shares the longest prefix of `tokens` in the caches, and the usable length of that prefix,
    /// which leaves at least one token to compute.
    fn donor(&self, tokens: &[u32]) -> Option<(SeqId, usize)> {
        let running = self.running.iter().filter_map(|&seq| {
            let sequence = self.sequences.get(&seq)?;
            Some((seq, common_tokens(&sequence.tokens[..sequence.sent], tokens)))
        });
        let best = running.chain(self.prefix_cache.best(tokens)).max_by_key(|&(_, common)| common);
        let usable = best.map(|(seq, common)| (seq, common.min(tokens.len() - 1)));
        usable.filter(|&(_, common)| common >= PREFIX_TOKENS_MIN)
    }

    /// Whether a running sequence will soon have at least [`PREFIX_TOKENS_MIN`] more tokens of the prefix of `tokens`
    /// in the caches than the `found` ones.
    fn is_being_computed(&self, tokens: &[u32], found: usize) -> bool {
        self.running.iter().filter_map(|seq| self.sequences.get(seq)).any(|sequence| {
            // Most sequences diverge early, so the comparison of all their tokens ends early.
            let soon = common_tokens(&sequence.tokens, tokens).min(tokens.len() - 1);
            sequence.sent < soon && soon >= found + PREFIX_TOKENS_MIN
        })
    }

    /// Frees pages for a sequence that forks from `donor`: for `length` tokens and the next one, because the sequence
    /// would otherwise be preempted first. Returns the donor if it remains; the outer `None` means too few pages.
    #[allow(clippy::option_option)] // No pages differs from pages without a donor.
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
        // The donor's own pages are evicted last.
        self.free_pages(whole, None, plan).then_some(None)
    }

    fn begin(&mut self, seq: SeqId, donor: Option<(SeqId, usize)>, plan: &mut StepPlan) {
        let Some(sequence) = self.sequences.get_mut(&seq) else { return };
        plan.samplers.push(SamplerOperation::Open { seq, spec: sequence.sampler() });
        self.running.push(seq);
        let mut cached_tokens = 0;
        if let Some((from, length)) = donor {
            let operation = Operation::Fork { from, to: seq, length_tokens: length as u32 };
            // The page table has the donor, and does not have the new sequence.
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

    /// Pages that running sequences still need for the tokens that they have.
    fn promised(&self) -> u32 {
        let needed = |seq: &SeqId| {
            let rows = self.sequences.get(seq).map_or(0, |sequence| sequence.tokens.len() - sequence.sent);
            self.pages.pages_needed(*seq, rows as u32)
        };
        self.running.iter().map(needed).sum()
    }
}
