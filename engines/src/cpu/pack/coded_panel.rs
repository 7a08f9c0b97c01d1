//! The kernel that packs sixteen rows of quantised blocks.

use super::PanelRows;
use crate::arithmetic::superblocks;
use crate::arithmetic::weights::{self, IntegerBlock, Rule};
use crate::cpu::packed::Coded;
use crate::format::ElementType;
use crate::format::blocks::{BLOCK, Coding};
use crate::simd::{Kernel, LANES, Simd};

/// The codes of a block of each row: \[group of four columns]\[lane], the first column in the lowest byte.
type BlockCodes = [[u32; LANES]; BLOCK / 4];

pub(super) struct CodedPanel<'a> {
    pub(super) rows: PanelRows<'a>,
    pub(super) codes: &'a mut [u8],
    /// Empty where scales are words.
    pub(super) scale_bytes: &'a mut [i8],
    /// Empty where scales are bytes.
    pub(super) scale_words: &'a mut [i16],
    pub(super) bases: &'a mut [i16],
    pub(super) units: &'a mut [f32],
    /// The first row with a value that is not finite.
    pub(super) bad_row: &'a mut Option<usize>,
}

impl Kernel for CodedPanel<'_> {
    /// Compiles the conversion of each type by itself.
    #[inline(always)]
    fn run<S: Simd>(mut self) {
        use ElementType as E;
        match self.rows.element {
            E::F32 | E::F16 | E::BF16 => unreachable!("dense rows are packed as wide panels"),
            E::Q4_0 => self.pack(E::Q4_0),
            E::Q4_1 => self.pack(E::Q4_1),
            E::Q5_0 => self.pack(E::Q5_0),
            E::Q5_1 => self.pack(E::Q5_1),
            E::Q8_0 => self.pack(E::Q8_0),
            E::Q2_K => self.pack(E::Q2_K),
            E::Q3_K => self.pack(E::Q3_K),
            E::Q4_K => self.pack(E::Q4_K),
            E::Q5_K => self.pack(E::Q5_K),
            E::Q6_K => self.pack(E::Q6_K),
            E::IQ4_NL => self.pack(E::IQ4_NL),
            E::IQ4_XS => self.pack(E::IQ4_XS),
            E::MXFP4 => self.pack(E::MXFP4),
        }
    }
}

impl CodedPanel<'_> {
    #[inline(always)]
    fn pack(&mut self, element: ElementType) {
        let (Some(coding), Some(rule)) = (Coding::of(element), Rule::of(element)) else { return };
        let block_bytes = Coded::block_bytes(coding);
        let mut codes: [BlockCodes; weights::BLOCKS] = [[[0; LANES]; BLOCK / 4]; weights::BLOCKS];
        for index in 0..superblocks(self.rows.columns) {
            let first = index * weights::BLOCKS;
            for (lane, row) in self.rows.rows(element).enumerate() {
                let superblock = weights::superblock(element, row, self.rows.columns, index);
                if !superblock.unit.is_finite() {
                    *self.bad_row = Some(self.bad_row.map_or(lane, |row| row.min(lane)));
                }
                self.units[index * LANES + lane] = superblock.unit;
                for (number, block) in superblock.blocks().iter().enumerate() {
                    self.put_scales(coding, rule, first + number, lane, block);
                    for (group, four) in block.codes.as_chunks::<4>().0.iter().enumerate() {
                        codes[number][group][lane] = u32::from_le_bytes(*four);
                    }
                }
            }
            let targets = self.codes[first * block_bytes..].chunks_exact_mut(block_bytes);
            for (codes, target) in codes.iter().zip(targets) {
                interleave(coding, codes, target);
            }
        }
    }

    #[inline(always)]
    fn put_scales(&mut self, coding: Coding, rule: Rule, index: usize, lane: usize, block: &IntegerBlock) {
        let halves = if coding.split { 2 } else { 1 };
        for half in 0..halves {
            let number = index * halves + half;
            match rule {
                Rule::Product { byte_scales: true, shift } => {
                    self.scale_bytes[number * LANES + lane] = (block.scales[half] >> shift) as i8;
                }
                _ => self.scale_words[number * LANES + lane] = block.scales[half],
            }
            if coding.has_mins {
                // The integers of a superblock that is not finite are arbitrary.
                let level = Coded::base_level(coding) as i16;
                let base = block.mins[half].wrapping_add(level.wrapping_mul(block.scales[half]));
                self.bases[(number / 2 * LANES + lane) * 2 + number % 2] = base;
            }
        }
    }
}

/// Writes a block's codes in the order of [`packed`](crate::cpu::packed).
#[inline(always)]
fn interleave(coding: Coding, codes: &BlockCodes, target: &mut [u8]) {
    let vectors = target.as_chunks_mut::<{ 4 * LANES }>().0;
    match coding.bits {
        8 => (0..8).for_each(|group| put(&mut vectors[group], |lane| codes[group][lane])),
        2 | 3 => (0..2).for_each(|half| put(&mut vectors[half], |lane| pairs(codes, half, lane, 0))),
        _ => (0..4).for_each(|group| {
            put(&mut vectors[group], |lane| {
                (codes[group][lane] & 0x0f0f_0f0f) | (codes[group + 4][lane] & 0x0f0f_0f0f) << 4
            });
        }),
    }
    match coding.bits {
        3 => put(&mut vectors[2], |lane| single_bits(codes, lane, 2)),
        5 => put(&mut vectors[4], |lane| single_bits(codes, lane, 4)),
        6 => (0..2).for_each(|half| put(&mut vectors[4 + half], |lane| pairs(codes, half, lane, 4))),
        _ => {}
    }
}

/// Bit `bit` of the codes of all eight groups.
#[inline(always)]
fn single_bits(codes: &BlockCodes, lane: usize, bit: u32) -> u32 {
    (0..8).fold(0, |joined, group| joined | (codes[group][lane] >> bit & 0x0101_0101) << group)
}

/// Bits `bit` and `bit` + 1 of the codes of the four groups of a half.
#[inline(always)]
fn pairs(codes: &BlockCodes, half: usize, lane: usize, bit: u32) -> u32 {
    (0..4).fold(0, |joined, group| joined | (codes[half * 4 + group][lane] >> bit & 0x0303_0303) << (group * 2))
}

/// Writes a vector: four codes of each lane.
#[inline(always)]
fn put(vector: &mut [u8; 4 * LANES], codes: impl Fn(usize) -> u32) {
    for (lane, bytes) in vector.as_chunks_mut::<4>().0.iter_mut().enumerate() {
        *bytes = codes(lane).to_le_bytes();
    }
}
