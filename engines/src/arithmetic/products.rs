//! Products of rows: out = Σ over columns of activation · weight.
//!
//! Inside a superblock the sum is an integer, so its order does not matter and any unit may compute it: products of
//! bytes, of 16-bit pairs, or block by block with the scale behind. Superblocks are summed in floats.

use super::activations::{self, CodedRow};
use super::weights::WeightRow;
use super::{SUPERBLOCK, superblocks};

/// Superblocks of one chain of fused multiply-adds.
pub const CHAIN: usize = 4;

/// The exact sums of one superblock, of weight · upper byte and of weight · lower byte. Both fit 32 bits: 256 columns,
/// weights of 15 bits, bytes of 7 bits.
pub fn sums(weights: &[i16], codes: &[i16]) -> (i32, i32) {
    let mut sums = (0, 0);
    for (&weight, &code) in weights.iter().zip(codes) {
        let (upper, lower) = activations::bytes(code);
        sums.0 += i32::from(weight) * i32::from(upper);
        sums.1 += i32::from(weight) * i32::from(lower);
    }
    sums
}

/// The sum of a superblock as a float: 256 · upper + lower, each rounded to a float, then fused.
#[inline(always)]
pub fn join(upper: i32, lower: i32) -> f32 {
    (upper as f32).mul_add(256.0, lower as f32)
}

/// One output: superblocks in order, sum · (weight unit · activation unit), in fused chains of four. The chains are
/// added in order.
pub fn dot(weights: &WeightRow, input: &CodedRow) -> f32 {
    let mut total = 0.0;
    for first in (0..superblocks(input.codes.len())).step_by(CHAIN) {
        let mut chain = 0.0_f32;
        for index in first..(first + CHAIN).min(input.units.len()) {
            let columns = index * SUPERBLOCK..((index + 1) * SUPERBLOCK).min(input.codes.len());
            let (upper, lower) = sums(&weights.codes[columns.clone()], &input.codes[columns]);
            chain = join(upper, lower).mul_add(weights.units[index] * input.units[index], chain);
        }
        total = if first == 0 { chain } else { total + chain };
    }
    total
}
