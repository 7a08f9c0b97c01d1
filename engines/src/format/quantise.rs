//! Quantisation of dense rows.
//!
//! candle's quantisers do the rounding (they follow ggml's reference quantisers). This module hands the rows to threads
//! a few at a time, so that little more than source and target is ever in memory.

use super::blocks::dequantise_row;
use super::{ElementType, FormatError, TensorBytes};
use candle_core::quantized::{GgmlDType, QTensor};
use candle_core::{Device, Tensor};
use parking_lot::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};

/// Values that a thread holds as f32 at once.
const PIECE_VALUES: usize = 1 << 17;

/// The reason why rows cannot be quantised.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum QuantiseError {
    /// A value in this row is not finite.
    NotANumber { row: usize },
    /// The quantiser's error message.
    Failed { what: String },
    /// The source cannot be read.
    Unreadable(FormatError),
}

fn target_type(element: ElementType) -> Option<GgmlDType> {
    Some(match element {
        ElementType::Q4_0 => GgmlDType::Q4_0,
        ElementType::Q5_0 => GgmlDType::Q5_0,
        ElementType::Q8_0 => GgmlDType::Q8_0,
        ElementType::Q4_K => GgmlDType::Q4K,
        ElementType::Q6_K => GgmlDType::Q6K,
        _ => return None,
    })
}

/// Quantises rows of `columns` values from `from` to `to`.
///
/// # Errors
/// [`QuantiseError`] for a value that is not finite, a type without a quantiser, rows that are not whole blocks, or a
/// file that cannot be read.
pub(crate) fn rows(
    (from, to): (ElementType, ElementType),
    bytes: &TensorBytes<'_>,
    columns: usize,
) -> Result<Vec<u8>, QuantiseError> {
    let failed = |what: &str| QuantiseError::Failed { what: what.to_owned() };
    let kind = target_type(to).ok_or_else(|| failed(&format!("quantisation to {to} is not supported")))?;
    let (Some(row_bytes), Some(target_row_bytes)) = (from.row_bytes(columns), to.row_bytes(columns)) else {
        return Err(failed(&format!("{columns} columns are not whole blocks of {to}")));
    };
    let rows_per_piece = (PIECE_VALUES / columns.max(1)).max(1);
    let mut out = vec![0; bytes.length() / row_bytes.max(1) * target_row_bytes];
    let pieces: Vec<_> =
        out.chunks_mut(rows_per_piece * target_row_bytes).map(|piece| Mutex::new(Some(piece))).collect();
    let next = AtomicUsize::new(0);
    let failure = Mutex::new(None);
    let work = || {
        let mut buffer = Vec::new();
        loop {
            let index = next.fetch_add(1, Ordering::Relaxed);
            let Some(piece) = pieces.get(index).and_then(|piece| piece.lock().take()) else { return };
            let start = index * rows_per_piece * row_bytes;
            let part = start..bytes.length().min(start + rows_per_piece * row_bytes);
            let source = bytes.part(part, &mut buffer).map_err(QuantiseError::Unreadable);
            let done =
                source.and_then(|source| quantise_piece((from, kind), source, columns, index * rows_per_piece, piece));
            if let Err(error) = done {
                failure.lock().get_or_insert(error);
                return;
            }
        }
    };
    std::thread::scope(|scope| {
        let others = std::thread::available_parallelism().map_or(1, std::num::NonZero::get).min(pieces.len()) - 1;
        // If a thread cannot be started, this thread does its work.
        let started: Vec<_> =
            (0..others).map_while(|_| std::thread::Builder::new().spawn_scoped(scope, work).ok()).collect();
        work();
        drop(started);
    });
    drop(pieces);
    match failure.into_inner() {
        Some(error) => Err(error),
        None => Ok(out),
    }
}

fn quantise_piece(
    (from, to): (ElementType, GgmlDType),
    source: &[u8],
    columns: usize,
    first_row: usize,
    out: &mut [u8],
) -> Result<(), QuantiseError> {
    let row_bytes = from.row_bytes(columns).unwrap_or(1).max(1);
    let mut values = vec![0.0; source.len() / row_bytes * columns];
    for (index, (row, out)) in source.chunks(row_bytes).zip(values.chunks_mut(columns)).enumerate() {
        dequantise_row(from, row, out);
        if out.iter().any(|value| !value.is_finite()) {
            return Err(QuantiseError::NotANumber { row: first_row + index });
        }
    }
    let rows = values.len() / columns.max(1);
    let quantise = || -> candle_core::Result<Vec<u8>> {
        let tensor = Tensor::from_vec(values, (rows, columns), &Device::Cpu)?;
        Ok(QTensor::quantize(&tensor, to)?.data()?.into_owned())
    };
    let quantised = quantise().map_err(|error| QuantiseError::Failed { what: error.to_string() })?;
    match quantised.len() == out.len() {
        true => out.copy_from_slice(&quantised),
        false => return Err(QuantiseError::Failed { what: format!("{} bytes, not {}", quantised.len(), out.len()) }),
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::path::Path;

    fn fixture(name: &str) -> Vec<u8> {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/blocks").join(name);
        std::fs::read(path).expect("the fixture that make.c writes")
    }

    fn squared_error(element: ElementType, bytes: &[u8], columns: usize, source: &[f32]) -> f32 {
        let mut read = vec![0.0; source.len()];
        let row_bytes = element.row_bytes(columns).expect("whole blocks");
        bytes.chunks(row_bytes).zip(read.chunks_mut(columns)).for_each(|(row, out)| dequantise_row(element, row, out));
        read.iter().zip(source).map(|(a, b)| (a - b) * (a - b)).sum()
    }

    /// R4.3: the error of quantisation on loading is at most 1.15 times ggml's.
    #[test]
    fn quantisation_is_as_accurate_as_ggml() {
        let columns = 512;
        let bytes = fixture("values.f32");
        let source: Vec<f32> = bytes.as_chunks::<4>().0.iter().map(|b| f32::from_le_bytes(*b)).collect();
        for element in [ElementType::Q4_0, ElementType::Q5_0, ElementType::Q8_0, ElementType::Q4_K, ElementType::Q6_K] {
            let bytes = TensorBytes::Gathered(bytes.clone());
            let ours = rows((ElementType::F32, element), &bytes, columns).expect("finite values");
            let ours = squared_error(element, &ours, columns, &source);
            let theirs = squared_error(element, &fixture(&format!("{element}.blocks")), columns, &source);
            let norm: f32 = source.iter().map(|v| v * v).sum();
            println!("{element:5} ours {:.5}, ggml's {:.5}", (ours / norm).sqrt(), (theirs / norm).sqrt());
            assert!(ours.sqrt() < 1.15 * theirs.sqrt(), "{element}: {ours}, ggml has {theirs}");
        }
    }

    #[test]
    fn rows_quantised_in_pieces_equal_rows_quantised_alone() {
        let (count, columns) = (5000, 512);
        let bytes: Vec<u8> = (0..count * columns).flat_map(|i| ((i as f32 * 0.37).sin()).to_le_bytes()).collect();
        let of =
            |bytes: &[u8]| rows((ElementType::F32, ElementType::Q8_0), &TensorBytes::Gathered(bytes.to_vec()), columns);
        let all = of(&bytes).expect("finite values");
        let row = 4321;
        let one = of(&bytes[row * 2048..(row + 1) * 2048]);
        let row_bytes = all.len() / count;
        assert_eq!(one.expect("finite values"), all[row * row_bytes..(row + 1) * row_bytes]);
    }

    #[test]
    fn rows_that_cannot_be_quantised_are_reported() {
        let mut bytes = vec![0; 3 * 32 * 4];
        bytes[2 * 128..][..4].copy_from_slice(&f32::NAN.to_le_bytes());
        let bytes = TensorBytes::Gathered(bytes);
        let of = |to| rows((ElementType::F32, to), &bytes, 32).expect_err("an error");
        assert_eq!(of(ElementType::Q8_0), QuantiseError::NotANumber { row: 2 });
        assert!(matches!(of(ElementType::Q4_K), QuantiseError::Failed { .. }));
        assert!(matches!(of(ElementType::IQ4_NL), QuantiseError::Failed { .. }));
    }
}
