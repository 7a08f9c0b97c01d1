//! Rows of activations, in the forms that matrix products read.
//!
//! [`arithmetic::activations`](crate::arithmetic::activations) defines the codes. Here they are laid out in steps of 64
//! columns, the depth of a byte tile; the last step is padded with zeros.

use super::disjoint::DisjointMut;
use super::lines::Lines;
use crate::arithmetic::functions::round;
use crate::arithmetic::{SUPERBLOCK, activations, superblocks};
use crate::format::blocks::BLOCK;
use crate::simd::{LANES, Simd};

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
/// 16-bit pairs of a step: those of the upper bytes, then those of the lower bytes.
pub(super) const STEP_PAIRS: usize = 2 * STEP;
/// Columns of half a block.
const HALF: usize = BLOCK / 2;
/// Sums of a step's bytes in one plane: of four halves of blocks, then of two blocks.
pub(super) const PLANE_SUMS: usize = STEP / HALF + STEP / BLOCK;
/// Where the sums of blocks begin.
pub(super) const BLOCK_SUMS: usize = STEP / HALF;
/// Sums of a step: of upper bytes, then of lower bytes.
pub(super) const STEP_SUMS: usize = 2 * PLANE_SUMS;
/// Starts of a step: of two blocks of upper bytes, then of lower bytes.
pub(super) const STEP_STARTS: usize = 2 * STEP / BLOCK;
/// The level from which sums of 4-bit products count: 32 products of bytes with levels −7 to 8 fit in 16 bits.
pub(super) const START_LEVEL: i32 = 7;
/// Rows of a tile.
pub(super) const TILE_ROWS: usize = 16;
/// Bytes of one step of a tile of rows: the upper and the lower bytes.
pub(super) const TILE_STEP_BYTES: usize = 2 * TILE_ROWS * STEP;

/// Rows of 16-bit codes.
#[derive(Debug, Default)]
pub(super) struct CodedRows {
    pub(super) width: usize,
    /// Upper and lower bytes: \[tile of rows]\[step]\[plane]\[row]\[column]. Rows of the last tile behind the last row
    /// are arbitrary.
    bytes: Lines,
    /// Rows of a tile: 16 for products on tiles, so that a plane of a tile is contiguous; else 1, so that a row is.
    tile_rows: usize,
    /// The same as 16-bit integers, in the order of [`Simd::even_odd`](crate::simd::Simd::even_odd):
    /// \[row]\[step]\[plane]\[group of four columns]\[0, 2, 1, 3]. Only where a product asks for it.
    pairs: Vec<i16>,
    /// Sums of bytes: \[row]\[step]\[plane]\[half blocks, then blocks].
    sums: Vec<i16>,
    /// −[`START_LEVEL`] times the sums of blocks: \[row]\[step]\[plane]\[block].
    starts: Vec<i32>,
    /// \[row]\[superblock], with the rows of whole tiles.
    units: Vec<f32>,
}

/// The forms of coded rows that products read, beside the bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Wanted {
    /// 16-bit pairs beside the bytes, for products of 16-bit weights.
    pub(super) pairs: bool,
    /// Bytes in tiles of sixteen rows.
    pub(super) tiles: bool,
}

/// One row, for kernels.
#[derive(Clone, Copy)]
pub(super) struct CodedRow {
    /// The row's first upper bytes. The lower bytes are `plane_bytes` behind, the next step twice as far.
    pub(super) bytes: *const i8,
    pub(super) plane_bytes: usize,
    pub(super) pairs: *const i16,
    pub(super) sums: *const i16,
    pub(super) starts: *const i32,
    pub(super) units: *const f32,
}

impl CodedRows {
    /// Resizes to `rows` rows in the `wanted` forms. Earlier contents become meaningless.
    pub(super) fn resize(&mut self, rows: usize, width: usize, wanted: Wanted) {
        let steps = width.div_ceil(STEP);
        self.width = width;
        self.tile_rows = if wanted.tiles { TILE_ROWS } else { 1 };
        self.bytes.resize(rows.next_multiple_of(self.tile_rows) * steps * 2 * STEP);
        self.pairs.resize(if wanted.pairs { rows * steps * STEP_PAIRS } else { 0 }, 0);
        self.sums.resize(rows * steps * STEP_SUMS, 0);
        self.starts.resize(rows * steps * STEP_STARTS, 0);
        self.units.resize(rows.next_multiple_of(self.tile_rows) * superblocks(width), 0.0);
    }

    pub(super) fn has_pairs(&self) -> bool {
        !self.pairs.is_empty()
    }

    pub(super) fn has_tiles(&self) -> bool {
        self.tile_rows == TILE_ROWS
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
        let count = superblocks(self.width);
        &self.units[tile * self.tile_rows * count..][..self.tile_rows * count][superblock..]
    }

    /// # Panics
    /// If there is no such row.
    #[inline(always)]
    pub(super) fn row(&self, row: usize) -> CodedRow {
        let steps = self.steps();
        let pairs: &[i16] = if self.has_pairs() { &self.pairs[row * steps * STEP_PAIRS..] } else { &[] };
        CodedRow {
            bytes: self.tile(row / self.tile_rows)[row % self.tile_rows * STEP..].as_ptr().cast(),
            plane_bytes: self.tile_rows * STEP,
            pairs: pairs.as_ptr(),
            sums: self.sums[row * steps * STEP_SUMS..][..steps * STEP_SUMS].as_ptr(),
            starts: self.starts[row * steps * STEP_STARTS..][..steps * STEP_STARTS].as_ptr(),
            units: self.units[row * superblocks(self.width)..][..superblocks(self.width)].as_ptr(),
        }
    }

    /// The bytes of a tile: \[step]\[plane]\[row]\[column].
    ///
    /// # Panics
    /// If there is no such tile.
    #[inline(always)]
    pub(super) fn tile(&self, tile: usize) -> &[u8] {
        let tile_bytes = self.steps() * 2 * self.tile_rows * STEP;
        &self.bytes.bytes()[tile * tile_bytes..][..tile_bytes]
    }

    /// Lends the rows to the tasks of a section.
    pub(super) fn parts(&mut self) -> CodedParts<'_> {
        let has_pairs = self.has_pairs();
        CodedParts {
            width: self.width,
            tile_rows: self.tile_rows,
            bytes: DisjointMut::new(self.bytes.bytes_mut()),
            pairs: has_pairs.then(|| DisjointMut::new(&mut self.pairs)),
            sums: DisjointMut::new(&mut self.sums),
            starts: DisjointMut::new(&mut self.starts),
            units: DisjointMut::new(&mut self.units),
        }
    }
}

/// [`CodedRows`] that several tasks write, each its own rows.
pub(super) struct CodedParts<'a> {
    width: usize,
    tile_rows: usize,
    bytes: DisjointMut<'a, u8>,
    pairs: Option<DisjointMut<'a, i16>>,
    sums: DisjointMut<'a, i16>,
    starts: DisjointMut<'a, i32>,
    units: DisjointMut<'a, f32>,
}

impl CodedParts<'_> {
    /// Rounds `values` into `row`, as [`activations::encode`] does.
    ///
    /// # Safety
    /// Call only inside a kernel of `S`. Only one task may write a row.
    #[inline(always)]
    pub(super) unsafe fn encode<S: Simd>(&self, row: usize, values: &[f32]) {
        let (steps, count) = (self.width.div_ceil(STEP), superblocks(self.width));
        // SAFETY: rows are disjoint, and the caller guarantees that no other task takes this row.
        let (sums, starts, units) = unsafe {
            (
                self.sums.take(row * steps * STEP_SUMS..(row + 1) * steps * STEP_SUMS),
                self.starts.take(row * steps * STEP_STARTS..(row + 1) * steps * STEP_STARTS),
                self.units.take(row * count..(row + 1) * count),
            )
        };
        let (sums, _) = sums.as_chunks_mut::<STEP_SUMS>();
        let (starts, _) = starts.as_chunks_mut::<STEP_STARTS>();
        for (index, superblock) in values.chunks(SUPERBLOCK).enumerate() {
            let (unit, factor) = activations::unit(largest_magnitude(superblock));
            units[index] = unit;
            for (offset, columns) in superblock.chunks(STEP).enumerate() {
                let step = index * SUPERBLOCK_STEPS + offset;
                let mut padded = [0.0; STEP];
                padded[..columns.len()].copy_from_slice(columns);
                // SAFETY: as above; the caller is a kernel of `S`.
                unsafe {
                    let planes = self.planes(row, step);
                    encode_step(&padded, factor, planes);
                    let planes = self.planes(row, step);
                    for (plane, bytes) in planes.into_iter().enumerate() {
                        let (_, sums) = sums[step].split_at_mut(plane * PLANE_SUMS);
                        sum_plane::<S>(bytes, &mut sums[..PLANE_SUMS], &mut starts[step][plane * 2..][..2]);
                    }
                }
            }
        }
        if let Some(pairs) = &self.pairs {
            // SAFETY: as above.
            let pairs = unsafe { pairs.take(row * steps * STEP_PAIRS..(row + 1) * steps * STEP_PAIRS) };
            for (step, pairs) in pairs.chunks_exact_mut(STEP_PAIRS).enumerate() {
                // SAFETY: as above.
                let planes = unsafe { self.planes(row, step) };
                for (plane, pairs) in planes.into_iter().zip(pairs.chunks_exact_mut(STEP)) {
                    for (pairs, &[a, b, c, d]) in pairs.as_chunks_mut::<4>().0.iter_mut().zip(plane.as_chunks::<4>().0)
                    {
                        *pairs = [a, c, b, d].map(|byte| i16::from(byte as i8));
                    }
                }
            }
        }
    }

    /// The upper and the lower bytes of a step of a row.
    ///
    /// # Safety
    /// Only one task may write a row, and holds them once at a time.
    #[allow(clippy::mut_from_ref)]
    #[inline(always)]
    unsafe fn planes(&self, row: usize, step: usize) -> [&mut [u8]; 2] {
        let plane_bytes = self.tile_rows * STEP;
        let tile_step = row / self.tile_rows * self.width.div_ceil(STEP) + step;
        let at = tile_step * 2 * plane_bytes + row % self.tile_rows * STEP;
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
