//! Attention over the paged cache, as [`arithmetic::attention`](crate::arithmetic::attention) defines it: chunks of 256
//! positions, joined in order. Memory never holds more than one chunk of scores for a query.
//!
//! ```text
//! a task: rows × query heads that share keys ─► tiles of queries ─► each chunk: scores ─► weights ─► mix ─► join
//! ```
//! Queries of a tile share the loads of a page. Where there are too few tasks for the threads, as when one sequence
//! decodes, each chunk is a task of its own, and the calling thread joins the mixes. A query's arithmetic depends on
//! its position alone: the bits are the same in any tile, batch and split.

mod page;
mod stored;
mod tile;

use super::activation::Rows;
use super::cache::LayerCache;
use super::disjoint::DisjointMut;
use super::thread_pool::{Panicked, ThreadPool};
use crate::arithmetic::attention::CHUNK;
use crate::backend::{Batch, Span};
use crate::model::Attention;
use crate::simd::Tier;
use crate::simd::{Kernel, Simd};
use std::ops::Range;
use tile::{Job, Mixes, Query, Running, Target};

/// Most rows of one task.
const TASK_ROWS: usize = 16;
/// Tasks per thread, of which fewer are split into chunks: several, so that one delayed thread does not delay the step.
const TASKS_PER_THREAD: usize = 4;
/// Most rows of a batch that is split into chunks: those of a step with drafts. It bounds the memory of mixes.
const SPLIT_ROWS_MAX: usize = 16;

/// The heads of a layer, with their sinks and cache.
#[derive(Clone, Copy)]
pub(super) struct Heads<'a> {
    pub(super) spec: &'a Attention,
    /// The score of each head's sink: a key without a value.
    pub(super) sinks: Option<&'a [f32]>,
    pub(super) cache: &'a LayerCache,
}

/// Rows of one sequence, with the query heads that share a key head.
struct Task<'a> {
    span: &'a Span,
    rows: Range<usize>,
    kv_head: usize,
    heads: Range<usize>,
}

impl Task<'_> {
    /// The number of pairs of row and head.
    fn queries(&self) -> usize {
        self.rows.len() * self.heads.len()
    }

    /// The chunks that some row sees.
    fn chunks(&self, spec: &Attention) -> Range<usize> {
        let position = |row: usize| self.span.first_position + row - self.span.rows.start;
        let first = (position(self.rows.start) + 1).saturating_sub(spec.window.unwrap_or(usize::MAX));
        first / CHUNK..(position(self.rows.end - 1) + 1).div_ceil(CHUNK)
    }
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
    let tasks = tasks(heads.spec, batch);
    if tasks.len() < pool.threads() * TASKS_PER_THREAD && batch.rows <= SPLIT_ROWS_MAX && pool.threads() > 1 {
        return run_split(tier, pool, heads, &tasks, queries, out);
    }
    let width = out.width;
    let parts = DisjointMut::new(&mut out.values);
    pool.run(tasks.len(), &|index| {
        let task = &tasks[index];
        Job { heads: *heads, task, queries, target: Target::Rows { out: &parts, width } }.run(tier);
    })
}

fn tasks<'a>(spec: &Attention, batch: &'a Batch) -> Vec<Task<'a>> {
    let mut tasks = Vec::new();
    for span in &batch.spans {
        for start in span.rows.clone().step_by(TASK_ROWS) {
            let rows = start..(start + TASK_ROWS).min(span.rows.end);
            for kv_head in 0..spec.kv_heads {
                let heads = kv_head * spec.group()..(kv_head + 1) * spec.group();
                tasks.push(Task { span, rows: rows.clone(), kv_head, heads });
            }
        }
    }
    tasks
}

/// Computes the mix of each chunk as a task of its own, then joins them.
fn run_split(
    tier: Tier,
    pool: &mut ThreadPool,
    heads: &Heads<'_>,
    tasks: &[Task<'_>],
    queries: &Rows,
    out: &mut Rows,
) -> Result<(), Panicked> {
    let mix_size = Mixes::size(heads.cache);
    // The chunks of all tasks, each with the place of its first mix.
    let mut chunks = Vec::new();
    let mut count = 0;
    for (index, task) in tasks.iter().enumerate() {
        for chunk in task.chunks(heads.spec) {
            chunks.push((index, chunk, count));
            count += task.queries();
        }
    }
    let mut mixes = vec![0.0; count * mix_size];
    let parts = DisjointMut::new(&mut mixes);
    pool.run(chunks.len(), &|number| {
        let (index, chunk, first) = chunks[number];
        let mixes = Mixes { values: &parts, first, size: mix_size };
        Job { heads: *heads, task: &tasks[index], queries, target: Target::Mix { chunk, mixes } }.run(tier);
    })?;
    tier.run(Join { heads, tasks, chunks: &chunks, mixes: &mixes, queries, out });
    Ok(())
}

/// Joins the mixes of all chunks, in order, and writes the outputs.
struct Join<'a, 'b> {
    heads: &'a Heads<'a>,
    tasks: &'a [Task<'b>],
    chunks: &'a [(usize, usize, usize)],
    mixes: &'a [f32],
    queries: &'a Rows,
    out: &'a mut Rows,
}

impl Kernel for Join<'_, '_> {
    #[inline(always)]
    fn run<S: Simd>(self) {
        let Self { heads, tasks, chunks, mixes, queries, out } = self;
        let (size, head_dim) = (Mixes::size(heads.cache), heads.spec.head_dim);
        let mut sums = vec![0.0; heads.cache.padded_dim()];
        for own in chunks.chunk_by(|a, b| a.0 == b.0) {
            let task = &tasks[own[0].0];
            for number in 0..task.queries() {
                let query = Query::new(heads, task, queries, number);
                sums.fill(0.0);
                let mut running = Running::new(heads, &query);
                for &(_, chunk, first) in own {
                    if !query.seen_of(chunk).is_empty() {
                        let (part, of) = Mixes::read(&mixes[(first + number) * size..][..size]);
                        running.join(&part, of, &mut sums);
                    }
                }
                let at = query.row * out.width + query.head * head_dim;
                running.finish(&sums, &mut out.values[at..at + head_dim]);
            }
        }
    }
}

#[cfg(test)]
mod tests;
