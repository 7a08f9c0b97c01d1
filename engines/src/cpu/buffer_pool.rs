//! Reuse of activation buffers.
//!
//! A step needs a dozen buffers per layer, in a few sizes that repeat. Fresh allocations would be mapped from, and
//! returned to, the operating system page by page.

use super::activation::{CodedRows, Rows, Wanted};

/// Most buffers of a kind in the pool: more than any call uses at once.
const BUFFERS_MAX: usize = 8;

/// Buffers that are not in use.
#[derive(Debug, Default)]
pub(super) struct BufferPool {
    floats: Vec<Vec<f32>>,
    coded: Vec<CodedRows>,
}

impl BufferPool {
    /// Returns rows with arbitrary values. The caller overwrites all of them.
    pub(super) fn rows(&mut self, count: usize, width: usize) -> Rows {
        let mut values = self.floats.pop().unwrap_or_default();
        values.resize(count * width, 0.0);
        Rows { width, values }
    }

    pub(super) fn keep(&mut self, rows: Rows) {
        if self.floats.len() < BUFFERS_MAX {
            self.floats.push(rows.values);
        }
    }

    /// Like [`BufferPool::rows`], for coded rows.
    pub(super) fn coded(&mut self, count: usize, width: usize, wanted: Wanted) -> CodedRows {
        let mut rows = self.coded.pop().unwrap_or_default();
        rows.resize(count, width, wanted);
        rows
    }

    pub(super) fn keep_coded(&mut self, rows: CodedRows) {
        if self.coded.len() < BUFFERS_MAX {
            self.coded.push(rows);
        }
    }
}
