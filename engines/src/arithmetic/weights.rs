//! Rows of weights as integers.
//!
//! Every type of tensor becomes the same thing: 16-bit integers with one unit for each superblock of 256 columns, so
//! that weight = integer · unit. How exact this is depends on the type:
//!
//! | type | integer | exactness |
//! |---|---|---|
//! | Q3_K, Q6_K, IQ4_XS | level · scale, both of the file | exact |
//! | Q2_K, Q4_K, Q5_K | level · scale · 2ᵏ + minimum | minima to half a unit |
//! | MXFP4 | level · scale | exact for scales down to 1/2,048 of the superblock's largest |
//! | Q4_0, Q4_1, Q5_0, Q5_1 | level · scale + minimum | scales and minima to half a unit |
//! | Q8_0, IQ4_NL | (level · scale + 64) / 128, rounded down | one unit |
//! | F32, F16, BF16 | the weight in units | half a unit |
//!
//! A unit is at most 1/31,800 of the largest value that the superblock's scales allow (in the exact types, what the
//! file has; 1/24,576 in MXFP4), so half a unit is less than bfloat16 loses of a typical weight by a factor of 30.
//!
//! Q2_K, Q4_K and Q5_K lose more where minima are more than about 30 times as large as steps between levels can be:
//! there the scales are rounded to half of 2ᵏ units, which is up to 770 units of a weight.

use super::functions::{largest, round};
use super::{SUPERBLOCK, superblocks};
use crate::format::ElementType;
use crate::format::blocks::{self, BLOCK, Coding, Levels};

/// The largest magnitude of an integer before the scales are rounded, which may add up to 770.
const LARGEST: f32 = 31_800.0;

/// Units below this are zero: the scales could not be divided by them exactly enough.
const UNIT_MIN: f32 = f32::MIN_POSITIVE;

/// The largest scale of MXFP4: 12 · 2¹¹ has 15 bits.
const FP4_SCALE_MAX: f32 = 2048.0;

/// Bits that products with rounded scales are shifted back.
const ROUNDED_BITS: u32 = 7;

/// Blocks in a superblock.
pub const BLOCKS: usize = SUPERBLOCK / BLOCK;

/// A row of weights: weight of column c = codes\[c] · units\[c / 256].
#[derive(Debug, Clone, PartialEq)]
pub struct WeightRow {
    /// One integer for each column, −32,639 to 32,639.
    pub codes: Vec<i16>,
    /// The value of 1, for each superblock.
    pub units: Vec<f32>,
}

/// How codes of a quantised type become integers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Rule {
    /// level · scale + minimum.
    Product {
        /// All scales are multiples of 2^`shift`.
        shift: u32,
        /// Whether scale / 2^`shift` fits in 8 bits; else it has 16.
        byte_scales: bool,
    },
    /// (level · scale + 64) / 128, rounded down.
    Rounded,
}

impl Rule {
    /// The rule of `element`; `None` for dense floats.
    pub const fn of(element: ElementType) -> Option<Self> {
        Some(match element {
            ElementType::F32 | ElementType::F16 | ElementType::BF16 => return None,
            // With these shifts the largest products, 3 · 15, 15 · 63 and 31 · 63, take 15 bits.
            ElementType::Q2_K => Self::Product { shift: 9, byte_scales: true },
            ElementType::Q4_K => Self::Product { shift: 5, byte_scales: true },
            ElementType::Q5_K => Self::Product { shift: 4, byte_scales: true },
            ElementType::Q3_K | ElementType::Q6_K | ElementType::IQ4_XS => {
                Self::Product { shift: 0, byte_scales: true }
            }
            ElementType::Q4_0 | ElementType::Q4_1 | ElementType::Q5_0 | ElementType::Q5_1 | ElementType::MXFP4 => {
                Self::Product { shift: 0, byte_scales: false }
            }
            ElementType::Q8_0 | ElementType::IQ4_NL => Self::Rounded,
        })
    }

    /// The integer of a level with its scale and minimum.
    #[inline(always)]
    pub fn weight(self, level: i32, scale: i16, min: i16) -> i16 {
        match self {
            Self::Product { .. } => (level * i32::from(scale) + i32::from(min)) as i16,
            Self::Rounded => ((level * i32::from(scale) + (1 << (ROUNDED_BITS - 1))) >> ROUNDED_BITS) as i16,
        }
    }
}

/// A block of 32 codes with integer scales.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct IntegerBlock {
    /// Unsigned codes, as [`blocks::Block`] has them.
    pub codes: [u8; BLOCK],
    /// Scales of columns 0–15 and 16–31.
    pub scales: [i16; 2],
    /// Minima of columns 0–15 and 16–31; zero for a type without minima.
    pub mins: [i16; 2],
}

/// Up to eight blocks with their unit.
#[derive(Debug, Clone, PartialEq)]
pub struct Superblock {
    /// The value of integer 1; not finite if the file's scales are not.
    pub unit: f32,
    /// The blocks; those from `count` on are zero.
    blocks: [IntegerBlock; BLOCKS],
    count: usize,
}

impl Superblock {
    /// The blocks, from 1 to 8.
    pub fn blocks(&self) -> &[IntegerBlock] {
        &self.blocks[..self.count]
    }
}

/// Converts superblock `index` of a quantised `row` of `columns`.
///
/// # Panics
/// If `element` is dense, or the row has no such superblock.
#[inline(always)]
pub fn superblock(element: ElementType, row: &[u8], columns: usize, index: usize) -> Superblock {
    let (Some(coding), Some(rule)) = (Coding::of(element), Rule::of(element)) else {
        unreachable!("a dense row has no blocks")
    };
    let row = &row[index * (SUPERBLOCK / element.block_values()) * element.block_bytes()..];
    let count =
        if element.block_values() == SUPERBLOCK { BLOCKS } else { BLOCKS.min(columns / BLOCK - index * BLOCKS) };
    let mut decoded = [blocks::Block { codes: [0; BLOCK], scales: [0.0; 2], mins: [0.0; 2] }; BLOCKS];
    for (number, block) in decoded[..count].iter_mut().enumerate() {
        *block = blocks::decode(element, row, number);
    }
    let decoded = &decoded[..count];
    let (unit, step) = match rule {
        Rule::Product { shift, .. } => {
            let power = (1_u32 << shift) as f32;
            let unit = product_unit(coding, blocks::shared_scale(element, row, 0), power, decoded);
            (unit, unit * power)
        }
        Rule::Rounded => {
            let largest = largest(decoded.iter().flat_map(|block| block.scales));
            let step = normal(largest / LARGEST);
            (step * (1 << ROUNDED_BITS) as f32, step)
        }
    };
    let factor = if let Rule::Product { shift, .. } = rule { 1_i16 << shift } else { 1 };
    let mut blocks = [IntegerBlock { codes: [0; BLOCK], scales: [0; 2], mins: [0; 2] }; BLOCKS];
    for (block, from) in blocks.iter_mut().zip(decoded) {
        *block = IntegerBlock {
            codes: from.codes,
            // The integers of a superblock that is not finite are arbitrary.
            scales: from.scales.map(|scale| integer(scale, step).wrapping_mul(factor)),
            mins: from.mins.map(|min| integer(min, unit)),
        };
    }
    Superblock { unit, blocks, count }
}

/// The unit of products: the file's own scale over 2^shift where all integers fit, else 1/31,800 of the largest value.
#[inline(always)]
fn product_unit(coding: Coding, shared: Option<f32>, power: f32, decoded: &[blocks::Block]) -> f32 {
    let (lowest, highest) = coding.level_range();
    if coding.levels == Levels::Fp4 {
        // All scales are powers of two, so their quotients are exact.
        return normal(largest(decoded.iter().flat_map(|block| block.scales)) / FP4_SCALE_MAX);
    }
    let ranges = decoded.iter().flat_map(|block| block.scales.into_iter().zip(block.mins));
    let largest = largest(ranges.flat_map(|(scale, min)| [lowest, highest].map(|level| scale * level as f32 + min)));
    match shared.map(|scale| scale / power) {
        Some(unit) if unit != 0.0 && (!coding.has_mins || largest <= unit.abs() * LARGEST) => unit,
        _ => normal(largest / LARGEST),
    }
}

/// value / step to the nearest integer, the even one in a tie; 0 for a step of 0. The magnitude is below 2¹⁵, or the
/// superblock's unit is not finite.
#[inline(always)]
fn integer(value: f32, step: f32) -> i16 {
    if step == 0.0 { 0 } else { round(value / step) }
}

#[inline(always)]
fn normal(unit: f32) -> f32 {
    if unit < UNIT_MIN { 0.0 } else { unit }
}

/// Converts `values`, at most a superblock of dense floats; returns their unit, which is not finite if a value is not.
#[inline(always)]
pub fn dense(values: &[f32], codes: &mut [i16]) -> f32 {
    let unit = normal(largest(values.iter().copied()) / LARGEST);
    for (code, &value) in codes.iter_mut().zip(values) {
        *code = integer(value, unit);
    }
    unit
}

/// Converts a whole row, stored as `element`.
///
/// # Panics
/// If the row has fewer values than `columns`.
pub fn row(element: ElementType, row: &[u8], columns: usize) -> WeightRow {
    let mut out = WeightRow { codes: Vec::with_capacity(columns), units: Vec::with_capacity(superblocks(columns)) };
    match (Coding::of(element), Rule::of(element)) {
        (Some(coding), Some(rule)) => {
            for index in 0..superblocks(columns) {
                let superblock = superblock(element, row, columns, index);
                out.units.push(superblock.unit);
                for block in superblock.blocks() {
                    let halves = block.codes.chunks(BLOCK / 2).zip(block.scales.into_iter().zip(block.mins));
                    for (codes, (scale, min)) in halves {
                        out.codes.extend(codes.iter().map(|&code| rule.weight(coding.level(code), scale, min)));
                    }
                }
            }
        }
        _ => {
            let mut values = vec![0.0; columns];
            blocks::dequantise_row(element, row, &mut values);
            out.codes.resize(columns, 0);
            for (values, codes) in values.chunks(SUPERBLOCK).zip(out.codes.chunks_mut(SUPERBLOCK)) {
                out.units.push(dense(values, codes));
            }
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cpu::test_weights;
    use proptest::prelude::*;

    /// The error of a weight, in units, that a type may have.
    fn error_max(element: ElementType) -> f32 {
        match element {
            ElementType::Q3_K | ElementType::Q6_K | ElementType::IQ4_XS => 0.01,
            ElementType::F32 | ElementType::F16 | ElementType::BF16 => 0.51,
            ElementType::Q2_K | ElementType::Q4_K | ElementType::Q5_K => 0.51,
            // Half a unit of the minimum, and half a unit of the scale for each level.
            ElementType::Q4_0 => 4.01,
            ElementType::Q5_0 | ElementType::Q4_1 => 8.02,
            ElementType::Q5_1 => 16.02,
            ElementType::MXFP4 => 0.01,
            ElementType::Q8_0 | ElementType::IQ4_NL => 1.02,
        }
    }

    /// Scales of MXFP4 down to 2⁻¹¹ of the largest are exact; smaller ones vanish.
    #[test]
    fn powers_of_two_are_exact_over_eleven_octaves() {
        for octaves in 0..14_u8 {
            let mut bytes = vec![0x11; 2 * 17];
            bytes[0] = 200;
            bytes[17] = 200 - octaves;
            let row = row(ElementType::MXFP4, &bytes, 64);
            let value = |column: usize| f32::from(row.codes[column]) * row.units[0];
            let expected = if octaves <= 11 { 0.5 * 2_f32.powi(200 - 127 - i32::from(octaves)) } else { 0.0 };
            assert_eq!((value(0), value(40)), (0.5 * 2_f32.powi(200 - 127), expected), "{octaves}");
        }
    }

    /// A superblock of Q4_K whose minima dwarf its steps keeps its values to 1 % of the largest.
    #[test]
    fn large_minima_leave_the_values_close() {
        let mut bytes = test_weights::bytes(ElementType::Q4_K, 1, 256, 1);
        bytes[..2].copy_from_slice(&half::f16::from_f32(0.01).to_le_bytes());
        bytes[2..4].copy_from_slice(&half::f16::from_f32(1.0).to_le_bytes());
        bytes[4..16].fill(0xff);
        let got = row(ElementType::Q4_K, &bytes, 256);
        let mut expected = vec![0.0; 256];
        blocks::dequantise_row(ElementType::Q4_K, &bytes, &mut expected);
        let largest = expected.iter().fold(0.0_f32, |a, b| a.max(b.abs()));
        assert!(largest > 60.0);
        for (&code, &value) in got.codes.iter().zip(&expected) {
            assert!((f32::from(code) * got.units[0] - value).abs() < 0.01 * largest);
        }
    }

    proptest! {
        /// R4.3: the integers of every type are its weights, to the error that the type's rule states.
        #[test]
        fn integers_are_the_weights_of_the_file(
            element in prop::sample::select(ElementType::ALL.to_vec()),
            columns in prop::sample::select(vec![256_usize, 512, 1280]),
            seed in any::<u64>(),
        ) {
            let columns = if element.block_values() == 32 && seed % 2 == 0 { columns - 96 } else { columns };
            let bytes = test_weights::bytes(element, 1, columns, seed);
            let got = row(element, &bytes, columns);
            let mut expected = vec![0.0; columns];
            blocks::dequantise_row(element, &bytes, &mut expected);
            prop_assert_eq!((got.codes.len(), got.units.len()), (columns, superblocks(columns)));
            for (column, (&code, &value)) in got.codes.iter().zip(&expected).enumerate() {
                let unit = got.units[column / SUPERBLOCK].abs();
                prop_assert!(code.unsigned_abs() <= 32_639);
                let error = (f32::from(code) * got.units[column / SUPERBLOCK] - value).abs();
                let allowed = error_max(element) * unit + 1e-6 * value.abs();
                prop_assert!(error <= allowed, "{element}, column {column}: {error} of {value}, unit {unit}");
            }
        }

        /// Any bytes give integers in range, or a unit that is not finite.
        #[test]
        fn any_bytes_give_integers_in_range(
            element in prop::sample::select(ElementType::ALL.to_vec()),
            seed in any::<u64>(),
        ) {
            let mut random = fastrand::Rng::with_seed(seed);
            let length = element.row_bytes(SUPERBLOCK).expect("whole blocks");
            let bytes: Vec<u8> = (0..length).map(|_| random.u8(..)).collect();
            let got = row(element, &bytes, SUPERBLOCK);
            if got.units[0].is_finite() {
                prop_assert!(got.codes.iter().all(|code| code.unsigned_abs() <= 32_639), "{element}: {:?}", got.codes);
            }
        }
    }
}
