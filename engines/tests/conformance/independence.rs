//! R4.2, R6.1–R6.5: the result of a row depends on its own sequence only, and it is that of the arithmetic.
//!
//! Random sequences are cut into random chunks, which are spread over random steps, shards, threads and kernel tiers.
//! The logits of each row must equal, to the bit, those of its sequence computed alone by the reference backend.

use crate::fixture;
use crate::pipeline::{Pipeline, row};
use exo_engines::cpu::{CpuFactory, Tier};
use exo_engines::engine::{ActivationBits, KvElement, Operation, SeqId};
use exo_engines::model::families::FAMILIES;
use exo_engines::reference::ReferenceFactory;
use proptest::prelude::*;

/// How one sequence is computed.
#[derive(Debug, Clone)]
struct Plan {
    tokens: Vec<u32>,
    /// Rows of the sequence in each step. The rows after the last chunk come one per step.
    chunks: Vec<usize>,
}

fn plan() -> impl Strategy<Value = Plan> {
    let tokens = prop::collection::vec(0_u32..96, 1..90);
    (tokens, prop::collection::vec(0_usize..40, 0..6)).prop_map(|(tokens, chunks)| Plan { tokens, chunks })
}

#[derive(Debug, Clone)]
struct Setting {
    family: &'static str,
    tier: Tier,
    kv: KvElement,
    activations: ActivationBits,
    shards: usize,
    threads: usize,
    /// The position at which the first sequence is forked, if it is that long.
    fork_at: usize,
}

fn setting() -> impl Strategy<Value = Setting> {
    let families =
        prop::sample::select(FAMILIES.iter().map(|family| family.name).chain(["gpt_oss_mxfp4"]).collect::<Vec<_>>());
    let tiers = prop::sample::select(Tier::available());
    let kvs = prop::sample::select(KvElement::ALL.to_vec());
    let bits = prop::sample::select(ActivationBits::ALL.to_vec());
    (families, tiers, kvs, bits, 1_usize..=3, 1_usize..=3, 1_usize..90).prop_map(
        |(family, tier, kv, activations, shards, threads, fork_at)| Setting {
            family,
            tier,
            kv,
            activations,
            shards,
            threads,
            fork_at,
        },
    )
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(96))]

    #[test]
    fn rows_do_not_affect_each_other(setting in setting(), plans in prop::collection::vec(plan(), 1..4)) {
        let model = fixture(setting.family).model;
        let mut alone = Pipeline::with_precision(&model, &ReferenceFactory, 1, setting.kv, setting.activations);
        let expected: Vec<_> = plans.iter().map(|plan| alone.logits(&plan.tokens, plan.tokens.len())).collect();
        let many = CpuFactory::with_tier(setting.threads, setting.tier);
        let mut together = Pipeline::with_precision(&model, &many, setting.shards, setting.kv, setting.activations);
        let mut done = vec![0; plans.len()];
        let mut turn = 0;
        while plans.iter().zip(&done).any(|(plan, &done)| done < plan.tokens.len()) {
            let mut rows = Vec::new();
            let mut tokens = Vec::new();
            for (index, (plan, done)) in plans.iter().zip(&done).enumerate() {
                let share = plan.chunks.get(turn).copied().unwrap_or(1).min(plan.tokens.len() - done);
                rows.extend((0..share).map(|i| row(SeqId(index as u64), done + i)));
                tokens.extend_from_slice(&plan.tokens[*done..done + share]);
            }
            turn += 1;
            if rows.is_empty() {
                continue;
            }
            let logits = together.step(&[], &rows, tokens);
            for (row, got) in rows.iter().zip(logits.chunks(logits.len() / rows.len())) {
                let seq = row.seq.0 as usize;
                prop_assert_eq!(got, &expected[seq][row.position as usize][..], "sequence {} position {}", seq, row.position);
                done[seq] += 1;
            }
        }
        // A fork continues like its origin, even if the origin is truncated.
        let first = &plans[0].tokens;
        if setting.fork_at < first.len() {
            let (from, to) = (SeqId(0), SeqId(99));
            let operations = [
                Operation::Fork { from, to, length_tokens: setting.fork_at as u32 },
                Operation::Truncate { seq: from, length_tokens: setting.fork_at as u32 + 1 },
            ];
            let rows: Vec<_> = (setting.fork_at..first.len()).map(|position| row(to, position)).collect();
            let logits = together.step(&operations, &rows, first[setting.fork_at..].to_vec());
            for (row, got) in rows.iter().zip(logits.chunks(logits.len() / rows.len())) {
                prop_assert_eq!(got, &expected[0][row.position as usize][..], "the fork's position {}", row.position);
            }
        }
    }
}
