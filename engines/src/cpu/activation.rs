//! Rows of activations, in the forms that matrix products read.

use crate::format::blocks::BLOCK;
use crate::simd::math;

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

/// Bytes of a block's codes: one plane of upper bytes, one of lower bytes.
pub(super) const BLOCK_CODES: usize = 2 * BLOCK;

/// The largest code: 256 · 127 + 127.
const CODE_MAX: f32 = 32_639.0;

/// Rows rounded to 16-bit codes, with one scale per 32 values.
///
/// Eight bits, as in llama.cpp and candle, change the logits of a small model by tenths (measured on SmolLM2: 0.37
/// for the second token of a plain question). Sixteen bits change them by thousandths, and cost no time where memory
/// bandwidth is the limit. A code is 256 · upper + lower, both signed bytes, so every tier can use byte products.
#[derive(Debug, Default)]
pub(super) struct CodedRows {
    pub(super) width: usize,
    /// For each block, 32 upper bytes, then 32 lower bytes.
    pub(super) codes: Vec<i8>,
    /// One scale for each block of 32 values.
    pub(super) scales: Vec<f32>,
    /// The sum of the codes of each half block.
    pub(super) half_sums: Vec<i32>,
    /// scale · (sum of the block's codes), the factor of a weight block's minimum.
    pub(super) weighted_sums: Vec<f32>,
}

impl CodedRows {
    #[cfg(test)]
    pub(super) fn zeroed(rows: usize, width: usize) -> Self {
        let mut coded = Self::default();
        coded.resize(rows, width);
        coded
    }

    /// Resizes to `rows` rows. Earlier contents become meaningless.
    pub(super) fn resize(&mut self, rows: usize, width: usize) {
        let blocks = rows * width / BLOCK;
        self.width = width;
        self.codes.resize(blocks * BLOCK_CODES, 0);
        self.scales.resize(blocks, 0.0);
        self.half_sums.resize(blocks * 2, 0);
        self.weighted_sums.resize(blocks, 0.0);
    }
}

/// A writable row of [`CodedRows`].
pub(super) struct CodedRowMut<'a> {
    pub(super) codes: &'a mut [i8],
    pub(super) scales: &'a mut [f32],
    pub(super) half_sums: &'a mut [i32],
    pub(super) weighted_sums: &'a mut [f32],
}

impl CodedRowMut<'_> {
    /// Rounds `values`: code = round(32639 · value / largest magnitude of its block).
    #[inline(always)]
    pub(super) fn encode(&mut self, values: &[f32]) {
        let (blocks, _) = values.as_chunks::<BLOCK>();
        let (targets, _) = self.codes.as_chunks_mut::<BLOCK_CODES>();
        for (index, (block, codes)) in blocks.iter().zip(targets).enumerate() {
            let largest = math::largest_magnitude(block);
            let inverse = if largest > 0.0 { CODE_MAX / largest } else { 0.0 };
            let (upper, lower) = codes.split_at_mut(BLOCK);
            let mut sums = [0_i32; 2];
            for (half, sum) in sums.iter_mut().enumerate() {
                for i in half * 16..half * 16 + 16 {
                    let code = math::round(block[i] * inverse) as i32;
                    let high = (code + 128) >> 8;
                    upper[i] = high as i8;
                    lower[i] = (code - (high << 8)) as i8;
                    *sum += code;
                }
            }
            let scale = largest / CODE_MAX;
            self.scales[index] = scale;
            self.half_sums[index * 2..][..2].copy_from_slice(&sums);
            self.weighted_sums[index] = scale * (sums[0] + sums[1]) as f32;
        }
    }
}
