//! The rows of a step.

use super::{SamplerOperation, Scheduler, Sequence, StepPlan};
use exo_engines::engine::{Row, SeqId};

impl Scheduler {
    /// Adds one row for each decoding sequence, oldest first. The newest sequences are preempted if pages run out. If
    /// several steps may be in flight, each takes an equal share of the sequences, so no stage waits for another.
    pub(super) fn add_decodes(&mut self, plan: &mut StepPlan) {
        let is_decoding = |seq: &&SeqId| self.sequences.get(seq).is_some_and(|s| s.draws || s.decodes());
        let share = self.running.iter().filter(is_decoding).count().div_ceil(self.limits.steps_in_flight.max(1));
        let rows = self.limits.draft_rows.checked_div(share).unwrap_or(0);
        let waiting = self.await_drafts(rows);
        if self.limits.steps_in_flight <= 1 && !waiting.is_empty() {
            // The drafts of one round come at about the same time, and a step serves all sequences at once.
            return;
        }
        let mut added = 0;
        for seq in self.running.clone() {
            if added >= share {
                return;
            }
            let decodes = self.sequences.get(&seq).is_some_and(Sequence::decodes) && !waiting.contains(&seq);
            if decodes && self.running.contains(&seq) && self.free_page_for(seq, plan) {
                self.add_rows(seq, 1, plan);
                self.add_draft(seq, rows, plan);
                added += 1;
            }
        }
    }

    /// Adds chunks of the prompts of running sequences, oldest first, in the remaining rows of the step.
    pub(super) fn add_prompts(&mut self, plan: &mut StepPlan) {
        for seq in self.running.clone() {
            // Decoding sequences are added by `add_decodes`, each in the step of its share.
            let prompt = self.sequences.get(&seq).filter(|sequence| !sequence.decodes());
            let left = prompt.map_or(0, Sequence::rows_left);
            let rows = left.min(self.rows_free(plan));
            if rows == 0 {
                continue;
            }
            if self.free_pages(self.pages.pages_needed(seq, rows as u32), None, plan) {
                self.add_rows(seq, rows, plan);
            }
        }
    }

    /// Rows that the step can still take.
    fn rows_free(&self, plan: &StepPlan) -> usize {
        let others = self.running.iter().filter(|seq| self.sequences.get(seq).is_some_and(|s| s.draws || s.decodes()));
        let limit = if others.count() > 0 || plan.rows.iter().any(|row| row.wants_logits) {
            self.limits.rows_shared
        } else {
            self.limits.rows_alone
        };
        limit.saturating_sub(plan.rows.len())
    }

    /// Frees a page for the next row of `seq`, if it needs one, and returns whether the row has space. The newest
    /// sequences are preempted first, except those with a row in flight that draws, or with rows in this step.
    fn free_page_for(&mut self, seq: SeqId, plan: &mut StepPlan) -> bool {
        while !self.free_pages(self.pages.pages_needed(seq, 1), None, plan) {
            let gives_way = |other: &&SeqId| {
                let idle = self.sequences.get(other).is_some_and(|sequence| !sequence.draws);
                idle && !self.is_in_flight(**other) && !plan.rows.iter().any(|row| row.seq == **other)
            };
            let Some(&newest) = self.running.iter().rev().find(gives_way) else { return false };
            self.running.retain(|&other| other != newest);
            self.release(newest, plan);
            // A sampler that this step would open stays closed.
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
        // The callers have checked that pages are free; copies of shared pages are made by the shards.
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
