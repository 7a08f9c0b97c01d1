//! out = x · Wᵀ: rows of activations times panels of weights.
//!
//! A task is a range of panels, for all rows. Rows are processed in tiles, so that a panel's codes are unpacked once
//! per tile. Each row of a tile has its own accumulators, filled in column order, so the bits of a row's result do not
//! depend on its tile, batch or thread.

use super::activation::{BLOCK_CODES, CodedRows, Rows};
use super::packed::{Coded, Dense, Form, Packed};
use super::thread_pool::{Panicked, ThreadPool};
use crate::format::ElementType;
use crate::format::blocks::{BLOCK, Coding, Levels};
use crate::simd::Tier;
use crate::simd::{Kernel, LANES, Simd};
use layout::Layout;
use std::ops::Range;

mod layout;

/// Tasks per thread: several, so that one delayed thread does not delay the step.
const TASKS_PER_THREAD: usize = 4;

/// One product of a parallel section. The products of a section share an operand, and run as one set of tasks.
pub(super) struct Product<'a> {
    pub(super) weights: &'a Packed,
    pub(super) bias: Option<&'a [f32]>,
    /// The operand's rows that are multiplied.
    pub(super) rows: Range<usize>,
    /// The outputs: \[row]\[weight row].
    pub(super) out: &'a mut [f32],
}

/// Activations in the forms that the products of a section read.
pub(super) struct Operand<'a> {
    pub(super) floats: &'a Rows,
    pub(super) codes: Option<&'a CodedRows>,
}

struct Job<'a> {
    weights: &'a Packed,
    bias: Option<&'a [f32]>,
    rows: Range<usize>,
    /// The output matrix; each task writes its own columns.
    out: *mut f32,
    first_panel: usize,
}

// SAFETY: tasks write disjoint columns of `out`, and the owner of `out` waits for the end of the section.
unsafe impl Sync for Job<'_> {}

/// Computes all `products` of `input`.
pub(super) fn run(
    tier: Tier,
    pool: &mut ThreadPool,
    input: &Operand<'_>,
    products: &mut [Product<'_>],
) -> Result<(), Panicked> {
    let mut jobs = Vec::with_capacity(products.len());
    let mut panels = 0;
    for product in products.iter_mut() {
        assert_eq!(product.out.len(), product.rows.len() * product.weights.rows, "the output has the wrong length");
        jobs.push(Job {
            weights: product.weights,
            bias: product.bias,
            rows: product.rows.clone(),
            out: product.out.as_mut_ptr(),
            first_panel: panels,
        });
        panels += product.weights.panels();
    }
    let tasks = (pool.threads() * TASKS_PER_THREAD).max(products.len()).min(panels);
    pool.run(tasks, &|task| {
        let mut range = panels * task / tasks..panels * (task + 1) / tasks;
        while range.start < range.end {
            // The last job that starts at or before the range; one exists, since the first job starts at 0.
            let index = jobs.partition_point(|job| job.first_panel <= range.start) - 1;
            let job = &jobs[index];
            let end = range.end.min(job.first_panel + job.weights.panels());
            tier.run(Panels { job, input, panels: range.start - job.first_panel..end - job.first_panel });
            range.start = end;
        }
    })
}

struct Panels<'a, 'b> {
    job: &'a Job<'b>,
    input: &'a Operand<'b>,
    panels: std::ops::Range<usize>,
}

impl Kernel for Panels<'_, '_> {
    #[inline(always)]
    fn run<S: Simd>(self) {
        for panel in self.panels.clone() {
            match (&self.job.weights.form, self.input.codes) {
                (Form::Dense(dense), _) => self.dense::<S>(dense, panel),
                (Form::Coded(coded), Some(codes)) => self.coded::<S>(coded, codes, panel),
                (Form::Coded(_), None) => unreachable!("coded weights without coded activations"),
            }
        }
    }
}

impl Panels<'_, '_> {
    #[inline(always)]
    fn dense<S: Simd>(&self, dense: &Dense, panel: usize) {
        match dense.element {
            ElementType::F16 => self.dense_rows::<S, 16>(dense, panel),
            ElementType::BF16 => self.dense_rows::<S, 17>(dense, panel),
            _ => self.dense_rows::<S, 32>(dense, panel),
        }
    }

    /// `KIND` is 32 for f32, 16 for f16, 17 for bf16.
    #[inline(always)]
    fn dense_rows<S: Simd, const KIND: u32>(&self, dense: &Dense, panel: usize) {
        let Range { start: mut row, end } = self.job.rows.clone();
        while row < end {
            row += match end - row {
                8.. => self.dense_tile::<S, KIND, 8>(dense, panel, row),
                4.. => self.dense_tile::<S, KIND, 4>(dense, panel, row),
                _ => self.dense_tile::<S, KIND, 1>(dense, panel, row),
            };
        }
    }

    #[inline(always)]
    fn dense_tile<S: Simd, const KIND: u32, const ROWS: usize>(
        &self,
        dense: &Dense,
        panel: usize,
        first: usize,
    ) -> usize {
        let columns = self.job.weights.columns;
        let size = dense.element.block_bytes();
        let start = panel * columns * LANES * size;
        let weights = dense.values.bytes()[start..start + columns * LANES * size].as_ptr();
        let inputs: [&[f32]; ROWS] = std::array::from_fn(|r| &self.input.floats.row(first + r)[..columns]);
        // SAFETY: `weights` has `columns` vectors, and every input has `columns` values.
        unsafe {
            let mut sums = [S::splat(0.0); ROWS];
            for column in 0..columns {
                let at = weights.add(column * LANES * size);
                let vector = match KIND {
                    16 => S::load_f16(at.cast()),
                    17 => S::load_bf16(at.cast()),
                    _ => S::load(at.cast()),
                };
                for r in 0..ROWS {
                    sums[r] = S::fma(vector, S::splat(*inputs[r].get_unchecked(column)), sums[r]);
                }
            }
            for (r, sum) in sums.into_iter().enumerate() {
                self.write::<S>(panel, first + r, sum);
            }
        }
        ROWS
    }

    #[inline(always)]
    fn coded<S: Simd>(&self, coded: &Coded, input: &CodedRows, panel: usize) {
        let Coding { bits, levels, has_mins, .. } = coded.coding;
        match (levels, bits, has_mins) {
            (Levels::Fp4, ..) => self.coded_rows::<S, layout::Fp4>(coded, input, panel),
            (Levels::Iq4, ..) => self.coded_rows::<S, layout::Iq4>(coded, input, panel),
            (_, 2, _) => self.coded_rows::<S, layout::Even<2, true, true>>(coded, input, panel),
            (_, 3, _) => self.coded_rows::<S, layout::Even<3, false, true>>(coded, input, panel),
            (_, 4, false) => self.coded_rows::<S, layout::Even<4, false, false>>(coded, input, panel),
            (_, 4, true) => self.coded_rows::<S, layout::Even<4, true, false>>(coded, input, panel),
            (_, 5, false) => self.coded_rows::<S, layout::Even<5, false, false>>(coded, input, panel),
            (_, 5, true) => self.coded_rows::<S, layout::Even<5, true, false>>(coded, input, panel),
            (_, 6, _) => self.coded_rows::<S, layout::Even<6, false, true>>(coded, input, panel),
            _ => self.coded_rows::<S, layout::Even<8, false, false>>(coded, input, panel),
        }
    }

    #[inline(always)]
    fn coded_rows<S: Simd, L: Layout>(&self, coded: &Coded, input: &CodedRows, panel: usize) {
        let Range { start: mut row, end } = self.job.rows.clone();
        while row < end {
            row += match end - row {
                8.. => self.coded_tile::<S, L, 8>(coded, input, panel, row),
                4.. => self.coded_tile::<S, L, 4>(coded, input, panel, row),
                2.. => self.coded_tile::<S, L, 2>(coded, input, panel, row),
                _ => self.coded_tile::<S, L, 1>(coded, input, panel, row),
            };
        }
    }

    #[inline(always)]
    fn coded_tile<S: Simd, L: Layout, const ROWS: usize>(
        &self,
        coded: &Coded,
        input: &CodedRows,
        panel: usize,
        first: usize,
    ) -> usize {
        let blocks = self.job.weights.columns / BLOCK;
        let halves = if L::SPLIT { 2 } else { 1 };
        let block_bytes = Coded::block_bytes(coded.coding);
        let codes = &coded.codes.bytes()[panel * blocks * block_bytes..][..blocks * block_bytes];
        let scales = &coded.scales[panel * blocks * halves * LANES..][..blocks * halves * LANES];
        let mins =
            if L::MINS { &coded.mins[panel * blocks * halves * LANES..][..blocks * halves * LANES] } else { &[] };
        let zero = coded.coding.zero;
        let row_start = first * blocks;
        let row_codes = input.codes[row_start * BLOCK_CODES..][..ROWS * blocks * BLOCK_CODES].as_ptr();
        let row_scales = &input.scales[row_start..][..ROWS * blocks];
        let half_sums = &input.half_sums[row_start * 2..][..ROWS * blocks * 2];
        let weighted_sums = &input.weighted_sums[row_start..][..ROWS * blocks];
        // SAFETY: the slices above have exactly the lengths that the loops below read, in vectors of sixteen lanes.
        unsafe {
            let mut sums = [S::splat(0.0); ROWS];
            for block in 0..blocks {
                let at = codes.as_ptr().add(block * block_bytes);
                let four = |r: usize, plane: usize, group: usize| {
                    let at = (r * blocks + block) * BLOCK_CODES + plane * BLOCK + group * 4;
                    row_codes.add(at).cast::<i32>().read_unaligned()
                };
                let dots = block_dots::<S, L, ROWS>(at, four);
                let vector = |half: usize| (block * halves + half) * LANES;
                let scale = L::scales::<S>(scales.as_ptr().add(vector(0)));
                for r in 0..ROWS {
                    let index = r * blocks + block;
                    let by = *row_scales.get_unchecked(index);
                    let sums_at = half_sums.as_ptr().add(index * 2);
                    if L::SPLIT {
                        let upper = L::scales::<S>(scales.as_ptr().add(vector(1)));
                        let low = S::floats_less(dots[r][0], zero * *sums_at);
                        let high = S::floats_less(dots[r][1], zero * *sums_at.add(1));
                        let both = S::fma(high, upper, S::mul(low, scale));
                        sums[r] = S::fma(both, S::splat(by), sums[r]);
                    } else {
                        let less = zero * (*sums_at + *sums_at.add(1));
                        let value = S::floats_less(dots[r][0], less);
                        sums[r] = S::fma(value, S::mul(scale, S::splat(by)), sums[r]);
                    }
                    if L::MINS && L::SPLIT {
                        for half in 0..2 {
                            let min = S::load_f16(mins.as_ptr().add(vector(half)));
                            sums[r] = S::fma(min, S::splat(by * *sums_at.add(half) as f32), sums[r]);
                        }
                    } else if L::MINS {
                        let min = S::load_f16(mins.as_ptr().add(vector(0)));
                        sums[r] = S::fma(min, S::splat(*weighted_sums.get_unchecked(index)), sums[r]);
                    }
                }
            }
            for (r, sum) in sums.into_iter().enumerate() {
                self.write::<S>(panel, first + r, sum);
            }
        }
        ROWS
    }

    /// Writes the outputs of `panel` for `row`: sixteen, or fewer in the last panel.
    #[inline(always)]
    unsafe fn write<S: Simd>(&self, panel: usize, row: usize, sum: S::Floats) {
        let Job { weights, bias, rows, out, .. } = self.job;
        let column = panel * LANES;
        let used = (weights.rows - column).min(LANES);
        let mut values = [0.0; LANES];
        // SAFETY: `values` has sixteen lanes; `row` and the `used` columns are inside `out`, and belong to this task.
        unsafe {
            S::store(values.as_mut_ptr(), sum);
            if let Some(bias) = bias {
                for (value, bias) in values.iter_mut().zip(&bias[column..column + used]) {
                    *value += bias;
                }
            }
            let target = out.add((row - rows.start) * weights.rows + column);
            std::ptr::copy_nonoverlapping(values.as_ptr(), target, used);
        }
    }
}

/// Returns the integer dot products of one block of sixteen weight rows with `ROWS` rows of codes, per half block if
/// the halves have their own scales. `four(r, plane, g)` is the `g`-th group of four bytes of a plane of row r.
#[inline(always)]
unsafe fn block_dots<S: Simd, L: Layout, const ROWS: usize>(
    at: *const u8,
    four: impl Fn(usize, usize, usize) -> i32,
) -> [[S::Ints; 2]; ROWS] {
    // SAFETY: the caller passes a whole block, and rows with its 32 columns.
    unsafe {
        let mut out = [[S::ints_zero(); 2]; ROWS];
        let mut planes = layout::Planes::<S>::of::<L>(at);
        let mut upper = [S::ints_zero(); ROWS];
        let mut lower = [S::ints_zero(); ROWS];
        for group in 0..8 {
            let codes = planes.next::<L>(at, group);
            for r in 0..ROWS {
                if L::WIDE {
                    upper[r] = S::dot_wide(upper[r], codes, four(r, 0, group));
                    lower[r] = S::dot_wide(lower[r], codes, four(r, 1, group));
                } else {
                    upper[r] = S::dot(upper[r], codes, four(r, 0, group));
                    lower[r] = S::dot(lower[r], codes, four(r, 1, group));
                }
            }
            if L::SPLIT && group == 3 {
                for r in 0..ROWS {
                    out[r][0] = S::join_planes(upper[r], lower[r]);
                    upper[r] = S::ints_zero();
                    lower[r] = S::ints_zero();
                }
            }
        }
        let last = if L::SPLIT { 1 } else { 0 };
        for r in 0..ROWS {
            out[r][last] = S::join_planes(upper[r], lower[r]);
        }
        out
    }
}

#[cfg(test)]
mod tests;
