//! Speculation: rows of drafted tokens, which a step computes before their turn (Leviathan et al. 2023).
//!
//! ```text
//! tokens ─► draft ─► rows that all draw ─► last shard: draws in order, and stops at the first other token ─► results
//! ```
//! A row's bits depend on its own sequence alone, and a draw on the seed and the position. So the tokens are those
//! without drafts, to the bit, also with a temperature. The caches drop the rows behind the first other token.

use super::drafting::{Decision, MODEL_DRAFT_MAX, Sources};
use super::{DraftAsk, SamplerOperation, Scheduler, Sequence, StepPlan};
use exo_engines::engine::{Operation, Row, SeqId};
use exo_engines::sampler::{SampleError, Sampled};
use std::collections::{BTreeMap, BTreeSet};

/// The fewest rows of a sequence in a step for which a draft model is asked: waiting for shorter drafts does not pay.
const MODEL_ROWS_MIN: usize = 4;

impl Scheduler {
    /// Chooses the drafts of all decoding sequences, each of which may send `rows` rows. Returns those that wait for
    /// the draft model.
    pub(super) fn await_drafts(&mut self, rows: usize) -> BTreeSet<SeqId> {
        let mut waiting = BTreeSet::new();
        for seq in &self.running {
            let Some(sequence) = self.sequences.get_mut(seq).filter(|sequence| sequence.decodes()) else { continue };
            let sources = Sources {
                lookup: self.limits.has_lookup,
                model: self.limits.has_draft_model && rows >= MODEL_ROWS_MIN && sequence.takes_model_drafts(),
            };
            let room = sequence.draft_room(rows);
            match sequence.drafting.decide(&sequence.tokens, room, sources) {
                Decision::Go => continue,
                Decision::Wait => {}
                Decision::Ask(count) => {
                    self.asks.push_back(DraftAsk { seq: *seq, tokens: sequence.tokens.clone(), count });
                }
            }
            waiting.insert(*seq);
        }
        waiting
    }

    /// Adds the chosen draft behind the last row of `seq`, which draws: at most `rows` rows together, on free pages,
    /// and no more tokens than the answer may have.
    pub(super) fn add_draft(&mut self, seq: SeqId, rows: usize, plan: &mut StepPlan) {
        let Some(sequence) = self.sequences.get_mut(&seq).filter(|sequence| sequence.draws) else { return };
        let mut tokens = sequence.drafting.take(sequence.tokens.len());
        tokens.truncate(sequence.draft_room(rows));
        // A draft takes no page that the next row of another sequence may need.
        let needed = self.pages.pages_needed(seq, tokens.len() as u32) + self.running.len() as u32;
        if tokens.is_empty() || needed > self.pages.free() || self.pages.extend(seq, tokens.len() as u32).is_err() {
            return;
        }
        sequence.drafted.clone_from(&tokens);
        for (position, &token) in (sequence.sent..).zip(&tokens) {
            plan.rows.push(Row { seq, position: position as u32, wants_logits: true });
            plan.tokens.push(token);
        }
        plan.samplers.push(SamplerOperation::Draft { seq, tokens });
    }

    /// Counts the accepted drafts of a step, whose tokens are in the caches, and marks the rejected ones. A draft is
    /// accepted up to the first token that differs, and behind it another token was drawn.
    pub(super) fn settle_drafts(&mut self, results: &[(SeqId, Result<Sampled, SampleError>)]) {
        let mut drawn: BTreeMap<SeqId, Vec<Option<u32>>> = BTreeMap::new();
        for (seq, result) in results {
            drawn.entry(*seq).or_default().push(result.as_ref().ok().map(|sampled| sampled.token));
        }
        for (seq, drawn) in drawn {
            let Some(sequence) = self.sequences.get_mut(&seq) else { continue };
            let draft = std::mem::take(&mut sequence.drafted);
            if draft.is_empty() {
                continue;
            }
            let equal = draft.iter().zip(&drawn).take_while(|(drafted, drawn)| **drawn == Some(**drafted)).count();
            let (drafted, accepted) = (draft.len(), equal.min(drawn.len() - 1));
            sequence.sent += accepted;
            sequence.drafting.learn(drafted, accepted);
            self.drafts.drafted += drafted as u64;
            self.drafts.accepted += accepted as u64;
            if accepted < drafted {
                self.truncates.insert(seq);
            }
        }
    }

    /// Drops the rejected drafts of a sequence from the caches.
    pub(super) fn truncate(&mut self, seq: SeqId, plan: &mut StepPlan) {
        let Some(sequence) = self.sequences.get(&seq) else { return };
        let operation = Operation::Truncate { seq, length_tokens: sequence.sent as u32 };
        // The caches have at least the sent tokens of a running sequence; one that waits has none.
        if self.running.contains(&seq) && self.pages.apply(operation).is_ok() {
            plan.operations.push(operation);
        }
    }
}

impl Sequence {
    /// Whether the sequence waits for a draft model. The first token does not: it is what a user waits for. Nor does a
    /// short answer: it may itself be a draft for another instance, which must not wait for drafts in turn.
    fn takes_model_drafts(&self) -> bool {
        self.generated() > 0 && self.max_tokens as usize > MODEL_DRAFT_MAX
    }

    /// The tokens that a draft may have where the sequence may send `rows` rows: its own row yields one token, whatever
    /// becomes of the draft.
    fn draft_room(&self, rows: usize) -> usize {
        let left = (self.max_tokens as usize).saturating_sub(self.generated() + 1);
        rows.saturating_sub(1).min(left)
    }
}
