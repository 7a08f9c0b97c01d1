//! Keys and values as bytes: the cache type `q8_0`, named after ggml's type of the same blocks.
//!
//! The values of a head are split into blocks of 32 (the last may be shorter). A block has a half-precision scale,
//! largest magnitude / 127, and a code of 8 bits for each value: value ≈ code · scale. Codes are relative to the scale
//! as it is stored, so a value is off by half a scale at most, but where the scale is a denormal number. The product
//! is exact in f32, which has 24 bits for its 7 + 11.

pub use crate::kv_element::BLOCK;

use super::functions::{largest, round};
use half::f16;

const CODE_MAX: f32 = 127.0;

/// Rounds up to 32 `values` to `codes`; returns the bits of their scale.
#[inline(always)]
pub fn encode(values: &[f32], codes: &mut [i8]) -> u16 {
    let stored = f16::from_f32(largest(values.iter().copied()) / CODE_MAX);
    let scale = stored.to_f32();
    for (code, &value) in codes.iter_mut().zip(values) {
        // A scale that is denormal may be rounded far below a 127th of the largest value.
        let level = if scale == 0.0 { 0.0 } else { (value / scale).clamp(-CODE_MAX, CODE_MAX) };
        *code = round(level) as i8;
    }
    stored.to_bits()
}

/// The values of a head as the cache has them.
pub fn rounded(values: &mut [f32]) {
    for block in values.chunks_mut(BLOCK) {
        let mut codes = [0; BLOCK];
        let scale = f16::from_bits(encode(block, &mut codes)).to_f32();
        block.iter_mut().zip(codes).for_each(|(value, code)| *value = f32::from(code) * scale);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        /// A cached value is off by half a step of its block, and by what a denormal scale loses.
        #[test]
        fn values_are_within_half_a_step(
            count in 1_usize..80,
            exponent in -30_i32..15,
            seed in any::<u64>(),
        ) {
            let mut random = fastrand::Rng::with_seed(seed);
            let values: Vec<f32> = (0..count).map(|_| (random.f32() * 2.0 - 1.0) * 2.0_f32.powi(exponent)).collect();
            let mut got = values.clone();
            rounded(&mut got);
            for (values, got) in values.chunks(BLOCK).zip(got.chunks(BLOCK)) {
                let largest = values.iter().fold(0.0_f32, |a, b| a.max(b.abs()));
                let allowed = largest / CODE_MAX * 0.502 + 127.0 * 2.0_f32.powi(-25);
                for (value, got) in values.iter().zip(got) {
                    prop_assert!((value - got).abs() <= allowed, "{} became {}, largest {}", value, got, largest);
                }
            }
        }
    }
}
