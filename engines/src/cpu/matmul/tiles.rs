//! Products of many rows on AMX tiles.
//!
//! Some panels are unpacked at a time, into upper and lower bytes of their 16-bit weights. Then all slots of rows are
//! multiplied with them, in tiles of sixteen, superblock by superblock: most operands come from the first-level cache.
//! A tile's integer sums of a superblock become floats while the next tile is multiplied: the vector and the tile units
//! work at the same time.

#![allow(clippy::needless_range_loop)] // The loops over rows and planes index several arrays.

use super::Panels;
use super::layout::{EachGroup, Layout, Of, for_groups, with_layout};
use crate::arithmetic::products::CHAIN;
use crate::arithmetic::superblocks;
use crate::cpu::activation::{STEP, SUPERBLOCK_STEPS, TILE_SLOTS, TILE_STEP_BYTES, slot_rows};
use crate::cpu::lines::Lines;
use crate::cpu::packed::{Coded, Form, GROUP_BYTES, Wide};
use crate::engine::ActivationBits;
use crate::simd::amx::{TILE_BYTES, TILE_ROWS, TileSums, Tiles};
use crate::simd::{Kernel, LANES, Simd, Tier, prefetch_ahead};
use std::cell::RefCell;
use std::marker::PhantomData;
use std::ops::Range;

/// Bytes of a step of unpacked weights: a tile of upper and a tile of lower bytes.
const STEP_PLANES: usize = 2 * TILE_BYTES;
/// Groups of four columns in a step.
const GROUPS: usize = STEP / 4;

thread_local! {
    /// The unpacked panel of this thread.
    static PLANES: RefCell<Lines> = RefCell::default();
}

/// Panels that are multiplied together: all but the first find the activations in the first-level cache.
const PANELS: usize = 4;
/// Tiles of slots that are multiplied together: all but the first find the weights of a superblock in the caches.
const TILES: usize = 4;

/// Computes `panels` on tiles.
pub(super) fn run(tier: Tier, panels: &Panels<'_, '_>) {
    let weights = panels.product.weights;
    let panel_planes = weights.columns.div_ceil(STEP) * STEP_PLANES;
    let mut planes = PLANES.take();
    planes.resize(PANELS * panel_planes);
    for first in panels.panels.clone().step_by(PANELS) {
        let group = first..(first + PANELS).min(panels.panels.end);
        for (panel, planes) in group.clone().zip(planes.bytes_mut().chunks_exact_mut(panel_planes)) {
            match &weights.form {
                Form::Wide(wide) => tier.run(UnpackWide { columns: weights.columns, wide, panel, planes }),
                Form::Coded(coded) => {
                    with_layout!(coded.element, unpack_coded(tier, weights.columns, coded, panel, planes));
                }
            }
        }
        tier.run(Multiply { panels, group, planes: planes.bytes(), panel_planes });
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
                    prefetch_ahead::<GROUP_BYTES>(at.cast());
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

/// A superblock of a tile of slots and a panel whose integer sums are done.
#[derive(Clone, Copy)]
struct Done {
    panel: usize,
    tile: usize,
    superblock: usize,
    /// The number of the floats of this tile and panel.
    floats: usize,
}

/// Multiplies all rows of the product with a group of unpacked panels.
struct Multiply<'a, 'b> {
    panels: &'a Panels<'a, 'b>,
    group: Range<usize>,
    /// Of all panels of the group, `panel_planes` bytes each.
    planes: &'a [u8],
    panel_planes: usize,
}

impl Kernel for Multiply<'_, '_> {
    #[inline(always)]
    fn run<S: Simd>(self) {
        // SAFETY: this tier runs only where tiles are available, and kernels do not nest.
        let tiles = unsafe { Tiles::configure() };
        self.all_tiles::<S>(&tiles);
    }
}

impl Multiply<'_, '_> {
    #[inline(always)]
    fn all_tiles<S: Simd>(&self, tiles: &Tiles) {
        let slots = self.panels.slots();
        let count = superblocks(self.panels.input.width);
        let mut sums = [const { TileSums([[[0; 16]; TILE_ROWS]; 4]) }; 2];
        let mut floats = [const { Floats::ZERO }; PANELS * TILES];
        let mut before = None;
        let mut turn = 0;
        let end = slots.end.div_ceil(TILE_SLOTS);
        for first in (slots.start / TILE_SLOTS..end).step_by(TILES) {
            for superblock in 0..count {
                if superblock + 1 == count {
                    for slot in (first * TILE_SLOTS).max(slots.start)..((first + TILES) * TILE_SLOTS).min(slots.end) {
                        self.group.clone().for_each(|panel| self.panels.prefetch_outputs(panel, slot));
                    }
                }
                for tile in first..(first + TILES).min(end) {
                    for (number, panel) in self.group.clone().enumerate() {
                        self.multiply(tiles, tile, superblock, number, &mut sums[turn]);
                        if let Some(done) = before {
                            finish::<S>(self.panels, done, &sums[1 - turn], &mut floats);
                        }
                        before = Some(Done { panel, tile, superblock, floats: (tile - first) * PANELS + number });
                        turn = 1 - turn;
                    }
                }
            }
        }
        if let Some(done) = before {
            finish::<S>(self.panels, done, &sums[1 - turn], &mut floats);
        }
    }

    /// Multiplies a superblock of a tile of slots with panel `number` of the group.
    #[inline(always)]
    fn multiply(&self, tiles: &Tiles, tile: usize, superblock: usize, number: usize, sums: &mut TileSums) {
        let input = self.panels.input;
        let first = superblock * SUPERBLOCK_STEPS;
        let steps = SUPERBLOCK_STEPS.min(input.steps() - first);
        let activations = &input.tile(tile)[first * TILE_STEP_BYTES..][..steps * TILE_STEP_BYTES];
        let weights = &self.planes[number * self.panel_planes + first * STEP_PLANES..][..steps * STEP_PLANES];
        // SAFETY: the slices have these steps.
        unsafe { tiles.multiply(activations.as_ptr(), weights.as_ptr(), steps, sums) };
    }
}

/// Rows of a tile of slots at most.
const ROWS_MAX: usize = 2 * TILE_SLOTS;

/// The floats of the rows of a tile: \[row]\[lane].
#[repr(align(64))]
struct Floats {
    chains: [[f32; LANES]; ROWS_MAX],
    totals: [[f32; LANES]; ROWS_MAX],
}

impl Floats {
    const ZERO: Self = Self { chains: [[0.0; LANES]; ROWS_MAX], totals: [[0.0; LANES]; ROWS_MAX] };
}

/// Adds the sums of a superblock to the floats of its rows, and writes the totals after the last superblock.
#[inline(always)]
fn finish<S: Simd>(
    panels: &Panels<'_, '_>,
    Done { panel, tile, superblock, floats: number }: Done,
    sums: &TileSums,
    floats: &mut [Floats; PANELS * TILES],
) {
    let Panels { product, input, .. } = panels;
    let count = superblocks(input.width);
    let rows = slot_rows(input.bits) * TILE_SLOTS;
    let floats = &mut floats[number];
    let weights = &product.weights.units[(panel * count + superblock) * LANES..][..LANES];
    let units = Units { weights, rows: input.tile_units(tile, superblock), stride: count };
    // SAFETY: the caller is a kernel of `S`.
    unsafe {
        match superblock % CHAIN {
            0 => add_rows::<S, true>(input.bits, sums, &units, &mut floats.chains),
            _ => add_rows::<S, false>(input.bits, sums, &units, &mut floats.chains),
        }
    }
    let last = superblock + 1 == count;
    if last || (superblock + 1).is_multiple_of(CHAIN) {
        for (total, chain) in floats.totals[..rows].iter_mut().zip(&floats.chains) {
            for (total, &chain) in total.iter_mut().zip(chain) {
                *total = if superblock < CHAIN { chain } else { *total + chain };
            }
        }
    }
    if last {
        let first = tile * rows;
        // The product may begin and end inside a tile.
        for row in first.max(product.rows.start)..(first + rows).min(product.rows.end) {
            panels.write_values(panel, row, &mut floats.totals[row - first]);
        }
    }
}

/// The units of a tile: of its weight rows, and of every `stride`-th row of activations.
struct Units<'a> {
    weights: &'a [f32],
    rows: &'a [f32],
    stride: usize,
}

/// Adds the sums of a superblock to the chains of all rows of a tile; those that no product has are arbitrary.
///
/// # Safety
/// Call only inside a kernel of `S`.
#[inline(always)]
unsafe fn add_rows<S: Simd, const STARTS: bool>(
    bits: ActivationBits,
    TileSums(sums): &TileSums,
    units: &Units<'_>,
    chains: &mut [[f32; LANES]; ROWS_MAX],
) {
    let last_row = slot_rows(bits) * TILE_SLOTS - 1;
    assert!(units.weights.len() >= LANES && units.rows.len() > last_row * units.stride, "all rows have units");
    // SAFETY: the caller is a kernel of `S`; every array has sixteen lanes, and the assertion.
    unsafe {
        let weights = S::load(units.weights.as_ptr());
        let factor = S::splat(256.0);
        for s in 0..TILE_SLOTS {
            // The upper and the lower bytes of the weights, times the first and the second plane.
            let [first_upper, first_lower, second_upper, second_lower] =
                [0, 1, 2, 3].map(|product| sums[product][s].as_ptr());
            let first = S::add_ints(S::shift_left(S::load_ints(first_upper), 8), S::load_ints(first_lower));
            let second = S::add_ints(S::shift_left(S::load_ints(second_upper), 8), S::load_ints(second_lower));
            let (first, second) = (S::floats(first), S::floats(second));
            match bits {
                ActivationBits::Sixteen => {
                    add_row::<S, STARTS>(S::fma(first, factor, second), weights, units, s, chains);
                }
                ActivationBits::Eight => {
                    add_row::<S, STARTS>(S::mul(first, factor), weights, units, 2 * s, chains);
                    add_row::<S, STARTS>(S::mul(second, factor), weights, units, 2 * s + 1, chains);
                }
            }
        }
    }
}

/// Adds the joined sums of a superblock to the chain of `row`.
///
/// # Safety
/// Call only inside a kernel of `S`, with a row that has a unit and a chain.
#[inline(always)]
unsafe fn add_row<S: Simd, const STARTS: bool>(
    joined: S::Floats,
    weights: S::Floats,
    units: &Units<'_>,
    row: usize,
    chains: &mut [[f32; LANES]; ROWS_MAX],
) {
    // SAFETY: the caller upholds the contract of this function.
    unsafe {
        let unit = S::mul(weights, S::splat(*units.rows.as_ptr().add(row * units.stride)));
        let chain = chains.as_mut_ptr().add(row).cast::<f32>();
        let before = if STARTS { S::splat(0.0) } else { S::load(chain) };
        S::store(chain, S::fma(joined, unit, before));
    }
}
