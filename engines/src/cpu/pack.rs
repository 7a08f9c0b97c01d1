//! Packing: converts weights from a file's order to the kernels' order.
//!
//! The pool's threads share ranges of panels: each reads a range of the file and writes it to its own part of the
//! target, so that memory never holds a large matrix twice.

use super::disjoint::DisjointMut;
use super::packed::{Coded, Dense, Form, Lines, Packed, code_position, scale_bits};
use super::thread_pool::{Panicked, ThreadPool};
use crate::format::blocks::{self, BLOCK, Coding};
use crate::format::{ElementType, FormatError, TensorBytes};
use crate::simd::LANES;
use half::f16;
use parking_lot::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};

/// Least and most file bytes of one task: enough to be worth a task, little beside a large matrix.
const TASK_BYTES: (usize, usize) = (128 << 10, 4 << 20);
/// Tasks per thread.
const TASKS_PER_THREAD: usize = 4;

/// A matrix as stored in a file.
pub(super) struct Source<'a> {
    pub(super) element: ElementType,
    pub(super) rows: usize,
    pub(super) columns: usize,
    /// The bytes of exactly the matrix's rows.
    pub(super) bytes: &'a TensorBytes<'a>,
}

/// The reason why a matrix cannot be packed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum PackError {
    /// A value, scale or minimum in this row is not a finite number.
    NotANumber {
        row: usize,
    },
    /// The matrix's file cannot be read.
    Unreadable(FormatError),
    Panicked,
}

impl From<Panicked> for PackError {
    fn from(_: Panicked) -> Self {
        Self::Panicked
    }
}

impl Packed {
    /// Packs a matrix, with all threads of the pool.
    pub(super) fn pack(pool: &mut ThreadPool, source: &Source<'_>) -> Result<Self, PackError> {
        let form = match Coding::of(source.element) {
            Some(coding) => Form::Coded(source.coded(pool, coding)?),
            None => Form::Dense(source.dense(pool)?),
        };
        Ok(Self { rows: source.rows, columns: source.columns, form })
    }
}

impl Source<'_> {
    fn panels(&self) -> usize {
        self.rows.div_ceil(LANES)
    }

    fn row_bytes(&self) -> usize {
        self.bytes.length() / self.rows.max(1)
    }

    /// Calls `pack` with (row, its bytes) for every row. One task packs all rows of a panel. `pack` returns whether all
    /// of the row's values are finite.
    fn for_rows(&self, pool: &mut ThreadPool, pack: &(dyn Fn(usize, &[u8]) -> bool + Sync)) -> Result<(), PackError> {
        let row_bytes = self.row_bytes();
        let task_bytes = (self.bytes.length() / (pool.threads() * TASKS_PER_THREAD)).clamp(TASK_BYTES.0, TASK_BYTES.1);
        let rows_per_task = (task_bytes / (LANES * row_bytes).max(1)).max(1) * LANES;
        let first_bad = AtomicUsize::new(usize::MAX);
        let unreadable = Mutex::new(None);
        pool.run(self.rows.div_ceil(rows_per_task), &|task| {
            let rows = task * rows_per_task..((task + 1) * rows_per_task).min(self.rows);
            let mut buffer = Vec::new();
            let bytes = match self.bytes.part(rows.start * row_bytes..rows.end * row_bytes, &mut buffer) {
                Ok(bytes) => bytes,
                Err(error) => {
                    unreadable.lock().get_or_insert(error);
                    return;
                }
            };
            for (row, bytes) in rows.zip(bytes.chunks(row_bytes.max(1))) {
                if !pack(row, bytes) {
                    first_bad.fetch_min(row, Ordering::Relaxed);
                    return;
                }
            }
        })?;
        if let Some(error) = unreadable.into_inner() {
            return Err(PackError::Unreadable(error));
        }
        match first_bad.into_inner() {
            usize::MAX => Ok(()),
            row => Err(PackError::NotANumber { row }),
        }
    }

    fn dense(&self, pool: &mut ThreadPool) -> Result<Dense, PackError> {
        let (columns, size) = (self.columns, self.element.block_bytes());
        let panel_bytes = LANES * columns * size;
        let mut values = Lines::zeroed(self.panels() * panel_bytes);
        let parts = DisjointMut::new(values.bytes_mut());
        self.for_rows(pool, &|row, source| {
            let (panel, lane) = (row / LANES, row % LANES);
            // SAFETY: a panel belongs to one task, which packs its rows one after the other.
            let target = unsafe { parts.take(panel * panel_bytes..(panel + 1) * panel_bytes) };
            let mut is_finite = true;
            for (column, value) in source.chunks_exact(size).enumerate() {
                let mut float = [0.0];
                blocks::dequantise_row(self.element, value, &mut float);
                is_finite &= float[0].is_finite();
                target[(column * LANES + lane) * size..][..size].copy_from_slice(value);
            }
            is_finite
        })?;
        Ok(Dense { element: self.element, values })
    }

    fn coded(&self, pool: &mut ThreadPool, coding: Coding) -> Result<Coded, PackError> {
        let blocks_per_row = self.columns / BLOCK;
        let block_count = self.panels() * blocks_per_row;
        let mut coded = Coded {
            coding,
            codes: Lines::zeroed(block_count * Coded::block_bytes(coding)),
            scales: vec![0; block_count * Coded::block_scales(coding)],
            mins: vec![0; block_count * Coded::block_mins(coding)],
        };
        let codes = DisjointMut::new(coded.codes.bytes_mut());
        let scales = DisjointMut::new(&mut coded.scales);
        let mins = DisjointMut::new(&mut coded.mins);
        self.for_rows(pool, &|row, source| {
            let (panel, lane) = (row / LANES, row % LANES);
            let part = |size: usize| panel * blocks_per_row * size..(panel + 1) * blocks_per_row * size;
            // SAFETY: a panel belongs to one task, which packs its rows one after the other.
            let mut target = unsafe {
                Panel {
                    coding,
                    codes: codes.take(part(Coded::block_bytes(coding))),
                    scales: scales.take(part(Coded::block_scales(coding))),
                    mins: mins.take(part(Coded::block_mins(coding))),
                }
            };
            if lane == 0 {
                // `put` ORs codes into memory. A write of zeros comes first: a page that is read first is mapped twice.
                target.codes.fill(0);
            }
            (0..blocks_per_row).all(|index| {
                let block = blocks::decode(self.element, source, index);
                target.put(index, lane, &block);
                block.scales.iter().chain(&block.mins).all(|value| value.is_finite())
            })
        })?;
        Ok(coded)
    }
}

/// Sixteen rows of a coded matrix.
struct Panel<'a> {
    coding: Coding,
    codes: &'a mut [u8],
    scales: &'a mut [u16],
    mins: &'a mut [u16],
}

impl Panel<'_> {
    fn put(&mut self, index: usize, lane: usize, block: &blocks::Block) {
        let coding = self.coding;
        let halves = if coding.split { 2 } else { 1 };
        for half in 0..halves {
            let at = (index * halves + half) * LANES + lane;
            self.scales[at] = scale_bits(coding, block.scales[half]);
            if coding.has_mins {
                self.mins[at] = f16::from_f32(block.mins[half]).to_bits();
            }
        }
        let size = Coded::block_bytes(coding);
        let bytes = &mut self.codes[index * size..][..size];
        // Four successive columns occupy four successive bytes: see `place`.
        for (group, four) in block.codes.as_chunks::<4>().0.iter().enumerate() {
            let four = u32::from_le_bytes(*four);
            let at = code_position(group * 4, lane);
            let mut join = |vector: usize, bits: u32| {
                let word = &mut bytes[vector * 64 + at.byte..][..4];
                let joined = bits | u32::from_le_bytes([word[0], word[1], word[2], word[3]]);
                word.copy_from_slice(&joined.to_le_bytes());
            };
            match coding.bits {
                8 => join(group, four),
                2 | 3 => join(group / 4, (four & 0x0303_0303) << (group % 4 * 2)),
                _ => join(at.vector, (four & 0x0f0f_0f0f) << at.nibble),
            }
            match coding.bits {
                3 => join(2, (four >> 2 & 0x0101_0101) << group),
                5 => join(4, (four >> 4 & 0x0101_0101) << group),
                6 => join(4 + group / 4, (four >> 4 & 0x0303_0303) << (group % 4 * 2)),
                _ => {}
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cpu::test_weights;
    use crate::format::SourceFile;
    use proptest::prelude::*;

    proptest! {
        /// R4.3: packing preserves every value, to the half precision of its scale.
        #[test]
        fn packed_rows_read_back(
            element in prop::sample::select(ElementType::ALL.to_vec()),
            rows in 1_usize..40,
            blocks_per_row in 1_usize..3,
            threads in 1_usize..4,
            seed in any::<u64>(),
        ) {
            let columns = blocks_per_row * 256;
            let bytes = test_weights::bytes(element, rows, columns, seed);
            let mut pool = ThreadPool::new(threads).expect("threads");
            let source = Source { element, rows, columns, bytes: &TensorBytes::Gathered(bytes.clone()) };
            let packed = Packed::pack(&mut pool, &source).expect("finite weights");
            let row_bytes = element.row_bytes(columns).unwrap_or(1);
            let (mut got, mut expected) = (vec![0.0; columns], vec![0.0; columns]);
            for row in 0..rows {
                packed.read_row(row, &mut got);
                blocks::dequantise_row(element, &bytes[row * row_bytes..][..row_bytes], &mut expected);
                for (i, (got, expected)) in got.iter().zip(&expected).enumerate() {
                    let parts = match Coding::of(element) {
                        None => 0.0,
                        Some(_) => {
                            let block = blocks::decode(element, &bytes[row * row_bytes..][..row_bytes], i / BLOCK);
                            block.scales[i % BLOCK / 16].abs() * 256.0 + block.mins[i % BLOCK / 16].abs()
                        }
                    };
                    prop_assert!((got - expected).abs() <= 0.0005 * parts + 1e-6, "{element}: {got} {expected}");
                }
            }
        }
    }

    /// A large matrix is packed in parts from its file. A file that is cut off is reported.
    #[test]
    fn a_large_matrix_is_read_in_parts() {
        let (rows, columns) = (16_384, 256);
        let bytes = test_weights::bytes(ElementType::F32, rows, columns, 1);
        let folder = tempfile::tempdir().expect("a temporary folder");
        let path = folder.path().join("weights");
        std::fs::write(&path, [&[0; 100], &bytes[..]].concat()).expect("written");
        let file = SourceFile::open(&path).expect("a file");
        let in_file = TensorBytes::InFile { file: &file, range: 100..100 + bytes.len() as u64, name: "x" };
        let mut pool = ThreadPool::new(2).expect("threads");
        let mut pack = |bytes| Packed::pack(&mut pool, &Source { element: ElementType::F32, rows, columns, bytes });
        let in_memory = TensorBytes::Gathered(bytes.clone());
        let expected = pack(&in_memory).expect("finite weights");
        let packed = pack(&in_file).expect("finite weights");
        let (mut got, mut wanted) = (vec![0.0; columns], vec![0.0; columns]);
        for row in 0..rows {
            packed.read_row(row, &mut got);
            expected.read_row(row, &mut wanted);
            assert_eq!(got, wanted, "row {row}");
        }
        std::fs::File::options().write(true).open(&path).and_then(|file| file.set_len(1 << 20)).expect("cut");
        assert_eq!(pack(&in_file).err(), Some(PackError::Unreadable(FormatError::Changed { path })));
    }

    #[test]
    fn a_value_that_is_not_finite_is_rejected() {
        let mut bytes = vec![0; 3 * 64 * 4];
        bytes[2 * 64 * 4..][..4].copy_from_slice(&f32::NAN.to_le_bytes());
        let pack = |element, rows, columns, bytes: &[u8]| {
            let mut pool = ThreadPool::new(1).expect("threads");
            Packed::pack(&mut pool, &Source { element, rows, columns, bytes: &TensorBytes::Gathered(bytes.to_vec()) })
                .err()
        };
        assert_eq!(pack(ElementType::F32, 3, 64, &bytes), Some(PackError::NotANumber { row: 2 }));
        let mut block = vec![0; 18];
        block[..2].copy_from_slice(&f16::NAN.to_le_bytes());
        assert_eq!(pack(ElementType::Q4_0, 1, 32, &block), Some(PackError::NotANumber { row: 0 }));
    }
}
