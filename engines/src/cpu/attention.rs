//! Attention over the paged cache, as [`arithmetic::attention`](crate::arithmetic::attention) defines it: chunks of 256
//! positions, joined in order. Memory never holds more than one chunk of scores for a query.
//!
//! Queries that share keys are computed in tiles, so that a page is loaded once per tile. A query's arithmetic depends
//! on its position alone: the bits are the same in any tile, batch and chunking of the prompt.

use super::activation::Rows;
use super::cache::{LayerCache, TOKENS};
use super::disjoint::DisjointMut;
use super::thread_pool::{Panicked, ThreadPool};
use crate::arithmetic::attention::{CHUNK, SUM_CHAINS, finish_score, rescales};
use crate::arithmetic::functions::{exp, tree_sum};
use crate::backend::{Batch, Span};
use crate::engine::KvElement;
use crate::model::Attention;
use crate::simd::Tier;
use crate::simd::{Kernel, LANES, Simd};
use std::ops::Range;

/// Most queries that are computed together on a page and share its loads.
const TILE: usize = 8;
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
        Job { spec, sinks, cache, task: &tasks[index], queries, out: &parts, out_width: width }.run(tier);
    })
}

/// Rows of one sequence, with query heads that share a key head.
struct Task<'a> {
    span: &'a Span,
    rows: Range<usize>,
    kv_head: usize,
    heads: Range<usize>,
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
    total: f32,
}

/// The memory of a tile: weights of a chunk for each query, and sums of values, of the chunk and of all chunks so far.
struct Scratch {
    weights: Vec<[f32; CHUNK]>,
    part: Vec<f32>,
    sums: Vec<f32>,
}

/// `N` queries of a job from number `first`; `HALF`: keys and values are f16. Each size is a kernel of its own, since a
/// compiler inlines little into very large functions.
struct Tile<'a, 'b, const HALF: bool, const N: usize> {
    job: &'b Job<'a>,
    first: usize,
    scratch: &'b mut Scratch,
}

impl<const HALF: bool, const N: usize> Kernel for Tile<'_, '_, HALF, N> {
    #[inline(always)]
    fn run<S: Simd>(self) {
        self.job.tile::<S, HALF, N>(self.first, self.scratch);
    }
}

impl<'a> Job<'a> {
    fn run(&self, tier: Tier) {
        match self.cache.element {
            KvElement::F16 => self.all_queries::<true>(tier),
            KvElement::F32 => self.all_queries::<false>(tier),
        }
    }

    fn all_queries<const HALF: bool>(&self, tier: Tier) {
        let count = self.task.rows.len() * self.task.heads.len();
        let width = TILE.min(count) * self.cache.padded_dim();
        let mut scratch =
            Scratch { weights: vec![[0.0; CHUNK]; TILE.min(count)], part: vec![0.0; width], sums: vec![0.0; width] };
        let (job, mut first) = (self, 0);
        while first < count {
            let scratch = &mut scratch;
            first += match count - first {
                TILE.. => {
                    tier.run(Tile::<HALF, TILE> { job, first, scratch });
                    TILE
                }
                4.. => {
                    tier.run(Tile::<HALF, 4> { job, first, scratch });
                    4
                }
                2.. => {
                    tier.run(Tile::<HALF, 2> { job, first, scratch });
                    2
                }
                _ => {
                    tier.run(Tile::<HALF, 1> { job, first, scratch });
                    1
                }
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
        let (largest, total) = self.sinks.map_or((f32::NEG_INFINITY, 0.0), |sinks| (sinks[head], 1.0));
        Query {
            row,
            head,
            values: &self.queries.row(row)[head * self.spec.head_dim..][..self.spec.head_dim],
            first_key: (position + 1).saturating_sub(window),
            end_key: position + 1,
            largest,
            total,
        }
    }

    #[inline(always)]
    fn tile<S: Simd, const HALF: bool, const N: usize>(&self, first: usize, scratch: &mut Scratch) {
        let padded = self.cache.padded_dim();
        let mut queries: [Query<'_>; N] = std::array::from_fn(|i| self.query(first + i));
        scratch.sums[..N * padded].fill(0.0);
        let start = queries.iter().map(|query| query.first_key).min().unwrap_or(0);
        let end = queries.iter().map(|query| query.end_key).max().unwrap_or(0);
        for chunk in start / CHUNK..end.div_ceil(CHUNK) {
            let positions = (chunk * CHUNK).max(start)..((chunk + 1) * CHUNK).min(end);
            self.score_chunk::<S, HALF, N>(&queries, positions.clone(), &mut scratch.weights);
            let seen: [Range<usize>; N] = std::array::from_fn(|i| queries[i].seen_of(chunk));
            let mut factors = [0.0; N];
            for (i, query) in queries.iter_mut().enumerate() {
                let sums = &mut scratch.sums[i * padded..][..padded];
                factors[i] = query.weigh(self.spec, &seen[i], &mut scratch.weights[i], sums);
            }
            self.mix_chunk::<S, HALF, N>(chunk, &seen, scratch);
            for (i, factor) in factors.into_iter().enumerate() {
                let (sums, part) = (&mut scratch.sums[i * padded..][..padded], &scratch.part[i * padded..][..padded]);
                sums.iter_mut().zip(part).for_each(|(sum, &part)| *sum = part.mul_add(factor, *sum));
            }
        }
        for (query, sums) in queries.iter().zip(scratch.sums.chunks(padded)) {
            let at = query.row * self.out_width + query.head * self.spec.head_dim;
            // SAFETY: each pair of row and head belongs to one task.
            let out = unsafe { self.out.take(at..at + self.spec.head_dim) };
            for (out, &sum) in out.iter_mut().zip(sums) {
                *out = sum / query.total;
            }
        }
    }

    /// Writes the products of the queries with the keys of every page that has one of `positions`.
    #[inline(always)]
    fn score_chunk<S: Simd, const HALF: bool, const N: usize>(
        &self,
        queries: &[Query<'_>; N],
        positions: Range<usize>,
        scores: &mut [[f32; CHUNK]],
    ) {
        for index in positions.start / TOKENS..positions.end.div_ceil(TOKENS) {
            let keys = self.cache.keys(self.task.span.pages[index], self.task.kv_head);
            page_scores::<S, HALF, N>(queries, keys, scores, index * TOKENS % CHUNK);
        }
    }

    /// Sets the chunk's part of every query to Σ weight · value over its `seen` positions: first those that only some
    /// queries see, then those that all see, together, then again those that only some see.
    #[inline(always)]
    fn mix_chunk<S: Simd, const HALF: bool, const N: usize>(
        &self,
        chunk: usize,
        seen: &[Range<usize>; N],
        scratch: &mut Scratch,
    ) {
        let padded = self.cache.padded_dim();
        let Scratch { weights, part, .. } = scratch;
        part[..N * padded].fill(0.0);
        let start = seen.iter().map(|seen| seen.start).max().unwrap_or(0);
        let end = seen.iter().map(|seen| seen.end).min().unwrap_or(0).max(start);
        for (i, own) in seen.iter().enumerate() {
            let before = own.start..start.min(own.end);
            self.mix::<S, HALF, 1>(chunk, before, &weights[i..=i], &mut part[i * padded..][..padded]);
        }
        self.mix::<S, HALF, N>(chunk, start..end, weights, &mut part[..N * padded]);
        for (i, own) in seen.iter().enumerate() {
            let behind = end.max(own.start).max(start.min(own.end))..own.end;
            self.mix::<S, HALF, 1>(chunk, behind, &weights[i..=i], &mut part[i * padded..][..padded]);
        }
    }

    /// Adds Σ weight · value over the `slots` of a chunk to the parts of `N` queries.
    #[inline(always)]
    fn mix<S: Simd, const HALF: bool, const N: usize>(
        &self,
        chunk: usize,
        slots: Range<usize>,
        weights: &[[f32; CHUNK]],
        parts: &mut [f32],
    ) {
        let mut slot = slots.start;
        while slot < slots.end {
            let position = chunk * CHUNK + slot;
            let within = position % TOKENS;
            let count = (TOKENS - within).min(slots.end - slot);
            let values = self.cache.values(self.task.span.pages[position / TOKENS], self.task.kv_head);
            add_values::<S, HALF, N>(weights, slot, within..within + count, values, parts);
            slot += count;
        }
    }
}

impl Query<'_> {
    /// Returns the visible slots of a chunk.
    #[inline(always)]
    fn seen_of(&self, chunk: usize) -> Range<usize> {
        let start = chunk * CHUNK;
        let first = self.first_key.saturating_sub(start).min(CHUNK);
        let end = self.end_key.saturating_sub(start).min(CHUNK);
        first..end.max(first)
    }

    /// Turns a chunk's products into weights, rescales the sums so far, and returns the factor of the chunk's part.
    #[inline(always)]
    fn weigh(&mut self, spec: &Attention, seen: &Range<usize>, scores: &mut [f32; CHUNK], sums: &mut [f32]) -> f32 {
        if seen.is_empty() {
            return 0.0;
        }
        let used = seen.end.next_multiple_of(LANES);
        let mut lanes = [f32::NEG_INFINITY; LANES];
        for (index, chunk) in scores[..used].as_chunks_mut::<LANES>().0.iter_mut().enumerate() {
            for (i, score) in chunk.iter_mut().enumerate() {
                let slot = index * LANES + i;
                let finished = finish_score(spec, *score);
                *score = if slot >= seen.start && slot < seen.end { finished } else { f32::NEG_INFINITY };
                lanes[i] = if *score > lanes[i] { *score } else { lanes[i] };
            }
        }
        let chunk_largest = lanes.iter().fold(f32::NEG_INFINITY, |a, &b| if b > a { b } else { a });
        let mut chains = [0.0_f32; SUM_CHAINS];
        for chunk in scores[..used].as_chunks_mut::<SUM_CHAINS>().0 {
            for (chain, score) in chains.iter_mut().zip(chunk) {
                *score = exp(*score - chunk_largest);
                *chain += *score;
            }
        }
        let (own, other, largest) = rescales(self.largest, chunk_largest);
        self.total = tree_sum(chains).mul_add(other, self.total * own);
        self.largest = largest;
        for sum in sums {
            *sum *= own;
        }
        other
    }
}

/// Writes the products of `N` queries with all 32 keys of a page, visible or not, to `scores` from `slot` on.
#[inline(always)]
fn page_scores<S: Simd, const HALF: bool, const N: usize>(
    queries: &[Query<'_>; N],
    keys: &[u8],
    scores: &mut [[f32; CHUNK]],
    slot: usize,
) {
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
            let page = &mut scores[slot..slot + TOKENS];
            S::store(page.as_mut_ptr(), sums[0]);
            S::store(page.as_mut_ptr().add(LANES), sums[1]);
        }
    }
}

/// sums += weights · values, over the tokens `within` a page, whose weights start at `slot` of a chunk.
#[inline(always)]
fn add_values<S: Simd, const HALF: bool, const N: usize>(
    weights: &[[f32; CHUNK]],
    slot: usize,
    within: Range<usize>,
    values: &[u8],
    sums: &mut [f32],
) {
    let size = if HALF { 2 } else { 4 };
    let padded = sums.len() / N;
    assert!(within.end <= TOKENS && values.len() >= padded * TOKENS * size, "a page holds all its values");
    assert!(weights.len() >= N && slot + within.len() <= CHUNK, "each value has weights");
    for chunk in (0..padded).step_by(LANES) {
        // SAFETY: the assertions; `padded` is a multiple of the lanes.
        unsafe {
            let mut lanes = [S::splat(0.0); N];
            for (i, lanes) in lanes.iter_mut().enumerate() {
                *lanes = S::load(sums.as_ptr().add(i * padded + chunk));
            }
            for (offset, token) in within.clone().enumerate() {
                let value = load::<S, HALF>(values.as_ptr().add((token * padded + chunk) * size));
                for (i, lanes) in lanes.iter_mut().enumerate() {
                    let weight = *weights.get_unchecked(i).get_unchecked(slot + offset);
                    *lanes = S::fma(value, S::splat(weight), *lanes);
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

#[cfg(test)]
mod tests;
