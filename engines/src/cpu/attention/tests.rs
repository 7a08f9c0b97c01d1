//! Attention over pages compared with the arithmetic, to the bit.

use super::*;
use crate::arithmetic::attention::attend;
use crate::arithmetic::cache;
use crate::backend::Batch;
use crate::cpu::cache::{KvCache, TOKENS};
use crate::cpu::kernels;
use crate::engine::KvElement;
use half::f16;
use proptest::prelude::*;

const HEADS: usize = 6;
const KV_HEADS: usize = 2;

fn random_rows(count: usize, width: usize, seed: u64) -> Rows {
    let mut random = fastrand::Rng::with_seed(seed);
    Rows { width, values: (0..count * width).map(|_| random.f32() * 4.0 - 2.0).collect() }
}

fn rounded(element: KvElement, head_dim: usize, rows: &Rows) -> Rows {
    let mut values = rows.values.clone();
    match element {
        KvElement::F16 => values.iter_mut().for_each(|value| *value = f16::from_f32(*value).to_f32()),
        KvElement::F32 => {}
        KvElement::Q8_0 => values.chunks_mut(head_dim).for_each(cache::rounded),
    }
    Rows { width: rows.width, values }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    /// R6.1–R6.5: queries at the end of a sequence of several chunks, with windows, caps and sinks, on every tier.
    #[test]
    fn every_tier_attends_as_the_arithmetic_does(
        length in 1_usize..700,
        queries in 1_usize..40,
        window in prop::sample::select(vec![None, Some(1), Some(8), Some(33), Some(300)]),
        head_dim in prop::sample::select(vec![16_usize, 40, 64]),
        element in prop::sample::select(KvElement::ALL.to_vec()),
        softcap in prop::sample::select(vec![None, Some(2.0)]),
        with_sinks in any::<bool>(),
        seed in any::<u64>(),
    ) {
        let queries = queries.min(length);
        let spec = Attention {
            heads: HEADS,
            kv_heads: KV_HEADS,
            head_dim,
            scale: 0.2,
            softcap,
            window,
            rope: 0,
            query_key_norm: None,
            input_bias: false,
            output_bias: false,
            sinks: with_sinks,
        };
        let (keys, values) = (random_rows(length, spec.kv_width(), seed), random_rows(length, spec.kv_width(), !seed));
        let query_rows = random_rows(queries, spec.query_width(), seed ^ 1);
        let sinks: Vec<f32> = (0..HEADS).map(|head| head as f32 - 3.0).collect();
        let sinks = with_sinks.then_some(sinks.as_slice());
        // Pages in an order of their own.
        let pages: Vec<u32> = (0..length.div_ceil(TOKENS) as u32).rev().collect();
        let mut cache = KvCache::new(&[&spec], element, pages.len() as u32).expect("memory");
        let all = Batch { rows: length, spans: vec![Span { rows: 0..length, first_position: 0, pages: pages.clone() }] };
        kernels::write_cache(Tier::best(), &mut cache.layers[0], &all, &keys, &values);
        let (keys, values) = (rounded(element, head_dim, &keys), rounded(element, head_dim, &values));
        let first_position = length - queries;
        let mut expected = Vec::new();
        for row in 0..queries {
            let end = first_position + row + 1;
            for head in 0..HEADS {
                let start = head / spec.group() * head_dim;
                let part = |rows: &Rows, position: usize| rows.row(position)[start..start + head_dim].to_vec();
                let (keys, values): (Vec<_>, Vec<_>) =
                    (0..length).map(|position| (part(&keys, position), part(&values, position))).unzip();
                expected.extend(attend(
                    &spec,
                    sinks.map(|sinks| sinks[head]),
                    &query_rows.row(row)[head * head_dim..][..head_dim],
                    end.saturating_sub(window.unwrap_or(usize::MAX))..end,
                    |position| &keys[position],
                    |position| &values[position],
                ));
            }
        }
        let batch = Batch { rows: queries, spans: vec![Span { rows: 0..queries, first_position, pages }] };
        let mut pool = ThreadPool::new(2).expect("threads");
        for tier in Tier::available() {
            let mut out = Rows::zeroed(queries, spec.query_width());
            let heads = Heads { spec: &spec, sinks, cache: &cache.layers[0], spans: &batch.spans };
            Workspace::default().run(tier, &mut pool, &heads, &query_rows, &mut out).expect("no panic");
            prop_assert_eq!(&out.values, &expected, "{}", tier.name());
        }
    }
}
