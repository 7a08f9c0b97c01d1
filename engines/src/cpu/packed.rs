//! Weights in the order in which the kernels read them.
//!
//! A matrix of `rows` × `columns` is split into panels of sixteen rows. [`arithmetic::weights`](crate::arithmetic)
//! defines the integers. A panel of quantised blocks holds, for each 32 columns, the codes of its sixteen rows,
//! interleaved so that one vector has four successive columns of each row:
//! - 4 to 6 bits: low nibbles of the vectors 0–3 are columns 0–15, high nibbles columns 16–31; planes with the fifth
//!   and sixth bits follow.
//! - 2 and 3 bits: two vectors hold bit pairs; a plane with the third bits follows.
//!
//! Scales, bases (minima) and units are stored separately. A panel of dense floats holds 16-bit integers, two vectors
//! for each four columns. The size is that of the file and 1 to 9 % more (Q2_K: 38 %, since its minima are expanded;
//! F32: half).

use super::activation::{START_LEVEL, STEP};
use super::lines::Lines;
use crate::arithmetic::weights::Rule;
use crate::arithmetic::{SUPERBLOCK, superblocks};
use crate::format::ElementType;
use crate::format::blocks::{BLOCK, Coding};
use crate::simd::LANES;

/// A weight matrix of the CPU backend, \[rows]\[columns], in panels of sixteen rows.
#[derive(Debug)]
pub struct Packed {
    pub(super) rows: usize,
    pub(super) columns: usize,
    /// The value of integer 1: \[panel]\[superblock]\[lane].
    pub(super) units: Vec<f32>,
    pub(super) form: Form,
}

#[derive(Debug)]
pub(super) enum Form {
    Wide(Wide),
    Coded(Coded),
}

/// Dense floats as 16-bit integers: \[panel]\[group of four columns]\[columns 0 and 2, then 1 and 3 of each lane].
/// Columns are padded with zeros to whole steps.
#[derive(Debug)]
pub(super) struct Wide {
    pub(super) pairs: Lines,
}

/// Quantised blocks.
#[derive(Debug)]
pub(super) struct Coded {
    pub(super) element: ElementType,
    pub(super) coding: Coding,
    pub(super) rule: Rule,
    /// \[panel]\[block].
    pub(super) codes: Lines,
    /// \[panel]\[block]\[half where split]\[lane], without the power of two of [`Rule::Product`].
    pub(super) scales: Scales,
    /// The integers of level [`Coded::base_level`], as pairs of neighbours: \[panel]\[pair]\[lane]\[2]; empty where the
    /// format has no minima. Neighbours are blocks, or the halves of a block where split.
    pub(super) bases: Vec<i16>,
}

#[derive(Debug)]
pub(super) enum Scales {
    /// In a box: a vector that is collected from one of words keeps the words' memory.
    Bytes(Box<[i8]>),
    Words(Vec<i16>),
}

/// Bytes of a group of four columns of a [`Wide`] panel.
pub(super) const GROUP_BYTES: usize = 4 * LANES * size_of::<i16>();

impl Scales {
    /// Returns the address of the first scale.
    pub(super) fn start(&self) -> *const u8 {
        match self {
            Self::Bytes(scales) => scales.as_ptr().cast(),
            Self::Words(scales) => scales.as_ptr().cast(),
        }
    }

    fn get(&self, at: usize) -> i16 {
        match self {
            Self::Bytes(scales) => i16::from(scales[at]),
            Self::Words(scales) => scales[at],
        }
    }

    fn memory_bytes(&self) -> usize {
        match self {
            Self::Bytes(scales) => scales.len(),
            Self::Words(scales) => 2 * scales.len(),
        }
    }
}

impl Coded {
    /// Bytes of codes in one block of 32 columns × sixteen rows.
    pub(super) const fn block_bytes(coding: Coding) -> usize {
        coding.bits as usize * BLOCK * LANES / 8
    }

    /// Scales in one block.
    pub(super) const fn block_scales(coding: Coding) -> usize {
        if coding.split { 2 * LANES } else { LANES }
    }

    /// The level whose integer is a base: that of level 0 is a minimum, but products of 4-bit codes count from
    /// [`START_LEVEL`].
    pub(super) const fn base_level(coding: Coding) -> i32 {
        match (coding.has_mins, coding.bits) {
            (false, _) => coding.zero,
            (true, 4) => START_LEVEL,
            (true, _) => 0,
        }
    }

    /// Pairs of bases in a row of `columns`.
    pub(super) const fn base_pairs(coding: Coding, columns: usize) -> usize {
        match (coding.has_mins, coding.split) {
            (false, _) => 0,
            (true, true) => columns / BLOCK,
            (true, false) => columns.div_ceil(2 * BLOCK),
        }
    }
}

impl Wide {
    /// Bytes of a panel.
    pub(super) fn panel_bytes(columns: usize) -> usize {
        columns.next_multiple_of(STEP) / 4 * GROUP_BYTES
    }
}

impl Packed {
    /// Returns the number of panels of sixteen rows.
    pub(super) fn panels(&self) -> usize {
        self.rows.div_ceil(LANES)
    }

    /// Returns whether products read activations as 16-bit pairs.
    pub(super) fn wants_pairs(&self) -> bool {
        match &self.form {
            Form::Wide(_) => true,
            Form::Coded(coded) => coded.rule == Rule::Rounded,
        }
    }

    /// Returns the bytes in use.
    pub(super) fn memory_bytes(&self) -> u64 {
        let bytes = match &self.form {
            Form::Wide(wide) => wide.pairs.length(),
            Form::Coded(coded) => coded.codes.length() + coded.scales.memory_bytes() + 2 * coded.bases.len(),
        };
        (bytes + 4 * self.units.len()) as u64
    }

    /// Writes the values of `row`, as f32, to `out`.
    pub(super) fn read_row(&self, row: usize, out: &mut [f32]) {
        let (panel, lane) = (row / LANES, row % LANES);
        let units = panel * superblocks(self.columns) * LANES + lane;
        for (index, values) in out.chunks_mut(SUPERBLOCK).enumerate() {
            let unit = self.units[units + index * LANES];
            for (block, values) in values.chunks_mut(BLOCK).enumerate() {
                let integers = match &self.form {
                    Form::Wide(wide) => wide.read(self.columns, panel, index * SUPERBLOCK + block * BLOCK, lane),
                    Form::Coded(coded) => coded.read(self.columns, panel, index * SUPERBLOCK / BLOCK + block, lane),
                };
                values.iter_mut().zip(integers).for_each(|(value, integer)| *value = f32::from(integer) * unit);
            }
        }
    }
}

impl Wide {
    /// Returns the integers of 32 columns from `first`.
    fn read(&self, columns: usize, panel: usize, first: usize, lane: usize) -> [i16; BLOCK] {
        let (words, _) = self.pairs.bytes().as_chunks::<2>();
        std::array::from_fn(|i| {
            let at = panel * Self::panel_bytes(columns) / 2 + wide_position(first + i, lane);
            i16::from_le_bytes(words[at])
        })
    }
}

/// The index of an integer in a [`Wide`] panel.
fn wide_position(column: usize, lane: usize) -> usize {
    let (group, within) = (column / 4, column % 4);
    group * GROUP_BYTES / 2 + within % 2 * 2 * LANES + lane * 2 + within / 2
}

impl Coded {
    /// Returns the integers of a block.
    fn read(&self, columns: usize, panel: usize, block: usize, lane: usize) -> [i16; BLOCK] {
        let blocks = columns / BLOCK;
        let codes = self.read_codes(panel * blocks + block, lane);
        let shift = if let Rule::Product { shift, .. } = self.rule { shift } else { 0 };
        std::array::from_fn(|i| {
            let half = if self.coding.split { i / 16 } else { 0 };
            let scale = (panel * blocks + block) * Self::block_scales(self.coding) + half * LANES + lane;
            let base = match (self.coding.has_mins, self.coding.split) {
                (false, _) => 0,
                (true, true) => self.base(columns, panel, block * 2 + half, lane),
                (true, false) => self.base(columns, panel, block, lane),
            };
            let level = self.coding.level(codes[i]) + self.coding.zero - Self::base_level(self.coding);
            self.rule.weight(level, self.scales.get(scale) << shift, base)
        })
    }

    fn base(&self, columns: usize, panel: usize, number: usize, lane: usize) -> i16 {
        let pair = panel * Self::base_pairs(self.coding, columns) + number / 2;
        self.bases[(pair * LANES + lane) * 2 + number % 2]
    }

    fn read_codes(&self, block: usize, lane: usize) -> [u8; BLOCK] {
        let size = Self::block_bytes(self.coding);
        let bytes = &self.codes.bytes()[block * size..][..size];
        std::array::from_fn(|column| {
            let at = code_position(column, lane);
            let group = column / 4;
            match self.coding.bits {
                8 => return bytes[group * 64 + at.byte],
                2 | 3 => {
                    let low = bytes[group / 4 * 64 + at.byte] >> (group % 4 * 2) & 3;
                    let high = if self.coding.bits == 3 { bytes[128 + at.byte] >> group & 1 } else { 0 };
                    return low | high << 2;
                }
                _ => {}
            }
            let low = bytes[at.vector * 64 + at.byte] >> at.nibble & 15;
            let high = match self.coding.bits {
                5 => bytes[256 + at.byte] >> (column / 4) & 1,
                6 => bytes[256 + column / 16 * 64 + at.byte] >> (column / 4 % 4 * 2) & 3,
                _ => 0,
            };
            low | high << 4
        })
    }
}

/// The position of a column's nibble in a block.
struct CodePosition {
    vector: usize,
    byte: usize,
    nibble: u32,
}

fn code_position(column: usize, lane: usize) -> CodePosition {
    let group = column / 4;
    CodePosition { vector: group % 4, byte: lane * 4 + column % 4, nibble: if group < 4 { 0 } else { 4 } }
}
