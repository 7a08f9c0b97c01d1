//! A file mapped read-only: only the bytes that are accessed are read from the disk.

use super::FormatError;
use std::fs::File;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::SystemTime;

/// A read-only view of a whole file. Cheap to clone.
#[derive(Debug, Clone)]
pub struct Mapped {
    path: PathBuf,
    /// Kept open, to notice changes.
    file: Arc<File>,
    opened_as: Version,
    bytes: Arc<memmap2::Mmap>,
}

/// What changes when a file is written to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Version {
    length_bytes: u64,
    modified: Option<SystemTime>,
}

impl Version {
    fn of(file: &File) -> std::io::Result<Self> {
        let metadata = file.metadata()?;
        Ok(Self { length_bytes: metadata.len(), modified: metadata.modified().ok() })
    }
}

impl Mapped {
    /// Maps `path`. An empty file is an error: no supported format allows one.
    pub fn open(path: &Path) -> Result<Self, FormatError> {
        let file = File::open(path).map_err(|e| FormatError::io(path, &e))?;
        let opened_as = Version::of(&file).map_err(|e| FormatError::io(path, &e))?;
        if opened_as.length_bytes == 0 {
            return Err(FormatError::Truncated { path: path.to_owned(), what: "its header".to_owned() });
        }
        // SAFETY: the mapping is read-only and private. If another process truncates the file, an access raises
        // SIGBUS. Models are written under a temporary name and renamed, never changed in place; backends copy weights
        // out while they load; and each range is checked before it is read. So the risk exists only while one range is
        // copied.
        let bytes = unsafe { memmap2::Mmap::map(&file) }.map_err(|e| FormatError::io(path, &e))?;
        Ok(Self { path: path.to_owned(), file: Arc::new(file), opened_as, bytes: Arc::new(bytes) })
    }

    /// The file's path, for errors.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The file's length, at least 1 byte.
    pub fn length_bytes(&self) -> u64 {
        self.bytes.len() as u64
    }

    /// All of the file.
    pub fn bytes(&self) -> &[u8] {
        &self.bytes
    }

    /// The bytes of `range`, counted from the file's start.
    ///
    /// # Errors
    /// [`FormatError::Truncated`], which names `what`, where the file is shorter; [`FormatError::Changed`] if another
    /// program has written to the file since it was opened.
    pub fn slice(&self, range: Range<u64>, what: &str) -> Result<&[u8], FormatError> {
        let version = Version::of(&self.file).map_err(|e| FormatError::io(&self.path, &e))?;
        if version != self.opened_as {
            return Err(FormatError::Changed { path: self.path.clone() });
        }
        self.header(range, what)
    }

    /// Like [`Mapped::slice`], but does not look for changes: for the many small reads of a header that was just
    /// opened.
    ///
    /// # Errors
    /// [`FormatError::Truncated`].
    pub(super) fn header(&self, range: Range<u64>, what: &str) -> Result<&[u8], FormatError> {
        let range = usize::try_from(range.start).ok().zip(usize::try_from(range.end).ok());
        range
            .and_then(|(start, end)| self.bytes.get(start..end))
            .ok_or_else(|| FormatError::Truncated { path: self.path.clone(), what: what.to_owned() })
    }

    /// Like [`Mapped::slice`], but the result can also release its pages.
    pub fn part(&self, range: Range<u64>, what: &str) -> Result<MappedBytes<'_>, FormatError> {
        let bytes = self.slice(range.clone(), what)?;
        Ok(MappedBytes { file: self, start: range.start, bytes })
    }

    /// Advises the kernel that `range` is not read again, so that a file copied into a backend's own layout does not
    /// stay in resident memory.
    pub fn forget(&self, range: Range<u64>) {
        let page = rustix::param::page_size() as u64;
        let start = range.start.div_ceil(page) * page;
        let end = range.end / page * page;
        if end <= start {
            return;
        }
        // The advice is a hint and changes no result, so its error is ignored.
        // SAFETY: the next access reads a private read-only mapping of a file from the file again.
        let _ = unsafe {
            self.bytes.unchecked_advise_range(
                memmap2::UncheckedAdvice::DontNeed,
                start as usize,
                (end - start) as usize,
            )
        };
    }
}

/// A range of a mapped file's bytes. Its pages can be released from memory.
#[derive(Debug, Clone, Copy)]
pub struct MappedBytes<'a> {
    file: &'a Mapped,
    start: u64,
    bytes: &'a [u8],
}

impl<'a> MappedBytes<'a> {
    /// The bytes of the range.
    pub fn get(&self) -> &'a [u8] {
        self.bytes
    }

    /// Advises the kernel that `part` of these bytes is not read again: see [`Mapped::forget`].
    pub fn forget(&self, part: Range<usize>) {
        self.file.forget(self.start + part.start as u64..self.start + part.end as u64);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A file that is cut or rewritten while it is read is reported, and not read any more.
    #[test]
    fn a_file_that_changes_is_reported_by_name() {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let path = folder.path().join("m.gguf");
        std::fs::write(&path, vec![1; 1 << 16]).expect("written");
        let mapped = Mapped::open(&path).expect("a file");
        assert_eq!(mapped.slice(4..8, "x").expect("it is there"), [1; 4]);
        // A new file under the old name leaves the opened one as it is.
        std::fs::write(folder.path().join("new"), vec![2; 8]).expect("written");
        std::fs::rename(folder.path().join("new"), &path).expect("renamed");
        assert_eq!(mapped.slice(4..8, "x").expect("it is still there"), [1; 4]);
        let replaced = Mapped::open(&path).expect("a file");
        File::options().write(true).open(&path).and_then(|file| file.set_len(6)).expect("cut");
        let changed = replaced.slice(4..8, "x").expect_err("it was cut");
        assert_eq!(changed, FormatError::Changed { path });
        assert!(!changed.remedy().is_empty());
    }
}
