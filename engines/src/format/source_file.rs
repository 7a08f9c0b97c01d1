//! Reading of byte ranges of a model's file.

use super::FormatError;
use serde::{Deserialize, Serialize};
use std::fs::File;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::SystemTime;

/// An open file that notices when another program writes to it. Cheap to clone.
///
/// Ranges are read, not mapped: reading a mapped range that another program cuts off ends the process with SIGBUS.
#[derive(Debug, Clone)]
pub struct SourceFile {
    path: PathBuf,
    file: Arc<File>,
    writers: Writers,
    opened_as: Version,
}

/// Who may write to a file while it is read.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub enum Writers {
    /// Nobody: a write means that the file is being replaced.
    #[default]
    Nobody,
    /// A transfer, which fills holes and leaves all other bytes as they are.
    Transfer,
}

/// What changes when a file is written to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Version {
    length_bytes: u64,
    modified: Option<SystemTime>,
}

impl Version {
    fn of(file: &File, writers: Writers) -> std::io::Result<Self> {
        let metadata = file.metadata()?;
        let modified = metadata.modified().ok().filter(|_| writers == Writers::Nobody);
        Ok(Self { length_bytes: metadata.len(), modified })
    }
}

impl SourceFile {
    /// Opens `path`, to which nobody writes. An empty file is an error: no supported format allows one.
    pub fn open(path: &Path) -> Result<Self, FormatError> {
        Self::open_beside(path, Writers::Nobody)
    }

    /// Opens `path`, to which these writers may write. An empty file is an error.
    pub fn open_beside(path: &Path, writers: Writers) -> Result<Self, FormatError> {
        let file = File::open(path).map_err(|e| FormatError::io(path, &e))?;
        let opened_as = Version::of(&file, writers).map_err(|e| FormatError::io(path, &e))?;
        if opened_as.length_bytes == 0 {
            return Err(FormatError::Truncated { path: path.to_owned(), what: "its header".to_owned() });
        }
        Ok(Self { path: path.to_owned(), file: Arc::new(file), writers, opened_as })
    }

    /// The file's path, for errors.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The file's length when it was opened, at least 1 byte.
    pub fn length_bytes(&self) -> u64 {
        self.opened_as.length_bytes
    }

    /// The bytes of `range`, counted from the file's start.
    ///
    /// # Errors
    /// [`FormatError::Truncated`], which names `what`, where the file is shorter; [`FormatError::Changed`] if another
    /// program has written to the file since it was opened.
    pub fn read(&self, range: Range<u64>, what: &str) -> Result<Vec<u8>, FormatError> {
        let mut bytes = Vec::new();
        self.read_into(range, what, &mut bytes)?;
        Ok(bytes)
    }

    /// Like [`SourceFile::read`], into a buffer, whose earlier content is lost.
    ///
    /// # Errors
    /// As [`SourceFile::read`].
    pub fn read_into(&self, range: Range<u64>, what: &str, buffer: &mut Vec<u8>) -> Result<(), FormatError> {
        let length = range.end.saturating_sub(range.start);
        let length = usize::try_from(length).ok().filter(|_| range.end <= self.length_bytes());
        let Some(length) = length else {
            return Err(FormatError::Truncated { path: self.path.clone(), what: what.to_owned() });
        };
        buffer.resize(length, 0);
        let read = self.file.read_exact_at(buffer, range.start);
        // The check comes last, so that it notices a write during the read, too.
        let version = Version::of(&self.file, self.writers).map_err(|e| FormatError::io(&self.path, &e))?;
        if version != self.opened_as {
            return Err(FormatError::Changed { path: self.path.clone() });
        }
        read.map_err(|e| FormatError::io(&self.path, &e))
    }
}

/// A tensor's rows, contiguous, as its element type stores them.
#[derive(Debug)]
pub enum TensorBytes<'a> {
    /// A range of a file.
    InFile {
        /// The file.
        file: &'a SourceFile,
        /// The range, counted from the file's start.
        range: Range<u64>,
        /// The tensor's name, for errors.
        name: &'a str,
    },
    /// Copied into row order, or newly quantised.
    Gathered(Vec<u8>),
}

impl TensorBytes<'_> {
    /// The number of bytes of all rows.
    pub fn length(&self) -> usize {
        match self {
            Self::InFile { range, .. } => usize::try_from(range.end.saturating_sub(range.start)).unwrap_or(usize::MAX),
            Self::Gathered(bytes) => bytes.len(),
        }
    }

    /// The bytes of `part`, a range of 0 to [`TensorBytes::length`]. Bytes of a file are read into `buffer`.
    ///
    /// # Errors
    /// As [`SourceFile::read`].
    pub fn part<'b>(&'b self, part: Range<usize>, buffer: &'b mut Vec<u8>) -> Result<&'b [u8], FormatError> {
        match self {
            Self::InFile { file, range, name } => {
                let at = |offset: usize| range.start.saturating_add(offset as u64);
                file.read_into(at(part.start)..at(part.end), name, buffer)?;
                Ok(buffer)
            }
            Self::Gathered(bytes) => bytes
                .get(part)
                .ok_or_else(|| FormatError::Truncated { path: PathBuf::new(), what: "a tensor".to_owned() }),
        }
    }

    /// The bytes of all rows.
    ///
    /// # Errors
    /// As [`SourceFile::read`].
    pub fn whole(&self) -> Result<std::borrow::Cow<'_, [u8]>, FormatError> {
        match self {
            Self::InFile { file, range, name } => Ok(file.read(range.clone(), name)?.into()),
            Self::Gathered(bytes) => Ok(bytes.into()),
        }
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
        let opened = SourceFile::open(&path).expect("a file");
        assert_eq!(opened.read(4..8, "x").expect("it is there"), [1; 4]);
        // A new file under the old name leaves the opened one as it is.
        std::fs::write(folder.path().join("new"), vec![2; 8]).expect("written");
        std::fs::rename(folder.path().join("new"), &path).expect("renamed");
        assert_eq!(opened.read(4..8, "x").expect("it is still there"), [1; 4]);
        let replaced = SourceFile::open(&path).expect("a file");
        File::options().write(true).open(&path).and_then(|file| file.set_len(6)).expect("cut");
        let changed = replaced.read(4..8, "x").expect_err("it was cut");
        assert_eq!(changed, FormatError::Changed { path: path.clone() });
        assert!(!changed.remedy().is_empty());
        let bytes = TensorBytes::InFile { file: &replaced, range: 2..8, name: "x" };
        assert_eq!((bytes.length(), bytes.whole().err()), (6, Some(FormatError::Changed { path })));
    }

    /// A transfer that fills holes of a file disturbs no reader of its other ranges. A cut does.
    #[test]
    fn a_transfer_may_write_beside_a_reader() {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let path = folder.path().join("m.gguf");
        std::fs::write(&path, [1; 8]).expect("written");
        let opened = SourceFile::open_beside(&path, Writers::Transfer).expect("a file");
        std::thread::sleep(std::time::Duration::from_millis(20));
        let file = File::options().write(true).open(&path).expect("a file");
        file.write_all_at(&[2; 2], 6).expect("written");
        assert_eq!(opened.read(0..4, "x").expect("it is there"), [1; 4]);
        file.set_len(6).expect("cut");
        assert_eq!(opened.read(0..4, "x"), Err(FormatError::Changed { path }));
    }

    /// A range that the file never had is reported with what it was to hold.
    #[test]
    fn a_range_beyond_the_end_is_reported() {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let path = folder.path().join("m.gguf");
        std::fs::write(&path, [1; 8]).expect("written");
        let opened = SourceFile::open(&path).expect("a file");
        for range in [4..9, 9..12, 0..u64::MAX, u64::MAX - 1..u64::MAX] {
            let error = opened.read(range, "a tensor").expect_err("too long");
            assert_eq!(error, FormatError::Truncated { path: path.clone(), what: "a tensor".to_owned() });
        }
    }
}
