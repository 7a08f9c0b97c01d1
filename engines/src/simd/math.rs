//! Functions of one row. They have no branches, so that the compiler can vectorise them, and a fixed order of
//! operations, so that a result depends on the row alone.

use super::{LANES, Simd};

/// Rounds to the nearest integer, ties to even, for |x| < 2²². (x + 1.5 · 2²³ has no bits for a fraction.)
#[inline(always)]
pub(crate) fn round(x: f32) -> f32 {
    const SHIFT: f32 = 12_582_912.0;
    (x + SHIFT) - SHIFT
}

/// Returns eˣ to within two units in the last place; 0 below −87, and e⁸⁸ above 88.
///
/// x = n·ln 2 + r. The minimax polynomial of degree 5 of Cephes' `expf` gives eʳ; n is added to the exponent.
#[inline(always)]
pub(crate) fn exp<S: Simd>(x: f32) -> f32 {
    let clamped = x.clamp(-87.0, 88.0);
    let n = round(clamped * std::f32::consts::LOG2_E);
    let r = S::fma1(n, -0.693_359_4, clamped);
    let r = S::fma1(n, 2.121_944_4e-4, r);
    let mut p = 1.987_569_2e-4;
    for coefficient in [1.398_2e-3, 8.333_452e-3, 4.166_579_6e-2, 1.666_666_5e-1, 5e-1] {
        p = S::fma1(p, r, coefficient);
    }
    let power = f32::from_bits(((n as i32 + 127) << 23) as u32);
    let value = S::fma1(p * r, r, r + 1.0) * power;
    if x < -87.0 { 0.0 } else { value }
}

/// tanh x = 1 − 2 / (e²ˣ + 1).
#[inline(always)]
pub(crate) fn tanh<S: Simd>(x: f32) -> f32 {
    1.0 - 2.0 / (exp::<S>(2.0 * x) + 1.0)
}

/// x · sigmoid(x).
#[inline(always)]
pub(crate) fn silu<S: Simd>(x: f32) -> f32 {
    x / (1.0 + exp::<S>(-x))
}

/// GELU in the tanh approximation (Hendrycks and Gimpel 2016, §2).
#[inline(always)]
pub(crate) fn gelu_tanh<S: Simd>(x: f32) -> f32 {
    let inner = 0.797_884_6 * (x + 0.044_715 * x * x * x);
    0.5 * x * (1.0 + tanh::<S>(inner))
}

/// The activation of gpt_oss: gate · σ(slope · gate) · (up + 1), with gate at most `limit` and up within ±`limit`.
#[inline(always)]
pub(crate) fn clamped_swish<S: Simd>(gate: f32, up: f32, slope: f32, limit: f32) -> f32 {
    let gate = if gate > limit { limit } else { gate };
    let up = up.clamp(-limit, limit);
    gate / (1.0 + exp::<S>(-slope * gate)) * (up + 1.0)
}

#[inline(always)]
pub(crate) fn largest_magnitude(values: &[f32; 32]) -> f32 {
    let mut lanes = [0.0_f32; LANES];
    for half in values.as_chunks::<LANES>().0 {
        for (lane, value) in lanes.iter_mut().zip(half) {
            *lane = if value.abs() > *lane { value.abs() } else { *lane };
        }
    }
    lanes.iter().fold(0.0, |a, &b| if b > a { b } else { a })
}

/// Σ x², in sixteen partial sums.
#[inline(always)]
pub(crate) fn sum_of_squares<S: Simd>(values: &[f32]) -> f32 {
    let mut lanes = [0.0_f32; LANES];
    let (whole, rest) = values.as_chunks::<LANES>();
    for chunk in whole {
        for (lane, &value) in lanes.iter_mut().zip(chunk) {
            *lane = S::fma1(value, value, *lane);
        }
    }
    for (lane, &value) in lanes.iter_mut().zip(rest) {
        *lane = S::fma1(value, value, *lane);
    }
    lanes.iter().sum()
}

/// RMS normalisation: out = x · weight / √(mean x² + epsilon).
#[inline(always)]
pub(crate) fn rms_norm<S: Simd>(values: &[f32], weight: &[f32], epsilon: f32, out: &mut [f32]) {
    let mean = sum_of_squares::<S>(values) / values.len() as f32;
    let factor = 1.0 / (mean + epsilon).sqrt();
    for ((out, &value), &weight) in out.iter_mut().zip(values).zip(weight) {
        *out = value * factor * weight;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::simd::Portable;

    #[test]
    fn exp_is_close_to_the_standard_library() {
        for i in -8700..8800 {
            let x = i as f32 / 100.0;
            let (got, expected) = (exp::<Portable>(x), x.exp());
            assert!((got - expected).abs() <= 3e-7 * expected, "exp({x}) = {got}, not {expected}");
        }
        assert_eq!(exp::<Portable>(f32::NEG_INFINITY), 0.0);
    }

    #[test]
    fn activations_are_close_to_f64() {
        for i in -1000..1000 {
            let x = i as f32 / 50.0;
            let wide = f64::from(x);
            let silu_expected = wide / (1.0 + (-wide).exp());
            let inner = 0.797_884_560_802_865_4 * (wide + 0.044_715 * wide.powi(3));
            let gelu_expected = 0.5 * wide * (1.0 + inner.tanh());
            assert!((f64::from(silu::<Portable>(x)) - silu_expected).abs() < 2e-6 * wide.abs().max(1.0));
            assert!((f64::from(gelu_tanh::<Portable>(x)) - gelu_expected).abs() < 2e-6 * wide.abs().max(1.0));
        }
    }

    #[test]
    fn rounding_is_to_nearest() {
        for (x, expected) in [(0.4, 0.0), (0.6, 1.0), (-126.7, -127.0), (2.5, 2.0), (3.5, 4.0)] {
            assert_eq!(round(x), expected);
        }
    }
}
