//! Rows of activations, in the forms that matrix products read.
//!
//! [`arithmetic::activations`](crate::arithmetic::activations) defines the codes. Here they are laid out in steps of 64
//! columns, the depth of a byte tile; the last step is padded with zeros.
//!
//! Kernels multiply two planes of bytes at once, which are called a slot: the upper and the lower bytes of one row of
//! 16-bit codes, or the bytes of two rows of 8-bit codes. So 8 bits take half of the work.

use super::disjoint::DisjointMut;
use super::lines::Lines;
use crate::arithmetic::functions::round;
use crate::arithmetic::{SUPERBLOCK, activations, superblocks};
use crate::engine::ActivationBits;
use crate::format::blocks::BLOCK;
use crate::simd::{LANES, Simd};
use std::ops::Range;
use std::ptr::NonNull;

/// Rows of f32: \[row]\[width].
#[derive(Debug, Clone, Default)]
pub struct Rows {
    pub(super) width: usize,
    pub(super) values: Vec<f32>,
}

impl Rows {
    pub(super) fn zeroed(rows: usize, width: usize) -> Self {
        Self { width, values: vec![0.0; rows * width] }
    }

    pub(super) fn count(&self) -> usize {
        self.values.len() / self.width.max(1)
    }

    pub(super) fn row(&self, index: usize) -> &[f32] {
        &self.values[index * self.width..][..self.width]
    }
}

/// Columns of a step.
pub(super) const STEP: usize = 64;
/// Steps of a superblock.
pub(super) const SUPERBLOCK_STEPS: usize = SUPERBLOCK / STEP;
/// 16-bit pairs of a step: those of the first plane, then those of the second.
pub(super) const STEP_PAIRS: usize = 2 * STEP;
/// Columns of half a block.
const HALF: usize = BLOCK / 2;
/// Sums of a step's bytes in one plane: of four halves of blocks, then of two blocks.
pub(super) const PLANE_SUMS: usize = STEP / HALF + STEP / BLOCK;
/// Where the sums of blocks begin.
pub(super) const BLOCK_SUMS: usize = STEP / HALF;
/// Sums of a step: of the first plane, then of the second.
pub(super) const STEP_SUMS: usize = 2 * PLANE_SUMS;
/// Starts of a step: of two blocks of the first plane, then of the second.
pub(super) const STEP_STARTS: usize = 2 * STEP / BLOCK;
/// The level from which sums of 4-bit products count: 32 products of bytes with levels −7 to 8 fit in 16 bits.
pub(super) const START_LEVEL: i32 = 7;
/// Slots of a tile.
pub(super) const TILE_SLOTS: usize = 16;
/// Bytes of one step of a tile of slots: both planes.
pub(super) const TILE_STEP_BYTES: usize = 2 * TILE_SLOTS * STEP;

/// The rows of a slot.
pub(super) const fn slot_rows(bits: ActivationBits) -> usize {
    match bits {
        ActivationBits::Sixteen => 1,
        ActivationBits::Eight => 2,
    }
}

/// The slots that hold `rows`.
pub(super) fn slots(bits: ActivationBits, rows: &Range<usize>) -> Range<usize> {
    rows.start / slot_rows(bits)..rows.end.div_ceil(slot_rows(bits))
}

/// Rows of codes.
#[derive(Debug, Default)]
pub(super) struct CodedRows {
    pub(super) width: usize,
    pub(super) bits: ActivationBits,
    /// The number of rows.
    count: usize,
    /// \[tile of slots]\[step]\[plane]\[slot]\[column]. Slots of the last tile behind the last slot are
    /// arbitrary.
    bytes: Lines,
    /// Slots of a tile: 16 for products on tiles, so that a plane of a tile is contiguous; else 1, so that a slot is.
    tile_slots: usize,
    /// The same as 16-bit integers, in the order of [`Simd::even_odd`](crate::simd::Simd::even_odd):
    /// \[slot]\[step]\[plane]\[group of four columns]\[0, 2, 1, 3]. Only where a product asks for it.
    pairs: Vec<i16>,
    /// Sums of bytes: \[slot]\[step]\[plane]\[half blocks, then blocks].
    sums: Vec<i16>,
    /// −[`START_LEVEL`] times the sums of blocks: \[slot]\[step]\[plane]\[block].
    starts: Vec<i32>,
    /// \[row]\[superblock], with the rows of whole tiles.
    units: Vec<f32>,
}

/// The forms of coded rows that products read, beside the bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Wanted {
    /// 16-bit pairs beside the bytes, for products of 16-bit weights.
    pub(super) pairs: bool,
    /// Bytes in tiles of sixteen slots.
    pub(super) tiles: bool,
}

/// One slot, for kernels.
#[derive(Clone, Copy)]
pub(super) struct CodedSlot {
    /// The first bytes of the first plane. The second plane is `plane_bytes` behind, the next step twice as far.
    pub(super) bytes: *const i8,
    pub(super) plane_bytes: usize,
    pub(super) pairs: *const i16,
    pub(super) sums: *const i16,
    pub(super) starts: *const i32,
    /// The units of the first row.
    pub(super) units: *const f32,
    /// The units of the second row, where the planes are two rows.
    pub(super) second_units: Option<NonNull<f32>>,
}

impl CodedRows {
    /// The size of the buffers, in bytes.
    pub(super) fn memory_bytes(&self) -> usize {
        let integers = (self.pairs.capacity() + self.sums.capacity()) * size_of::<i16>();
        self.bytes.length()
            + integers
            + self.starts.capacity() * size_of::<i32>()
            + self.units.capacity() * size_of::<f32>()
    }

    /// Resizes to `rows` rows in the `wanted` forms. Earlier contents become meaningless.
    pub(super) fn resize(&mut self, bits: ActivationBits, rows: usize, width: usize, wanted: Wanted) {
        let (steps, slots) = (width.div_ceil(STEP), slots(bits, &(0..rows)).end);
        (self.bits, self.count, self.width) = (bits, rows, width);
        self.tile_slots = if wanted.tiles { TILE_SLOTS } else { 1 };
        let tiled = slots.next_multiple_of(self.tile_slots);
        self.bytes.resize(tiled * steps * 2 * STEP);
        self.pairs.resize(if wanted.pairs { slots * steps * STEP_PAIRS } else { 0 }, 0);
        self.sums.resize(slots * steps * STEP_SUMS, 0);
        self.starts.resize(slots * steps * STEP_STARTS, 0);
        self.units.resize(tiled * slot_rows(bits) * superblocks(width), 0.0);
    }

    pub(super) fn has_pairs(&self) -> bool {
        !self.pairs.is_empty()
    }

    pub(super) fn has_tiles(&self) -> bool {
        self.tile_slots == TILE_SLOTS
    }

    pub(super) fn steps(&self) -> usize {
        self.width.div_ceil(STEP)
    }

    /// The values of code 1 in a superblock, one after every [`superblocks`] of the width, of the rows of a tile.
    ///
    /// # Panics
    /// If there is no such tile.
    #[inline(always)]
    pub(super) fn tile_units(&self, tile: usize, superblock: usize) -> &[f32] {
        let values = self.tile_slots * slot_rows(self.bits) * superblocks(self.width);
        &self.units[tile * values..][..values][superblock..]
    }

    /// # Panics
    /// If there is no such slot.
    #[inline(always)]
    pub(super) fn slot(&self, slot: usize) -> CodedSlot {
        let (steps, count) = (self.steps(), superblocks(self.width));
        let pairs: &[i16] = if self.has_pairs() { &self.pairs[slot * steps * STEP_PAIRS..] } else { &[] };
        let units = |row: usize| &self.units[row * count..][..count];
        let first = slot * slot_rows(self.bits);
        CodedSlot {
            bytes: self.tile(slot / self.tile_slots)[slot % self.tile_slots * STEP..].as_ptr().cast(),
            plane_bytes: self.tile_slots * STEP,
            pairs: pairs.as_ptr(),
            sums: self.sums[slot * steps * STEP_SUMS..][..steps * STEP_SUMS].as_ptr(),
            starts: self.starts[slot * steps * STEP_STARTS..][..steps * STEP_STARTS].as_ptr(),
            units: units(first).as_ptr(),
            second_units: match self.bits {
                ActivationBits::Sixteen => None,
                ActivationBits::Eight => Some(NonNull::from(units(first + 1)).cast()),
            },
        }
    }

    /// The bytes of a tile: \[step]\[plane]\[slot]\[column].
    ///
    /// # Panics
    /// If there is no such tile.
    #[inline(always)]
    pub(super) fn tile(&self, tile: usize) -> &[u8] {
        let tile_bytes = self.steps() * 2 * self.tile_slots * STEP;
        &self.bytes.bytes()[tile * tile_bytes..][..tile_bytes]
    }

    /// Lends the rows to the tasks of a section.
    pub(super) fn parts(&mut self) -> CodedParts<'_> {
        let has_pairs = self.has_pairs();
        CodedParts {
            width: self.width,
            bits: self.bits,
            count: self.count,
            tile_slots: self.tile_slots,
            bytes: DisjointMut::new(self.bytes.bytes_mut()),
            pairs: has_pairs.then(|| DisjointMut::new(&mut self.pairs)),
            sums: DisjointMut::new(&mut self.sums),
            starts: DisjointMut::new(&mut self.starts),
            units: DisjointMut::new(&mut self.units),
        }
    }
}

/// [`CodedRows`] that several tasks write, each its own slots.
pub(super) struct CodedParts<'a> {
    width: usize,
    bits: ActivationBits,
    count: usize,
    tile_slots: usize,
    bytes: DisjointMut<'a, u8>,
    pairs: Option<DisjointMut<'a, i16>>,
    sums: DisjointMut<'a, i16>,
    starts: DisjointMut<'a, i32>,
    units: DisjointMut<'a, f32>,
}

impl CodedParts<'_> {
    /// The row behind the last one that shares its slot. Nobody reads its outputs, but its codes, sums and starts must
    /// agree, as those of zeros do: else sums of products would not fit their integers.
    pub(super) fn missing_row(&self) -> Option<usize> {
        (!self.count.is_multiple_of(slot_rows(self.bits))).then_some(self.count)
    }

    /// Rounds `values` into `row`, as [`activations::encode`] does.
    ///
    /// # Safety
    /// Call only inside a kernel of `S`. Only one task may write the rows of a slot.
    #[inline(always)]
    pub(super) unsafe fn encode<S: Simd>(&self, row: usize, values: &[f32]) {
        let (steps, count) = (self.width.div_ceil(STEP), superblocks(self.width));
        let (slot, planes) = match self.bits {
            ActivationBits::Sixteen => (row, 0..2),
            ActivationBits::Eight => (row / 2, row % 2..row % 2 + 1),
        };
        // SAFETY: slots are disjoint, and the caller guarantees that no other task takes this slot.
        let (sums, starts, units) = unsafe {
            (
                self.sums.take(slot * steps * STEP_SUMS..(slot + 1) * steps * STEP_SUMS),
                self.starts.take(slot * steps * STEP_STARTS..(slot + 1) * steps * STEP_STARTS),
                self.units.take(row * count..(row + 1) * count),
            )
        };
        let (sums, _) = sums.as_chunks_mut::<STEP_SUMS>();
        let (starts, _) = starts.as_chunks_mut::<STEP_STARTS>();
        for (index, superblock) in values.chunks(SUPERBLOCK).enumerate() {
            let (unit, factor) = activations::unit(self.bits, largest_magnitude(superblock));
            units[index] = unit;
            for (offset, columns) in superblock.chunks(STEP).enumerate() {
                let step = index * SUPERBLOCK_STEPS + offset;
                let mut padded = [0.0; STEP];
                padded[..columns.len()].copy_from_slice(columns);
                // SAFETY: as above; the caller is a kernel of `S`.
                unsafe {
                    let bytes = self.planes(slot, step);
                    match self.bits {
                        ActivationBits::Sixteen => encode_step(&padded, factor, bytes),
                        ActivationBits::Eight => encode_plane(&padded, factor, bytes, planes.start),
                    }
                    let bytes = self.planes(slot, step);
                    for plane in planes.clone() {
                        let (_, sums) = sums[step].split_at_mut(plane * PLANE_SUMS);
                        sum_plane::<S>(bytes[plane], &mut sums[..PLANE_SUMS], &mut starts[step][plane * 2..][..2]);
                    }
                }
            }
        }
        if let Some(pairs) = &self.pairs {
            // SAFETY: as above.
            let pairs = unsafe { pairs.take(slot * steps * STEP_PAIRS..(slot + 1) * steps * STEP_PAIRS) };
            for (step, pairs) in pairs.chunks_exact_mut(STEP_PAIRS).enumerate() {
                // SAFETY: as above.
                let bytes = unsafe { self.planes(slot, step) };
                for plane in planes.clone() {
                    widen(bytes[plane], &mut pairs[plane * STEP..][..STEP]);
                }
            }
        }
    }

    /// Both planes of a step of a slot.
    ///
    /// # Safety
    /// Only one task may write a slot, and holds them once at a time.
    #[allow(clippy::mut_from_ref)]
    #[inline(always)]
    unsafe fn planes(&self, slot: usize, step: usize) -> [&mut [u8]; 2] {
        let plane_bytes = self.tile_slots * STEP;
        let tile_step = slot / self.tile_slots * self.width.div_ceil(STEP) + step;
        let at = tile_step * 2 * plane_bytes + slot % self.tile_slots * STEP;
        // SAFETY: the caller upholds the contract; the planes are disjoint.
        unsafe { [self.bytes.take(at..at + STEP), self.bytes.take(at + plane_bytes..at + plane_bytes + STEP)] }
    }
}

#[inline(always)]
fn encode_step(columns: &[f32; STEP], factor: f32, [upper, lower]: [&mut [u8]; 2]) {
    for ((&value, upper), lower) in columns.iter().zip(upper).zip(lower) {
        let (high, low) = activations::bytes(round(value * factor));
        *upper = high as u8;
        *lower = low as u8;
    }
}

/// Rounds to bytes, into plane `number`.
#[inline(always)]
fn encode_plane(columns: &[f32; STEP], factor: f32, planes: [&mut [u8]; 2], number: usize) {
    let [first, second] = planes;
    let plane = if number == 0 { first } else { second };
    for (&value, byte) in columns.iter().zip(plane) {
        *byte = round(value * factor) as u8;
    }
}

/// Writes bytes as 16-bit integers, in the order of pairs.
#[inline(always)]
fn widen(plane: &[u8], pairs: &mut [i16]) {
    for (pairs, &[a, b, c, d]) in pairs.as_chunks_mut::<4>().0.iter_mut().zip(plane.as_chunks::<4>().0) {
        *pairs = [a, c, b, d].map(|byte| i16::from(byte as i8));
    }
}

/// Sums the bytes of a step in one plane.
///
/// # Safety
/// Call only inside a kernel of `S`.
#[inline(always)]
unsafe fn sum_plane<S: Simd>(bytes: &[u8], sums: &mut [i16], starts: &mut [i32]) {
    let mut fours = [0_i32; LANES];
    // SAFETY: the caller is a kernel of `S`; a step is one vector of codes.
    unsafe { S::store_ints(fours.as_mut_ptr(), S::sum_fours(S::codes(bytes[..STEP].as_ptr()))) };
    let (halves, blocks) = sums.split_at_mut(BLOCK_SUMS);
    for (half, four) in halves.iter_mut().zip(fours.as_chunks::<{ HALF / 4 }>().0) {
        *half = four.iter().sum::<i32>() as i16;
    }
    for ((block, start), halves) in blocks.iter_mut().zip(starts).zip(halves.as_chunks::<2>().0) {
        *block = halves[0] + halves[1];
        *start = -START_LEVEL * i32::from(*block);
    }
}

#[inline(always)]
fn largest_magnitude(values: &[f32]) -> f32 {
    let mut lanes = [0.0_f32; LANES];
    let (whole, rest) = values.as_chunks::<LANES>();
    for chunk in whole {
        for (lane, value) in lanes.iter_mut().zip(chunk) {
            *lane = if value.abs() > *lane { value.abs() } else { *lane };
        }
    }
    lanes.iter().chain(rest).fold(0.0, |a, b| if b.abs() > a { b.abs() } else { a })
}
