//! Queries about rows: the largest logits, all logits, and rows after the final norm.

use crate::pipeline::{Pipeline, SEQ, row};
use crate::{factories, fixture};
use exo_engines::engine::{RowQuery, RowScores, TopLogits, TopQuery};

/// R3.1–R3.5: every backend answers each kind of query in one step; short answers agree with all logits.
#[test]
fn every_backend_answers_every_query() {
    for name in ["gemma2", "llama"] {
        let fixture = fixture(name);
        for (backend, factory) in factories() {
            let mut pipeline = Pipeline::new(&fixture.model, &*factory, 1);
            let tokens = fixture.expected.prompt[..4].to_vec();
            let rows: Vec<_> = (0..4).map(|position| row(SEQ, position)).collect();
            let top = TopQuery { count: 3, tokens: vec![1, 5], factor: Some(0.7) };
            let queries =
                [RowQuery::FinalNorm, RowQuery::Top(top.clone()), RowQuery::Logits, RowQuery::Top(top.clone())];
            let scores = pipeline.scores(&[], &rows, tokens, &queries);
            let values = |index: usize| match &scores.rows[index] {
                RowScores::Values(range) => &scores.values[range.clone()],
                RowScores::Top(_) => panic!("{backend}: query {index} asked for values"),
            };
            assert_eq!(values(0).len(), fixture.model.architecture.hidden, "{backend}");
            assert_eq!(values(2), pipeline.all_logits(2), "{backend}");
            for index in [1, 3] {
                let RowScores::Top(answer) = &scores.rows[index] else {
                    panic!("{backend}: a short answer was asked for")
                };
                agrees(answer, &top, &pipeline.all_logits(index), &backend);
            }
        }
    }
}

fn agrees(answer: &TopLogits, query: &TopQuery, logits: &[f32], backend: &str) {
    let mut order: Vec<u32> = (0..logits.len() as u32).collect();
    order.sort_by(|&a, &b| logits[b as usize].total_cmp(&logits[a as usize]).then(a.cmp(&b)));
    let best: Vec<(u32, f32)> = order[..query.count as usize].iter().map(|&id| (id, logits[id as usize])).collect();
    assert_eq!(answer.best, best, "{backend}");
    let tokens: Vec<f32> = query.tokens.iter().map(|&id| logits[id as usize]).collect();
    assert_eq!(answer.tokens, tokens, "{backend}");
    let sum = |factor: f64| logits.iter().map(|&l| ((f64::from(l) - f64::from(best[0].1)) * factor).exp()).sum::<f64>();
    let relative = |got: f64, expected: f64| (got / expected - 1.0).abs();
    let log_total = answer.log_total - f64::from(best[0].1);
    assert!(relative(log_total.exp(), sum(1.0)) < TopLogits::TOTAL_ERROR, "{backend}");
    assert!(relative(answer.weight_total, sum(f64::from(0.7_f32))) < TopLogits::TOTAL_ERROR, "{backend}");
}
