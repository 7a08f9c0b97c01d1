//! Products of byte codes: a block's sum of codes times activation bytes, times the block's scale, in integers.

#![allow(clippy::needless_range_loop)] // The loops over rows and planes index several arrays.

use super::layout::{self, Layout, Planes};
use super::wide::RoundedPanels;
use super::{Panels, Sums};
use crate::arithmetic::superblocks;
use crate::arithmetic::weights::{BLOCKS, Rule};
use crate::cpu::activation::{CodedRow, STEP_SUMS};
use crate::cpu::packed::Coded;
use crate::format::blocks::BLOCK;
use crate::simd::{Kernel, LANES, Simd, Tier};
use std::marker::PhantomData;
use std::ops::Range;

/// Computes `panels` of weights of the layout `L`.
pub(super) fn run<L: Layout>(tier: Tier, panels: Panels<'_, '_>, coded: &Coded) {
    match L::RULE {
        Rule::Product { .. } => tier.run(CodedPanels::<L> { panels, coded, layout: PhantomData }),
        Rule::Rounded => tier.run(RoundedPanels::<L> { panels, coded, layout: PhantomData }),
    }
}

struct CodedPanels<'a, 'b, L> {
    panels: Panels<'a, 'b>,
    coded: &'a Coded,
    layout: PhantomData<L>,
}

impl<L: Layout> Kernel for CodedPanels<'_, '_, L> {
    #[inline(always)]
    fn run<S: Simd>(self) {
        for panel in self.panels.panels.clone() {
            self.panels.coded_rows::<S, L>(self.coded, panel);
        }
    }
}

impl Panels<'_, '_> {
    #[inline(always)]
    fn coded_rows<S: Simd, L: Layout>(&self, coded: &Coded, panel: usize) {
        let Range { start: mut row, end } = self.job.rows.clone();
        while row < end {
            row += match end - row {
                4.. => self.coded_tile::<S, L, 4>(coded, panel, row),
                2.. => self.coded_tile::<S, L, 2>(coded, panel, row),
                _ => self.coded_tile::<S, L, 1>(coded, panel, row),
            };
        }
    }

    #[inline(always)]
    fn coded_tile<S: Simd, L: Layout, const ROWS: usize>(&self, coded: &Coded, panel: usize, first: usize) -> usize {
        let columns = self.job.weights.columns;
        let (blocks, count) = (columns / BLOCK, superblocks(columns));
        let inputs = self.inputs::<ROWS>(first);
        let units = &self.job.weights.units[panel * count * LANES..][..count * LANES];
        let block_bytes = Coded::block_bytes(L::CODING);
        let codes = &coded.codes.bytes()[panel * blocks * block_bytes..][..blocks * block_bytes];
        // SAFETY: the slices above, the scales and the rows have the blocks that the loops read, in vectors of sixteen
        // lanes.
        unsafe {
            let mut sums = Sums::<S, ROWS>::zero();
            for index in 0..count {
                let mut upper = [S::ints_zero(); ROWS];
                let mut lower = [S::ints_zero(); ROWS];
                for block in index * BLOCKS..((index + 1) * BLOCKS).min(blocks) {
                    let at = codes.as_ptr().add(block * block_bytes);
                    let dots = block_dots::<S, L, ROWS>(at, block, &inputs);
                    for half in 0..L::HALVES {
                        let scale = layout::scales::<S>(coded, (panel * blocks + block) * L::HALVES + half);
                        for r in 0..ROWS {
                            upper[r] = S::mul_add_ints(dots[r][half][0], scale, upper[r]);
                            lower[r] = S::mul_add_ints(dots[r][half][1], scale, lower[r]);
                        }
                    }
                }
                if L::SHIFT > 0 {
                    for r in 0..ROWS {
                        upper[r] = S::shift_left(upper[r], L::SHIFT);
                        lower[r] = S::shift_left(lower[r], L::SHIFT);
                    }
                }
                if L::CODING.has_mins {
                    add_mins::<S, L, ROWS>(coded, panel, columns, index, &inputs, &mut upper, &mut lower);
                }
                sums.add(index, S::load(units.as_ptr().add(index * LANES)), &inputs, upper, lower);
            }
            for (r, sum) in sums.finish(count).into_iter().enumerate() {
                self.write::<S>(panel, first + r, sum);
            }
        }
        ROWS
    }
}

/// Returns Σ level · byte of one block: \[row]\[half where split]\[plane].
///
/// # Safety
/// Call only inside a kernel of `S`, with a whole block at `at`, and rows that have `block`.
#[inline(always)]
unsafe fn block_dots<S: Simd, L: Layout, const ROWS: usize>(
    at: *const u8,
    block: usize,
    inputs: &[CodedRow; ROWS],
) -> [[[S::Ints; 2]; 2]; ROWS] {
    // All rows of an operand have the same layout.
    let plane_bytes = inputs[0].plane_bytes;
    let step = block / 2 * 2 * plane_bytes + block % 2 * BLOCK;
    // SAFETY: the caller upholds the contract of this function.
    unsafe {
        let mut out = [[[S::ints_zero(); 2]; 2]; ROWS];
        let mut planes = Planes::<S>::of::<L>(at);
        for group in 0..8 {
            let codes = planes.next::<L>(at, group);
            let half = if L::CODING.split { group / 4 } else { 0 };
            for r in 0..ROWS {
                for plane in 0..2 {
                    let from = inputs[r].bytes.add(step + plane * plane_bytes + group * 4);
                    let four = from.cast::<i32>().read_unaligned();
                    let sum = &mut out[r][half][plane];
                    *sum = if L::WIDE { S::dot_wide(*sum, codes, four) } else { S::dot(*sum, codes, four) };
                }
            }
        }
        if L::CODING.zero != 0 {
            for r in 0..ROWS {
                for plane in 0..2 {
                    let sums = inputs[r].sums.add(block / 2 * STEP_SUMS + plane * STEP_SUMS / 2 + block % 2 * 2);
                    let halves = [*sums, *sums.add(1)].map(i32::from);
                    let levels = |sum: i32| L::CODING.zero * sum;
                    if L::CODING.split {
                        for half in 0..2 {
                            out[r][half][plane] = S::sub_int(out[r][half][plane], levels(halves[half]));
                        }
                    } else {
                        out[r][0][plane] = S::sub_int(out[r][0][plane], levels(halves[0] + halves[1]));
                    }
                }
            }
        }
        out
    }
}

/// Adds Σ minimum · Σ bytes of superblock `index`.
///
/// # Safety
/// Call only inside a kernel of `S`, with rows and weights that have the superblock.
#[inline(always)]
unsafe fn add_mins<S: Simd, L: Layout, const ROWS: usize>(
    coded: &Coded,
    panel: usize,
    columns: usize,
    index: usize,
    inputs: &[CodedRow; ROWS],
    upper: &mut [S::Ints; ROWS],
    lower: &mut [S::Ints; ROWS],
) {
    let pairs = Coded::min_pairs(L::CODING, columns);
    let per_superblock = if L::CODING.split { BLOCKS } else { BLOCKS / 2 };
    for pair in index * per_superblock..((index + 1) * per_superblock).min(pairs) {
        // SAFETY: the caller upholds the contract of this function.
        unsafe {
            let mins = S::load_pairs(coded.mins.as_ptr().add((panel * pairs + pair) * 2 * LANES));
            for r in 0..ROWS {
                let sums = |plane: usize| match L::CODING.split {
                    true => {
                        let at = pair / 2 * STEP_SUMS + plane * STEP_SUMS / 2 + pair % 2 * 2;
                        inputs[r].sums.add(at).cast::<i32>().read_unaligned()
                    }
                    false => {
                        let at = inputs[r].sums.add(pair * STEP_SUMS + plane * STEP_SUMS / 2);
                        let block = |number: usize| (*at.add(number * 2) + *at.add(number * 2 + 1)) as u16;
                        i32::from(block(0)) | (i32::from(block(1)) << 16)
                    }
                };
                upper[r] = S::dot_pairs(upper[r], mins, sums(0));
                lower[r] = S::dot_pairs(lower[r], mins, sums(1));
            }
        }
    }
}
