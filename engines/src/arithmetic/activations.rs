//! Rows of activations as integers.
//!
//! A value is code · unit, to within half a unit. The largest magnitude of a superblock gets the code ±32,639, so a
//! code is 256 · upper + lower with two signed bytes: units of any device that multiply bytes can compute with it.

use super::{SUPERBLOCK, superblocks};

/// The largest code: 256 · 127 + 127.
pub const CODE_MAX: f32 = 32_639.0;

/// Superblocks with a smaller largest magnitude are zero. Far below it, the factor of codes would not be finite.
pub const MAGNITUDE_MIN: f32 = 1e-30;

/// A row in 16 bits.
#[derive(Debug, Clone, PartialEq)]
pub struct CodedRow {
    /// One code for each column, −32,639 to 32,639.
    pub codes: Vec<i16>,
    /// The value of code 1, for each superblock.
    pub units: Vec<f32>,
}

/// The value of code 1 in a superblock with this largest magnitude, and the factor that turns a value into a code.
#[inline(always)]
pub fn unit(largest: f32) -> (f32, f32) {
    if largest < MAGNITUDE_MIN { (0.0, 0.0) } else { (largest / CODE_MAX, CODE_MAX / largest) }
}

/// The upper and the lower byte of a code.
#[inline(always)]
pub fn bytes(code: i16) -> (i8, i8) {
    let upper = (code + 128) >> 8;
    (upper as i8, (code - (upper << 8)) as i8)
}

/// Rounds a row: code = round(value · factor), ties to even. A value that is not a number has code 0.
pub fn encode(values: &[f32]) -> CodedRow {
    let mut row =
        CodedRow { codes: Vec::with_capacity(values.len()), units: Vec::with_capacity(superblocks(values.len())) };
    for superblock in values.chunks(SUPERBLOCK) {
        let largest = superblock.iter().fold(0.0_f32, |a, b| if b.abs() > a { b.abs() } else { a });
        let (unit, factor) = unit(largest);
        row.codes.extend(superblock.iter().map(|&value| super::functions::round(value * factor)));
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
        fn a_code_is_half_a_unit_off_at_most(values in prop::collection::vec(-1e6_f32..1e6, 1..600)) {
            let row = encode(&values);
            for (column, (&value, &code)) in values.iter().zip(&row.codes).enumerate() {
                let unit = row.units[column / SUPERBLOCK];
                prop_assert!((f32::from(code) * unit - value).abs() <= 0.51 * unit);
                let (upper, lower) = bytes(code);
                prop_assert_eq!(i32::from(upper) * 256 + i32::from(lower), i32::from(code));
            }
        }
    }

    #[test]
    fn tiny_and_zero_superblocks_are_zero() {
        assert_eq!(encode(&[0.0, -1e-35]), CodedRow { codes: vec![0, 0], units: vec![0.0] });
    }
}
