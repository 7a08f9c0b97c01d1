//! Draws of a step's rows, with and without drafts.

use super::*;
use exo_engines::sampler::{SamplerSpec, SamplingParams};

const VOCABULARY: usize = 10;

/// Logits of which token `best` is the likeliest.
fn logits(best: usize) -> Vec<f32> {
    (0..VOCABULARY).map(|token| if token == best { 1.0 } else { 0.0 }).collect()
}

/// The drawn tokens of a step: rows as (sequence, whether they draw, likeliest next token).
fn drawn(rows: &[(u64, bool, usize)], drafts: &[(u64, &[u32])]) -> Vec<(u64, u32)> {
    let mut sampler = TokenSampler::default();
    for (seq, ..) in rows {
        let spec = SamplerSpec { params: SamplingParams::greedy(), prompt: vec![1], generated: Vec::new() };
        sampler.open(SeqId(*seq), spec);
    }
    let all: Vec<f32> = rows.iter().filter(|row| row.1).flat_map(|row| logits(row.2)).collect();
    let rows: Vec<Row> = rows
        .iter()
        .zip(0..)
        .map(|(&(seq, wants_logits, _), position)| Row { seq: SeqId(seq), position, wants_logits })
        .collect();
    let drafts = drafts.iter().map(|&(seq, tokens)| (SeqId(seq), tokens.to_vec().into())).collect();
    let results = draw(&mut sampler, &rows, &all, VOCABULARY, drafts);
    results.into_iter().map(|(seq, result)| (seq.0, result.expect("finite logits").token)).collect()
}

/// R6.1–R6.5: a draft yields tokens up to the first that differs, which is the model's own; other sequences of the step
/// are not affected.
#[test]
fn a_draft_ends_with_the_first_other_token() {
    let rows = [(1, false, 0), (1, true, 4), (1, true, 5), (1, true, 7), (1, true, 8), (2, true, 3)];
    assert_eq!(drawn(&rows, &[(1, &[4, 5, 6])]), [(1, 4), (1, 5), (1, 7), (2, 3)], "6 was drafted, 7 drawn");
    assert_eq!(drawn(&rows, &[(1, &[4, 5, 7])]), [(1, 4), (1, 5), (1, 7), (1, 8), (2, 3)], "all were drafted");
    assert_eq!(drawn(&rows, &[(1, &[9, 5, 7])]), [(1, 4), (2, 3)], "none was");
}

#[test]
fn rows_without_drafts_draw_once_each() {
    assert_eq!(drawn(&[(1, true, 2), (3, true, 4), (2, true, 6)], &[]), [(1, 2), (3, 4), (2, 6)]);
}
