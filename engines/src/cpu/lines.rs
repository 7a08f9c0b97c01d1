//! Memory in whole cache lines, for vector loads.

use memmap2::MmapMut;
use std::io;

/// The alignment of vector loads.
pub(super) const LINE_BYTES: usize = 64;

/// Smallest memory that is mapped from the system by itself. An allocator keeps freed memory, and clears reused memory:
/// what only becomes resident as it is written, or is large, is better mapped.
const MAPPED_MIN: usize = 1 << 20;

/// Bytes aligned to a cache line, initially zero. Pages become resident when they are written.
#[derive(Debug, Default)]
pub(super) struct Lines {
    memory: Memory,
    start: usize,
    length: usize,
}

#[derive(Debug)]
enum Memory {
    /// One line longer than the length, so that the start can be aligned.
    Allocated(Vec<u8>),
    Mapped(MmapMut),
}

impl Default for Memory {
    fn default() -> Self {
        Self::Allocated(Vec::new())
    }
}

impl Lines {
    pub(super) fn zeroed(length: usize) -> Self {
        let bytes = vec![0; length + LINE_BYTES];
        let start = bytes.as_ptr().align_offset(LINE_BYTES).min(LINE_BYTES);
        Self { memory: Memory::Allocated(bytes), start, length }
    }

    /// Like [`Lines::zeroed`], for memory that becomes resident page by page, and is returned to the system when
    /// dropped.
    ///
    /// # Errors
    /// The system's, if it refuses the memory.
    pub(super) fn reserved(length: usize) -> io::Result<Self> {
        if length < MAPPED_MIN {
            return Ok(Self::zeroed(length));
        }
        Ok(Self { memory: Memory::Mapped(MmapMut::map_anon(length)?), start: 0, length })
    }

    /// Like [`Lines::reserved`], in huge pages where the system has them: every token reads a large matrix from end to
    /// end, and fewer pages need fewer translations.
    ///
    /// # Errors
    /// The system's, if it refuses the memory.
    pub(super) fn reserved_huge(length: usize) -> io::Result<Self> {
        let lines = Self::reserved(length)?;
        #[cfg(target_os = "linux")]
        if let Memory::Mapped(mapped) = &lines.memory {
            // A hint: it changes no result, so its error is ignored.
            let _ = mapped.advise(memmap2::Advice::HugePage);
        }
        Ok(lines)
    }

    /// Makes room for `length` bytes, whose contents are arbitrary. Memory is kept when the length shrinks.
    pub(super) fn resize(&mut self, length: usize) {
        let room = match &self.memory {
            Memory::Allocated(bytes) => bytes.len().saturating_sub(LINE_BYTES),
            Memory::Mapped(mapped) => mapped.len(),
        };
        if room < length {
            *self = Self::zeroed(length);
        }
        self.length = length;
    }

    pub(super) fn length(&self) -> usize {
        self.length
    }

    pub(super) fn bytes(&self) -> &[u8] {
        let bytes = match &self.memory {
            Memory::Allocated(bytes) => bytes,
            Memory::Mapped(mapped) => &mapped[..],
        };
        &bytes[self.start..][..self.length]
    }

    pub(super) fn bytes_mut(&mut self) -> &mut [u8] {
        let bytes = match &mut self.memory {
            Memory::Allocated(bytes) => bytes,
            Memory::Mapped(mapped) => &mut mapped[..],
        };
        &mut bytes[self.start..][..self.length]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_is_aligned_and_zero() {
        for length in [0, 1, 100, MAPPED_MIN - 1, MAPPED_MIN, 3 * MAPPED_MIN + 5] {
            for mut lines in [Lines::zeroed(length), Lines::reserved_huge(length).expect("memory")] {
                assert_eq!(lines.bytes().as_ptr().align_offset(LINE_BYTES), 0);
                assert!(lines.bytes().iter().all(|&byte| byte == 0) && lines.length() == length);
                lines.bytes_mut().fill(1);
                lines.resize(length / 2);
                assert_eq!(lines.bytes().len(), length / 2);
                lines.resize(2 * length);
                assert_eq!(lines.bytes().len(), 2 * length);
            }
        }
    }

    #[test]
    fn memory_that_no_machine_has_is_refused() {
        assert!(Lines::reserved(usize::MAX / 4).is_err());
    }
}
