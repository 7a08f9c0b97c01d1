//! Products of many rows on AMX tiles.
//!
//! A panel is unpacked once, into upper and lower bytes of its 16-bit weights. Then all rows are multiplied with it, in
//! tiles of sixteen. A tile's integer sums of a superblock become floats while the next tile is multiplied: the vector
//! and the tile units work at the same time.

#![allow(clippy::needless_range_loop)] // The loops over rows and planes index several arrays.

use super::Panels;
use super::layout::{EachGroup, Layout, Of, for_groups, with_layout};
use crate::arithmetic::products::CHAIN;
use crate::arithmetic::superblocks;
use crate::cpu::activation::{STEP, SUPERBLOCK_STEPS, TILE_STEP_BYTES};
use crate::cpu::lines::Lines;
use crate::cpu::packed::{Coded, Form, GROUP_BYTES, Wide};
use crate::simd::amx::{TILE_BYTES, TILE_ROWS, TileSums, Tiles};
use crate::simd::{Kernel, LANES, Simd, Tier};
use std::cell::RefCell;
use std::marker::PhantomData;

/// Bytes of a step of unpacked weights: a tile of upper and a tile of lower bytes.
const STEP_PLANES: usize = 2 * TILE_BYTES;
/// Groups of four columns in a step.
const GROUPS: usize = STEP / 4;

thread_local! {
    /// The unpacked panel of this thread.
    static PLANES: RefCell<Lines> = RefCell::default();
}

/// Computes `panels` on tiles.
pub(super) fn run(tier: Tier, panels: &Panels<'_, '_>) {
    let weights = panels.job.weights;
    let mut planes = PLANES.take();
    planes.resize(weights.columns.div_ceil(STEP) * STEP_PLANES);
    for panel in panels.panels.clone() {
        let unpacked = planes.bytes_mut();
        match &weights.form {
            Form::Wide(wide) => tier.run(UnpackWide { columns: weights.columns, wide, panel, planes: unpacked }),
            Form::Coded(coded) => {
                with_layout!(coded.element, unpack_coded(tier, weights.columns, coded, panel, unpacked));
            }
        }
        tier.run(Multiply { panels, panel, planes: planes.bytes() });
    }
    PLANES.set(planes);
}

fn unpack_coded<L: Layout>(tier: Tier, columns: usize, coded: &Coded, panel: usize, planes: &mut [u8]) {
    tier.run(UnpackCoded::<L> { columns, coded, panel, planes, layout: PhantomData });
}

/// A panel that is unpacked into `planes`: \[step]\[upper, then lower bytes]\[group of four columns]\[lane]\[column].
struct UnpackCoded<'a, L> {
    columns: usize,
    coded: &'a Coded,
    panel: usize,
    planes: &'a mut [u8],
    layout: PhantomData<L>,
}

impl<L: Layout> Kernel for UnpackCoded<'_, L> {
    #[inline(always)]
    fn run<S: Simd>(self) {
        let Self { columns, coded, panel, planes, .. } = self;
        if !columns.is_multiple_of(STEP) {
            let last = planes.len() - STEP_PLANES;
            planes[last..].fill(0);
        }
        assert!(planes.len() >= columns.div_ceil(STEP) * STEP_PLANES, "a panel has whole steps");
        let target = planes.as_mut_ptr();
        // SAFETY: the panel is inside the matrix, and `planes` has room for its groups.
        unsafe {
            for_groups::<S, L, _>(coded, columns, panel, &mut StorePlanes { target });
        }
    }
}

/// Stores groups as planes.
struct StorePlanes {
    target: *mut u8,
}

impl<S: Simd> EachGroup<S> for StorePlanes {
    #[inline(always)]
    unsafe fn take(&mut self, group: usize, weights: [S::Pairs; 2]) {
        // SAFETY: the caller upholds the contract of this method.
        unsafe { store::<S>(self.target.add(group / GROUPS * STEP_PLANES + group % GROUPS * 4 * LANES), weights) };
    }
}

/// Like [`UnpackCoded`], for dense floats.
struct UnpackWide<'a> {
    columns: usize,
    wide: &'a Wide,
    panel: usize,
    planes: &'a mut [u8],
}

impl Kernel for UnpackWide<'_> {
    #[inline(always)]
    fn run<S: Simd>(self) {
        let panel_bytes = Wide::panel_bytes(self.columns);
        let pairs = &self.wide.pairs.bytes()[self.panel * panel_bytes..][..panel_bytes];
        for (step, planes) in self.planes.as_chunks_mut::<STEP_PLANES>().0.iter_mut().enumerate() {
            for group in 0..GROUPS {
                // SAFETY: the panel has whole steps, and a step has sixteen groups in each plane.
                unsafe {
                    let at = pairs.as_ptr().add((step * GROUPS + group) * GROUP_BYTES).cast::<i16>();
                    let weights = [S::load_pairs(at), S::load_pairs(at.add(2 * LANES))];
                    store::<S>(planes.as_mut_ptr().add(group * 4 * LANES), weights);
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
unsafe fn store<S: Simd>(to: *mut u8, [even, odd]: [S::Pairs; 2]) {
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
    tile: usize,
    superblock: usize,
}

/// Multiplies all rows of the job with an unpacked panel.
struct Multiply<'a, 'b> {
    panels: &'a Panels<'a, 'b>,
    panel: usize,
    planes: &'a [u8],
}

impl Kernel for Multiply<'_, '_> {
    #[inline(always)]
    fn run<S: Simd>(self) {
        // SAFETY: this tier runs only where tiles are available, and kernels do not nest.
        let tiles = unsafe { Tiles::configure() };
        multiply::<S>(&tiles, self.panels, self.panel, self.planes);
    }
}

#[inline(always)]
fn multiply<S: Simd>(tiles: &Tiles, panels: &Panels<'_, '_>, panel: usize, planes: &[u8]) {
    let Panels { job, input, .. } = panels;
    let (steps, count) = (input.steps(), superblocks(input.width));
    let mut sums = [const { TileSums([[[0; 16]; TILE_ROWS]; 4]) }; 2];
    let mut floats = Floats { chains: [[0.0; LANES]; TILE_ROWS], totals: [[0.0; LANES]; TILE_ROWS] };
    let mut before = None;
    let mut turn = 0;
    for tile in job.rows.start / TILE_ROWS..job.rows.end.div_ceil(TILE_ROWS) {
        for superblock in 0..count {
            let first = superblock * SUPERBLOCK_STEPS;
            let own_steps = SUPERBLOCK_STEPS.min(steps - first);
            let activations = &input.tile(tile)[first * TILE_STEP_BYTES..][..own_steps * TILE_STEP_BYTES];
            let weights = &planes[first * STEP_PLANES..][..own_steps * STEP_PLANES];
            // SAFETY: the slices have these steps.
            unsafe { tiles.multiply(activations.as_ptr(), weights.as_ptr(), own_steps, &mut sums[turn]) };
            if let Some(done) = before {
                finish::<S>(panels, panel, done, &sums[1 - turn], &mut floats);
            }
            before = Some(Done { tile, superblock });
            turn = 1 - turn;
        }
    }
    if let Some(done) = before {
        finish::<S>(panels, panel, done, &sums[1 - turn], &mut floats);
    }
}

/// The floats of a tile of rows: \[row]\[lane].
#[repr(align(64))]
struct Floats {
    chains: [[f32; LANES]; TILE_ROWS],
    totals: [[f32; LANES]; TILE_ROWS],
}

/// Adds the sums of a superblock to the floats of its rows, and writes the totals after the last superblock.
#[inline(always)]
fn finish<S: Simd>(
    panels: &Panels<'_, '_>,
    panel: usize,
    Done { tile, superblock }: Done,
    TileSums(sums): &TileSums,
    floats: &mut Floats,
) {
    let Panels { job, input, .. } = panels;
    let count = superblocks(input.width);
    let units = &job.weights.units[(panel * count + superblock) * LANES..][..LANES];
    let (starts, ends) = (superblock % CHAIN == 0, (superblock + 1) % CHAIN == 0 || superblock + 1 == count);
    let first = tile * TILE_ROWS;
    // The job may begin and end inside a tile.
    for r in job.rows.start.saturating_sub(first)..TILE_ROWS.min(job.rows.end - first) {
        let (chain, total) = (&mut floats.chains[r], &mut floats.totals[r]);
        // SAFETY: the caller is a kernel of `S`; every array has sixteen lanes.
        unsafe {
            let int = |product: usize| S::load_ints(sums[product][r].as_ptr());
            let upper = S::add_ints(S::shift_left(int(0), 8), int(1));
            let lower = S::add_ints(S::shift_left(int(2), 8), int(3));
            let joined = S::fma(S::floats(upper), S::splat(256.0), S::floats(lower));
            let unit = S::mul(S::load(units.as_ptr()), S::splat(input.unit(first + r, superblock)));
            let before = if starts { S::splat(0.0) } else { S::load(chain.as_ptr()) };
            let sum = S::fma(joined, unit, before);
            S::store(chain.as_mut_ptr(), sum);
            if ends {
                let sum = if superblock < CHAIN { sum } else { S::add(S::load(total.as_ptr()), sum) };
                S::store(total.as_mut_ptr(), sum);
            }
        }
        if superblock + 1 == count {
            panels.write_values(panel, first + r, total);
        }
    }
}
