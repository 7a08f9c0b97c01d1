//! out = x · Wᵀ: rows of activations times panels of weights.
//!
//! A task is a range of panels, for all rows. Slots of rows are processed in tiles, so that a panel's codes are
//! unpacked once per tile. [`arithmetic::products`](crate::arithmetic::products) defines every bit of the result; the
//! kernels differ in how they compute the exact integer sum of a superblock: [`coded`] multiplies codes and applies the
//! scale of each block to its sum, [`wide`] multiplies 16-bit weights, `tiles` multiplies many rows on AMX.

use super::activation::{self, CodedRows, CodedSlot, Wanted};
use super::packed::{Form, Packed};
use super::thread_pool::{Panicked, ThreadPool};
use crate::arithmetic::products::CHAIN;
use crate::engine::ActivationBits;
use crate::simd::Tier;
use crate::simd::{LANES, Simd, prefetch};
use std::marker::PhantomData;
use std::ops::Range;

mod coded;
mod layout;
#[cfg(target_arch = "x86_64")]
mod tiles;
mod wide;

use layout::{Of, with_layout};
use wide::WidePanels;

/// Tasks per thread: several, so that one delayed thread does not delay the step.
const TASKS_PER_THREAD: usize = 2;

/// The fewest slots for which tiles are faster than vectors.
const TILES_SLOTS_MIN: usize = 8;

/// One product of a parallel section. The products of a section share an operand, and run as one set of tasks.
pub(super) struct Product<'a> {
    pub(super) weights: &'a Packed,
    bias: Option<&'a [f32]>,
    /// The operand's rows that are multiplied.
    pub(super) rows: Range<usize>,
    /// The output matrix, \[row]\[weight row]; each task writes its own columns.
    out: *mut f32,
    life: PhantomData<&'a mut [f32]>,
    /// The number of the first panel among those of the section.
    first_panel: usize,
}

// SAFETY: tasks write disjoint columns of `out`, and the owner of `out` waits for the end of the section.
unsafe impl Sync for Product<'_> {}

impl<'a> Product<'a> {
    /// Describes the product of the operand's `rows` with `weights`, plus `bias`: `out` is \[row]\[weight row].
    ///
    /// # Panics
    /// If `out` has another length.
    pub(super) fn new(weights: &'a Packed, bias: Option<&'a [f32]>, rows: Range<usize>, out: &'a mut [f32]) -> Self {
        assert_eq!(out.len(), rows.len() * weights.rows, "the output has the wrong length");
        Self { weights, bias, rows, out: out.as_mut_ptr(), life: PhantomData, first_panel: 0 }
    }
}

/// Returns the forms of the operand that `products` read.
pub(super) fn wanted(tier: Tier, bits: ActivationBits, products: &[Product<'_>]) -> Wanted {
    Wanted {
        pairs: products.iter().any(|product| product.weights.wants_pairs()),
        tiles: products.iter().any(|product| uses_tiles(tier, bits, &product.rows)),
    }
}

/// Whether a product of these rows is computed on tiles.
fn uses_tiles(tier: Tier, bits: ActivationBits, rows: &Range<usize>) -> bool {
    tier == Tier::Amx && activation::slots(bits, rows).len() >= TILES_SLOTS_MIN
}

/// Computes all `products` of `input`.
pub(super) fn run(
    tier: Tier,
    pool: &mut ThreadPool,
    input: &CodedRows,
    products: &mut [Product<'_>],
) -> Result<(), Panicked> {
    let mut panels = 0;
    for product in products.iter_mut() {
        let weights = product.weights;
        assert!(input.width == weights.columns && input.width > 0, "the operand has the wrong width");
        assert!(input.has_tiles() || !uses_tiles(tier, input.bits, &product.rows), "the operand has no tiles");
        assert!(input.has_pairs() || !weights.wants_pairs() || product.rows.is_empty(), "the operand has no pairs");
        product.first_panel = panels;
        panels += weights.panels();
    }
    let products = &*products;
    let tasks = (pool.threads() * TASKS_PER_THREAD).max(products.len()).min(panels);
    pool.run(tasks, &|task| {
        let mut range = panels * task / tasks..panels * (task + 1) / tasks;
        while range.start < range.end {
            // The last product that starts at or before the range; one exists, since the first starts at 0.
            let index = products.partition_point(|product| product.first_panel <= range.start) - 1;
            let product = &products[index];
            let end = range.end.min(product.first_panel + product.weights.panels());
            let panels = range.start - product.first_panel..end - product.first_panel;
            Panels { product, input, panels }.run(tier);
            range.start = end;
        }
    })
}

/// A range of panels of one product.
struct Panels<'a, 'b> {
    product: &'a Product<'b>,
    input: &'a CodedRows,
    panels: Range<usize>,
}

impl Panels<'_, '_> {
    /// Runs the kernel of the weights' form. Each is compiled by itself, since a compiler inlines little into very
    /// large functions.
    fn run(self, tier: Tier) {
        #[cfg(target_arch = "x86_64")]
        if uses_tiles(tier, self.input.bits, &self.product.rows) {
            return tiles::run(tier, &self);
        }
        match &self.product.weights.form {
            Form::Wide(wide) => tier.run(WidePanels { panels: self, wide }),
            Form::Coded(coded) => with_layout!(coded.element, coded::run(tier, self, coded)),
        }
    }

    /// The slots of the product's rows. The first and the last may hold a row of another product.
    fn slots(&self) -> Range<usize> {
        activation::slots(self.input.bits, &self.product.rows)
    }

    /// The codes of the slots `first` and the following.
    #[inline(always)]
    fn inputs<const SLOTS: usize>(&self, first: usize) -> [CodedSlot; SLOTS] {
        std::array::from_fn(|s| self.input.slot(first + s))
    }

    /// The rows of `slot`, where they are the product's.
    #[inline(always)]
    fn rows_of(&self, slot: usize) -> [Option<usize>; 2] {
        let per_slot = activation::slot_rows(self.input.bits);
        let row = |number: usize| Some(slot * per_slot + number).filter(|row| self.product.rows.contains(row));
        [row(0), if per_slot == 2 { row(1) } else { None }]
    }

    /// Writes the outputs of `panel` for the rows of `slot`: sixteen each, or fewer in the last panel.
    #[inline(always)]
    unsafe fn write<S: Simd>(&self, panel: usize, slot: usize, sums: [S::Floats; 2]) {
        for (row, sum) in self.rows_of(slot).into_iter().zip(sums) {
            let Some(row) = row else { continue };
            let mut values = [0.0; LANES];
            // SAFETY: `values` has sixteen lanes.
            unsafe { S::store(values.as_mut_ptr(), sum) };
            self.write_values(panel, row, &mut values);
        }
    }

    /// Asks for the lines of the outputs of `panel` for `slot`: outputs of successive rows are in different pages, and
    /// a write would wait for both page and line.
    #[inline(always)]
    fn prefetch_outputs(&self, panel: usize, slot: usize) {
        let Product { weights, rows, out, .. } = self.product;
        for row in self.rows_of(slot).into_iter().flatten() {
            let target = out.wrapping_add((row - rows.start) * weights.rows + panel * LANES);
            prefetch(target.cast());
            prefetch(target.wrapping_add(LANES - 1).cast());
        }
    }

    #[inline(always)]
    fn write_values(&self, panel: usize, row: usize, values: &mut [f32; LANES]) {
        let Product { weights, bias, rows, out, .. } = self.product;
        let column = panel * LANES;
        let used = (weights.rows - column).min(LANES);
        if let Some(bias) = bias {
            for (value, bias) in values.iter_mut().zip(&bias[column..column + used]) {
                *value += bias;
            }
        }
        // SAFETY: `row` and the `used` columns are inside `out`, and belong to this task.
        unsafe {
            let target = out.add((row - rows.start) * weights.rows + column);
            if used == LANES {
                target.cast::<[f32; LANES]>().write_unaligned(*values);
            } else {
                std::ptr::copy_nonoverlapping(values.as_ptr(), target, used);
            }
        }
    }
}

/// A kernel that multiplies tiles of slots with panels.
trait RowTile {
    /// The panels to multiply with.
    fn panels(&self) -> &Panels<'_, '_>;

    /// Prepares for the tiles of `panel`.
    #[inline(always)]
    fn begin<S: Simd>(&mut self, _panel: usize) {}

    /// Writes the outputs of `panel` for `SLOTS` slots from `first` on.
    fn tile<S: Simd, const SLOTS: usize>(&self, panel: usize, first: usize);
}

/// Slots whose outputs are written panel after panel: a panel writes one cache line of each row, and lines of more rows
/// than these would be gone from the caches, and their pages from the translation buffer, before the next panel.
const CHUNK_SLOTS: usize = 24;

/// Calls `kernel` for all slots and panels: tiles of `MANY` slots, then of `FEW`, then of one.
#[inline(always)]
fn for_tiles<S: Simd, K: RowTile, const MANY: usize, const FEW: usize>(kernel: &mut K) {
    let (slots, panels) = (kernel.panels().slots(), kernel.panels().panels.clone());
    for start in slots.clone().step_by(CHUNK_SLOTS) {
        let end = (start + CHUNK_SLOTS).min(slots.end);
        for panel in panels.clone() {
            kernel.begin::<S>(panel);
            for slot in start..end {
                kernel.panels().prefetch_outputs(panel, slot);
            }
            let mut slot = start;
            while slot < end {
                if end - slot >= MANY {
                    kernel.tile::<S, MANY>(panel, slot);
                    slot += MANY;
                } else if end - slot >= FEW {
                    kernel.tile::<S, FEW>(panel, slot);
                    slot += FEW;
                } else {
                    kernel.tile::<S, 1>(panel, slot);
                    slot += 1;
                }
            }
        }
    }
}

/// The exact sums of a superblock so far, for `SLOTS` slots × sixteen outputs: of the first and of the second plane.
struct Exact<S: Simd, const SLOTS: usize>([[S::Ints; 2]; SLOTS]);

impl<S: Simd, const SLOTS: usize> Exact<S, SLOTS> {
    /// # Safety
    /// Call only inside a kernel of `S`.
    #[inline(always)]
    unsafe fn zero() -> Self {
        // SAFETY: the caller is a kernel of `S`.
        Self([[unsafe { S::ints_zero() }; 2]; SLOTS])
    }
}

/// The running sums of the rows of `SLOTS` slots × sixteen outputs, as
/// [`arithmetic::products`](crate::arithmetic::products) defines them: chains of four superblocks, which are added in
/// order.
struct Sums<S: Simd, const SLOTS: usize> {
    total: [[S::Floats; 2]; SLOTS],
    chain: [[S::Floats; 2]; SLOTS],
}

impl<S: Simd, const SLOTS: usize> Sums<S, SLOTS> {
    /// # Safety
    /// Call only inside a kernel of `S`; so with the other methods.
    #[inline(always)]
    unsafe fn zero() -> Self {
        // SAFETY: the caller is a kernel of `S`.
        let zero = unsafe { S::splat(0.0) };
        Self { total: [[zero; 2]; SLOTS], chain: [[zero; 2]; SLOTS] }
    }

    /// Adds the sums of superblock `index`; `units` are those of its sixteen weight rows.
    #[inline(always)]
    unsafe fn add(&mut self, index: usize, units: S::Floats, inputs: &[CodedSlot; SLOTS], exact: Exact<S, SLOTS>) {
        // SAFETY: the caller is a kernel of `S`; every row has a unit for this superblock.
        unsafe {
            if index > 0 && index.is_multiple_of(CHAIN) {
                self.close(index);
            }
            let factor = S::splat(256.0);
            for ((chain, [first, second]), input) in self.chain.iter_mut().zip(exact.0).zip(inputs) {
                let unit = S::mul(units, S::splat(*input.units.add(index)));
                match input.second_units {
                    None => chain[0] = S::fma(S::fma(S::floats(first), factor, S::floats(second)), unit, chain[0]),
                    Some(second_units) => {
                        let second_unit = S::mul(units, S::splat(*second_units.as_ptr().add(index)));
                        chain[0] = S::fma(S::mul(S::floats(first), factor), unit, chain[0]);
                        chain[1] = S::fma(S::mul(S::floats(second), factor), second_unit, chain[1]);
                    }
                }
            }
        }
    }

    /// Adds the chains that end before superblock `end` to the totals.
    #[inline(always)]
    unsafe fn close(&mut self, end: usize) {
        // SAFETY: the caller is a kernel of `S`.
        unsafe {
            for (total, chain) in self.total.as_flattened_mut().iter_mut().zip(self.chain.as_flattened_mut()) {
                *total = if end <= CHAIN { *chain } else { S::add(*total, *chain) };
                *chain = S::splat(0.0);
            }
        }
    }

    /// Returns the totals after `count` superblocks.
    #[inline(always)]
    unsafe fn finish(mut self, count: usize) -> [[S::Floats; 2]; SLOTS] {
        // SAFETY: the caller is a kernel of `S`.
        unsafe { self.close(count) };
        self.total
    }
}

#[cfg(test)]
mod tests;
