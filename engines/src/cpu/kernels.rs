//! Kernels between the matrix products: norms, rounding, rotation, activation, sums. Threads share the rows.

use super::activation::{CodedParts, CodedRows, Rows, Wanted};
use super::buffer_pool::BufferPool;
use super::cache::{LayerCache, TOKENS};
use super::disjoint::DisjointMut;
use super::rotary::Rotations;
use super::scratch::Scratch;
use super::thread_pool::{Panicked, ThreadPool};
use crate::arithmetic::functions::{clamped_swish, gelu_tanh, silu};
use crate::arithmetic::norms;
use crate::backend::Batch;
use crate::engine::ActivationBits;
use crate::model::Activation;
use crate::simd::Tier;
use crate::simd::{Kernel, Simd};
use std::ops::Range;

/// Rows of one task. A decode step of a few rows is one task, which the calling thread runs without waking a helper.
const TASK_ROWS: usize = 8;
const _: () = assert!(TASK_ROWS.is_multiple_of(2), "both rows of a slot are in one task");

/// x / √(mean of x² + epsilon) · weight.
#[derive(Clone, Copy)]
pub(super) struct RmsNorm<'a> {
    pub(super) weight: &'a [f32],
    pub(super) epsilon: f32,
}

/// Runs `kernel` on all rows, in ranges of [`TASK_ROWS`].
fn over_rows<K: Kernel>(
    tier: Tier,
    pool: &mut ThreadPool,
    rows: usize,
    kernel: impl Fn(Range<usize>) -> K + Sync,
) -> Result<(), Panicked> {
    pool.run(rows.div_ceil(TASK_ROWS), &|task| {
        let start = task * TASK_ROWS;
        tier.run(kernel(start..(start + TASK_ROWS).min(rows)));
    })
}

/// Returns `input` after `norm`, if there is a norm.
pub(super) fn norm(
    tier: Tier,
    pool: &mut ThreadPool,
    buffers: &mut BufferPool,
    input: &Rows,
    norm: Option<RmsNorm<'_>>,
) -> Result<Option<Rows>, Panicked> {
    let Some(norm) = norm else { return Ok(None) };
    let mut out = buffers.rows(input.count(), input.width);
    let parts = DisjointMut::new(&mut out.values);
    over_rows(tier, pool, input.count(), |rows| NormRows { rows, input, norm, out: &parts })?;
    Ok(Some(out))
}

struct NormRows<'a> {
    rows: Range<usize>,
    input: &'a Rows,
    norm: RmsNorm<'a>,
    out: &'a DisjointMut<'a, f32>,
}

impl Kernel for NormRows<'_> {
    #[inline(always)]
    fn run<S: Simd>(self) {
        let width = self.input.width;
        for row in self.rows.clone() {
            // SAFETY: a row belongs to one task.
            let out = unsafe { self.out.take(row * width..(row + 1) * width) };
            norms::rms_norm(self.input.row(row), self.norm.weight, self.norm.epsilon, out);
        }
    }
}

/// What a product multiplies: rows, or what is computed from rows as they are rounded.
#[derive(Clone, Copy)]
pub(super) enum Operand<'a> {
    Rows(&'a Rows),
    Normed(&'a Rows, RmsNorm<'a>),
    /// activation(gate, up).
    Gated {
        activation: Activation,
        gate: &'a Rows,
        up: &'a Rows,
    },
}

impl<'a> Operand<'a> {
    /// norm(`rows`), or `rows` without a norm.
    pub(super) fn new(rows: &'a Rows, norm: Option<RmsNorm<'a>>) -> Self {
        norm.map_or(Self::Rows(rows), |norm| Self::Normed(rows, norm))
    }

    pub(super) fn rows(&self) -> &'a Rows {
        match self {
            Self::Rows(rows) | Self::Normed(rows, _) | Self::Gated { gate: rows, .. } => rows,
        }
    }
}

/// Returns the codes of `operand`.
pub(super) fn encode(
    tier: Tier,
    pool: &mut ThreadPool,
    buffers: &mut BufferPool,
    operand: Operand<'_>,
    bits: ActivationBits,
    wanted: Wanted,
) -> Result<CodedRows, Panicked> {
    let (count, width) = (operand.rows().count(), operand.rows().width);
    let mut codes = buffers.coded(bits, count, width, wanted);
    let parts = codes.parts();
    over_rows(tier, pool, count, |rows| Encode { rows, operand, codes: &parts })?;
    Ok(codes)
}

struct Encode<'a> {
    rows: Range<usize>,
    operand: Operand<'a>,
    codes: &'a CodedParts<'a>,
}

impl Kernel for Encode<'_> {
    #[inline(always)]
    fn run<S: Simd>(self) {
        let mut scratch = Scratch::take(self.operand.rows().width);
        for row in self.rows.clone() {
            let values = match self.operand {
                Operand::Rows(rows) => rows.row(row),
                Operand::Normed(rows, norm) => {
                    norms::rms_norm(rows.row(row), norm.weight, norm.epsilon, &mut scratch);
                    &scratch
                }
                Operand::Gated { activation, gate, up } => {
                    activate(activation, gate.row(row), up.row(row), &mut scratch);
                    &scratch
                }
            };
            // SAFETY: the caller is a kernel of `S`; a slot belongs to one task.
            unsafe { self.codes.encode::<S>(row, values) };
        }
        if let Some(missing) = self.codes.missing_row().filter(|&missing| missing == self.rows.end) {
            scratch.fill(0.0);
            // SAFETY: as above; the row shares the slot of this task's last row.
            unsafe { self.codes.encode::<S>(missing, &scratch) };
        }
    }
}

/// out = activation(gate, up).
#[inline(always)]
fn activate(activation: Activation, gate: &[f32], up: &[f32], out: &mut [f32]) {
    let inputs = gate.iter().zip(up);
    match activation {
        Activation::Silu => out.iter_mut().zip(inputs).for_each(|(out, (&gate, &up))| *out = silu(gate) * up),
        Activation::GeluTanh => out.iter_mut().zip(inputs).for_each(|(out, (&gate, &up))| *out = gelu_tanh(gate) * up),
        Activation::ClampedSwish { slope, limit } => {
            out.iter_mut().zip(inputs).for_each(|(out, (&gate, &up))| *out = clamped_swish(gate, up, slope, limit));
        }
    }
}

/// The norm and the rotation of projected queries or keys.
pub(super) struct Turn<'a> {
    pub(super) norm: Option<RmsNorm<'a>>,
    /// The number of values that one norm spans.
    pub(super) norm_width: usize,
    pub(super) head_dim: usize,
    pub(super) rotations: &'a Rotations,
}

/// Normalises and rotates every head of every row, in place.
pub(super) fn turn_heads(tier: Tier, pool: &mut ThreadPool, turn: &Turn<'_>, rows: &mut Rows) -> Result<(), Panicked> {
    let (count, width) = (rows.count(), rows.width);
    let values = DisjointMut::new(&mut rows.values);
    over_rows(tier, pool, count, |rows| TurnRows { rows, width, turn, values: &values })
}

struct TurnRows<'a> {
    rows: Range<usize>,
    width: usize,
    turn: &'a Turn<'a>,
    values: &'a DisjointMut<'a, f32>,
}

impl Kernel for TurnRows<'_> {
    #[inline(always)]
    fn run<S: Simd>(self) {
        let mut normed = Scratch::take(self.turn.norm_width);
        for row in self.rows.clone() {
            // SAFETY: a row belongs to one task.
            let values = unsafe { self.values.take(row * self.width..(row + 1) * self.width) };
            if let Some(norm) = self.turn.norm {
                for part in values.chunks_exact_mut(self.turn.norm_width) {
                    norms::rms_norm(part, norm.weight, norm.epsilon, &mut normed);
                    part.copy_from_slice(&normed);
                }
            }
            for head in values.chunks_exact_mut(self.turn.head_dim) {
                self.turn.rotations.turn(row, head);
            }
        }
    }
}

/// Writes every row's keys and values to its page.
pub(super) fn write_cache(tier: Tier, cache: &mut LayerCache, batch: &Batch, keys: &Rows, values: &Rows) {
    tier.run(WriteCache { cache, batch, keys, values });
}

struct WriteCache<'a> {
    cache: &'a mut LayerCache,
    batch: &'a Batch,
    keys: &'a Rows,
    values: &'a Rows,
}

impl Kernel for WriteCache<'_> {
    #[inline(always)]
    fn run<S: Simd>(self) {
        for span in &self.batch.spans {
            for (offset, row) in span.rows.clone().enumerate() {
                let position = span.first_position + offset;
                let page = span.pages[position / TOKENS];
                self.cache.write::<S>(page, position % TOKENS, self.keys.row(row), self.values.row(row));
            }
        }
    }
}

/// Adds norm(delta) to `hidden`, or delta itself without a norm.
pub(super) fn add(
    tier: Tier,
    pool: &mut ThreadPool,
    hidden: &mut Rows,
    delta: &Rows,
    norm: Option<RmsNorm<'_>>,
) -> Result<(), Panicked> {
    let count = hidden.count();
    let hidden = DisjointMut::new(&mut hidden.values);
    over_rows(tier, pool, count, |rows| Add { rows, hidden: &hidden, delta, norm })
}

struct Add<'a> {
    rows: Range<usize>,
    hidden: &'a DisjointMut<'a, f32>,
    delta: &'a Rows,
    norm: Option<RmsNorm<'a>>,
}

impl Kernel for Add<'_> {
    #[inline(always)]
    fn run<S: Simd>(self) {
        let width = self.delta.width;
        let mut normed = Scratch::take(width);
        for row in self.rows.clone() {
            // SAFETY: a row belongs to one task.
            let hidden = unsafe { self.hidden.take(row * width..(row + 1) * width) };
            let mut delta = self.delta.row(row);
            if let Some(norm) = self.norm {
                norms::rms_norm(delta, norm.weight, norm.epsilon, &mut normed);
                delta = &normed;
            }
            hidden.iter_mut().zip(delta).for_each(|(h, d)| *h += d);
        }
    }
}

/// Sets each row of `out` to Σ weight · row of `parts`, in the order of the row's choices.
pub(super) fn combine(
    tier: Tier,
    pool: &mut ThreadPool,
    choices: &[Vec<(usize, f32)>],
    parts: &Rows,
    out: &mut Rows,
) -> Result<(), Panicked> {
    let count = out.count();
    let out = DisjointMut::new(&mut out.values);
    over_rows(tier, pool, count, |rows| Combine { rows, choices, parts, out: &out })
}

struct Combine<'a> {
    rows: Range<usize>,
    choices: &'a [Vec<(usize, f32)>],
    parts: &'a Rows,
    out: &'a DisjointMut<'a, f32>,
}

impl Kernel for Combine<'_> {
    #[inline(always)]
    fn run<S: Simd>(self) {
        let width = self.parts.width;
        for row in self.rows.clone() {
            // SAFETY: a row belongs to one task.
            let out = unsafe { self.out.take(row * width..(row + 1) * width) };
            out.fill(0.0);
            for &(at, weight) in &self.choices[row] {
                out.iter_mut().zip(self.parts.row(at)).for_each(|(o, p)| *o = weight.mul_add(*p, *o));
            }
        }
    }
}
