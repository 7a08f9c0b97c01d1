//! Files that only their owner may read: keys and secrets in the data directory.

use std::fs::OpenOptions;
use std::io::{Read, Write};
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use tempfile::NamedTempFile;

/// The most bytes that are read of a private file: an Ed25519 key has 83 bytes, a cluster's secret 65.
const BYTES_MAX: u64 = 1024;

/// Why a private file could not be read or written.
#[derive(Debug, thiserror::Error)]
pub enum PrivateFileError {
    /// The file or its folder cannot be read or written.
    #[error("{path}: {source}")]
    Io {
        /// The file.
        path: PathBuf,
        /// The system's error.
        source: std::io::Error,
    },
    /// The file's mode gives other users access.
    #[error("{path} is open to other users (mode {mode:o}); set its mode to 600")]
    Exposed {
        /// The file.
        path: PathBuf,
        /// The file's permission bits.
        mode: u32,
    },
}

/// The bytes of `path`; `None` where there is no such file.
fn read(path: &Path) -> Result<Option<Vec<u8>>, PrivateFileError> {
    let io = |source| PrivateFileError::Io { path: path.to_owned(), source };
    let file = match OpenOptions::new().read(true).open(path) {
        Ok(file) => file,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
        Err(source) => return Err(io(source)),
    };
    let mode = file.metadata().map_err(io)?.mode() & 0o777;
    if mode & 0o077 != 0 {
        return Err(PrivateFileError::Exposed { path: path.to_owned(), mode });
    }
    let mut bytes = Vec::new();
    file.take(BYTES_MAX).read_to_end(&mut bytes).map_err(io)?;
    Ok(Some(bytes))
}

/// The bytes of `path`; where there is no such file, creates it with the bytes that `make` returns.
pub(crate) fn read_or_create<E: From<PrivateFileError>>(
    path: &Path,
    make: impl FnOnce() -> Result<Vec<u8>, E>,
) -> Result<Vec<u8>, E> {
    if let Some(kept) = read(path)? {
        return Ok(kept);
    }
    create(path, &make()?)?;
    // Another process may have created the file first.
    Ok(read(path)?.unwrap_or_default())
}

/// Creates `path` with `bytes`; an existing file stays as it is. If two processes do so at once, one wins, and its file
/// is complete from the first moment.
pub(crate) fn create(path: &Path, bytes: &[u8]) -> Result<(), PrivateFileError> {
    match draft(path, bytes)?.persist_noclobber(path) {
        Err(error) if error.error.kind() != std::io::ErrorKind::AlreadyExists => {
            Err(PrivateFileError::Io { path: path.to_owned(), source: error.error })
        }
        _ => Ok(()),
    }
}

/// Replaces the file at `path` with one that holds `bytes`.
pub(crate) fn replace(path: &Path, bytes: &[u8]) -> Result<(), PrivateFileError> {
    let replaced = draft(path, bytes)?.persist(path);
    replaced.map(drop).map_err(|error| PrivateFileError::Io { path: path.to_owned(), source: error.error })
}

/// Writes `bytes` to a temporary file in the folder of `path`, which only the owner may read.
fn draft(path: &Path, bytes: &[u8]) -> Result<NamedTempFile, PrivateFileError> {
    let io = |source| PrivateFileError::Io { path: path.to_owned(), source };
    let folder = path.parent().unwrap_or(Path::new("."));
    std::fs::create_dir_all(folder).map_err(io)?;
    std::fs::set_permissions(folder, std::fs::Permissions::from_mode(0o700)).map_err(io)?;
    let mut file = NamedTempFile::new_in(folder).map_err(io)?;
    file.write_all(bytes).and_then(|()| file.as_file().sync_all()).map_err(io)?;
    Ok(file)
}
