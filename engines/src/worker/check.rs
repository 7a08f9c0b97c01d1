//! Checks of a worker's outputs: their shapes, and that their numbers are numbers. A device that fails may return
//! anything.

use crate::engine::{RowQuery, RowScores, TopLogits, TopQuery};

/// The lengths of a loaded shard's rows.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Shape {
    pub(super) hidden: usize,
    pub(super) vocabulary: usize,
}

impl Shape {
    /// Checks the output of a step of `rows` rows; `scores` is `None` for hidden rows.
    pub(super) fn check(
        self,
        rows: usize,
        queries: &[RowQuery],
        scores: Option<&[RowScores]>,
        values: &[f32],
    ) -> Result<(), String> {
        let Some(scores) = scores else { return self.check_hidden(rows, values) };
        if scores.len() != queries.len() {
            return Err(format!("{} answers to {} queries", scores.len(), queries.len()));
        }
        scores.iter().zip(queries).try_for_each(|(scores, query)| match (scores, query) {
            (RowScores::Top(top), RowQuery::Top(query)) => self.check_top(top, query),
            (RowScores::Top(_), _) => Err("few logits in place of a row".to_owned()),
            (RowScores::Values(range), query) => {
                let width = if *query == RowQuery::FinalNorm { self.hidden } else { self.vocabulary };
                let row = values.get(range.clone()).filter(|row| row.len() == width);
                let row = row.ok_or_else(|| format!("{} values of a row instead of {width}", range.len()))?;
                match query {
                    RowQuery::FinalNorm => check_finite(row),
                    RowQuery::Top(_) | RowQuery::Logits => self.check_logits(row),
                }
            }
        })
    }

    fn check_hidden(self, rows: usize, values: &[f32]) -> Result<(), String> {
        let expected = rows * self.hidden;
        if values.len() != expected {
            return Err(format!("{} hidden values instead of {expected}", values.len()));
        }
        check_finite(values)
    }

    /// Checks a row of all logits.
    pub(super) fn check_logits(self, row: &[f32]) -> Result<(), String> {
        if row.len() != self.vocabulary {
            return Err(format!("{} logits instead of {}", row.len(), self.vocabulary));
        }
        let largest = row.iter().copied().fold(f32::NEG_INFINITY, f32::max);
        match largest.is_finite() && !row.iter().any(|logit| logit.is_nan()) {
            true => Ok(()),
            false => Err("logits without a finite maximum".to_owned()),
        }
    }

    fn check_top(self, top: &TopLogits, query: &TopQuery) -> Result<(), String> {
        let is_token = |token: u32| (token as usize) < self.vocabulary;
        let count = (query.count as usize).min(self.vocabulary);
        if top.tokens.len() != query.tokens.len() || top.best.len() != count {
            return Err("another number of logits than was asked for".to_owned());
        }
        if !top.best.is_sorted_by(|(_, a), (_, b)| a >= b || b.is_nan()) {
            return Err("the largest logits are not in order".to_owned());
        }
        if query.factor.is_some() && !(top.weight_total.is_finite() && top.weight_total >= 1.0 - TopLogits::TOTAL_ERROR)
        {
            return Err("a sum of weights that cannot be".to_owned());
        }
        if !top.best.iter().all(|&(token, _)| is_token(token)) {
            return Err("a token outside the vocabulary".to_owned());
        }
        match top.best.first() {
            Some((_, logit)) if logit.is_finite() && top.log_total.is_finite() => Ok(()),
            _ => Err("logits without a finite maximum".to_owned()),
        }
    }
}

fn check_finite(values: &[f32]) -> Result<(), String> {
    match values.iter().all(|value| value.is_finite()) {
        true => Ok(()),
        false => Err("rows with values that are not finite".to_owned()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SHAPE: Shape = Shape { hidden: 2, vocabulary: 3 };

    #[test]
    fn wrong_outputs_are_refused() {
        let query = TopQuery { count: 2, tokens: vec![1], factor: None };
        let top = |best: &[(u32, f32)]| {
            RowScores::Top(TopLogits { best: best.to_vec(), tokens: vec![0.5], log_total: 1.0, weight_total: 0.0 })
        };
        let check =
            |scores: RowScores, query: RowQuery, values: &[f32]| SHAPE.check(1, &[query], Some(&[scores]), values);
        let top_query = || RowQuery::Top(query.clone());
        assert_eq!(check(top(&[(2, 1.0), (0, 0.5)]), top_query(), &[]), Ok(()));
        assert_eq!(check(RowScores::Values(0..3), RowQuery::Logits, &[1.0; 3]), Ok(()));
        assert_eq!(SHAPE.check(2, &[], None, &[0.0; 4]), Ok(()));
        let wrong = [
            check(top(&[(3, 1.0), (1, 0.0)]), top_query(), &[]),
            check(top(&[(2, 1.0)]), top_query(), &[]),
            check(top(&[(2, 0.0), (0, 1.0)]), top_query(), &[]),
            check(RowScores::Values(0..3), RowQuery::Logits, &[1.0, f32::INFINITY, 1.0]),
            check(top(&[(2, f32::NAN), (1, 0.0)]), top_query(), &[]),
            check(top(&[(0, 1.0), (1, 0.0), (2, 0.0)]), top_query(), &[]),
            check(top(&[(2, 1.0)]), RowQuery::Logits, &[]),
            check(RowScores::Values(0..3), RowQuery::FinalNorm, &[1.0; 3]),
            check(RowScores::Values(1..4), RowQuery::Logits, &[1.0; 3]),
            check(RowScores::Values(0..3), RowQuery::Logits, &[1.0, f32::NAN, 1.0]),
            SHAPE.check(1, &[top_query(), RowQuery::Logits], Some(&[top(&[(2, 1.0)])]), &[]),
            SHAPE.check(2, &[], None, &[0.0; 3]),
            SHAPE.check(2, &[], None, &[f32::INFINITY; 4]),
        ];
        assert!(wrong.iter().all(Result::is_err), "{wrong:?}");
    }
}
