//! Buffers that one call has used, kept for the next.
//!
//! A step makes a dozen buffers a layer, of the same few sizes over and over. Made anew they would come from, and go
//! back to, the operating system, page by page.

use super::activation::{CodedRows, Rows};

/// Buffers kept: more than any call has at once.
const BUFFERS_MAX: usize = 8;

/// Buffers that nobody uses.
#[derive(Debug, Default)]
pub(super) struct BufferPool {
    floats: Vec<Vec<f32>>,
    coded: Vec<CodedRows>,
}

impl BufferPool {
    /// Rows whose values are anything: whoever takes them writes all.
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

    /// As [`BufferPool::rows`].
    pub(super) fn coded(&mut self, count: usize, width: usize) -> CodedRows {
        let mut rows = self.coded.pop().unwrap_or_default();
        rows.resize(count, width);
        rows
    }

    pub(super) fn keep_coded(&mut self, rows: CodedRows) {
        if self.coded.len() < BUFFERS_MAX {
            self.coded.push(rows);
        }
    }
}
