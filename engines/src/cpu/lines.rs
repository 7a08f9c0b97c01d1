//! Memory in whole cache lines, for vector loads.

#[cfg(target_os = "linux")]
use rustix::mm::{Advice, madvise};

/// The alignment of vector loads.
pub(super) const LINE_BYTES: usize = 64;

/// The size of a huge page on x86-64 and aarch64.
#[cfg(target_os = "linux")]
const HUGE_PAGE_BYTES: usize = 2 << 20;

/// Bytes aligned to a cache line, initially zero. Pages become resident when they are written.
#[derive(Debug, Default)]
pub(super) struct Lines {
    /// One line longer than `length`, so that `start` can be aligned.
    bytes: Vec<u8>,
    start: usize,
    length: usize,
}

impl Lines {
    pub(super) fn zeroed(length: usize) -> Self {
        let bytes = vec![0; length + LINE_BYTES];
        let start = bytes.as_ptr().align_offset(LINE_BYTES).min(LINE_BYTES);
        Self { bytes, start, length }
    }

    /// Like [`Lines::zeroed`], in huge pages where the system has them: every token reads a large matrix from end to
    /// end, and fewer pages need fewer translations.
    pub(super) fn zeroed_huge(length: usize) -> Self {
        let mut lines = Self::zeroed(length);
        lines.ask_for_huge_pages();
        lines
    }

    #[cfg(target_os = "linux")]
    fn ask_for_huge_pages(&mut self) {
        let bytes = self.bytes.as_mut_ptr();
        let before = bytes.align_offset(HUGE_PAGE_BYTES);
        let inside = self.bytes.len().saturating_sub(before) / HUGE_PAGE_BYTES * HUGE_PAGE_BYTES;
        if inside == 0 {
            return;
        }
        // A hint: it changes no result, so its error is ignored.
        // SAFETY: the range is whole pages of this allocation; the advice changes their backing, not their contents.
        let _ = unsafe { madvise(bytes.add(before).cast(), inside, Advice::LinuxHugepage) };
    }

    #[cfg(not(target_os = "linux"))]
    fn ask_for_huge_pages(&mut self) {}

    /// Makes room for `length` bytes, whose contents are arbitrary. Memory is kept when the length shrinks.
    pub(super) fn resize(&mut self, length: usize) {
        if self.bytes.len() < length + LINE_BYTES {
            *self = Self::zeroed(length);
        }
        self.length = length;
    }

    pub(super) fn length(&self) -> usize {
        self.length
    }

    pub(super) fn bytes(&self) -> &[u8] {
        &self.bytes[self.start..][..self.length]
    }

    pub(super) fn bytes_mut(&mut self) -> &mut [u8] {
        &mut self.bytes[self.start..][..self.length]
    }
}
