//! The kernel that packs sixteen rows of dense floats.

use super::PanelRows;
use crate::arithmetic::{SUPERBLOCK, weights};
use crate::cpu::packed::GROUP_BYTES;
use crate::format::ElementType;
use crate::format::blocks::dequantise_row;
use crate::simd::{Kernel, LANES, Simd};

pub(super) struct WidePanel<'a> {
    pub(super) rows: PanelRows<'a>,
    pub(super) pairs: &'a mut [u8],
    pub(super) units: &'a mut [f32],
    /// The first row with a value that is not finite.
    pub(super) bad_row: &'a mut Option<usize>,
}

impl Kernel for WidePanel<'_> {
    /// Compiles the conversion of each type by itself.
    #[inline(always)]
    fn run<S: Simd>(mut self) {
        match self.rows.element {
            ElementType::F32 => self.pack(ElementType::F32),
            ElementType::F16 => self.pack(ElementType::F16),
            ElementType::BF16 => self.pack(ElementType::BF16),
            quantised => unreachable!("rows of {quantised} are packed as coded panels"),
        }
    }
}

impl WidePanel<'_> {
    #[inline(always)]
    fn pack(&mut self, element: ElementType) {
        let (mut values, mut codes) = ([0.0; SUPERBLOCK], [0; SUPERBLOCK]);
        let groups_per_superblock = SUPERBLOCK / 4;
        for (lane, row) in self.rows.rows(element).enumerate() {
            for (index, source) in row.chunks(SUPERBLOCK * element.block_bytes()).enumerate() {
                let columns = source.len() / element.block_bytes();
                values[columns..].fill(0.0);
                dequantise_row(element, source, &mut values[..columns]);
                let unit = weights::dense(&values, &mut codes);
                if !unit.is_finite() {
                    self.bad_row.get_or_insert(lane);
                    return;
                }
                self.units[index * LANES + lane] = unit;
                let first = index * groups_per_superblock * GROUP_BYTES;
                let end = self.pairs.len().min(first + groups_per_superblock * GROUP_BYTES);
                let targets = self.pairs[first..end].as_chunks_mut::<GROUP_BYTES>().0;
                for (target, &[a, b, c, d]) in targets.iter_mut().zip(codes.as_chunks::<4>().0) {
                    put(target, 0, lane, a, c);
                    put(target, 1, lane, b, d);
                }
            }
        }
    }
}

/// Writes two columns of a lane to one of the vectors of a group.
#[inline(always)]
fn put(group: &mut [u8; GROUP_BYTES], vector: usize, lane: usize, first: i16, second: i16) {
    let pair = u32::from(first as u16) | u32::from(second as u16) << 16;
    group.as_chunks_mut::<4>().0[vector * LANES + lane] = pair.to_le_bytes();
}
