//! Loops over all logits of a vocabulary row, which are among the longest loops of this program.
//!
//! Host backends answer [`TopQuery`]s with them, and the sampler draws with them. The loop bodies are compiled for the
//! machine's best instruction set; the results have the same bits on all tiers.

use crate::arithmetic::functions::exp;
use crate::engine::{TopLogits, TopQuery};
use crate::simd::{Kernel, LANES, Simd, Tier};
use std::cell::Cell;
use std::sync::LazyLock;

static TIER: LazyLock<Tier> = LazyLock::new(Tier::best);

/// Entries whose weights are summed in single precision before the sum goes into a double.
const BLOCK: usize = 32 * LANES;
/// Entries that are checked together for an interesting one.
const GLANCE: usize = 4 * LANES;
/// The largest count for which [`likeliest`] keeps a sorted list during one pass; above it, sorting is faster.
const KEPT_IN_ORDER: usize = 256;

/// Returns the id and value of the largest logit; among equals, the lowest id. `None` if the largest is not finite.
pub(crate) fn largest(logits: &[f32]) -> Option<(u32, f32)> {
    let mut value = f32::NEG_INFINITY;
    TIER.run(Largest { logits, value: &mut value });
    if !value.is_finite() {
        return None;
    }
    let mut found = None;
    TIER.run(Above { values: logits, admits: |logit| logit == value, on: &mut |id, _| found = found.or(Some(id)) });
    found.map(|id| (id, value))
}

/// Answers a query about a row of logits.
pub(crate) fn top(logits: &[f32], query: &TopQuery) -> TopLogits {
    let of = |token: &u32| logits.get(*token as usize).copied().unwrap_or(f32::NEG_INFINITY);
    let tokens = query.tokens.iter().map(of).collect();
    let Some((token, largest)) = largest(logits) else {
        return TopLogits { best: Vec::new(), tokens, log_total: f64::NAN, weight_total: 0.0 };
    };
    let best = match query.count {
        0 | 1 => vec![(token, largest)],
        count => likeliest(logits, count as usize).into_iter().map(|id| (id, logits[id as usize])).collect(),
    };
    let weight_total = query.factor.map_or(0.0, |factor| weight_total(logits, largest, factor));
    TopLogits { best, tokens, log_total: log_total(logits, largest), weight_total }
}

/// Returns ln Σ e^logit.
pub(crate) fn log_total(logits: &[f32], largest: f32) -> f64 {
    f64::from(largest) + libm::log(weight_total(logits, largest, 1.0))
}

/// Returns Σ e^((logit − largest) · `factor`).
fn weight_total(logits: &[f32], largest: f32, factor: f32) -> f64 {
    let mut total = 0.0;
    TIER.run(Total { logits, largest, factor, total: &mut total });
    total
}

/// Returns e^((logit − largest) · `factor`) of each logit, and the sum.
pub(crate) fn weights(logits: &[f32], largest: f32, factor: f32) -> (Vec<f32>, f64) {
    let mut weights = vec![0.0; logits.len()];
    TIER.run(Weights { logits, largest, factor, weights: &mut weights });
    let total = sum(&weights);
    (weights, total)
}

/// Returns the first entry at which the running sum of weights exceeds `left`; the last entry of positive weight if
/// rounding leaves a remainder.
pub(crate) fn entry_at(weights: &[f32], mut left: f64) -> Option<usize> {
    for (number, block) in weights.chunks(BLOCK).enumerate() {
        let of_block = sum(block);
        if left < of_block {
            for (index, &weight) in block.iter().enumerate() {
                left -= f64::from(weight);
                if left < 0.0 {
                    return Some(number * BLOCK + index);
                }
            }
            // The block's sum is added by lanes, this one in order. The difference belongs to the last weighted entry.
            return block.iter().rposition(|&weight| weight > 0.0).map(|index| number * BLOCK + index);
        }
        left -= of_block;
    }
    weights.iter().rposition(|&weight| weight > 0.0)
}

/// Returns the entries of at least `floor`, as (id, weight).
pub(crate) fn at_least(weights: &[f32], floor: f32) -> Vec<(u32, f32)> {
    let mut found = Vec::new();
    TIER.run(Above {
        values: weights,
        admits: |weight| weight >= floor,
        on: &mut |id, weight| found.push((id, weight)),
    });
    found
}

/// Returns the ids of the `count` largest logits, largest first; among equals, the lower id first. NaN counts as −∞.
pub(crate) fn likeliest(logits: &[f32], count: usize) -> Vec<u32> {
    let count = count.min(logits.len());
    if count == 0 {
        return Vec::new();
    }
    if count > KEPT_IN_ORDER {
        let mut ids: Vec<u32> = (0..logits.len() as u32).collect();
        // The addition turns −0 into 0, so that they are equal.
        let key = |id: u32| if logits[id as usize].is_nan() { f32::NEG_INFINITY } else { logits[id as usize] + 0.0 };
        let better = |a: &u32, b: &u32| key(*b).total_cmp(&key(*a)).then(a.cmp(b));
        if count < ids.len() {
            ids.select_nth_unstable_by(count, better);
            ids.truncate(count);
        }
        ids.sort_unstable_by(better);
        return ids;
    }
    let mut best: Vec<(u32, f32)> = Vec::with_capacity(count + 1);
    // The smallest of `best`, once `best` is full.
    let worst = Cell::new(None);
    TIER.run(Above {
        values: logits,
        admits: |logit| worst.get().is_none_or(|worst| logit > worst),
        on: &mut |id, logit| {
            let logit = if logit.is_nan() { f32::NEG_INFINITY } else { logit };
            let at = best.partition_point(|&(_, other)| other >= logit);
            best.insert(at, (id, logit));
            best.truncate(count);
            worst.set(best.get(count - 1).map(|&(_, logit)| logit));
        },
    });
    best.into_iter().map(|(id, _)| id).collect()
}

fn sum(weights: &[f32]) -> f64 {
    let mut total = 0.0;
    TIER.run(Sum { weights, total: &mut total });
    total
}

struct Largest<'a> {
    logits: &'a [f32],
    value: &'a mut f32,
}

impl Kernel for Largest<'_> {
    #[inline(always)]
    fn run<S: Simd>(self) {
        let mut lanes = [f32::NEG_INFINITY; LANES];
        let (whole, rest) = self.logits.as_chunks::<LANES>();
        let parts = whole.iter().map(<[f32; LANES]>::as_slice).chain([rest]);
        for part in parts {
            for (lane, &logit) in lanes.iter_mut().zip(part) {
                // NaN never compares as larger.
                *lane = if logit > *lane { logit } else { *lane };
            }
        }
        *self.value = lanes.iter().fold(f32::NEG_INFINITY, |a, &b| if b > a { b } else { a });
    }
}

/// Calls `on` with the id and value of each entry for which `admits` returns true.
struct Above<'a, F: Fn(f32) -> bool, G: FnMut(u32, f32)> {
    values: &'a [f32],
    admits: F,
    on: &'a mut G,
}

impl<F: Fn(f32) -> bool, G: FnMut(u32, f32)> Kernel for Above<'_, F, G> {
    #[inline(always)]
    fn run<S: Simd>(self) {
        for (number, glance) in self.values.chunks(GLANCE).enumerate() {
            if !glance.iter().fold(false, |any, &value| any | (self.admits)(value)) {
                continue;
            }
            for (index, &value) in glance.iter().enumerate() {
                if (self.admits)(value) {
                    (self.on)((number * GLANCE + index) as u32, value);
                }
            }
        }
    }
}

/// The weight of one entry; 0 for NaN.
#[inline(always)]
fn weigh(logit: f32, largest: f32, factor: f32) -> f32 {
    let logit = if logit > f32::NEG_INFINITY { logit } else { f32::NEG_INFINITY };
    exp((logit - largest) * factor)
}

struct Weights<'a> {
    logits: &'a [f32],
    largest: f32,
    factor: f32,
    weights: &'a mut [f32],
}

impl Kernel for Weights<'_> {
    #[inline(always)]
    fn run<S: Simd>(self) {
        for (weight, &logit) in self.weights.iter_mut().zip(self.logits) {
            *weight = weigh(logit, self.largest, self.factor);
        }
    }
}

/// Returns the sum of `of` over `values`, in an order that depends only on their number.
#[inline(always)]
fn summed(values: &[f32], of: impl Fn(f32) -> f32) -> f64 {
    let mut total = 0.0;
    for block in values.chunks(BLOCK) {
        let mut lanes = [0.0_f32; LANES];
        let (whole, rest) = block.as_chunks::<LANES>();
        for part in whole {
            for (lane, &value) in lanes.iter_mut().zip(part) {
                *lane += of(value);
            }
        }
        for (lane, &value) in lanes.iter_mut().zip(rest) {
            *lane += of(value);
        }
        total += lanes.iter().map(|&lane| f64::from(lane)).sum::<f64>();
    }
    total
}

struct Total<'a> {
    logits: &'a [f32],
    largest: f32,
    factor: f32,
    total: &'a mut f64,
}

impl Kernel for Total<'_> {
    #[inline(always)]
    fn run<S: Simd>(self) {
        let Self { logits, largest, factor, total } = self;
        *total = summed(logits, |logit| weigh(logit, largest, factor));
    }
}

struct Sum<'a> {
    weights: &'a [f32],
    total: &'a mut f64,
}

impl Kernel for Sum<'_> {
    #[inline(always)]
    fn run<S: Simd>(self) {
        *self.total = summed(self.weights, |weight| weight);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn logits() -> impl Strategy<Value = Vec<f32>> {
        // Coarse values, so that some are equal; enough values for several blocks.
        prop::collection::vec(
            prop_oneof![9 => (-400_i32..400).prop_map(|n| n as f32 / 16.0), 1 => Just(f32::NAN)],
            1..2000,
        )
    }

    fn plainly_sorted(logits: &[f32]) -> Vec<u32> {
        let key = |id: u32| if logits[id as usize].is_nan() { f32::NEG_INFINITY } else { logits[id as usize] };
        let mut ids: Vec<u32> = (0..logits.len() as u32).collect();
        ids.sort_by(|&a, &b| key(b).partial_cmp(&key(a)).expect("numbers").then(a.cmp(&b)));
        ids
    }

    proptest! {
        #[test]
        fn likeliest_agrees_with_sorting(logits in logits(), count in prop_oneof![1_usize..40, 250_usize..300]) {
            let sorted = plainly_sorted(&logits);
            prop_assert_eq!(likeliest(&logits, count), &sorted[..count.min(logits.len())]);
            let first = sorted[0];
            let expected = logits[first as usize].is_finite().then_some((first, logits[first as usize]));
            prop_assert_eq!(largest(&logits), expected);
        }

        #[test]
        fn weights_and_their_sum_agree_with_f64(logits in logits(), factor in 0.3_f32..3.0) {
            let Some((_, best)) = largest(&logits) else { return Ok(()) };
            let (weights, total) = weights(&logits, best, factor);
            let plain: Vec<f64> = logits
                .iter()
                .map(|&l| if l.is_nan() { 0.0 } else { (f64::from(l - best) * f64::from(factor)).exp() })
                .collect();
            let plain_total: f64 = plain.iter().sum();
            prop_assert!((total - plain_total).abs() < 1e-5 * plain_total);
            prop_assert_eq!(weight_total(&logits, best, factor), total);
            for (&weight, plain) in weights.iter().zip(&plain) {
                prop_assert!((f64::from(weight) - plain).abs() < 1e-5 * plain + 1e-30);
            }
            let floor = weights[weights.len() / 2];
            let kept: Vec<(u32, f32)> =
                (0..).zip(weights.iter().copied()).filter(|&(_, weight)| weight >= floor).collect();
            prop_assert_eq!(at_least(&weights, floor), kept);
        }

        #[test]
        fn entry_at_finds_where_the_running_sum_exceeds_the_target(
            weights in prop::collection::vec(0_u8..4, 1..2000),
            share in 0.0_f64..1.0,
        ) {
            // The weights are whole numbers, so sums are exact.
            let weights: Vec<f32> = weights.into_iter().map(f32::from).collect();
            let target = share * weights.iter().map(|&w| f64::from(w)).sum::<f64>();
            let mut sum = 0.0;
            let expected = weights.iter().position(|&weight| {
                sum += f64::from(weight);
                sum > target
            });
            prop_assert_eq!(entry_at(&weights, target), expected);
        }
    }

    proptest! {
        #[test]
        fn entry_at_never_returns_an_entry_of_weight_zero(
            weights in prop::collection::vec(prop_oneof![Just(0.0_f32), 1e-9_f32..1.0], 513..1500),
            share in 0.0_f64..1.0,
        ) {
            let mut weights = weights;
            (weights[0], weights[BLOCK]) = (1.0, 0.0);
            let of_block = sum(&weights[..BLOCK]);
            let exact: f64 = weights[..BLOCK].iter().map(|&weight| f64::from(weight)).sum();
            for left in [share * sum(&weights), of_block.next_down(), exact, exact.next_down()] {
                let found = entry_at(&weights, left).expect("there are weights");
                prop_assert!(weights[found] > 0.0, "entry {} of {}", found, left);
            }
        }

        #[test]
        fn all_tiers_give_the_same_bits(logits in logits()) {
            let on = |tier: Tier| {
                let (mut value, mut total) = (0.0, 0.0);
                let mut weights = vec![0.0; logits.len()];
                tier.run(Largest { logits: &logits, value: &mut value });
                tier.run(Total { logits: &logits, largest: value, factor: 1.0, total: &mut total });
                tier.run(Weights { logits: &logits, largest: value, factor: 0.7, weights: &mut weights });
                let bits: Vec<u32> = weights.iter().map(|weight| weight.to_bits()).collect();
                (value.to_bits(), total.to_bits(), bits)
            };
            for tier in Tier::available() {
                prop_assert_eq!(on(tier), on(Tier::Portable), "{}", tier.name());
            }
        }
    }

    #[test]
    fn log_total_is_accurate_over_a_large_vocabulary() {
        let logits: Vec<f32> =
            (0..262_144_u32).map(|id| (id.wrapping_mul(2_654_435_761) >> 16) as f32 / 4096.0).collect();
        let (_, best) = largest(&logits).expect("finite");
        let plain = logits.iter().map(|&l| f64::from(l - best).exp()).sum::<f64>().ln() + f64::from(best);
        assert!((log_total(&logits, best) - plain).abs() < 1e-6);
    }

    #[test]
    fn largest_is_none_if_not_finite_and_entry_at_skips_zero_weights() {
        assert_eq!(largest(&[f32::NAN, f32::NEG_INFINITY]), None);
        assert_eq!(largest(&[0.0, f32::INFINITY]), None);
        assert_eq!(entry_at(&[0.0, 1.0, 0.0], 1.0), Some(1));
    }
}
