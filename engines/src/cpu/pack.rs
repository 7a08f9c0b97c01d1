//! Packing: converts weights from a file's order and scales to the kernels' order and the arithmetic's integers.
//!
//! The pool's threads share ranges of panels: each reads a range of the file and writes it to its own part of the
//! target, so that memory never holds a large matrix twice.

use super::disjoint::DisjointMut;
use super::lines::Lines;
use super::packed::{Coded, Form, Packed, Scales, Wide, code_position, wide_position};
use super::thread_pool::{Panicked, ThreadPool};
use crate::arithmetic::weights::{self, IntegerBlock, Rule};
use crate::arithmetic::{SUPERBLOCK, superblocks};
use crate::format::blocks::{self, BLOCK, Coding};
use crate::format::{ElementType, FormatError, TensorBytes};
use crate::simd::LANES;
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
        let mut units = vec![0.0; source.panels() * superblocks(source.columns) * LANES];
        let form = match (Coding::of(source.element), Rule::of(source.element)) {
            (Some(coding), Some(rule)) => Form::Coded(source.coded(pool, coding, rule, &mut units)?),
            _ => Form::Wide(source.wide(pool, &mut units)?),
        };
        Ok(Self { rows: source.rows, columns: source.columns, units, form })
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

    fn wide(&self, pool: &mut ThreadPool, units: &mut [f32]) -> Result<Wide, PackError> {
        let count = superblocks(self.columns);
        let panel_bytes = Wide::panel_bytes(self.columns);
        let mut pairs = Lines::zeroed_huge(self.panels() * panel_bytes);
        let parts = DisjointMut::new(pairs.bytes_mut());
        let units = DisjointMut::new(units);
        self.for_rows(pool, &|row, source| {
            let (panel, lane) = (row / LANES, row % LANES);
            // SAFETY: a panel belongs to one task, which packs its rows one after the other.
            let (target, units) = unsafe {
                (
                    parts.take(panel * panel_bytes..(panel + 1) * panel_bytes),
                    units.take(panel * count * LANES..(panel + 1) * count * LANES),
                )
            };
            let (words, _) = target.as_chunks_mut::<2>();
            let superblock_bytes = SUPERBLOCK * self.element.block_bytes();
            let (mut values, mut codes) = ([0.0; SUPERBLOCK], [0; SUPERBLOCK]);
            for (index, source) in source.chunks(superblock_bytes).enumerate() {
                let columns = source.len() / self.element.block_bytes();
                blocks::dequantise_row(self.element, source, &mut values[..columns]);
                let unit = weights::dense(&values[..columns], &mut codes[..columns]);
                if !unit.is_finite() {
                    return false;
                }
                units[index * LANES + lane] = unit;
                for (column, code) in codes[..columns].iter().enumerate() {
                    words[wide_position(index * SUPERBLOCK + column, lane)] = code.to_ne_bytes();
                }
            }
            true
        })?;
        Ok(Wide { pairs })
    }

    fn coded(&self, pool: &mut ThreadPool, coding: Coding, rule: Rule, units: &mut [f32]) -> Result<Coded, PackError> {
        let (blocks, base_pairs) = (self.columns / BLOCK, Coded::base_pairs(coding, self.columns));
        let (block_bytes, block_scales) = (Coded::block_bytes(coding), Coded::block_scales(coding));
        let mut codes = Lines::zeroed_huge(self.panels() * blocks * block_bytes);
        let mut scales = vec![0_i16; self.panels() * blocks * block_scales];
        let mut bases = vec![0; self.panels() * base_pairs * 2 * LANES];
        let shared = (
            DisjointMut::new(codes.bytes_mut()),
            DisjointMut::new(&mut scales),
            DisjointMut::new(&mut bases),
            DisjointMut::new(units),
        );
        self.for_rows(pool, &|row, source| {
            let (panel, lane) = (row / LANES, row % LANES);
            let part = |size: usize| panel * size..(panel + 1) * size;
            // SAFETY: a panel belongs to one task, which packs its rows one after the other.
            let mut target = unsafe {
                Panel {
                    coding,
                    codes: shared.0.take(part(blocks * block_bytes)),
                    scales: shared.1.take(part(blocks * block_scales)),
                    bases: shared.2.take(part(base_pairs * 2 * LANES)),
                    units: shared.3.take(part(superblocks(self.columns) * LANES)),
                }
            };
            if lane == 0 {
                // `put` ORs codes into memory. A write of zeros comes first: a page that is read first is mapped twice.
                target.codes.fill(0);
            }
            (0..superblocks(self.columns)).all(|index| {
                let superblock = weights::superblock(self.element, source, self.columns, index);
                target.units[index * LANES + lane] = superblock.unit;
                for (number, block) in superblock.blocks().iter().enumerate() {
                    target.put(index * weights::BLOCKS + number, lane, block);
                }
                superblock.unit.is_finite()
            })
        })?;
        let scales = match rule {
            Rule::Product { byte_scales: true, shift } => {
                Scales::Bytes(scales.into_iter().map(|scale| (scale >> shift) as i8).collect())
            }
            _ => Scales::Words(scales),
        };
        Ok(Coded { element: self.element, coding, rule, codes, scales, bases })
    }
}

/// Sixteen rows of a coded matrix.
struct Panel<'a> {
    coding: Coding,
    codes: &'a mut [u8],
    scales: &'a mut [i16],
    bases: &'a mut [i16],
    units: &'a mut [f32],
}

impl Panel<'_> {
    fn put(&mut self, index: usize, lane: usize, block: &IntegerBlock) {
        let coding = self.coding;
        let halves = if coding.split { 2 } else { 1 };
        for half in 0..halves {
            let number = index * halves + half;
            self.scales[number * LANES + lane] = block.scales[half];
            if coding.has_mins {
                let base = block.mins[half] + Coded::base_level(coding) as i16 * block.scales[half];
                self.bases[(number / 2 * LANES + lane) * 2 + number % 2] = base;
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
        /// R4.3: packing preserves every integer of the arithmetic.
        #[test]
        fn packed_rows_read_back(
            element in prop::sample::select(ElementType::ALL.to_vec()),
            rows in 1_usize..40,
            blocks in 1_usize..24,
            threads in 1_usize..4,
            seed in any::<u64>(),
        ) {
            let columns = (blocks * BLOCK).next_multiple_of(element.block_values());
            let bytes = test_weights::bytes(element, rows, columns, seed);
            let mut pool = ThreadPool::new(threads).expect("threads");
            let source = Source { element, rows, columns, bytes: &TensorBytes::Gathered(bytes.clone()) };
            let packed = Packed::pack(&mut pool, &source).expect("finite weights");
            let row_bytes = element.row_bytes(columns).unwrap_or(1);
            let mut got = vec![0.0; columns];
            for row in 0..rows {
                packed.read_row(row, &mut got);
                let expected = weights::row(element, &bytes[row * row_bytes..][..row_bytes], columns);
                let expected = expected.codes.iter().enumerate().map(|(column, &code)| {
                    f32::from(code) * expected.units[column / SUPERBLOCK]
                });
                prop_assert_eq!(&got, &expected.collect::<Vec<_>>(), "{} row {}", element, row);
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
        block[..2].copy_from_slice(&half::f16::NAN.to_le_bytes());
        assert_eq!(pack(ElementType::Q4_0, 1, 32, &block), Some(PackError::NotANumber { row: 0 }));
    }
}
