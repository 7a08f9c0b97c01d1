//! Products of many rows on AMX tiles.
//!
//! A panel is unpacked once, into upper and lower bytes of its 16-bit weights. Then all rows are multiplied with it, in
//! tiles of sixteen. A tile's integer sums of a superblock become floats while the next tile is multiplied: the vector
//! and the tile units work at the same time.

use super::coded::with_layout;
use super::layout::{Integers, Layout, Of, Planes};
use super::{Job, Panels};
use crate::arithmetic::products::{CHAIN, join};
use crate::arithmetic::superblocks;
use crate::cpu::activation::{CodedRows, STEP, STEP_BYTES, SUPERBLOCK_STEPS};
use crate::cpu::lines::Lines;
use crate::cpu::packed::{Coded, Form, GROUP_BYTES, Wide};
use crate::format::ElementType;
use crate::format::blocks::BLOCK;
use crate::simd::amx::{TILE_BYTES, TILE_ROWS, TileSums, Tiles};
use crate::simd::{Kernel, LANES, Simd};
use std::cell::RefCell;
use std::ops::Range;

/// The fewest rows for which tiles are faster than vectors.
pub(super) const ROWS_MIN: usize = 8;

/// Bytes of a step of unpacked weights: a tile of upper and a tile of lower bytes.
const STEP_PLANES: usize = 2 * TILE_BYTES;

thread_local! {
    /// The unpacked panel of this thread.
    static PLANES: RefCell<Lines> = RefCell::default();
}

/// A range of panels of one product, for AMX.
pub(super) struct TilePanels<'a, 'b> {
    pub(super) job: &'a Job<'b>,
    pub(super) input: &'a CodedRows,
    pub(super) panels: Range<usize>,
}

impl Kernel for TilePanels<'_, '_> {
    #[inline(always)]
    fn run<S: Simd>(self) {
        let Self { job, input, panels } = self;
        let steps = job.weights.columns.div_ceil(STEP);
        PLANES.with_borrow_mut(|planes| {
            planes.resize(steps * STEP_PLANES);
            // SAFETY: this tier runs only where tiles are available, and kernels do not nest.
            let tiles = unsafe { Tiles::configure() };
            for panel in panels.clone() {
                let unpack = Unpack { job, panel, planes: planes.bytes_mut() };
                match &job.weights.form {
                    Form::Wide(wide) => unpack.wide::<S>(wide),
                    Form::Coded(coded) => with_layout!(coded.element, unpack.coded::<S>(coded)),
                }
                let panels = Panels { job, input, panels: panels.clone() };
                multiply::<S>(&tiles, &panels, panel, planes.bytes());
            }
        });
    }
}

/// A panel that is unpacked into `planes`: \[step]\[upper, then lower bytes]\[group of four columns]\[lane]\[column].
struct Unpack<'a, 'b> {
    job: &'a Job<'b>,
    panel: usize,
    planes: &'a mut [u8],
}

impl Unpack<'_, '_> {
    #[inline(always)]
    fn coded<S: Simd, L: Layout>(self, coded: &Coded) {
        let columns = self.job.weights.columns;
        let blocks = columns / BLOCK;
        let block_bytes = Coded::block_bytes(L::CODING);
        let codes = &coded.codes.bytes()[self.panel * blocks * block_bytes..][..blocks * block_bytes];
        let first = (self.panel * blocks, self.panel * Coded::min_pairs(L::CODING, columns));
        if !blocks.is_multiple_of(2) {
            let last = self.planes.len() - STEP_PLANES;
            self.planes[last..].fill(0);
        }
        for block in 0..blocks {
            let step = &mut self.planes[block / 2 * STEP_PLANES..][..STEP_PLANES];
            let offset = block % 2 * TILE_BYTES / 2;
            // SAFETY: the panel has whole blocks, and a step has sixteen groups in each plane.
            unsafe {
                let at = codes.as_ptr().add(block * block_bytes);
                let mut planes = Planes::<S>::of::<L>(at);
                let mut integers = Integers::<S>::load::<L>(coded, first, block, 0);
                for group in 0..8 {
                    if L::CODING.split && group == 4 {
                        integers = Integers::<S>::load::<L>(coded, first, block, 1);
                    }
                    let (even, odd) = integers.weights::<L>(planes.next::<L>(at, group));
                    store::<S>(step.as_mut_ptr().add(offset + group * 4 * LANES), even, odd);
                }
            }
        }
    }

    #[inline(always)]
    fn wide<S: Simd>(self, wide: &Wide) {
        let panel_bytes = Wide::panel_bytes(self.job.weights.columns);
        let pairs = &wide.pairs.bytes()[self.panel * panel_bytes..][..panel_bytes];
        let groups = STEP / 4;
        for (step, planes) in self.planes.as_chunks_mut::<STEP_PLANES>().0.iter_mut().enumerate() {
            for group in 0..groups {
                // SAFETY: the panel has whole steps, and a step has sixteen groups in each plane.
                unsafe {
                    let at = pairs.as_ptr().add((step * groups + group) * GROUP_BYTES).cast::<i16>();
                    let (even, odd) = (S::load_pairs(at), S::load_pairs(at.add(2 * LANES)));
                    store::<S>(planes.as_mut_ptr().add(group * 4 * LANES), even, odd);
                }
            }
        }
    }
}

/// Stores the bytes of a group of weights to both planes of a step.
///
/// # Safety
/// Call only inside a kernel of `S`, with a group of the upper plane at `to`.
#[inline(always)]
unsafe fn store<S: Simd>(to: *mut u8, even: S::Pairs, odd: S::Pairs) {
    // SAFETY: the caller upholds the contract of this function.
    unsafe {
        let (upper, lower) = S::planes(even, odd);
        S::store_codes(to, upper);
        S::store_codes(to.add(TILE_BYTES), lower);
    }
}

/// A superblock of a tile of rows whose integer sums are done.
#[derive(Clone, Copy)]
struct Done {
    row: usize,
    superblock: usize,
}

/// Multiplies all rows of the job with an unpacked panel.
#[inline(always)]
fn multiply<S: Simd>(tiles: &Tiles, panels: &Panels<'_, '_>, panel: usize, planes: &[u8]) {
    let Panels { job, input, .. } = panels;
    let (steps, count) = (input.steps(), superblocks(input.width));
    let mut sums = [const { TileSums([[[0; 16]; TILE_ROWS]; 4]) }; 2];
    let mut floats = [[[0.0; LANES]; TILE_ROWS]; 2];
    let mut before = None;
    let mut turn = 0;
    for row in job.rows.clone().step_by(TILE_ROWS) {
        for superblock in 0..count {
            let first = superblock * SUPERBLOCK_STEPS;
            let own_steps = SUPERBLOCK_STEPS.min(steps - first);
            let activations = &input.tile(row)[first * STEP_BYTES..];
            let weights = &planes[first * STEP_PLANES..][..own_steps * STEP_PLANES];
            // SAFETY: a tile of rows and the planes have these steps.
            unsafe {
                let row_bytes = steps * STEP_BYTES;
                tiles.multiply(activations.as_ptr(), row_bytes, weights.as_ptr(), own_steps, &mut sums[turn]);
            }
            if let Some(done) = before {
                finish::<S>(panels, panel, done, &sums[1 - turn], &mut floats);
            }
            before = Some(Done { row, superblock });
            turn = 1 - turn;
        }
    }
    if let Some(done) = before {
        finish::<S>(panels, panel, done, &sums[1 - turn], &mut floats);
    }
}

/// Adds the sums of a superblock to the floats of its rows, \[chain, then total]\[row]\[lane], and writes the totals after
/// the last superblock.
#[inline(always)]
fn finish<S: Simd>(
    panels: &Panels<'_, '_>,
    panel: usize,
    Done { row, superblock }: Done,
    TileSums(sums): &TileSums,
    floats: &mut [[[f32; LANES]; TILE_ROWS]; 2],
) {
    let Panels { job, input, .. } = panels;
    let count = superblocks(input.width);
    let units = &job.weights.units[(panel * count + superblock) * LANES..][..LANES];
    let [chains, totals] = floats;
    for r in 0..TILE_ROWS.min(job.rows.end - row) {
        let unit = input.unit(row + r, superblock);
        let (chain, total) = (&mut chains[r], &mut totals[r]);
        for lane in 0..LANES {
            let upper = (sums[0][r][lane] << 8).wrapping_add(sums[1][r][lane]);
            let lower = (sums[2][r][lane] << 8).wrapping_add(sums[3][r][lane]);
            let start = if superblock.is_multiple_of(CHAIN) { 0.0 } else { chain[lane] };
            chain[lane] = join(upper, lower).mul_add(units[lane] * unit, start);
        }
        if (superblock + 1).is_multiple_of(CHAIN) || superblock + 1 == count {
            for lane in 0..LANES {
                total[lane] = if superblock < CHAIN { chain[lane] } else { total[lane] + chain[lane] };
            }
        }
        if superblock + 1 == count {
            panels.write_values(panel, row + r, total);
        }
    }
}
