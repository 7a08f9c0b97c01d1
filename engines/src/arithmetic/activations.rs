//! Rows of activations as integers.
//!
//! A value is code · unit. In 16 bits, the largest magnitude of a superblock gets the code ±32,639, so a code is
//! 256 · upper + lower with two signed bytes: units of any device that multiply bytes can compute with it. In 8 bits,
//! the lower byte is 0 and the largest code is 256 · 127.

use super::{SUPERBLOCK, superblocks};
use crate::activation_bits::ActivationBits;

/// The largest code of 16 bits: 256 · 127 + 127.
pub const CODE_MAX: f32 = 32_639.0;

/// The largest upper byte.
pub const BYTE_MAX: f32 = 127.0;

/// Superblocks with a smaller largest magnitude are zero. Far below it, the factor of codes would not be finite.
pub const MAGNITUDE_MIN: f32 = 1e-30;

/// A row as integers.
#[derive(Debug, Clone, PartialEq)]
pub struct CodedRow {
    /// One code for each column, −32,639 to 32,639.
    pub codes: Vec<i16>,
    /// The value of code 1, for each superblock.
    pub units: Vec<f32>,
}

/// The value of code 1 in a superblock with this largest magnitude, and the factor that turns a value into a code, or
/// into the upper byte of a code of 8 bits.
#[inline(always)]
pub fn unit(bits: ActivationBits, largest: f32) -> (f32, f32) {
    match bits {
        _ if largest < MAGNITUDE_MIN => (0.0, 0.0),
        ActivationBits::Sixteen => (largest / CODE_MAX, CODE_MAX / largest),
        ActivationBits::Eight => (largest / (256.0 * BYTE_MAX), BYTE_MAX / largest),
    }
}

/// The upper and the lower byte of a code.
#[inline(always)]
pub fn bytes(code: i16) -> (i8, i8) {
    let upper = (code + 128) >> 8;
    (upper as i8, (code - (upper << 8)) as i8)
}

/// Rounds a row: code = round(value · factor), in 8 bits 256 · round(value · factor), ties to even. A value that is not
/// a number has code 0.
pub fn encode(bits: ActivationBits, values: &[f32]) -> CodedRow {
    let mut row =
        CodedRow { codes: Vec::with_capacity(values.len()), units: Vec::with_capacity(superblocks(values.len())) };
    for superblock in values.chunks(SUPERBLOCK) {
        let largest = superblock.iter().fold(0.0_f32, |a, b| if b.abs() > a { b.abs() } else { a });
        let (unit, factor) = unit(bits, largest);
        let rounded = superblock.iter().map(|&value| super::functions::round(value * factor));
        row.codes.extend(rounded.map(|code| if bits == ActivationBits::Eight { code << 8 } else { code }));
        row.units.push(unit);
    }
    row
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn a_code_is_half_a_step_off_at_most(
            values in prop::collection::vec(-1e6_f32..1e6, 1..600),
            bits in prop::sample::select(ActivationBits::ALL.to_vec()),
        ) {
            let step = if bits == ActivationBits::Eight { 256.0 } else { 1.0 };
            let row = encode(bits, &values);
            for (column, (&value, &code)) in values.iter().zip(&row.codes).enumerate() {
                let unit = row.units[column / SUPERBLOCK];
                prop_assert!((f32::from(code) * unit - value).abs() <= 0.51 * step * unit);
                let (upper, lower) = bytes(code);
                prop_assert_eq!(i32::from(upper) * 256 + i32::from(lower), i32::from(code));
                prop_assert!(bits == ActivationBits::Sixteen || lower == 0);
            }
        }
    }

    #[test]
    fn tiny_and_zero_superblocks_are_zero() {
        for bits in ActivationBits::ALL {
            assert_eq!(encode(bits, &[0.0, -1e-35]), CodedRow { codes: vec![0, 0], units: vec![0.0] });
        }
    }
}
