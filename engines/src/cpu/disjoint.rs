//! A slice whose parts are written by several tasks at once.

use std::marker::PhantomData;
use std::ops::Range;

/// Hands out disjoint parts of a slice to the tasks of one section.
pub(super) struct DisjointMut<'a, T> {
    start: *mut T,
    length: usize,
    life: PhantomData<&'a mut [T]>,
}

// SAFETY: the parts that tasks take are disjoint (the promise of `take`).
unsafe impl<T: Send> Sync for DisjointMut<'_, T> {}

impl<'a, T> DisjointMut<'a, T> {
    pub(super) fn new(slice: &'a mut [T]) -> Self {
        Self { start: slice.as_mut_ptr(), length: slice.len(), life: PhantomData }
    }

    /// The part `range`.
    ///
    /// # Safety
    /// No two tasks of a section take overlapping parts.
    ///
    /// # Panics
    /// Where `range` does not lie in the slice.
    #[allow(clippy::mut_from_ref)]
    pub(super) unsafe fn take(&self, range: Range<usize>) -> &'a mut [T] {
        assert!(range.start <= range.end && range.end <= self.length, "a part outside the slice");
        // SAFETY: inside the slice, and nobody else's by the caller's promise.
        unsafe { std::slice::from_raw_parts_mut(self.start.add(range.start), range.len()) }
    }
}
