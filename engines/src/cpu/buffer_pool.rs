//! Reuse of activation buffers.
//!
//! A step needs a dozen buffers per layer, in a few sizes that repeat. Fresh allocations would be mapped from, and
//! returned to, the operating system page by page.

use super::activation::{CodedRows, Rows, Wanted};
use crate::engine::ActivationBits;

/// Most buffers of a kind in the pool: more than any call uses at once.
const BUFFERS_MAX: usize = 8;

/// Buffers that are not in use.
#[derive(Debug, Default)]
pub(super) struct BufferPool {
    floats: Vec<Vec<f32>>,
    coded: Vec<CodedRows>,
}

impl BufferPool {
    /// Returns rows with arbitrary values. The caller overwrites all of them. The smallest buffer that has room is
    /// taken, so that not every buffer grows to the size of the largest rows.
    pub(super) fn rows(&mut self, count: usize, width: usize) -> Rows {
        let length = count * width;
        let fitting = self.floats.iter().enumerate().filter(|(_, buffer)| buffer.capacity() >= length);
        let smallest = fitting.min_by_key(|(_, buffer)| buffer.capacity()).map(|(at, _)| at);
        let mut values = smallest.map_or_else(Vec::new, |at| self.floats.swap_remove(at));
        values.resize(length, 0.0);
        Rows { width, values }
    }

    /// Keeps a buffer. Where there are too many, the smallest goes: it is the cheapest to allocate again.
    pub(super) fn keep(&mut self, rows: Rows) {
        self.floats.push(rows.values);
        if self.floats.len() > BUFFERS_MAX {
            let smallest = self.floats.iter().enumerate().min_by_key(|(_, buffer)| buffer.capacity());
            smallest.map(|(at, _)| at).map(|at| self.floats.swap_remove(at));
        }
    }

    /// Like [`BufferPool::rows`], for coded rows.
    pub(super) fn coded(&mut self, bits: ActivationBits, count: usize, width: usize, wanted: Wanted) -> CodedRows {
        let mut rows = self.coded.pop().unwrap_or_default();
        rows.resize(bits, count, width, wanted);
        rows
    }

    /// The size of the buffers in the pool, in bytes.
    pub(super) fn memory_bytes(&self) -> u64 {
        let floats = self.floats.iter().map(|buffer| buffer.capacity() * size_of::<f32>()).sum::<usize>();
        (floats + self.coded.iter().map(CodedRows::memory_bytes).sum::<usize>()) as u64
    }

    pub(super) fn keep_coded(&mut self, rows: CodedRows) {
        if self.coded.len() < BUFFERS_MAX {
            self.coded.push(rows);
        }
    }
}
