//! Draws of a step's rows, with and without drafts.

use super::*;
use exo_engines::engine::{
    Input, LoadProgress, LoadReport, Output, SelfTestReport, ShardSpec, Step, TopLogits, WarmUpReport,
};
use exo_engines::model::WeightSource;
use exo_engines::sampler::{SamplerSpec, SamplingParams, TokenSampler};
use std::ops::ControlFlow;

const VOCABULARY: usize = 10;

/// Logits of which token `best` is the likeliest.
fn logits(best: usize) -> Vec<f32> {
    (0..VOCABULARY).map(|token| if token == best { 1.0 } else { 0.0 }).collect()
}

/// An engine that has computed the logits of a step.
struct Computed(Vec<Vec<f32>>);

impl Engine for Computed {
    fn self_test(&mut self) -> Result<SelfTestReport, EngineError> {
        Err(EngineError::NotLoaded)
    }

    fn load(
        &mut self,
        _: &ShardSpec,
        _: &WeightSource,
        _: &mut dyn FnMut(LoadProgress) -> ControlFlow<()>,
    ) -> Result<LoadReport, EngineError> {
        Err(EngineError::NotLoaded)
    }

    fn warm_up(&mut self) -> Result<WarmUpReport, EngineError> {
        Err(EngineError::NotLoaded)
    }

    fn forward(&mut self, _: &Step, _: Input, _: &[RowQuery]) -> Result<Output, EngineError> {
        Err(EngineError::NotLoaded)
    }

    fn logits(&mut self, row: usize) -> Result<Vec<f32>, EngineError> {
        Ok(self.0[row].clone())
    }
}

/// The drawn tokens of a step: rows as (sequence, whether they draw, likeliest next token). The engine answers every
/// query with all logits, or with the largest alone.
fn drawn(rows: &[(u64, bool, usize)], drafts: &[(u64, &[u32])]) -> Vec<(u64, u32)> {
    let answers = [false, true].map(|is_short| {
        let mut sampler = TokenSampler::default();
        let open = |seq: u64| {
            let spec = SamplerSpec { params: SamplingParams::greedy(), prompt: vec![1], generated: Vec::new() };
            SamplerOperation::Open { seq: SeqId(seq), spec }
        };
        let mut operations: Vec<SamplerOperation> = rows.iter().map(|row| open(row.0)).collect();
        let draft =
            |&(seq, tokens): &(u64, &[u32])| SamplerOperation::Draft { seq: SeqId(seq), tokens: tokens.to_vec() };
        operations.extend(drafts.iter().map(draft));
        let all: Vec<Vec<f32>> = rows.iter().filter(|row| row.1).map(|row| logits(row.2)).collect();
        let row = |(&(seq, wants_logits, _), position)| Row { seq: SeqId(seq), position, wants_logits };
        let step_rows: Vec<Row> = rows.iter().zip(0..).map(row).collect();
        let draws = Draws::prepare(&mut sampler, operations, &step_rows, VOCABULARY);
        assert_eq!(draws.queries().len(), all.len());
        let scores = match is_short {
            false => Scores::of_logits(all.concat(), VOCABULARY),
            true => {
                let top = |row: &(u64, bool, usize)| {
                    let best = vec![(row.2 as u32, 1.0)];
                    RowScores::Top(TopLogits { best, tokens: Vec::new(), log_total: 2.0, weight_total: 0.0 })
                };
                Scores { rows: rows.iter().filter(|row| row.1).map(top).collect(), values: Vec::new() }
            }
        };
        let results = draws.draw(&mut sampler, &mut Computed(all), &scores).expect("every query has an answer");
        results.into_iter().map(|(seq, result)| (seq.0, result.expect("finite logits").token)).collect::<Vec<_>>()
    });
    assert_eq!(answers[0], answers[1]);
    answers[0].clone()
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

/// A draw that a few logits do not decide asks the engine for all.
#[test]
fn an_undecided_draw_asks_for_all_logits() {
    let mut sampler = TokenSampler::default();
    let params = SamplingParams { temperature: 1.0, top_p: 0.999, seed: 3, ..SamplingParams::greedy() };
    let spec = SamplerSpec { params, prompt: vec![1], generated: Vec::new() };
    let operations = vec![SamplerOperation::Open { seq: SeqId(1), spec }];
    let row = Row { seq: SeqId(1), position: 0, wants_logits: true };
    let draws = Draws::prepare(&mut sampler, operations, &[row], 1000);
    // All tokens are as likely: sixty-four of them do not reach the probability of top-p.
    let best = (0..64).map(|token| (token, 0.0)).collect();
    let top = TopLogits { best, tokens: Vec::new(), log_total: 1000.0_f64.ln(), weight_total: 1000.0 };
    let scores = Scores { rows: vec![RowScores::Top(top)], values: Vec::new() };
    let results = draws.draw(&mut sampler, &mut Computed(vec![vec![0.0; 1000]]), &scores).expect("all logits");
    assert!(results[0].1.is_ok());
}
