//! Copies tensors whose rows are not contiguous in their file into row order.

use super::TensorSlice;
use crate::format::{ElementType, FormatError, SourceFile};
use std::ops::Range;

/// Values that share one scale in MXFP4.
const MXFP4_VALUES: usize = 32;

/// Copies a dense matrix of which neither rows nor columns need be contiguous.
pub(super) fn strided(
    file: &SourceFile,
    slice: &TensorSlice,
    row_step: u64,
    column_step: u64,
) -> Result<Vec<u8>, FormatError> {
    let size = slice.element.block_bytes();
    let (rows, columns) = (slice.rows as u64, slice.columns as u64);
    let last = rows
        .saturating_sub(1)
        .saturating_mul(row_step)
        .saturating_add(columns.saturating_sub(1).saturating_mul(column_step));
    let length = last.saturating_add(1).saturating_mul(size as u64);
    let source = file.read(slice.offset_bytes..slice.offset_bytes.saturating_add(length), &slice.name)?;
    let mut out = vec![0; slice.rows * slice.columns * size];
    let (row_step, column_step) = (row_step as usize * size, column_step as usize * size);
    // Column by column, because the values of a column are close together in the file.
    for column in 0..slice.columns {
        for row in 0..slice.rows {
            let from = row * row_step + column * column_step;
            let to = (row * slice.columns + column) * size;
            out[to..to + size].copy_from_slice(&source[from..from + size]);
        }
    }
    Ok(out)
}

/// Copies rows of MXFP4 into GGUF's order. Each block is its scale, then sixteen bytes with values 0–15 in the low
/// nibbles and 16–31 in the high ones.
pub(super) fn mxfp4(
    blocks: &SourceFile,
    scales: &SourceFile,
    slice: &TensorSlice,
    row_step: u64,
    scales_offset_bytes: u64,
) -> Result<Vec<u8>, FormatError> {
    let per_row = slice.columns / MXFP4_VALUES;
    // The rows of other tensors between the first and the last are read, too: one long read is faster than many short.
    let last = (slice.rows as u64).saturating_sub(1).saturating_mul(row_step);
    let span = |file: &SourceFile, start, row_bytes| {
        let end = nth(start, last, row_bytes).end;
        file.read(start..end, &slice.name)
    };
    let pairs = span(blocks, slice.offset_bytes, per_row * 16)?;
    let scales = span(scales, scales_offset_bytes, per_row)?;
    let mut out = Vec::with_capacity(slice.rows * per_row * ElementType::MXFP4.block_bytes());
    for row in 0..slice.rows {
        let number = row * row_step as usize;
        let pairs = &pairs[number * per_row * 16..][..per_row * 16];
        let scales = &scales[number * per_row..][..per_row];
        for (pairs, &scale) in pairs.as_chunks::<16>().0.iter().zip(scales) {
            out.push(scale);
            let value = |i: usize| pairs[i / 2] >> (i % 2 * 4) & 15;
            out.extend((0..16).map(|i| value(i) | value(i + 16) << 4));
        }
    }
    Ok(out)
}

/// The byte range of the `number`-th row of `length` bytes, counted from `start`.
fn nth(start: u64, number: u64, length: usize) -> Range<u64> {
    let start = start.saturating_add(number.saturating_mul(length as u64));
    start..start.saturating_add(length as u64)
}
