//! Tiles: up to eight queries of a task, chunk after chunk.

use super::super::activation::Rows;
use super::super::cache::{LayerCache, TOKENS};
use super::super::disjoint::DisjointMut;
use super::super::scratch::Scratch;
use super::stored::{F16, F32, Q8, Stored};
use super::{Heads, Task, page};
use crate::arithmetic::attention::{CHUNK, SUM_CHAINS, finish_score, rescales};
use crate::arithmetic::functions::{exp, tree_sum};
use crate::engine::KvElement;
use crate::model::Attention;
use crate::simd::{Kernel, LANES, Simd, Tier};
use std::marker::PhantomData;
use std::ops::Range;

/// Most queries that are computed together on a page and share its loads.
const TILE: usize = 8;

/// A task, and where its results go.
pub(super) struct Job<'a> {
    pub(super) heads: Heads<'a>,
    pub(super) task: &'a Task,
    pub(super) queries: &'a Rows,
    pub(super) target: Target<'a>,
}

/// Where the results of a job go.
#[derive(Clone, Copy)]
pub(super) enum Target<'a> {
    /// Outputs over all chunks: \[row]\[head]\[dimension], `width` values a row.
    Rows { out: &'a DisjointMut<'a, f32>, width: usize },
    /// The mix of one chunk for each query.
    Mix { chunk: usize, mixes: Mixes<'a> },
}

/// Mixes of single chunks, each `size` floats: the values, the largest score, the sum of weights.
#[derive(Clone, Copy)]
pub(super) struct Mixes<'a> {
    pub(super) values: &'a DisjointMut<'a, f32>,
    /// The mix of the job's first query.
    pub(super) first: usize,
    pub(super) size: usize,
}

impl Mixes<'_> {
    pub(super) fn size(cache: &LayerCache) -> usize {
        cache.padded_dim() + LANES
    }

    /// Splits a mix into its part and its values.
    pub(super) fn read(mix: &[f32]) -> (Part, &[f32]) {
        let (values, rest) = mix.split_at(mix.len() - LANES);
        (Part { largest: rest[0], total: rest[1] }, values)
    }
}

/// One query head of a row: its index, and its visible positions.
#[derive(Clone, Copy)]
pub(super) struct Query<'a> {
    pub(super) row: usize,
    pub(super) head: usize,
    values: &'a [f32],
    /// The visible positions: `first_key..end_key`.
    first_key: usize,
    end_key: usize,
}

impl<'a> Query<'a> {
    /// Returns query `number` of a task: rows in order, and the heads of each row.
    pub(super) fn new(heads: &Heads<'_>, task: &Task, queries: &'a Rows, number: usize) -> Self {
        let row = task.rows.start + number / task.heads.len();
        let head = task.heads.start + number % task.heads.len();
        let position = task.position + row - task.rows.start;
        Query {
            row,
            head,
            values: &queries.row(row)[head * heads.spec.head_dim..][..heads.spec.head_dim],
            first_key: (position + 1).saturating_sub(heads.spec.window.unwrap_or(usize::MAX)),
            end_key: position + 1,
        }
    }

    /// Returns the visible slots of a chunk.
    #[inline(always)]
    pub(super) fn seen_of(&self, chunk: usize) -> Range<usize> {
        let start = chunk * CHUNK;
        let first = self.first_key.saturating_sub(start).min(CHUNK);
        let end = self.end_key.saturating_sub(start).min(CHUNK);
        first..end.max(first)
    }
}

/// The largest score of a chunk, and the sum of its weights.
#[derive(Clone, Copy)]
pub(super) struct Part {
    largest: f32,
    total: f32,
}

/// The running softmax of a query: that of the chunks so far.
#[derive(Clone, Copy)]
pub(super) struct Running(Part);

impl Running {
    /// A sink counts as a key before all others.
    pub(super) fn new(heads: &Heads<'_>, query: &Query<'_>) -> Self {
        let none = Part { largest: f32::NEG_INFINITY, total: 0.0 };
        Self(heads.sinks.map_or(none, |sinks| Part { largest: sinks[query.head], total: 1.0 }))
    }

    /// Adds the next chunk, whose weighted sum of values is `values`.
    #[inline(always)]
    pub(super) fn join(&mut self, next: &Part, values: &[f32], sums: &mut [f32]) {
        let (own, other, largest) = rescales(self.0.largest, next.largest);
        self.0 = Part { largest, total: next.total.mul_add(other, self.0.total * own) };
        sums.iter_mut().zip(values).for_each(|(sum, &value)| *sum = value.mul_add(other, *sum * own));
    }

    #[inline(always)]
    pub(super) fn finish(&self, sums: &[f32], out: &mut [f32]) {
        out.iter_mut().zip(sums).for_each(|(out, &sum)| *out = sum / self.0.total);
    }
}

/// The memory of a tile: weights of a chunk for each query, and sums of values, of the chunk and of all chunks so far.
struct Memory<'a> {
    weights: &'a mut [[f32; CHUNK]],
    part: &'a mut [f32],
    sums: &'a mut [f32],
}

/// `N` queries of a job from number `first`, over a cache of the type `E`. Each size is a kernel of its own, since a
/// compiler inlines little into very large functions.
struct Tile<'a, 'b, 'c, E, const N: usize> {
    job: &'b Job<'a>,
    first: usize,
    memory: &'b mut Memory<'c>,
    stored: PhantomData<E>,
}

impl Job<'_> {
    pub(super) fn run(&self, tier: Tier) {
        match self.heads.cache.element {
            KvElement::F16 => self.all_queries::<F16>(tier),
            KvElement::F32 => self.all_queries::<F32>(tier),
            KvElement::Q8_0 => self.all_queries::<Q8>(tier),
        }
    }

    fn all_queries<E: Stored>(&self, tier: Tier) {
        let count = self.task.queries();
        let width = TILE.min(count) * self.heads.cache.padded_dim();
        let mut scratch = Scratch::take(TILE.min(count) * CHUNK + 2 * width);
        let (weights, sums) = scratch.split_at_mut(TILE.min(count) * CHUNK);
        let (part, sums) = sums.split_at_mut(width);
        let mut memory = Memory { weights: weights.as_chunks_mut().0, part, sums };
        let mut first = 0;
        while first < count {
            let memory = &mut memory;
            first += match count - first {
                TILE.. => self.tile::<E, TILE>(tier, first, memory),
                4.. => self.tile::<E, 4>(tier, first, memory),
                3 => self.tile::<E, 3>(tier, first, memory),
                2 => self.tile::<E, 2>(tier, first, memory),
                _ => self.tile::<E, 1>(tier, first, memory),
            };
        }
    }

    fn tile<E: Stored, const N: usize>(&self, tier: Tier, first: usize, memory: &mut Memory<'_>) -> usize {
        tier.run(Tile::<E, N> { job: self, first, memory, stored: PhantomData });
        N
    }
}

impl<E: Stored, const N: usize> Kernel for Tile<'_, '_, '_, E, N> {
    #[inline(always)]
    fn run<S: Simd>(self) {
        let Job { heads, task, queries, target } = *self.job;
        let queries: [Query<'_>; N] = std::array::from_fn(|i| Query::new(&heads, task, queries, self.first + i));
        match target {
            Target::Rows { out, width } => self.all_chunks::<S>(&queries, out, width),
            Target::Mix { chunk, mixes } => self.one_chunk::<S>(&queries, chunk, mixes),
        }
    }
}

impl<E: Stored, const N: usize> Tile<'_, '_, '_, E, N> {
    #[inline(always)]
    fn all_chunks<S: Simd>(self, queries: &[Query<'_>; N], out: &DisjointMut<'_, f32>, width: usize) {
        let heads = &self.job.heads;
        let padded = heads.cache.padded_dim();
        self.memory.sums[..N * padded].fill(0.0);
        let mut running: [Running; N] = std::array::from_fn(|i| Running::new(heads, &queries[i]));
        let start = queries.iter().map(|query| query.first_key).min().unwrap_or(0);
        let end = queries.iter().map(|query| query.end_key).max().unwrap_or(0);
        for chunk in start / CHUNK..end.div_ceil(CHUNK) {
            let parts = chunk_mix::<S, E, N>(self.job, queries, chunk, self.memory);
            let Memory { part, sums, .. } = &mut *self.memory;
            for (i, query) in queries.iter().enumerate() {
                if !query.seen_of(chunk).is_empty() {
                    let range = i * padded..(i + 1) * padded;
                    running[i].join(&parts[i], &part[range.clone()], &mut sums[range]);
                }
            }
        }
        for ((query, running), sums) in queries.iter().zip(running).zip(self.memory.sums.chunks(padded)) {
            let at = query.row * width + query.head * heads.spec.head_dim;
            // SAFETY: each pair of row and head belongs to one task.
            running.finish(sums, unsafe { out.take(at..at + heads.spec.head_dim) });
        }
    }

    #[inline(always)]
    fn one_chunk<S: Simd>(self, queries: &[Query<'_>; N], chunk: usize, mixes: Mixes<'_>) {
        let padded = self.job.heads.cache.padded_dim();
        let parts = chunk_mix::<S, E, N>(self.job, queries, chunk, self.memory);
        for (i, part) in parts.iter().enumerate() {
            let at = (mixes.first + self.first + i) * mixes.size;
            // SAFETY: each query of a chunk belongs to one task.
            let mix = unsafe { mixes.values.take(at..at + mixes.size) };
            mix[..padded].copy_from_slice(&self.memory.part[i * padded..][..padded]);
            [mix[padded], mix[padded + 1]] = [part.largest, part.total];
        }
    }
}

/// Computes one chunk of `N` queries: their parts, and in `memory.part` their weighted sums of values. A query that
/// sees no position of the chunk has an arbitrary part.
#[inline(always)]
fn chunk_mix<S: Simd, E: Stored, const N: usize>(
    job: &Job<'_>,
    queries: &[Query<'_>; N],
    chunk: usize,
    memory: &mut Memory<'_>,
) -> [Part; N] {
    let Memory { weights, part, .. } = memory;
    let seen: [Range<usize>; N] = std::array::from_fn(|i| queries[i].seen_of(chunk));
    let first = seen.iter().map(|seen| seen.start).min().unwrap_or(0);
    let end = seen.iter().map(|seen| seen.end).max().unwrap_or(0);
    let values: [&[f32]; N] = std::array::from_fn(|i| queries[i].values);
    let pages = first / TOKENS..end.div_ceil(TOKENS);
    for page in pages.clone() {
        let number = chunk * (CHUNK / TOKENS) + page;
        // Behind the last page of keys, the first of values is read.
        let next = if page + 1 < pages.end {
            job.keys(number + 1)
        } else {
            job.values(chunk * (CHUNK / TOKENS) + pages.start)
        };
        page::scores::<S, E, N>(&values, job.keys(number), next, weights, page * TOKENS);
    }
    let mut parts = [Part { largest: 0.0, total: 0.0 }; N];
    for i in 0..N {
        parts[i] = weigh(job.heads.spec, &seen[i], &mut weights[i]);
    }
    mix_chunk::<S, E, N>(job, chunk, &seen, weights, part);
    parts
}

impl Job<'_> {
    /// The keys of page `number` of the sequence.
    fn keys(&self, number: usize) -> &[u8] {
        self.heads.cache.keys(self.heads.spans[self.task.span].pages[number], self.task.kv_head)
    }

    fn values(&self, number: usize) -> &[u8] {
        self.heads.cache.values(self.heads.spans[self.task.span].pages[number], self.task.kv_head)
    }
}

/// Sets the chunk's part of every query to Σ weight · value over its `seen` positions: first those that only some
/// queries see, then those that all see, together, then again those that only some see.
#[inline(always)]
fn mix_chunk<S: Simd, E: Stored, const N: usize>(
    job: &Job<'_>,
    chunk: usize,
    seen: &[Range<usize>; N],
    weights: &[[f32; CHUNK]],
    part: &mut [f32],
) {
    let padded = job.heads.cache.padded_dim();
    part[..N * padded].fill(0.0);
    let start = seen.iter().map(|seen| seen.start).max().unwrap_or(0);
    let end = seen.iter().map(|seen| seen.end).min().unwrap_or(0).max(start);
    for (i, own) in seen.iter().enumerate() {
        let before = own.start..start.min(own.end);
        mix_slots::<S, E, 1>(job, chunk, before, &weights[i..=i], &mut part[i * padded..][..padded]);
    }
    mix_slots::<S, E, N>(job, chunk, start..end, weights, &mut part[..N * padded]);
    for (i, own) in seen.iter().enumerate() {
        let behind = end.max(own.start).max(start.min(own.end))..own.end;
        mix_slots::<S, E, 1>(job, chunk, behind, &weights[i..=i], &mut part[i * padded..][..padded]);
    }
}

/// Adds Σ weight · value over the `slots` of a chunk to the parts of `N` queries.
#[inline(always)]
fn mix_slots<S: Simd, E: Stored, const N: usize>(
    job: &Job<'_>,
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
        let number = position / TOKENS;
        let next = if slot + count < slots.end { number + 1 } else { number };
        page::mix::<S, E, N>(weights, slot, within..within + count, [job.values(number), job.values(next)], parts);
        slot += count;
    }
}

/// Turns a chunk's products into weights; returns the largest score and the sum of the weights.
#[inline(always)]
fn weigh(spec: &Attention, seen: &Range<usize>, scores: &mut [f32; CHUNK]) -> Part {
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
    let largest = lanes.iter().fold(f32::NEG_INFINITY, |a, &b| if b > a { b } else { a });
    let mut chains = [0.0_f32; SUM_CHAINS];
    for chunk in scores[..used].as_chunks_mut::<SUM_CHAINS>().0 {
        for (chain, score) in chains.iter_mut().zip(chunk) {
            *score = exp(*score - largest);
            *chain += *score;
        }
    }
    Part { largest, total: tree_sum(chains) }
}
