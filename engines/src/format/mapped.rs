//! A file mapped read-only, so that only the bytes that are looked at are read.

use super::FormatError;
use std::fs::File;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// A read-only view of a whole file. Cheap to clone.
#[derive(Debug, Clone)]
pub struct Mapped {
    path: PathBuf,
    bytes: Arc<memmap2::Mmap>,
}

impl Mapped {
    /// Maps `path`. An empty file is an error: no format here has one.
    pub fn open(path: &Path) -> Result<Self, FormatError> {
        let file = File::open(path).map_err(|e| FormatError::io(path, &e))?;
        let length = file.metadata().map_err(|e| FormatError::io(path, &e))?.len();
        if length == 0 {
            return Err(FormatError::Truncated { path: path.to_owned(), what: "its header".to_owned() });
        }
        // SAFETY: the mapping is read-only and private. A file that another process truncates meanwhile
        // raises SIGBUS; models are written under a temporary name and renamed, never in place, and
        // backends copy weights out while they load, so the window is the load itself.
        let bytes = unsafe { memmap2::Mmap::map(&file) }.map_err(|e| FormatError::io(path, &e))?;
        Ok(Self { path: path.to_owned(), bytes: Arc::new(bytes) })
    }

    /// The file's path, for errors.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The file's length.
    pub fn length_bytes(&self) -> u64 {
        self.bytes.len() as u64
    }

    /// All of the file.
    pub fn bytes(&self) -> &[u8] {
        &self.bytes
    }

    /// The bytes of `range`, or an error that names `what` where the file is shorter.
    pub fn slice(&self, range: Range<u64>, what: &str) -> Result<&[u8], FormatError> {
        let range = usize::try_from(range.start).ok().zip(usize::try_from(range.end).ok());
        range
            .and_then(|(start, end)| self.bytes.get(start..end))
            .ok_or_else(|| FormatError::Truncated { path: self.path.clone(), what: what.to_owned() })
    }

    /// As [`Mapped::slice`], with the way back to the file.
    pub fn part(&self, range: Range<u64>, what: &str) -> Result<MappedBytes<'_>, FormatError> {
        let bytes = self.slice(range.clone(), what)?;
        Ok(MappedBytes { file: self, start: range.start, bytes })
    }

    /// Tells the kernel that `range` will not be read again, so that resident memory does not grow by a
    /// file that has been copied into a backend's own layout.
    pub fn forget(&self, range: Range<u64>) {
        let page = rustix::param::page_size() as u64;
        let start = range.start.div_ceil(page) * page;
        let end = range.end / page * page;
        if end <= start {
            return;
        }
        // A hint: whether it is taken changes no result, so its error is of no use to anyone.
        // SAFETY: a private read-only mapping of a file is filled again from the file when it is read.
        let _ = unsafe {
            self.bytes.unchecked_advise_range(
                memmap2::UncheckedAdvice::DontNeed,
                start as usize,
                (end - start) as usize,
            )
        };
    }
}

/// Some bytes of a mapped file, which can be told to leave memory.
#[derive(Debug, Clone, Copy)]
pub struct MappedBytes<'a> {
    file: &'a Mapped,
    start: u64,
    bytes: &'a [u8],
}

impl<'a> MappedBytes<'a> {
    pub fn get(&self) -> &'a [u8] {
        self.bytes
    }

    /// Says that `part` of these bytes will not be read again: see [`Mapped::forget`].
    pub fn forget(&self, part: Range<usize>) {
        self.file.forget(self.start + part.start as u64..self.start + part.end as u64);
    }
}
