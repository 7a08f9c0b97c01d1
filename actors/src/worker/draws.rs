//! Draws of a step's tokens, beside the last shard.
//!
//! ```text
//! SamplerOperation ─► sampler ─queries─► Engine::forward ─Scores─► draws ─► StepResult
//! ```
//! A row is drawn from a few of its logits if these decide the token, else from all.

use crate::core::scheduler::SamplerOperation;
use exo_engines::engine::{Row, RowQuery, RowScores, Scores, SeqId};
use exo_engines::sampler::{SampleError, Sampled, Sampler};
use exo_engines::{Engine, EngineError};
use std::collections::HashMap;

/// The drawn tokens of a step: a token or an error for each row that wants logits, but for the rejected rows of drafts.
pub(super) type Drawn = Vec<(SeqId, Result<Sampled, SampleError>)>;

/// The rows of a step that want logits, and what they need.
#[derive(Debug)]
pub(super) struct Draws {
    rows: Vec<Row>,
    queries: Vec<RowQuery>,
    /// The drafted tokens of sequences.
    drafts: HashMap<SeqId, Vec<u32>>,
}

impl Draws {
    /// Applies a step's operations to the sampler, and finds out which logits the step's rows need.
    pub(super) fn prepare(
        sampler: &mut dyn Sampler,
        operations: Vec<SamplerOperation>,
        rows: &[Row],
        vocabulary: usize,
    ) -> Self {
        let mut drafts = HashMap::new();
        for operation in operations {
            match operation {
                SamplerOperation::Open { seq, spec } => sampler.open(seq, spec),
                SamplerOperation::Close { seq } => sampler.close(seq),
                SamplerOperation::Draft { seq, tokens } => drop(drafts.insert(seq, tokens)),
            }
        }
        let rows: Vec<Row> = rows.iter().filter(|row| row.wants_logits).copied().collect();
        let mut queries = Vec::with_capacity(rows.len());
        for of_sequence in rows.chunk_by(|a, b| a.seq == b.seq) {
            let seq = of_sequence[0].seq;
            let drafted: &[u32] = drafts.get(&seq).map_or(&[], Vec::as_slice);
            let query = |index: usize| sampler.query(seq, &drafted[..index.min(drafted.len())], vocabulary);
            queries.extend((0..of_sequence.len()).map(query));
        }
        Self { rows, queries, drafts }
    }

    /// The queries of the step.
    pub(super) fn queries(&self) -> &[RowQuery] {
        &self.queries
    }

    /// Draws a token for each row. Rows of a draft end with the first token that was not drafted.
    ///
    /// # Errors
    /// The engine's error if it has no answer to a query, or does not return all logits of a row.
    pub(super) fn draw(
        self,
        sampler: &mut dyn Sampler,
        engine: &mut dyn Engine,
        scores: &Scores,
    ) -> Result<Drawn, EngineError> {
        let mut drawn: Drawn = Vec::with_capacity(self.rows.len());
        let mut rejected = None;
        let mut reached = 0;
        for (index, &Row { seq, position, .. }) in self.rows.iter().enumerate() {
            if index == 0 || self.rows[index - 1].seq != seq {
                (rejected, reached) = (None, 0);
            }
            if rejected == Some(seq) {
                continue;
            }
            let result = match (scores.rows.get(index), &self.queries[index]) {
                (Some(RowScores::Top(top)), RowQuery::Top(query)) => {
                    match sampler.sample_top(seq, position, query, top) {
                        Ok(None) => sampler.sample(seq, position, &engine.logits(index)?),
                        Ok(Some(sampled)) => Ok(sampled),
                        Err(error) => Err(error),
                    }
                }
                (Some(RowScores::Values(range)), _) => {
                    let logits = scores.values.get(range.clone());
                    sampler.sample(seq, position, logits.ok_or_else(|| no_answer(index))?)
                }
                _ => return Err(no_answer(index)),
            };
            let drafted = self.drafts.get(&seq).and_then(|tokens| tokens.get(reached));
            reached += 1;
            let is_accepted = matches!((&result, drafted), (Ok(sampled), Some(drafted)) if sampled.token == *drafted);
            rejected = (!is_accepted).then_some(seq);
            drawn.push((seq, result));
        }
        Ok(drawn)
    }
}

fn no_answer(index: usize) -> EngineError {
    EngineError::BadStep { what: format!("the engine did not answer query {index}") }
}

#[cfg(test)]
mod tests;
