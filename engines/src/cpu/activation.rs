//! Rows of activations, in the forms that matrix products read.
//!
//! [`arithmetic::activations`](crate::arithmetic::activations) defines the codes. Here they are laid out in steps of 64
//! columns, the depth of a byte tile; the last step is padded with zeros.

use super::disjoint::DisjointMut;
use super::lines::Lines;
use crate::arithmetic::functions::round;
use crate::arithmetic::{SUPERBLOCK, activations, superblocks};
use crate::simd::LANES;

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
/// Bytes of a step's codes: the upper bytes, then the lower bytes.
pub(super) const STEP_BYTES: usize = 2 * STEP;
/// Columns whose codes are summed.
const SUMMED: usize = 16;
/// Sums of a step: of upper bytes, then of lower bytes.
pub(super) const STEP_SUMS: usize = 2 * STEP / SUMMED;
/// The height of a byte tile. A tile may start at any row, so there is memory for 15 rows behind the last.
const TILE_ROWS: usize = 16;

/// Rows of 16-bit codes.
#[derive(Debug, Default)]
pub(super) struct CodedRows {
    pub(super) width: usize,
    /// Upper and lower bytes: \[row]\[step]\[plane]\[column], with arbitrary rows behind the last.
    bytes: Lines,
    /// The same as 16-bit integers, in the order of [`Simd::even_odd`](crate::simd::Simd::even_odd):
    /// \[row]\[step]\[plane]\[group of four columns]\[0, 2, 1, 3]. Only where a product asks for it.
    pairs: Vec<i16>,
    /// The sums of every 16 bytes: \[row]\[step]\[plane]\[sixteen].
    sums: Vec<i16>,
    /// \[row]\[superblock].
    units: Vec<f32>,
}

/// The forms of coded rows that products read. All read bytes or may do so.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Wanted {
    /// 16-bit pairs beside the bytes, for products of 16-bit weights.
    pub(super) pairs: bool,
}

/// One row, for kernels.
#[derive(Clone, Copy)]
pub(super) struct CodedRow {
    pub(super) bytes: *const i8,
    pub(super) pairs: *const i16,
    pub(super) sums: *const i16,
    pub(super) units: *const f32,
}

impl CodedRows {
    /// Resizes to `rows` rows in the `wanted` forms. Earlier contents become meaningless.
    pub(super) fn resize(&mut self, rows: usize, width: usize, wanted: Wanted) {
        let steps = width.div_ceil(STEP);
        self.width = width;
        self.bytes.resize((rows + TILE_ROWS - 1) * steps * STEP_BYTES);
        self.pairs.resize(if wanted.pairs { rows * steps * STEP_BYTES } else { 0 }, 0);
        self.sums.resize(rows * steps * STEP_SUMS, 0);
        self.units.resize(rows * superblocks(width), 0.0);
    }

    pub(super) fn has_pairs(&self) -> bool {
        !self.pairs.is_empty()
    }

    pub(super) fn steps(&self) -> usize {
        self.width.div_ceil(STEP)
    }

    /// The value of code 1 in a superblock of a row.
    #[inline(always)]
    pub(super) fn unit(&self, row: usize, superblock: usize) -> f32 {
        self.units[row * superblocks(self.width) + superblock]
    }

    /// # Panics
    /// If there is no such row.
    #[inline(always)]
    pub(super) fn row(&self, row: usize) -> CodedRow {
        let steps = self.steps();
        let pairs: &[i16] = if self.has_pairs() { &self.pairs[row * steps * STEP_BYTES..] } else { &[] };
        CodedRow {
            bytes: self.bytes.bytes()[row * steps * STEP_BYTES..][..steps * STEP_BYTES].as_ptr().cast(),
            pairs: pairs.as_ptr(),
            sums: self.sums[row * steps * STEP_SUMS..][..steps * STEP_SUMS].as_ptr(),
            units: self.units[row * superblocks(self.width)..][..superblocks(self.width)].as_ptr(),
        }
    }

    /// The bytes of a tile of 16 rows from `row`, which follow each other at a distance of `steps` · [`STEP_BYTES`].
    pub(super) fn tile(&self, row: usize) -> &[u8] {
        let row_bytes = self.steps() * STEP_BYTES;
        &self.bytes.bytes()[row * row_bytes..][..TILE_ROWS * row_bytes]
    }

    /// Lends the rows to the tasks of a section.
    pub(super) fn parts(&mut self) -> CodedParts<'_> {
        let has_pairs = self.has_pairs();
        CodedParts {
            width: self.width,
            bytes: DisjointMut::new(self.bytes.bytes_mut()),
            pairs: has_pairs.then(|| DisjointMut::new(&mut self.pairs)),
            sums: DisjointMut::new(&mut self.sums),
            units: DisjointMut::new(&mut self.units),
        }
    }
}

/// [`CodedRows`] that several tasks write, each its own rows.
pub(super) struct CodedParts<'a> {
    width: usize,
    bytes: DisjointMut<'a, u8>,
    pairs: Option<DisjointMut<'a, i16>>,
    sums: DisjointMut<'a, i16>,
    units: DisjointMut<'a, f32>,
}

impl CodedParts<'_> {
    /// Rounds `values` into `row`, as [`activations::encode`] does. Inline into kernels: the loops become vectors.
    ///
    /// # Safety
    /// Only one task may write a row.
    #[inline(always)]
    pub(super) unsafe fn encode(&self, row: usize, values: &[f32]) {
        let (steps, count) = (self.width.div_ceil(STEP), superblocks(self.width));
        // SAFETY: rows are disjoint, and the caller guarantees that no other task takes this row.
        let (bytes, sums, units, pairs) = unsafe {
            (
                self.bytes.take(row * steps * STEP_BYTES..(row + 1) * steps * STEP_BYTES),
                self.sums.take(row * steps * STEP_SUMS..(row + 1) * steps * STEP_SUMS),
                self.units.take(row * count..(row + 1) * count),
                self.pairs.as_ref().map(|pairs| pairs.take(row * steps * STEP_BYTES..(row + 1) * steps * STEP_BYTES)),
            )
        };
        let (targets, _) = bytes.as_chunks_mut::<STEP_BYTES>();
        let (sums, _) = sums.as_chunks_mut::<STEP_SUMS>();
        for (index, superblock) in values.chunks(SUPERBLOCK).enumerate() {
            let (unit, factor) = activations::unit(largest_magnitude(superblock));
            units[index] = unit;
            for (offset, columns) in superblock.chunks(STEP).enumerate() {
                let step = index * SUPERBLOCK_STEPS + offset;
                match columns.as_array::<STEP>() {
                    Some(columns) => encode_step(columns, factor, &mut targets[step], &mut sums[step]),
                    None => {
                        let mut padded = [0.0; STEP];
                        padded[..columns.len()].copy_from_slice(columns);
                        encode_step(&padded, factor, &mut targets[step], &mut sums[step]);
                    }
                }
            }
        }
        if let Some(pairs) = pairs {
            let (pairs, _) = pairs.as_chunks_mut::<4>();
            for (pairs, &[a, b, c, d]) in pairs.iter_mut().zip(bytes.as_chunks::<4>().0) {
                *pairs = [a, c, b, d].map(|byte| i16::from(byte as i8));
            }
        }
    }
}

#[inline(always)]
fn encode_step(columns: &[f32; STEP], factor: f32, bytes: &mut [u8; STEP_BYTES], sums: &mut [i16; STEP_SUMS]) {
    let (upper, lower) = bytes.split_at_mut(STEP);
    for i in 0..STEP {
        let (high, low) = activations::bytes(round(columns[i] * factor) as i16);
        upper[i] = high as u8;
        lower[i] = low as u8;
    }
    for (sum, bytes) in sums.iter_mut().zip(bytes.as_chunks::<SUMMED>().0) {
        *sum = bytes.iter().map(|&byte| i16::from(byte as i8)).sum();
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
