//! Functions of one number. They have no branches, so that a compiler can vectorise them.

/// 1.5 · 2²³. For |x| < 2²², x + `ROUNDER` has no bits for a fraction, and the low bits of its mantissa are x in two's
/// complement, rounded to the nearest integer, ties to even.
const ROUNDER: f32 = 12_582_912.0;

/// Rounds to the nearest integer, ties to even, for |x| < 2¹⁵; 0 for a value that is not a number.
#[inline(always)]
pub fn round(x: f32) -> i16 {
    if x.is_nan() { 0 } else { (x + ROUNDER).to_bits() as i16 }
}

/// The largest magnitude; NaN if a value is NaN. Bits of positive floats have the order of their values, with NaN last.
#[inline(always)]
pub fn largest(values: impl Iterator<Item = f32>) -> f32 {
    f32::from_bits(values.fold(0, |largest, value| value.abs().to_bits().max(largest)))
}

/// Returns eˣ to within two units in the last place; 0 below −87, and e⁸⁸ above 88.
///
/// x = n·ln 2 + r. The minimax polynomial of degree 5 of Cephes' `expf` gives eʳ; n is added to the exponent.
#[inline(always)]
pub fn exp(x: f32) -> f32 {
    let clamped = x.clamp(-87.0, 88.0);
    // A cast to an integer would not become vectors, since it checks its range.
    let shifted = clamped * std::f32::consts::LOG2_E + ROUNDER;
    let n = shifted - ROUNDER;
    let r = n.mul_add(-0.693_359_4, clamped);
    let r = n.mul_add(2.121_944_4e-4, r);
    let mut p = 1.987_569_2e-4_f32;
    for coefficient in [1.398_2e-3, 8.333_452e-3, 4.166_579_6e-2, 1.666_666_5e-1, 5e-1] {
        p = p.mul_add(r, coefficient);
    }
    let power = f32::from_bits((shifted.to_bits() << 23).wrapping_add(127 << 23));
    let value = (p * r).mul_add(r, r + 1.0) * power;
    if x < -87.0 { 0.0 } else { value }
}

/// tanh x = 1 − 2 / (e²ˣ + 1).
#[inline(always)]
pub fn tanh(x: f32) -> f32 {
    1.0 - 2.0 / (exp(2.0 * x) + 1.0)
}

/// x · sigmoid(x).
#[inline(always)]
pub fn silu(x: f32) -> f32 {
    x / (1.0 + exp(-x))
}

/// GELU in the tanh approximation (Hendrycks and Gimpel 2016, §2).
#[inline(always)]
pub fn gelu_tanh(x: f32) -> f32 {
    let inner = 0.797_884_6 * (x + 0.044_715 * x * x * x);
    0.5 * x * (1.0 + tanh(inner))
}

/// The activation of gpt_oss: gate · σ(slope · gate) · (up + 1), with gate at most `limit` and up within ±`limit`.
#[inline(always)]
pub fn clamped_swish(gate: f32, up: f32, slope: f32, limit: f32) -> f32 {
    let gate = if gate > limit { limit } else { gate };
    let up = if up > limit { limit } else { up };
    let up = if up < -limit { -limit } else { up };
    gate / (1.0 + exp(-slope * gate)) * (up + 1.0)
}

/// `x` within ±`cap`: cap · tanh(x / cap).
#[inline(always)]
pub fn softcap(x: f32, cap: f32) -> f32 {
    cap * tanh(x / cap)
}

/// Sums a power of two of numbers: the upper half is added to the lower half, until one number is left.
#[inline(always)]
pub fn tree_sum<const N: usize>(mut values: [f32; N]) -> f32 {
    let mut half = N / 2;
    while half > 0 {
        for i in 0..half {
            values[i] += values[i + half];
        }
        half /= 2;
    }
    values[0]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exp_is_close_to_the_standard_library() {
        for i in -8700..8800 {
            let x = i as f32 / 100.0;
            let (got, expected) = (exp(x), x.exp());
            assert!((got - expected).abs() <= 3e-7 * expected, "exp({x}) = {got}, not {expected}");
        }
        assert_eq!(exp(f32::NEG_INFINITY), 0.0);
    }

    #[test]
    fn activations_are_close_to_f64() {
        for i in -1000..1000 {
            let x = i as f32 / 50.0;
            let wide = f64::from(x);
            let silu_expected = wide / (1.0 + (-wide).exp());
            let inner = 0.797_884_560_802_865_4 * (wide + 0.044_715 * wide.powi(3));
            let gelu_expected = 0.5 * wide * (1.0 + inner.tanh());
            assert!((f64::from(silu(x)) - silu_expected).abs() < 2e-6 * wide.abs().max(1.0));
            assert!((f64::from(gelu_tanh(x)) - gelu_expected).abs() < 2e-6 * wide.abs().max(1.0));
            assert!((f64::from(softcap(x, 5.0)) - 5.0 * (wide / 5.0).tanh()).abs() < 2e-6);
        }
    }

    #[test]
    fn rounding_is_to_nearest() {
        for (x, expected) in [(0.4, 0), (0.6, 1), (-126.7, -127), (2.5, 2), (3.5, 4)] {
            assert_eq!(round(x), expected);
        }
        assert_eq!([32_639.4, -32_639.4, -0.3, f32::NAN].map(round), [32_639, -32_639, 0, 0]);
    }

    #[test]
    fn a_tree_adds_halves() {
        // 1 + 2⁻²⁴ is 1 in single precision, but 2⁻²⁴ + 2⁻²⁴ counts.
        let tiny = 2_f32.powi(-24);
        assert_eq!(tree_sum([1.0, tiny, 0.0, tiny]), 1.0 + 2.0 * tiny);
        assert_eq!(tree_sum([1.0, 0.0, tiny, tiny]), 1.0);
    }
}
