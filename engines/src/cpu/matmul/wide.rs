//! Products of 16-bit weights: dense floats, and codes whose product with the scale is rounded.

#![allow(clippy::needless_range_loop)] // The loops over rows and planes index several arrays.

use super::layout::{Integers, Layout, Planes};
use super::{Exact, Panels, RowTile, Sums, for_tiles};
use crate::arithmetic::superblocks;
use crate::cpu::activation::{CodedRow, STEP, STEP_PAIRS, SUPERBLOCK_STEPS};
use crate::cpu::packed::{Coded, GROUP_BYTES, Wide};
use crate::format::blocks::BLOCK;
use crate::simd::{Kernel, LANES, Simd, prefetch_ahead};
use std::marker::PhantomData;

impl<S: Simd, const ROWS: usize> Exact<S, ROWS> {
    /// Adds the products of the columns 4 · `group` to 4 · `group` + 3; groups count from the row's first.
    ///
    /// # Safety
    /// Call only inside a kernel of `S`, with rows that have this group.
    #[inline(always)]
    unsafe fn add(&mut self, inputs: &[CodedRow; ROWS], group: usize, (even, odd): (S::Pairs, S::Pairs)) {
        let at = group / (STEP / 4) * STEP_PAIRS + group % (STEP / 4) * 4;
        // SAFETY: the caller upholds the contract of this method.
        unsafe {
            for r in 0..ROWS {
                let pair = |offset: usize| inputs[r].pairs.add(at + offset).cast::<i32>().read_unaligned();
                self.upper[r] = S::dot_pairs(self.upper[r], even, pair(0));
                self.upper[r] = S::dot_pairs(self.upper[r], odd, pair(2));
                self.lower[r] = S::dot_pairs(self.lower[r], even, pair(STEP));
                self.lower[r] = S::dot_pairs(self.lower[r], odd, pair(STEP + 2));
            }
        }
    }
}

/// Panels of dense floats.
pub(super) struct WidePanels<'a, 'b> {
    pub(super) panels: Panels<'a, 'b>,
    pub(super) wide: &'a Wide,
}

impl Kernel for WidePanels<'_, '_> {
    #[inline(always)]
    fn run<S: Simd>(self) {
        for_tiles::<S, Self, 8, 4>(&self.panels, &self);
    }
}

/// Panels of codes whose product with the scale is rounded.
pub(super) struct RoundedPanels<'a, 'b, L> {
    pub(super) panels: Panels<'a, 'b>,
    pub(super) coded: &'a Coded,
    pub(super) layout: PhantomData<L>,
}

impl<L: Layout> Kernel for RoundedPanels<'_, '_, L> {
    #[inline(always)]
    fn run<S: Simd>(self) {
        for_tiles::<S, Self, 8, 4>(&self.panels, &self);
    }
}

impl RowTile for WidePanels<'_, '_> {
    #[inline(always)]
    fn tile<S: Simd, const ROWS: usize>(&self, panel: usize, first: usize) {
        let Self { panels, wide } = self;
        let columns = panels.job.weights.columns;
        let panel_bytes = Wide::panel_bytes(columns);
        let weights = wide.pairs.bytes()[panel * panel_bytes..][..panel_bytes].as_ptr().cast::<i16>();
        // SAFETY: the panel and the rows are whole steps.
        unsafe {
            panels.superblocks::<S, ROWS>(panel, first, |group, inputs, sums| {
                let at = weights.add(group * GROUP_BYTES / 2);
                prefetch_ahead::<GROUP_BYTES>(at.cast());
                sums.add(inputs, group, (S::load_pairs(at), S::load_pairs(at.add(2 * LANES))));
            });
        }
    }
}

impl<L: Layout> RowTile for RoundedPanels<'_, '_, L> {
    #[inline(always)]
    fn tile<S: Simd, const ROWS: usize>(&self, panel: usize, first: usize) {
        let Self { panels, coded, .. } = self;
        let blocks = panels.job.weights.columns / BLOCK;
        let block_bytes = Coded::block_bytes(L::CODING);
        let codes = coded.codes.bytes()[panel * blocks * block_bytes..][..blocks * block_bytes].as_ptr();
        // SAFETY: the panel has whole blocks, and the rows have whole steps. Groups come in order.
        unsafe {
            let mut planes = Planes::<S>::of::<L>(codes);
            let mut integers = Integers::<S>::load::<L>(coded, (panel * blocks, 0), 0, 0);
            panels.superblocks::<S, ROWS>(panel, first, |group, inputs, sums| {
                let (block, within) = (group / 8, group % 8);
                if block == blocks {
                    return;
                }
                let at = codes.add(block * block_bytes);
                if within == 0 {
                    // Codes of four or eight bits.
                    if L::CODING.bits == 8 {
                        prefetch_ahead::<512>(at)
                    } else {
                        prefetch_ahead::<256>(at)
                    }
                    planes = Planes::<S>::of::<L>(at);
                    integers = Integers::<S>::load::<L>(coded, (panel * blocks, 0), block, 0);
                }
                sums.add(inputs, group, integers.weights::<L>(planes.next::<L>(at, within)));
            });
        }
    }
}

impl Panels<'_, '_> {
    /// Calls `add` for every group of four columns, in order, and writes the sums.
    ///
    /// # Safety
    /// Call only inside a kernel of `S`.
    #[inline(always)]
    unsafe fn superblocks<S: Simd, const ROWS: usize>(
        &self,
        panel: usize,
        first: usize,
        mut add: impl FnMut(usize, &[CodedRow; ROWS], &mut Exact<S, ROWS>),
    ) {
        let columns = self.job.weights.columns;
        let (steps, count) = (columns.div_ceil(STEP), superblocks(columns));
        let inputs = self.inputs::<ROWS>(first);
        let units = &self.job.weights.units[panel * count * LANES..][..count * LANES];
        // SAFETY: the caller is a kernel of `S`; units and rows have every superblock.
        unsafe {
            let mut sums = Sums::<S, ROWS>::zero();
            for index in 0..count {
                let mut exact = Exact::<S, ROWS>::zero();
                let steps = index * SUPERBLOCK_STEPS..((index + 1) * SUPERBLOCK_STEPS).min(steps);
                for group in steps.start * STEP / 4..steps.end * STEP / 4 {
                    add(group, &inputs, &mut exact);
                }
                let unit = S::load(units.as_ptr().add(index * LANES));
                sums.add(index, unit, &inputs, exact.upper, exact.lower);
            }
            for (r, sum) in sums.finish(count).into_iter().enumerate() {
                self.write::<S>(panel, first + r, sum);
            }
        }
    }
}
