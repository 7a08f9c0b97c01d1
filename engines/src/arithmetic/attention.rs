//! Attention of one query head: out = softmax(q · K · scale) · V over the visible positions.
//!
//! A running softmax (Milakov and Gimelshein 2018; Dao et al. 2022) over chunks of 256 positions. Chunks are aligned to
//! positions, each is computed by itself, and they are joined in order, so that a device may compute several chunks at
//! a time. Keys and values are as the cache rounded them.

use super::functions::{exp, softcap, tree_sum};
use crate::model::Attention;
use std::ops::Range;

/// Positions of a chunk.
pub const CHUNK: usize = 256;

/// Chains of a chunk's sum of weights.
pub const SUM_CHAINS: usize = 16;

/// The largest score so far, Σ e^(score − largest), and Σ e^(score − largest) · value for each dimension.
#[derive(Debug, Clone, PartialEq)]
pub struct Mix {
    /// The largest score; −∞ before the first.
    pub largest: f32,
    /// The sum of weights.
    pub total: f32,
    /// The weighted sum of values: \[dimension].
    pub values: Vec<f32>,
}

/// The score of a key: one fused chain over the dimensions, then the scale, then the cap.
pub fn score(spec: &Attention, query: &[f32], key: &[f32]) -> f32 {
    let product = query.iter().zip(key).fold(0.0_f32, |sum, (&q, &k)| q.mul_add(k, sum));
    finish_score(spec, product)
}

/// The scale and the cap of a score.
#[inline(always)]
pub fn finish_score(spec: &Attention, product: f32) -> f32 {
    let scaled = product * spec.scale;
    match spec.softcap {
        Some(cap) => softcap(scaled, cap),
        None => scaled,
    }
}

/// The mix of the visible positions of one chunk, of which there is at least one. Position p belongs to chain p mod 16
/// of the sum of weights. Values are added in a fused chain for each dimension, in order of positions.
fn chunk<'a>(
    spec: &Attention,
    query: &[f32],
    visible: Range<usize>,
    key: &impl Fn(usize) -> &'a [f32],
    value: &impl Fn(usize) -> &'a [f32],
) -> Mix {
    let scores: Vec<f32> = visible.clone().map(|position| score(spec, query, key(position))).collect();
    let largest = scores.iter().fold(f32::NEG_INFINITY, |a, &b| if b > a { b } else { a });
    let mut chains = [0.0_f32; SUM_CHAINS];
    let mut values = vec![0.0_f32; query.len()];
    for (position, score) in visible.zip(scores) {
        let weight = exp(score - largest);
        chains[position % SUM_CHAINS] += weight;
        for (sum, &value) in values.iter_mut().zip(value(position)) {
            *sum = value.mul_add(weight, *sum);
        }
    }
    Mix { largest, total: tree_sum(chains), values }
}

impl Mix {
    /// The mix of no positions. A sink counts as a position without a value, before all others.
    pub fn new(head_dim: usize, sink: Option<f32>) -> Self {
        let (largest, total) = sink.map_or((f32::NEG_INFINITY, 0.0), |sink| (sink, 1.0));
        Self { largest, total, values: vec![0.0; head_dim] }
    }

    /// Adds the mix of the next chunk: each part is rescaled to the larger of both largest scores, then fused.
    fn join(&mut self, next: &Self) {
        let (own, other, largest) = rescales(self.largest, next.largest);
        self.largest = largest;
        self.total = next.total.mul_add(other, self.total * own);
        for (sum, &value) in self.values.iter_mut().zip(&next.values) {
            *sum = value.mul_add(other, *sum * own);
        }
    }
}

/// The factors of two parts with these largest scores, and the larger score.
#[inline(always)]
pub fn rescales(own: f32, other: f32) -> (f32, f32, f32) {
    let largest = if other > own { other } else { own };
    (exp(own - largest), exp(other - largest), largest)
}

/// The output of a query head that sees the positions `visible`, at least one. `key` and `value` return the vectors of
/// a position.
pub fn attend<'a>(
    spec: &Attention,
    sink: Option<f32>,
    query: &[f32],
    visible: Range<usize>,
    key: impl Fn(usize) -> &'a [f32],
    value: impl Fn(usize) -> &'a [f32],
) -> Vec<f32> {
    let mut mix = Mix::new(query.len(), sink);
    for index in visible.start / CHUNK..visible.end.div_ceil(CHUNK) {
        let part = (index * CHUNK).max(visible.start)..((index + 1) * CHUNK).min(visible.end);
        mix.join(&chunk(spec, query, part, &key, &value));
    }
    mix.values.iter().map(|value| value / mix.total).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Attention over several chunks, with a sink, is close to a plain softmax in f64.
    #[test]
    fn attention_is_close_to_f64() {
        let spec = Attention {
            heads: 1,
            kv_heads: 1,
            head_dim: 8,
            scale: 0.3,
            softcap: Some(20.0),
            window: None,
            rope: 0,
            query_key_norm: None,
            input_bias: false,
            output_bias: false,
            sinks: true,
        };
        let mut random = fastrand::Rng::with_seed(3);
        let mut vectors = |count: usize| -> Vec<Vec<f32>> {
            (0..count).map(|_| (0..8).map(|_| random.f32() * 8.0 - 4.0).collect()).collect()
        };
        let (keys, values, query) = (vectors(700), vectors(700), vectors(1).remove(0));
        let got = attend(&spec, Some(0.5), &query, 100..700, |p| &keys[p], |p| &values[p]);
        let scores: Vec<f64> = (100..700)
            .map(|p| {
                let product: f64 = query.iter().zip(&keys[p]).map(|(&q, &k)| f64::from(q) * f64::from(k)).sum();
                20.0 * (product * f64::from(spec.scale) / 20.0).tanh()
            })
            .collect();
        let total = 0.5_f64.exp() + scores.iter().map(|s| s.exp()).sum::<f64>();
        for (dimension, &got) in got.iter().enumerate() {
            let mixed = (100..700).zip(&scores).map(|(p, s)| s.exp() * f64::from(values[p][dimension])).sum::<f64>();
            assert!((f64::from(got) - mixed / total).abs() < 1e-5, "{dimension}: {got} {}", mixed / total);
        }
    }
}
