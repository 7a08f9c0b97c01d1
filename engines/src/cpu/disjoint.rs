//! A slice that several tasks write at the same time, in disjoint parts.

use std::marker::PhantomData;
use std::ops::Range;

/// Lends disjoint parts of a slice to the tasks of one parallel section.
pub(super) struct DisjointMut<'a, T> {
    start: *mut T,
    length: usize,
    life: PhantomData<&'a mut [T]>,
}

// SAFETY: callers of `take` guarantee that the parts of different tasks are disjoint.
unsafe impl<T: Send> Sync for DisjointMut<'_, T> {}

impl<'a, T> DisjointMut<'a, T> {
    pub(super) fn new(slice: &'a mut [T]) -> Self {
        Self { start: slice.as_mut_ptr(), length: slice.len(), life: PhantomData }
    }

    /// Returns the part `range`.
    ///
    /// # Safety
    /// No two tasks of a section may take overlapping parts.
    ///
    /// # Panics
    /// If `range` is not inside the slice.
    #[allow(clippy::mut_from_ref)]
    pub(super) unsafe fn take(&self, range: Range<usize>) -> &'a mut [T] {
        assert!(range.start <= range.end && range.end <= self.length, "the part is outside the slice");
        // SAFETY: the part is inside the slice, and the caller guarantees that no other task takes it.
        unsafe { std::slice::from_raw_parts_mut(self.start.add(range.start), range.len()) }
    }
}
