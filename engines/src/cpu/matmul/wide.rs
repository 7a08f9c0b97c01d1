//! Products of 16-bit weights: dense floats, and codes whose product with the scale is rounded.

use super::layout::{EachGroup, Integers, Layout, Planes, for_groups, prefetch_block};
use super::{Exact, Panels, RowTile, Sums, for_tiles};
use crate::arithmetic::superblocks;
use crate::cpu::activation::{CodedSlot, STEP, STEP_PAIRS, SUPERBLOCK_STEPS};
use crate::cpu::lines::Lines;
use crate::cpu::packed::{Coded, GROUP_BYTES, Wide};
use crate::format::blocks::BLOCK;
use crate::simd::{Kernel, LANES, Simd, Tier, prefetch_ahead};
use std::cell::RefCell;
use std::marker::PhantomData;

/// Slots of a tile. Its sums take 16 of the 32 vector registers of AVX-512.
const SLOTS: usize = 8;

impl<S: Simd, const SLOTS: usize> Exact<S, SLOTS> {
    /// Adds the products of the columns 4 · `group` to 4 · `group` + 3; groups count from the row's first.
    ///
    /// # Safety
    /// Call only inside a kernel of `S`, with slots that have this group.
    #[inline(always)]
    unsafe fn add(&mut self, inputs: &[CodedSlot; SLOTS], group: usize, weights: [S::Pairs; 2]) {
        let at = group / (STEP / 4) * STEP_PAIRS + group % (STEP / 4) * 4;
        let mut slots = [std::ptr::null(); SLOTS];
        // SAFETY: the caller upholds the contract of this method.
        unsafe {
            for (slot, input) in slots.iter_mut().zip(inputs) {
                *slot = input.pairs.add(at);
            }
            S::dot_pairs_slots::<SLOTS, STEP>(&mut self.0, weights, &slots);
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
    fn run<S: Simd>(mut self) {
        for_tiles::<S, Self, SLOTS, 4>(&mut self);
    }
}

impl RowTile for WidePanels<'_, '_> {
    fn panels(&self) -> &Panels<'_, '_> {
        &self.panels
    }

    #[inline(always)]
    fn tile<S: Simd, const SLOTS: usize>(&self, panel: usize, first: usize) {
        let panel_bytes = Wide::panel_bytes(self.panels.product.weights.columns);
        let weights = &self.wide.pairs.bytes()[panel * panel_bytes..][..panel_bytes];
        self.panels.wide_tile::<S, SLOTS>(weights, panel, first);
    }
}

/// Computes panels of codes whose product with the scale is rounded.
pub(super) fn run_rounded<L: Layout>(tier: Tier, panels: Panels<'_, '_>, coded: &Coded) {
    if panels.slots().len() < SLOTS {
        return tier.run(RoundedPanels::<L> { panels, coded, layout: PhantomData });
    }
    let mut unpacked = UNPACKED.take();
    unpacked.resize(Wide::panel_bytes(panels.product.weights.columns));
    tier.run(UnpackedPanels::<L> { panels, coded, unpacked: &mut unpacked, layout: PhantomData });
    UNPACKED.set(unpacked);
}

thread_local! {
    /// The unpacked panel of this thread.
    static UNPACKED: RefCell<Lines> = RefCell::default();
}

/// Panels for few slots: codes become weights as they are multiplied.
struct RoundedPanels<'a, 'b, L> {
    panels: Panels<'a, 'b>,
    coded: &'a Coded,
    layout: PhantomData<L>,
}

impl<L: Layout> Kernel for RoundedPanels<'_, '_, L> {
    #[inline(always)]
    fn run<S: Simd>(mut self) {
        for_tiles::<S, Self, 4, 2>(&mut self);
    }
}

impl<L: Layout> RowTile for RoundedPanels<'_, '_, L> {
    fn panels(&self) -> &Panels<'_, '_> {
        &self.panels
    }

    #[inline(always)]
    fn tile<S: Simd, const SLOTS: usize>(&self, panel: usize, first: usize) {
        let Self { panels, coded, .. } = self;
        let blocks = panels.product.weights.columns / BLOCK;
        let block_bytes = Coded::block_bytes(L::CODING);
        let codes = coded.codes.bytes()[panel * blocks * block_bytes..][..blocks * block_bytes].as_ptr();
        // SAFETY: the panel has whole blocks, and the slots have whole steps.
        unsafe {
            let planes = Planes::<S>::of::<L>(codes);
            let integers = Integers::<S>::load::<L>(coded, (panel * blocks, 0), 0, 0);
            let groups = RoundedGroups::<S, L> { coded, blocks, panel, codes, planes, integers, layout: PhantomData };
            panels.superblocks::<S, _, SLOTS>(panel, first, groups);
        }
    }
}

/// Weights of a panel, in groups of four columns.
trait Groups<S: Simd> {
    /// Returns the weights of a group; groups come in order. `None` behind the last whole block.
    ///
    /// # Safety
    /// Call only inside a kernel of `S`, with a group of the panel.
    unsafe fn weights(&mut self, group: usize) -> Option<[S::Pairs; 2]>;
}

/// Codes that become weights as they are read.
struct RoundedGroups<'a, S: Simd, L> {
    coded: &'a Coded,
    blocks: usize,
    panel: usize,
    codes: *const u8,
    planes: Planes<S>,
    integers: Integers<S>,
    layout: PhantomData<L>,
}

impl<S: Simd, L: Layout> Groups<S> for RoundedGroups<'_, S, L> {
    #[inline(always)]
    unsafe fn weights(&mut self, group: usize) -> Option<[S::Pairs; 2]> {
        let (block, within) = (group / 8, group % 8);
        if block == self.blocks {
            return None;
        }
        // SAFETY: the caller upholds the contract of this method.
        unsafe {
            let at = self.codes.add(block * Coded::block_bytes(L::CODING));
            if within == 0 {
                prefetch_block::<L>(at);
                self.planes = Planes::<S>::of::<L>(at);
                self.integers = Integers::<S>::load::<L>(self.coded, (self.panel * self.blocks, 0), block, 0);
            }
            Some(self.integers.weights::<L>(self.planes.next::<L>(at, within)))
        }
    }
}

/// A panel in the layout of [`Wide`].
struct WideGroups<'a> {
    weights: &'a [u8],
}

impl<S: Simd> Groups<S> for WideGroups<'_> {
    #[inline(always)]
    unsafe fn weights(&mut self, group: usize) -> Option<[S::Pairs; 2]> {
        // SAFETY: the caller upholds the contract of this method.
        unsafe {
            let at = self.weights.as_ptr().add(group * GROUP_BYTES).cast::<i16>();
            prefetch_ahead::<GROUP_BYTES>(at.cast());
            Some([S::load_pairs(at), S::load_pairs(at.add(2 * LANES))])
        }
    }
}

/// Panels for many slots: a panel's codes become weights once, in the layout of [`Wide`].
struct UnpackedPanels<'a, 'b, L> {
    panels: Panels<'a, 'b>,
    coded: &'a Coded,
    unpacked: &'a mut Lines,
    layout: PhantomData<L>,
}

impl<L: Layout> Kernel for UnpackedPanels<'_, '_, L> {
    #[inline(always)]
    fn run<S: Simd>(mut self) {
        for_tiles::<S, Self, SLOTS, 4>(&mut self);
    }
}

impl<L: Layout> RowTile for UnpackedPanels<'_, '_, L> {
    fn panels(&self) -> &Panels<'_, '_> {
        &self.panels
    }

    #[inline(always)]
    fn begin<S: Simd>(&mut self, panel: usize) {
        let columns = self.panels.product.weights.columns;
        let bytes = self.unpacked.bytes_mut();
        let used = columns / 4 * GROUP_BYTES;
        bytes[used..].fill(0);
        let target = bytes.as_mut_ptr();
        // SAFETY: the panel is inside the matrix, and `unpacked` has room for its groups.
        unsafe {
            for_groups::<S, L, _>(self.coded, columns, panel, &mut StorePairs { target });
        }
    }

    #[inline(always)]
    fn tile<S: Simd, const SLOTS: usize>(&self, panel: usize, first: usize) {
        self.panels.wide_tile::<S, SLOTS>(self.unpacked.bytes(), panel, first);
    }
}

/// Stores groups in the layout of [`Wide`].
struct StorePairs {
    target: *mut u8,
}

impl<S: Simd> EachGroup<S> for StorePairs {
    #[inline(always)]
    unsafe fn take(&mut self, group: usize, [even, odd]: [S::Pairs; 2]) {
        // SAFETY: the caller upholds the contract of this method.
        unsafe {
            let at = self.target.add(group * GROUP_BYTES);
            S::store_pairs(at.cast(), even);
            S::store_pairs(at.add(GROUP_BYTES / 2).cast(), odd);
        }
    }
}

impl Panels<'_, '_> {
    /// Multiplies with `weights`, a panel of 16-bit integers in the layout of [`Wide`].
    #[inline(always)]
    fn wide_tile<S: Simd, const SLOTS: usize>(&self, weights: &[u8], panel: usize, first: usize) {
        assert!(weights.len() >= Wide::panel_bytes(self.product.weights.columns), "a panel has whole steps");
        // SAFETY: the assertion; the slots are whole steps, too.
        unsafe { self.superblocks::<S, _, SLOTS>(panel, first, WideGroups { weights }) };
    }

    /// Multiplies `SLOTS` slots with the weights of all groups, and writes the sums.
    ///
    /// # Safety
    /// Call only inside a kernel of `S`, with groups of the panel, and slots of whole steps.
    #[inline(always)]
    unsafe fn superblocks<S: Simd, G: Groups<S>, const SLOTS: usize>(&self, panel: usize, first: usize, mut groups: G) {
        let columns = self.product.weights.columns;
        let (steps, count) = (columns.div_ceil(STEP), superblocks(columns));
        let inputs = self.inputs::<SLOTS>(first);
        let units = &self.product.weights.units[panel * count * LANES..][..count * LANES];
        // SAFETY: the caller is a kernel of `S`; units and slots have every superblock.
        unsafe {
            let mut sums = Sums::<S, SLOTS>::zero();
            for index in 0..count {
                let mut exact = Exact::<S, SLOTS>::zero();
                let steps = index * SUPERBLOCK_STEPS..((index + 1) * SUPERBLOCK_STEPS).min(steps);
                for group in steps.start * STEP / 4..steps.end * STEP / 4 {
                    if let Some(weights) = groups.weights(group) {
                        exact.add(&inputs, group, weights);
                    }
                }
                sums.add(index, S::load(units.as_ptr().add(index * LANES)), &inputs, exact);
            }
            for (s, sums) in sums.finish(count).into_iter().enumerate() {
                self.write::<S>(panel, first + s, sums);
            }
        }
    }
}
