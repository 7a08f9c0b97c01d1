//! Products of byte codes: a block's sum of codes times activation bytes, times the block's scale, in integers.

#![allow(clippy::needless_range_loop)] // The loops over slots and planes index several arrays.

use super::layout::{self, Layout, Planes};
use super::wide::run_rounded;
use super::{Exact, Panels, RowTile, Sums, for_tiles};
use crate::arithmetic::superblocks;
use crate::arithmetic::weights::{BLOCKS, Rule};
use crate::cpu::activation::{BLOCK_SUMS, CodedSlot, PLANE_SUMS, STEP_STARTS, STEP_SUMS};
use crate::cpu::packed::Coded;
use crate::format::blocks::BLOCK;
use crate::simd::{Kernel, LANES, Simd, Tier};
use std::marker::PhantomData;

/// Computes `panels` of weights of the layout `L`.
pub(super) fn run<L: Layout>(tier: Tier, panels: Panels<'_, '_>, coded: &Coded) {
    match L::RULE {
        Rule::Product { .. } => tier.run(CodedPanels::<L> { panels, coded, layout: PhantomData }),
        Rule::Rounded => run_rounded::<L>(tier, panels, coded),
    }
}

struct CodedPanels<'a, 'b, L> {
    panels: Panels<'a, 'b>,
    coded: &'a Coded,
    layout: PhantomData<L>,
}

impl<L: Layout> Kernel for CodedPanels<'_, '_, L> {
    #[inline(always)]
    fn run<S: Simd>(mut self) {
        // The sums of six slots take 24 of the 32 vector registers of AVX-512.
        for_tiles::<S, Self, 6, 3>(&mut self);
    }
}

impl<L: Layout> RowTile for CodedPanels<'_, '_, L> {
    fn panels(&self) -> &Panels<'_, '_> {
        &self.panels
    }

    #[inline(always)]
    fn tile<S: Simd, const SLOTS: usize>(&self, panel: usize, first: usize) {
        let Self { panels, coded, .. } = self;
        let columns = panels.product.weights.columns;
        let (blocks, count) = (columns / BLOCK, superblocks(columns));
        let inputs = panels.inputs::<SLOTS>(first);
        let units = &panels.product.weights.units[panel * count * LANES..][..count * LANES];
        let block_bytes = Coded::block_bytes(L::CODING);
        let codes = &coded.codes.bytes()[panel * blocks * block_bytes..][..blocks * block_bytes];
        // SAFETY: the slices above, the scales and the slots have the blocks that the loops read, in vectors of sixteen
        // lanes.
        unsafe {
            let mut sums = Sums::<S, SLOTS>::zero();
            for index in 0..count {
                let mut exact = Exact::<S, SLOTS>::zero();
                for block in index * BLOCKS..((index + 1) * BLOCKS).min(blocks) {
                    let at = codes.as_ptr().add(block * block_bytes);
                    layout::prefetch_block::<L>(at);
                    let dots = block_dots::<S, L, SLOTS>(at, block, &inputs);
                    for half in 0..L::HALVES {
                        let scale = layout::scales::<S, L>(coded, (panel * blocks + block) * L::HALVES + half);
                        exact.add_scaled::<L>(&dots[half], scale);
                    }
                }
                if L::SHIFT > 0 {
                    exact.shift_left(L::SHIFT);
                }
                if L::CODING.has_mins || L::ZERO != 0 {
                    add_bases::<S, L, SLOTS>(coded, panel, columns, index, &inputs, &mut exact);
                }
                sums.add(index, S::load(units.as_ptr().add(index * LANES)), &inputs, exact);
            }
            for (s, sums) in sums.finish(count).into_iter().enumerate() {
                panels.write::<S>(panel, first + s, sums);
            }
        }
    }
}

impl<S: Simd, const SLOTS: usize> Exact<S, SLOTS> {
    /// Adds the sums of a block, or of a half, times its scale.
    ///
    /// # Safety
    /// Call only inside a kernel of `S`; so with the other method.
    #[inline(always)]
    unsafe fn add_scaled<L: Layout>(&mut self, dots: &[[S::Ints; 2]; SLOTS], scale: S::Ints) {
        // SAFETY: the caller is a kernel of `S`.
        unsafe {
            let scale = if L::NARROW { S::low_words(scale) } else { scale };
            for (sums, dots) in self.0.iter_mut().zip(dots) {
                for (sum, &dot) in sums.iter_mut().zip(dots) {
                    *sum = match L::NARROW {
                        true => S::mul_add_words(dot, scale, *sum),
                        false => S::mul_add_ints(dot, scale, *sum),
                    };
                }
            }
        }
    }

    #[inline(always)]
    unsafe fn shift_left(&mut self, bits: u32) {
        // SAFETY: the caller is a kernel of `S`.
        unsafe {
            for sum in self.0.as_flattened_mut() {
                *sum = S::shift_left(*sum, bits);
            }
        }
    }
}

/// Returns Σ (level − start) · byte of one block: \[half where split]\[slot]\[plane].
///
/// # Safety
/// Call only inside a kernel of `S`, with a whole block at `at`, and slots that have `block`.
#[inline(always)]
unsafe fn block_dots<S: Simd, L: Layout, const SLOTS: usize>(
    at: *const u8,
    block: usize,
    inputs: &[CodedSlot; SLOTS],
) -> [[[S::Ints; 2]; SLOTS]; 2] {
    // All slots of an operand have the same layout.
    let plane = inputs[0].plane_bytes;
    // SAFETY: the caller upholds the contract of this function.
    unsafe {
        let mut out = [[[S::ints_zero(); 2]; SLOTS]; 2];
        let mut slots = [std::ptr::null(); SLOTS];
        for s in 0..SLOTS {
            slots[s] = inputs[s].bytes.add(block / 2 * 2 * plane + block % 2 * BLOCK);
            if L::START != 0 {
                let starts = inputs[s].starts.add(block / 2 * STEP_STARTS + block % 2);
                out[0][s] = [S::splat_int(*starts), S::splat_int(*starts.add(2))];
            }
        }
        let mut planes = Planes::<S>::of::<L>(at);
        macro_rules! group {
            ($group:literal) => {
                let codes = planes.next::<L>(at, $group);
                let half = if L::CODING.split { $group / 4 } else { 0 };
                match L::WIDE {
                    true => S::dot_slots::<SLOTS, { $group * 4 }, true>(&mut out[half], codes, &slots, plane),
                    false => S::dot_slots::<SLOTS, { $group * 4 }, false>(&mut out[half], codes, &slots, plane),
                }
            };
        }
        group!(0);
        group!(1);
        group!(2);
        group!(3);
        group!(4);
        group!(5);
        group!(6);
        group!(7);
        out
    }
}

/// Adds Σ base · Σ bytes of superblock `index`: what the level from which sums count weighs.
///
/// # Safety
/// Call only inside a kernel of `S`, with slots and weights that have the superblock.
#[inline(always)]
unsafe fn add_bases<S: Simd, L: Layout, const SLOTS: usize>(
    coded: &Coded,
    panel: usize,
    columns: usize,
    index: usize,
    inputs: &[CodedSlot; SLOTS],
    exact: &mut Exact<S, SLOTS>,
) {
    let numbers = columns / BLOCK * L::HALVES;
    let per_superblock = BLOCKS * L::HALVES / 2;
    for pair in index * per_superblock..((index + 1) * per_superblock).min(numbers.div_ceil(2)) {
        // Where in a plane's sums a pair of halves, or the pair of blocks of a step, is.
        let at = match L::CODING.split {
            true => pair / 2 * STEP_SUMS + pair % 2 * 2,
            false => pair * STEP_SUMS + BLOCK_SUMS,
        };
        // SAFETY: the caller upholds the contract of this function.
        unsafe {
            let bases = bases::<S, L>(coded, panel, numbers, pair);
            for (exact, input) in exact.0.iter_mut().zip(inputs) {
                for (plane, exact) in exact.iter_mut().enumerate() {
                    let sums = input.sums.add(at + plane * PLANE_SUMS).cast::<i32>().read_unaligned();
                    *exact = S::dot_pairs(*exact, bases, sums);
                }
            }
        }
    }
}

/// Returns a pair of bases: as stored in a type with minima, else as the scales give them.
///
/// # Safety
/// Call only inside a kernel of `S`, with a pair inside the panel, which has `numbers` blocks or halves.
#[inline(always)]
unsafe fn bases<S: Simd, L: Layout>(coded: &Coded, panel: usize, numbers: usize, pair: usize) -> S::Pairs {
    // SAFETY: the caller upholds the contract of this function.
    unsafe {
        if L::CODING.has_mins {
            return S::load_pairs(coded.bases.as_ptr().add((panel * numbers.div_ceil(2) + pair) * 2 * LANES));
        }
        let at = panel * numbers + pair * 2;
        let low = S::low_words(layout::scales::<S, L>(coded, at));
        let high = if pair * 2 + 1 < numbers { layout::scales::<S, L>(coded, at + 1) } else { S::ints_zero() };
        S::mul_pairs(S::pair(low, high), S::both(S::splat_int(-L::ZERO)))
    }
}
