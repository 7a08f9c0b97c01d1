//! Memory of a task: each thread keeps its own for the next task, so that the layers of a step allocate nothing.

use std::cell::RefCell;
use std::ops::{Deref, DerefMut};

/// Most buffers that a thread keeps: more than a task uses at once.
const KEPT_MAX: usize = 4;

thread_local! {
    static KEPT: RefCell<Vec<Vec<f32>>> = const { RefCell::new(Vec::new()) };
}

/// Floats of this thread, until they are dropped.
#[derive(Debug)]
pub(super) struct Scratch(Vec<f32>);

impl Scratch {
    /// Returns `length` floats with arbitrary values.
    pub(super) fn take(length: usize) -> Self {
        let mut floats = KEPT.with_borrow_mut(Vec::pop).unwrap_or_default();
        floats.resize(length, 0.0);
        Self(floats)
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        KEPT.with_borrow_mut(|kept| {
            if kept.len() < KEPT_MAX {
                kept.push(std::mem::take(&mut self.0));
            }
        });
    }
}

impl Deref for Scratch {
    type Target = [f32];

    fn deref(&self) -> &[f32] {
        &self.0
    }
}

impl DerefMut for Scratch {
    fn deref_mut(&mut self) -> &mut [f32] {
        &mut self.0
    }
}
