//! Packing: converts weights from a file's order and scales to the kernels' order and the arithmetic's integers.
//!
//! The pool's threads share ranges of panels: each reads a range of the file and writes it to its own part of the
//! target, so that memory never holds a large matrix twice. A panel is packed by a kernel of the tier, since the
//! conversion has some dozen instructions for each block, which must keep up with the file.

mod coded_panel;
mod wide_panel;

use super::disjoint::DisjointMut;
use super::lines::Lines;
use super::packed::{Coded, Form, Packed, Scales, Wide};
use super::thread_pool::{Panicked, ThreadPool};
use crate::arithmetic::superblocks;
use crate::arithmetic::weights::Rule;
use crate::format::blocks::{BLOCK, Coding};
use crate::format::{ElementType, FormatError, TensorBytes};
use crate::simd::{LANES, Tier};
use coded_panel::CodedPanel;
use parking_lot::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};
use wide_panel::WidePanel;

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
    /// The system refuses the memory.
    OutOfMemory {
        bytes: u64,
    },
    Panicked,
}

/// Memory for the codes of a matrix.
fn reserved(bytes: usize) -> Result<Lines, PackError> {
    Lines::reserved_huge(bytes).map_err(|_| PackError::OutOfMemory { bytes: bytes as u64 })
}

impl From<Panicked> for PackError {
    fn from(_: Panicked) -> Self {
        Self::Panicked
    }
}

impl Packed {
    /// Packs a matrix, with all threads of the pool.
    pub(super) fn pack(tier: Tier, pool: &mut ThreadPool, source: &Source<'_>) -> Result<Self, PackError> {
        let mut units = vec![0.0; source.panels() * superblocks(source.columns) * LANES];
        let form = match (Coding::of(source.element), Rule::of(source.element)) {
            (Some(coding), Some(rule)) => Form::Coded(source.coded(tier, pool, coding, rule, &mut units)?),
            _ => Form::Wide(source.wide(tier, pool, &mut units)?),
        };
        Ok(Self { rows: source.rows, columns: source.columns, units, form })
    }
}

/// Up to sixteen rows, as stored in a file.
#[derive(Clone, Copy)]
struct PanelRows<'a> {
    element: ElementType,
    columns: usize,
    bytes: &'a [u8],
}

impl<'a> PanelRows<'a> {
    /// The rows. `element` is that of the rows, as a constant where the caller knows it.
    #[inline(always)]
    fn rows(self, element: ElementType) -> impl Iterator<Item = &'a [u8]> {
        let row_bytes = self.columns / element.block_values() * element.block_bytes();
        self.bytes.chunks_exact(row_bytes.max(1)).take(LANES)
    }
}

impl Source<'_> {
    fn panels(&self) -> usize {
        self.rows.div_ceil(LANES)
    }

    fn row_bytes(&self) -> usize {
        self.bytes.length() / self.rows.max(1)
    }

    /// Calls `pack` with (panel, the bytes of its rows) for every panel. `pack` returns the first of these rows with a
    /// value that is not finite, if there is one.
    fn for_panels(
        &self,
        pool: &mut ThreadPool,
        pack: &(dyn Fn(usize, &[u8]) -> Option<usize> + Sync),
    ) -> Result<(), PackError> {
        let panel_bytes = LANES * self.row_bytes();
        let task_bytes = (self.bytes.length() / (pool.threads() * TASKS_PER_THREAD)).clamp(TASK_BYTES.0, TASK_BYTES.1);
        let panels_per_task = (task_bytes / panel_bytes.max(1)).max(1);
        let first_bad = AtomicUsize::new(usize::MAX);
        let unreadable = Mutex::new(None);
        pool.run(self.panels().div_ceil(panels_per_task), &|task| {
            let panels = task * panels_per_task..((task + 1) * panels_per_task).min(self.panels());
            let end = (panels.end * panel_bytes).min(self.rows * self.row_bytes());
            let mut buffer = Vec::new();
            let bytes = match self.bytes.part(panels.start * panel_bytes..end, &mut buffer) {
                Ok(bytes) => bytes,
                Err(error) => {
                    unreadable.lock().get_or_insert(error);
                    return;
                }
            };
            for (panel, bytes) in panels.zip(bytes.chunks(panel_bytes.max(1))) {
                if let Some(row) = pack(panel, bytes) {
                    first_bad.fetch_min(panel * LANES + row, Ordering::Relaxed);
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

    fn wide(&self, tier: Tier, pool: &mut ThreadPool, units: &mut [f32]) -> Result<Wide, PackError> {
        let panel_bytes = Wide::panel_bytes(self.columns);
        let mut pairs = reserved(self.panels() * panel_bytes)?;
        let shared = (DisjointMut::new(pairs.bytes_mut()), DisjointMut::new(units));
        self.for_panels(pool, &|panel, rows| {
            let part = |size: usize| panel * size..(panel + 1) * size;
            // SAFETY: a panel belongs to one task, which packs it once.
            let (pairs, units) =
                unsafe { (shared.0.take(part(panel_bytes)), shared.1.take(part(superblocks(self.columns) * LANES))) };
            let mut bad_row = None;
            let rows = PanelRows { element: self.element, columns: self.columns, bytes: rows };
            tier.run(WidePanel { rows, pairs, units, bad_row: &mut bad_row });
            bad_row
        })?;
        Ok(Wide { pairs })
    }

    fn coded(
        &self,
        tier: Tier,
        pool: &mut ThreadPool,
        coding: Coding,
        rule: Rule,
        units: &mut [f32],
    ) -> Result<Coded, PackError> {
        let (blocks, base_pairs) = (self.columns / BLOCK, Coded::base_pairs(coding, self.columns));
        let (block_bytes, block_scales) = (Coded::block_bytes(coding), Coded::block_scales(coding));
        let (byte_scales, word_scales) = match rule {
            Rule::Product { byte_scales: true, .. } => (blocks * block_scales, 0),
            _ => (0, blocks * block_scales),
        };
        let mut codes = reserved(self.panels() * blocks * block_bytes)?;
        let mut scale_bytes = vec![0; self.panels() * byte_scales].into_boxed_slice();
        let mut scale_words = vec![0; self.panels() * word_scales];
        let mut bases = vec![0; self.panels() * base_pairs * 2 * LANES];
        let shared = (
            DisjointMut::new(codes.bytes_mut()),
            DisjointMut::new(&mut scale_bytes),
            DisjointMut::new(&mut scale_words),
            DisjointMut::new(&mut bases),
            DisjointMut::new(units),
        );
        self.for_panels(pool, &|panel, rows| {
            let part = |size: usize| panel * size..(panel + 1) * size;
            let mut bad_row = None;
            // SAFETY: a panel belongs to one task, which packs it once.
            let target = unsafe {
                CodedPanel {
                    rows: PanelRows { element: self.element, columns: self.columns, bytes: rows },
                    codes: shared.0.take(part(blocks * block_bytes)),
                    scale_bytes: shared.1.take(part(byte_scales)),
                    scale_words: shared.2.take(part(word_scales)),
                    bases: shared.3.take(part(base_pairs * 2 * LANES)),
                    units: shared.4.take(part(superblocks(self.columns) * LANES)),
                    bad_row: &mut bad_row,
                }
            };
            tier.run(target);
            bad_row
        })?;
        let scales = if byte_scales > 0 { Scales::Bytes(scale_bytes) } else { Scales::Words(scale_words) };
        Ok(Coded { element: self.element, coding, rule, codes, scales, bases })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::arithmetic::{SUPERBLOCK, weights};
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
            tier in prop::sample::select(Tier::available()),
            seed in any::<u64>(),
        ) {
            let columns = (blocks * BLOCK).next_multiple_of(element.block_values());
            let bytes = test_weights::bytes(element, rows, columns, seed);
            let mut pool = ThreadPool::new(threads).expect("threads");
            let source = Source { element, rows, columns, bytes: &TensorBytes::Gathered(bytes.clone()) };
            let packed = Packed::pack(tier, &mut pool, &source).expect("finite weights");
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
        let mut pack =
            |bytes| Packed::pack(Tier::best(), &mut pool, &Source { element: ElementType::F32, rows, columns, bytes });
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
            Packed::pack(
                Tier::best(),
                &mut pool,
                &Source { element, rows, columns, bytes: &TensorBytes::Gathered(bytes.to_vec()) },
            )
            .err()
        };
        assert_eq!(pack(ElementType::F32, 3, 64, &bytes), Some(PackError::NotANumber { row: 2 }));
        let mut block = vec![0; 18];
        block[..2].copy_from_slice(&half::f16::NAN.to_le_bytes());
        assert_eq!(pack(ElementType::Q4_0, 1, 32, &block), Some(PackError::NotANumber { row: 0 }));
    }
}
