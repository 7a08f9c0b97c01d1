//! What the last shard is asked about a row, and what it answers: few logits, all of them, or the row itself.
//!
//! A vocabulary row is half a megabyte, and most draws need a few of its numbers.

use serde::{Deserialize, Serialize};
use std::ops::Range;

/// What the last shard returns for a row that wants logits.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub enum RowQuery {
    /// The logits of a few tokens, and sums over all.
    Top(TopQuery),
    /// All logits: \[vocabulary].
    Logits,
    /// The row after the final norm, in place of logits: \[hidden].
    FinalNorm,
}

/// A query of a few logits of a row.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
pub struct TopQuery {
    /// The number of largest logits to return, at least 1.
    pub count: u32,
    /// Further tokens whose logits are returned, each below the vocabulary's size.
    pub tokens: Vec<u32>,
    /// The factor of [`TopLogits::weight_total`], finite and above 0; `None`: the total is not needed.
    pub factor: Option<f32>,
}

/// The largest logits of a row, and sums over all. Logits are exact; sums have a relative error of at most
/// [`TopLogits::TOTAL_ERROR`].
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct TopLogits {
    /// The largest logits with their tokens, largest first; among equals, the lowest token first. Empty if the largest
    /// is not finite. NaN counts as −∞.
    pub best: Vec<(u32, f32)>,
    /// The logits of the query's further tokens, in its order.
    pub tokens: Vec<f32>,
    /// ln Σ e^logit.
    pub log_total: f64,
    /// Σ e^((logit − largest) · factor); 0 if the query has no factor.
    pub weight_total: f64,
}

impl TopLogits {
    /// The largest relative error of Σ e^(logit − largest) and of [`TopLogits::weight_total`].
    pub const TOTAL_ERROR: f64 = 1e-5;
}

/// The answers to the queries of a step.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
pub struct Scores {
    /// One answer for each query, in order.
    pub rows: Vec<RowScores>,
    /// The numbers of [`RowScores::Values`], one row after the other.
    pub values: Vec<f32>,
}

impl Scores {
    /// Answers every query with all logits: \[query]\[vocabulary].
    pub fn of_logits(values: Vec<f32>, vocabulary: usize) -> Self {
        let rows = (0..values.len() / vocabulary.max(1)).map(|row| row * vocabulary..(row + 1) * vocabulary);
        Self { rows: rows.map(RowScores::Values).collect(), values }
    }
}

/// The answer to a query.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub enum RowScores {
    /// The answer to [`RowQuery::Top`].
    Top(TopLogits),
    /// The range in [`Scores::values`] of all logits, or of the row after the final norm. An engine may answer any
    /// query for logits with all of them.
    Values(Range<usize>),
}
