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
use super::scratch::Scratch;
use super::thread_pool::{Panicked, ThreadPool};
use crate::arithmetic::attention::CHUNK;
use crate::backend::Span;
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

/// The most floats of mixes that are kept for the next layer: those of one row over a long context.
const MIXES_KEPT_MAX: usize = 1 << 20;

/// The heads of a layer, with their sinks and cache, and the sequences of the batch.
#[derive(Clone, Copy)]
pub(super) struct Heads<'a> {
    pub(super) spec: &'a Attention,
    /// The score of each head's sink: a key without a value.
    pub(super) sinks: Option<&'a [f32]>,
    pub(super) cache: &'a LayerCache,
    pub(super) spans: &'a [Span],
}

/// Rows of one sequence, with the query heads that share a key head.
#[derive(Debug)]
struct Task {
    /// The index of the sequence's span.
    span: usize,
    rows: Range<usize>,
    /// The position of the first row.
    position: usize,
    kv_head: usize,
    heads: Range<usize>,
}

impl Task {
    /// The number of pairs of row and head.
    fn queries(&self) -> usize {
        self.rows.len() * self.heads.len()
    }

    /// The chunks that some row sees.
    fn chunks(&self, spec: &Attention) -> Range<usize> {
        let first = (self.position + 1).saturating_sub(spec.window.unwrap_or(usize::MAX));
        first / CHUNK..(self.position + self.rows.len()).div_ceil(CHUNK)
    }
}

/// A chunk of a task.
#[derive(Debug, Clone, Copy)]
struct TaskChunk {
    task: usize,
    chunk: usize,
    /// The place of its first mix.
    first: usize,
}

/// The memory of attention, which the layers share.
#[derive(Debug, Default)]
pub(super) struct Workspace {
    tasks: Vec<Task>,
    /// The chunks of all tasks, where they are tasks of their own.
    chunks: Vec<TaskChunk>,
    mixes: Vec<f32>,
}

impl Workspace {
    /// out = softmax(q · K · scale) · V, for every row and head.
    pub(super) fn run(
        &mut self,
        tier: Tier,
        pool: &mut ThreadPool,
        heads: &Heads<'_>,
        queries: &Rows,
        out: &mut Rows,
    ) -> Result<(), Panicked> {
        self.plan_tasks(heads);
        let is_split = self.tasks.len() < pool.threads() * TASKS_PER_THREAD && queries.count() <= SPLIT_ROWS_MAX;
        if is_split && pool.threads() > 1 {
            return self.run_split(tier, pool, heads, queries, out);
        }
        let width = out.width;
        let parts = DisjointMut::new(&mut out.values);
        let tasks = &self.tasks;
        pool.run(tasks.len(), &|index| {
            let task = &tasks[index];
            Job { heads: *heads, task, queries, target: Target::Rows { out: &parts, width } }.run(tier);
        })
    }

    fn plan_tasks(&mut self, heads: &Heads<'_>) {
        self.tasks.clear();
        let (kv_heads, group) = (heads.spec.kv_heads, heads.spec.group());
        for (index, span) in heads.spans.iter().enumerate() {
            for start in span.rows.clone().step_by(TASK_ROWS) {
                let rows = start..(start + TASK_ROWS).min(span.rows.end);
                let position = span.first_position + start - span.rows.start;
                for kv_head in 0..kv_heads {
                    let heads = kv_head * group..(kv_head + 1) * group;
                    self.tasks.push(Task { span: index, rows: rows.clone(), position, kv_head, heads });
                }
            }
        }
    }

    /// Computes the mix of each chunk as a task of its own, then joins them.
    fn run_split(
        &mut self,
        tier: Tier,
        pool: &mut ThreadPool,
        heads: &Heads<'_>,
        queries: &Rows,
        out: &mut Rows,
    ) -> Result<(), Panicked> {
        let Self { tasks, chunks, mixes } = self;
        let size = Mixes::size(heads.cache);
        chunks.clear();
        let mut count = 0;
        for (index, task) in tasks.iter().enumerate() {
            for chunk in task.chunks(heads.spec) {
                chunks.push(TaskChunk { task: index, chunk, first: count });
                count += task.queries();
            }
        }
        mixes.resize(count * size, 0.0);
        let parts = DisjointMut::new(mixes);
        pool.run(chunks.len(), &|number| {
            let TaskChunk { task, chunk, first } = chunks[number];
            let mixes = Mixes { values: &parts, first, size };
            Job { heads: *heads, task: &tasks[task], queries, target: Target::Mix { chunk, mixes } }.run(tier);
        })?;
        tier.run(Join { heads, tasks, chunks, mixes, queries, out });
        if mixes.capacity() > MIXES_KEPT_MAX {
            *mixes = Vec::new();
        }
        Ok(())
    }
}

/// Joins the mixes of all chunks, in order, and writes the outputs.
struct Join<'a> {
    heads: &'a Heads<'a>,
    tasks: &'a [Task],
    chunks: &'a [TaskChunk],
    mixes: &'a [f32],
    queries: &'a Rows,
    out: &'a mut Rows,
}

impl Kernel for Join<'_> {
    #[inline(always)]
    fn run<S: Simd>(self) {
        let Self { heads, tasks, chunks, mixes, queries, out } = self;
        let (size, head_dim) = (Mixes::size(heads.cache), heads.spec.head_dim);
        let mut sums = Scratch::take(heads.cache.padded_dim());
        for own in chunks.chunk_by(|a, b| a.task == b.task) {
            let task = &tasks[own[0].task];
            for number in 0..task.queries() {
                let query = Query::new(heads, task, queries, number);
                sums.fill(0.0);
                let mut running = Running::new(heads, &query);
                for &TaskChunk { chunk, first, .. } in own {
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
