//! Speculation: rows of drafted tokens, which a step computes before their turn (Leviathan et al. 2023).
//!
//! ```text
//! tokens ─► draft ─► rows that all draw ─► last shard: draws in order, and stops at the first other token ─► results
//! ```
//! A row's bits depend on its own sequence alone, and a draw on the seed and the position. So the tokens are those
//! without drafts, to the bit, also with a temperature. The caches drop the rows behind the first other token.

use super::{SamplerOperation, Scheduler, StepPlan};
use exo_engines::engine::{Operation, Row, SeqId};
use exo_engines::sampler::{SampleError, Sampled};
use std::collections::BTreeMap;

impl Scheduler {
    /// Adds a draft behind the last row of `seq`, which draws: at most `rows` rows together, on free pages, and no more
    /// tokens than the answer may have.
    pub(super) fn add_draft(&mut self, seq: SeqId, rows: usize, plan: &mut StepPlan) {
        let Some(sequence) = self.sequences.get_mut(&seq).filter(|sequence| sequence.draws) else { return };
        // The row itself yields one token, whatever becomes of the draft.
        let room = (sequence.max_tokens as usize).saturating_sub(sequence.generated() + 1);
        let most = rows.saturating_sub(1).min(room);
        let tokens = sequence.lookup.draft(&sequence.tokens, most);
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
            sequence.lookup.learn(drafted, accepted);
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
