//! Attention over the paged cache. Memory never holds more than one page of scores for a query.
//!
//! Running softmax (Milakov and Gimelshein 2018; Dao et al. 2022): each page, in order of position, gives scores of 32
//! keys and a new maximum; the sums so far are rescaled, and the page's weighted values added. Pages are aligned to
//! positions, so a query's arithmetic depends on its position alone: the bits are the same in any batch and chunking.

use super::activation::Rows;
use super::cache::{LayerCache, TOKENS};
use super::disjoint::DisjointMut;
use super::thread_pool::{Panicked, ThreadPool};
use crate::backend::{Batch, Span};
use crate::engine::KvElement;
use crate::model::Attention;
use crate::simd::Tier;
use crate::simd::math;
use crate::simd::{Kernel, LANES, Simd};

/// Queries that are computed together on a page and share its loads.
const TILE: usize = 4;
/// Most rows of one task.
const TASK_ROWS: usize = 16;

/// The heads of a layer, with their sinks and cache.
#[derive(Clone, Copy)]
pub(super) struct Heads<'a> {
    pub(super) spec: &'a Attention,
    /// The score of each head's sink: a key without a value.
    pub(super) sinks: Option<&'a [f32]>,
    pub(super) cache: &'a LayerCache,
}

/// out = softmax(q · K · scale) · V, for every row and head.
pub(super) fn run(
    tier: Tier,
    pool: &mut ThreadPool,
    heads: &Heads<'_>,
    batch: &Batch,
    queries: &Rows,
    out: &mut Rows,
) -> Result<(), Panicked> {
    let Heads { spec, sinks, cache } = *heads;
    let tasks = tasks(spec, batch, pool.threads());
    let width = out.width;
    let parts = DisjointMut::new(&mut out.values);
    pool.run(tasks.len(), &|index| {
        tier.run(Job { spec, sinks, cache, task: &tasks[index], queries, out: &parts, out_width: width });
    })
}

/// Rows of one sequence, with query heads that share a key head.
struct Task<'a> {
    span: &'a Span,
    rows: std::ops::Range<usize>,
    kv_head: usize,
    heads: std::ops::Range<usize>,
}

/// Splits a batch into tasks. Heads that share keys stay in one task unless that leaves threads without work.
fn tasks<'a>(spec: &Attention, batch: &'a Batch, threads: usize) -> Vec<Task<'a>> {
    let blocks: usize = batch.spans.iter().map(|span| span.rows.len().div_ceil(TASK_ROWS)).sum();
    let splits_groups = blocks * spec.kv_heads < threads * 2;
    let heads_per_task = if splits_groups { 1 } else { spec.group() };
    let mut tasks = Vec::new();
    for span in &batch.spans {
        for start in span.rows.clone().step_by(TASK_ROWS) {
            for kv_head in 0..spec.kv_heads {
                let heads = kv_head * spec.group()..(kv_head + 1) * spec.group();
                for head in heads.clone().step_by(heads_per_task) {
                    tasks.push(Task {
                        span,
                        rows: start..(start + TASK_ROWS).min(span.rows.end),
                        kv_head,
                        heads: head..(head + heads_per_task).min(heads.end),
                    });
                }
            }
        }
    }
    tasks
}

struct Job<'a> {
    spec: &'a Attention,
    sinks: Option<&'a [f32]>,
    cache: &'a LayerCache,
    task: &'a Task<'a>,
    queries: &'a Rows,
    out: &'a DisjointMut<'a, f32>,
    out_width: usize,
}

/// One query head of a row: its index, its visible positions, and its running softmax.
#[derive(Clone, Copy)]
struct Query<'a> {
    row: usize,
    head: usize,
    values: &'a [f32],
    /// The visible positions: `first_key..end_key`.
    first_key: usize,
    end_key: usize,
    largest: f32,
    sum: f32,
}

impl Kernel for Job<'_> {
    #[inline(always)]
    fn run<S: Simd>(self) {
        match self.cache.element {
            KvElement::F16 => self.all_queries::<S, true>(),
            KvElement::F32 => self.all_queries::<S, false>(),
        }
    }
}

impl<'a> Job<'a> {
    #[inline(always)]
    fn all_queries<S: Simd, const HALF: bool>(&self) {
        let mut sums = vec![0.0; TILE * self.cache.padded_dim()];
        let heads = self.task.heads.clone();
        let count = self.task.rows.len() * heads.len();
        let mut next = 0;
        while next < count {
            next += if count - next >= TILE {
                self.tile::<S, HALF, TILE>(next, &mut sums)
            } else {
                self.tile::<S, HALF, 1>(next, &mut sums)
            };
        }
    }

    fn query(&self, number: usize) -> Query<'a> {
        let heads = &self.task.heads;
        let row = self.task.rows.start + number / heads.len();
        let head = heads.start + number % heads.len();
        let position = self.task.span.first_position + row - self.task.span.rows.start;
        let window = self.spec.window.unwrap_or(usize::MAX);
        // A sink counts as a key before all others.
        let (largest, sum) = self.sinks.map_or((f32::NEG_INFINITY, 0.0), |sinks| (sinks[head], 1.0));
        Query {
            row,
            head,
            values: &self.queries.row(row)[head * self.spec.head_dim..][..self.spec.head_dim],
            first_key: (position + 1).saturating_sub(window),
            end_key: position + 1,
            largest,
            sum,
        }
    }

    #[inline(always)]
    fn tile<S: Simd, const HALF: bool, const N: usize>(&self, first: usize, sums: &mut [f32]) -> usize {
        let padded = self.cache.padded_dim();
        let mut queries: [Query<'_>; N] = std::array::from_fn(|i| self.query(first + i));
        sums[..N * padded].fill(0.0);
        let start = queries.iter().map(|q| q.first_key).min().unwrap_or(0) / TOKENS;
        let end = queries.iter().map(|q| q.end_key).max().unwrap_or(0).div_ceil(TOKENS);
        for index in start..end {
            let page = self.task.span.pages[index];
            let keys = self.cache.keys(page, self.task.kv_head);
            let values = self.cache.values(page, self.task.kv_head);
            let mut scores = page_scores::<S, HALF, N>(&queries, keys);
            let mut seen = [(0, 0); N];
            for (i, query) in queries.iter_mut().enumerate() {
                seen[i] = query.seen_of(index);
                let sums = &mut sums[i * padded..][..padded];
                query.weigh::<S>(self.spec, seen[i], &mut scores[i], sums);
            }
            if seen.iter().all(|&seen| seen == (0, TOKENS)) {
                add_values::<S, HALF, N>(&scores, (0, TOKENS), values, &mut sums[..N * padded]);
            } else {
                for (i, &seen) in seen.iter().enumerate() {
                    let sums = &mut sums[i * padded..][..padded];
                    add_values::<S, HALF, 1>(&[scores[i]], seen, values, sums);
                }
            }
        }
        for (query, sums) in queries.iter().zip(sums.chunks(padded)) {
            let at = query.row * self.out_width + query.head * self.spec.head_dim;
            // SAFETY: each pair of row and head belongs to one task.
            let out = unsafe { self.out.take(at..at + self.spec.head_dim) };
            for (out, &sum) in out.iter_mut().zip(sums) {
                *out = sum / query.sum;
            }
        }
        N
    }
}

impl Query<'_> {
    /// Returns the visible slots of page `index`, as (first, end).
    #[inline(always)]
    fn seen_of(&self, index: usize) -> (usize, usize) {
        let start = index * TOKENS;
        let first = self.first_key.saturating_sub(start).min(TOKENS);
        let end = self.end_key.saturating_sub(start).min(TOKENS);
        (first, end.max(first))
    }

    /// Turns a page's scores into weights, and rescales the sums so far to the new maximum.
    #[inline(always)]
    fn weigh<S: Simd>(
        &mut self,
        spec: &Attention,
        (first, end): (usize, usize),
        scores: &mut [f32; TOKENS],
        sums: &mut [f32],
    ) {
        if first == end {
            return;
        }
        for (slot, score) in scores.iter_mut().enumerate() {
            let scaled = *score * spec.scale;
            let capped = match spec.softcap {
                Some(cap) => cap * math::tanh::<S>(scaled / cap),
                None => scaled,
            };
            let seen = slot >= first && slot < end;
            *score = if seen { capped } else { f32::NEG_INFINITY };
        }
        let page_largest = scores.iter().fold(f32::NEG_INFINITY, |a, &b| if b > a { b } else { a });
        let largest = if page_largest > self.largest { page_largest } else { self.largest };
        let rescale = math::exp::<S>(self.largest - largest);
        let mut lanes = [0.0_f32; LANES];
        for chunk in scores.as_chunks_mut::<LANES>().0 {
            for (lane, score) in lanes.iter_mut().zip(chunk) {
                *score = math::exp::<S>(*score - largest);
                *lane += *score;
            }
        }
        self.sum = self.sum * rescale + lanes.iter().sum::<f32>();
        self.largest = largest;
        for sum in sums {
            *sum *= rescale;
        }
    }
}

/// Returns the scores of all 32 keys of a page, visible or not.
#[inline(always)]
fn page_scores<S: Simd, const HALF: bool, const N: usize>(queries: &[Query<'_>; N], keys: &[u8]) -> [[f32; TOKENS]; N] {
    let mut scores = [[0.0; TOKENS]; N];
    let size = if HALF { 2 } else { 4 };
    let head_dim = queries[0].values.len();
    assert!(keys.len() >= head_dim * TOKENS * size, "a page holds all dimensions of its keys");
    // SAFETY: the assertion; every query has `head_dim` values.
    unsafe {
        let zero = S::splat(0.0);
        let mut sums = [[zero; 2]; N];
        for dimension in 0..head_dim {
            let at = keys.as_ptr().add(dimension * TOKENS * size);
            let lower = load::<S, HALF>(at);
            let upper = load::<S, HALF>(at.add(LANES * size));
            for (sums, query) in sums.iter_mut().zip(queries) {
                let value = S::splat(*query.values.get_unchecked(dimension));
                sums[0] = S::fma(lower, value, sums[0]);
                sums[1] = S::fma(upper, value, sums[1]);
            }
        }
        for (scores, sums) in scores.iter_mut().zip(sums) {
            S::store(scores.as_mut_ptr(), sums[0]);
            S::store(scores.as_mut_ptr().add(LANES), sums[1]);
        }
    }
    scores
}

/// sums += weights · values, over the slots `first`..`end`.
#[inline(always)]
fn add_values<S: Simd, const HALF: bool, const N: usize>(
    weights: &[[f32; TOKENS]; N],
    (first, end): (usize, usize),
    values: &[u8],
    sums: &mut [f32],
) {
    let size = if HALF { 2 } else { 4 };
    let padded = sums.len() / N;
    assert!(end <= TOKENS && values.len() >= padded * TOKENS * size, "a page holds all its values");
    for chunk in (0..padded).step_by(LANES) {
        // SAFETY: the assertion; `padded` is a multiple of the lanes.
        unsafe {
            let mut lanes: [S::Floats; N] = std::array::from_fn(|i| S::load(sums.as_ptr().add(i * padded + chunk)));
            for slot in first..end {
                let value = load::<S, HALF>(values.as_ptr().add((slot * padded + chunk) * size));
                for (lanes, weights) in lanes.iter_mut().zip(weights) {
                    *lanes = S::fma(value, S::splat(*weights.get_unchecked(slot)), *lanes);
                }
            }
            for (i, lanes) in lanes.into_iter().enumerate() {
                S::store(sums.as_mut_ptr().add(i * padded + chunk), lanes);
            }
        }
    }
}

#[inline(always)]
unsafe fn load<S: Simd, const HALF: bool>(from: *const u8) -> S::Floats {
    // SAFETY: the caller guarantees sixteen elements at `from`.
    unsafe { if HALF { S::load_f16(from.cast()) } else { S::load(from.cast()) } }
}
