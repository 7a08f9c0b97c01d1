//! The end of the last shard: answers queries about rows from their logits, or with the rows after the final norm.

use super::bad_step;
use crate::backend::{Backend, Norm};
use crate::engine::{Row, RowQuery, RowScores, Scores, ShardSpec, TopQuery};
use crate::error::EngineError;
use crate::model::Architecture;

/// The weights after the last layer.
pub(super) struct OutputLayer<'a, B: Backend> {
    pub(super) norm: &'a Norm<B>,
    pub(super) head: &'a B::Matrix,
    pub(super) architecture: &'a Architecture,
}

/// The logits of a step, which stay on the device until the next step.
pub(super) struct KeptLogits<B: Backend> {
    logits: B::Logits,
    /// The row of logits of each query; `None`: the query needed no logits.
    places: Vec<Option<usize>>,
}

impl<B: Backend> KeptLogits<B> {
    /// Returns the logits, and the row in them that belongs to a query.
    pub(super) fn row(&self, query: usize) -> Option<(&B::Logits, usize)> {
        Some((&self.logits, self.places.get(query).copied().flatten()?))
    }
}

/// Returns an error unless there is a valid query for each row that wants logits.
pub(super) fn check_queries(spec: &ShardSpec, rows: &[Row], queries: &[RowQuery]) -> Result<(), EngineError> {
    let wanted = if spec.is_last() { rows.iter().filter(|row| row.wants_logits).count() } else { 0 };
    if queries.len() != wanted {
        return Err(bad_step(format!("{} queries for {wanted} rows that want logits", queries.len())));
    }
    let vocabulary = spec.architecture.vocabulary;
    let is_bad = |query: &TopQuery| query.count == 0 || query.tokens.iter().any(|&token| token as usize >= vocabulary);
    match queries.iter().any(|query| matches!(query, RowQuery::Top(query) if is_bad(query))) {
        true => Err(bad_step(format!("a query asks for no logit, or for one outside the vocabulary of {vocabulary}"))),
        false => Ok(()),
    }
}

impl<B: Backend> OutputLayer<'_, B> {
    /// Answers `queries` about the rows `wanted` of `hidden`, in order.
    pub(super) fn answer(
        &self,
        backend: &mut B,
        hidden: B::Buffer,
        wanted: &[usize],
        queries: &[RowQuery],
    ) -> Result<(Scores, Option<KeptLogits<B>>), EngineError> {
        let of = |is_final: bool| {
            let asked = wanted.iter().zip(queries);
            let rows = asked.filter(move |(_, query)| (**query == RowQuery::FinalNorm) == is_final);
            rows.map(|(&row, _)| row).collect::<Vec<usize>>()
        };
        let (finals, scored) = (of(true), of(false));
        let finals = if finals.is_empty() { Vec::new() } else { backend.final_rows(self.norm, &hidden, &finals)? };
        let mut kept = None;
        if !scored.is_empty() {
            let logits = backend.logits(self.norm, self.head, hidden, &scored, self.architecture.logit_softcap)?;
            let mut at = 0..scored.len();
            let place = |query: &RowQuery| if *query == RowQuery::FinalNorm { None } else { at.next() };
            kept = Some(KeptLogits { logits, places: queries.iter().map(place).collect() });
        }
        Ok((self.scores(backend, queries, kept.as_ref(), finals)?, kept))
    }

    fn scores(
        &self,
        backend: &mut B,
        queries: &[RowQuery],
        kept: Option<&KeptLogits<B>>,
        finals: Vec<f32>,
    ) -> Result<Scores, EngineError> {
        let (mut tops, mut whole) = (Vec::new(), Vec::new());
        for (index, query) in queries.iter().enumerate() {
            match (query, kept.and_then(|kept| kept.row(index))) {
                (RowQuery::Top(query), Some((_, row))) => tops.push((row, query)),
                (RowQuery::Logits, Some((_, row))) => whole.push(row),
                _ => {}
            }
        }
        let (mut top_logits, mut values) = (Vec::new(), finals);
        let mut next = [values.len(), 0];
        if let Some(KeptLogits { logits, .. }) = kept {
            if !tops.is_empty() {
                top_logits = backend.top_logits(logits, &tops)?;
            }
            if !whole.is_empty() {
                let rows = backend.logit_rows(logits, &whole)?;
                // Most steps have no final rows: the logits are not copied then.
                values = if values.is_empty() { rows } else { [values, rows].concat() };
            }
        }
        let mut top_logits = top_logits.into_iter();
        let mut take = |at: usize, width: usize| {
            next[at] += width;
            RowScores::Values(next[at] - width..next[at])
        };
        let rows = queries.iter().map(|query| match query {
            RowQuery::Top(_) => top_logits.next().map(RowScores::Top),
            RowQuery::Logits => Some(take(0, self.architecture.vocabulary)),
            RowQuery::FinalNorm => Some(take(1, self.architecture.hidden)),
        });
        let rows = rows.collect::<Option<Vec<_>>>();
        let rows = rows.ok_or_else(|| bad_step("a query got no answer".to_owned()))?;
        Ok(Scores { rows, values })
    }
}
