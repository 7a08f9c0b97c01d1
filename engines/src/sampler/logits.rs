//! What is done with every entry of a vocabulary row: some of the loops of this program that are long.
//!
//! The bodies are those of the portable tier, compiled for the best instruction set of the machine: what they give
//! is the same to the bit on all of them.

use crate::simd::math::exp;
use crate::simd::{Kernel, LANES, Portable, Simd, Tier};
use std::cell::Cell;
use std::sync::LazyLock;

static TIER: LazyLock<Tier> = LazyLock::new(Tier::best);

/// Entries whose weights are summed in single precision before the sum goes into a double.
const BLOCK: usize = 32 * LANES;
/// Entries that are looked at together for one that is of interest.
const GLANCE: usize = 4 * LANES;
/// Up to so many are kept in order while the rest is looked through; beyond, sorting is faster.
const KEPT_IN_ORDER: usize = 256;

/// The largest logit and its id; of equals the lowest id. `None` where none is finite, or it is infinite.
pub(super) fn largest(logits: &[f32]) -> Option<(u32, f32)> {
    let mut value = f32::NEG_INFINITY;
    TIER.run(Largest { logits, value: &mut value });
    if !value.is_finite() {
        return None;
    }
    let mut found = None;
    TIER.run(Above { values: logits, admits: |logit| logit == value, on: &mut |id, _| found = found.or(Some(id)) });
    found.map(|id| (id, value))
}

/// ln Σ e^logit.
pub(super) fn log_total(logits: &[f32], largest: f32) -> f64 {
    let mut total = 0.0;
    TIER.run(Total { logits, largest, total: &mut total });
    f64::from(largest) + total.ln()
}

/// e^((logit − largest) · `factor`) of each, and the sum.
pub(super) fn weights(logits: &[f32], largest: f32, factor: f32) -> (Vec<f32>, f64) {
    let mut weights = vec![0.0; logits.len()];
    TIER.run(Weights { logits, largest, factor, weights: &mut weights });
    let total = sum(&weights);
    (weights, total)
}

/// The entry behind which `left` is used up, where each takes its weight off it; the last with a weight where rounding
/// left a crumb.
pub(super) fn entry_at(weights: &[f32], mut left: f64) -> Option<usize> {
    for (number, block) in weights.chunks(BLOCK).enumerate() {
        let of_block = sum(block);
        if left < of_block {
            for (index, &weight) in block.iter().enumerate() {
                left -= f64::from(weight);
                if left < 0.0 {
                    return Some(number * BLOCK + index);
                }
            }
            // The block's sum is of lanes, and this one is not: the crumb between them is the last entry's.
            return block.iter().rposition(|&weight| weight > 0.0).map(|index| number * BLOCK + index);
        }
        left -= of_block;
    }
    weights.iter().rposition(|&weight| weight > 0.0)
}

/// Entries of at least `floor`, with their ids.
pub(super) fn at_least(weights: &[f32], floor: f32) -> Vec<(u32, f32)> {
    let mut found = Vec::new();
    TIER.run(Above {
        values: weights,
        admits: |weight| weight >= floor,
        on: &mut |id, weight| found.push((id, weight)),
    });
    found
}

/// The `count` largest, best first; of equals the lower id first. What is not a number comes last.
pub(super) fn likeliest(logits: &[f32], count: usize) -> Vec<u32> {
    let count = count.min(logits.len());
    if count == 0 {
        return Vec::new();
    }
    if count > KEPT_IN_ORDER {
        let mut ids: Vec<u32> = (0..logits.len() as u32).collect();
        // −0 and 0 are equals.
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
    // The last of those, once there are so many.
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
                // What is not a number is not larger.
                *lane = if logit > *lane { logit } else { *lane };
            }
        }
        *self.value = lanes.iter().fold(f32::NEG_INFINITY, |a, &b| if b > a { b } else { a });
    }
}

/// Calls `on` for each entry that `admits` does.
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

/// The weight of one entry; nothing for what is not a number.
#[inline(always)]
fn weigh(logit: f32, largest: f32, factor: f32) -> f32 {
    let logit = if logit > f32::NEG_INFINITY { logit } else { f32::NEG_INFINITY };
    exp::<Portable>((logit - largest) * factor)
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

/// The sum of `of` over `values`, in an order that depends on nothing but their number.
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
    total: &'a mut f64,
}

impl Kernel for Total<'_> {
    #[inline(always)]
    fn run<S: Simd>(self) {
        let Self { logits, largest, total } = self;
        *total = summed(logits, |logit| weigh(logit, largest, 1.0));
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
        // Coarse, so that there are equals; long enough for several blocks.
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
        fn the_likeliest_are_those_that_sorting_finds(logits in logits(), count in prop_oneof![1_usize..40, 250_usize..300]) {
            let sorted = plainly_sorted(&logits);
            prop_assert_eq!(likeliest(&logits, count), &sorted[..count.min(logits.len())]);
            let first = sorted[0];
            let expected = logits[first as usize].is_finite().then_some((first, logits[first as usize]));
            prop_assert_eq!(largest(&logits), expected);
        }

        #[test]
        fn weights_are_probabilities(logits in logits(), factor in 0.3_f32..3.0) {
            let Some((_, best)) = largest(&logits) else { return Ok(()) };
            let (weights, total) = weights(&logits, best, factor);
            let plain: Vec<f64> = logits
                .iter()
                .map(|&l| if l.is_nan() { 0.0 } else { (f64::from(l - best) * f64::from(factor)).exp() })
                .collect();
            let plain_total: f64 = plain.iter().sum();
            prop_assert!((total - plain_total).abs() < 1e-5 * plain_total);
            for (&weight, plain) in weights.iter().zip(&plain) {
                prop_assert!((f64::from(weight) - plain).abs() < 1e-5 * plain + 1e-30);
            }
            let floor = weights[weights.len() / 2];
            let kept: Vec<(u32, f32)> =
                (0..).zip(weights.iter().copied()).filter(|&(_, weight)| weight >= floor).collect();
            prop_assert_eq!(at_least(&weights, floor), kept);
        }

        #[test]
        fn an_entry_is_found_where_the_sum_passes(
            weights in prop::collection::vec(0_u8..4, 1..2000),
            share in 0.0_f64..1.0,
        ) {
            // Whole numbers: sums are exact.
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
        fn nothing_without_a_weight_is_drawn(
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
                tier.run(Total { logits: &logits, largest: value, total: &mut total });
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
    fn the_logarithm_of_the_sum_is_exact_enough_over_a_large_vocabulary() {
        let logits: Vec<f32> =
            (0..262_144_u32).map(|id| (id.wrapping_mul(2_654_435_761) >> 16) as f32 / 4096.0).collect();
        let (_, best) = largest(&logits).expect("finite");
        let plain = logits.iter().map(|&l| f64::from(l - best).exp()).sum::<f64>().ln() + f64::from(best);
        assert!((log_total(&logits, best) - plain).abs() < 1e-6);
    }

    #[test]
    fn rows_without_a_finite_largest_have_none() {
        assert_eq!(largest(&[f32::NAN, f32::NEG_INFINITY]), None);
        assert_eq!(largest(&[0.0, f32::INFINITY]), None);
        assert_eq!(entry_at(&[0.0, 1.0, 0.0], 1.0), Some(1));
    }
}
