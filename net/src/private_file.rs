//! Files that their owner alone may read: keys and secrets in the data directory.

use std::fs::OpenOptions;
use std::io::{Read, Write};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};

/// The longest that is kept so: an Ed25519 key has 83 bytes, a cluster's secret 65.
const BYTES_MAX: u64 = 1024;

/// Why a private file could not be read or made.
#[derive(Debug, thiserror::Error)]
pub enum PrivateFileError {
    #[error("{path}: {source}")]
    Io { path: PathBuf, source: std::io::Error },
    #[error("{path} may be read by others (mode {mode:o}); chmod 600 it")]
    Exposed { path: PathBuf, mode: u32 },
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

/// The bytes of `path`; the first call keeps there what `make` gives.
pub(crate) fn read_or_create<E: From<PrivateFileError>>(
    path: &Path,
    make: impl FnOnce() -> Result<Vec<u8>, E>,
) -> Result<Vec<u8>, E> {
    if let Some(kept) = read(path)? {
        return Ok(kept);
    }
    create(path, &make()?)?;
    // Another process may have been first.
    Ok(read(path)?.unwrap_or_default())
}

/// Makes `path`, where it is not there; what is there is left as it is. Of two processes that do so at once, one wins,
/// and its file is whole from the first moment.
pub(crate) fn create(path: &Path, bytes: &[u8]) -> Result<(), PrivateFileError> {
    let draft = draft(path, bytes)?;
    let linked = std::fs::hard_link(&draft, path);
    let io = |source| PrivateFileError::Io { path: path.to_owned(), source };
    std::fs::remove_file(&draft).map_err(io)?;
    match linked {
        Err(error) if error.kind() != std::io::ErrorKind::AlreadyExists => Err(io(error)),
        _ => Ok(()),
    }
}

/// Puts `bytes` in the place of `path`.
pub(crate) fn replace(path: &Path, bytes: &[u8]) -> Result<(), PrivateFileError> {
    let draft = draft(path, bytes)?;
    std::fs::rename(&draft, path).map_err(|source| PrivateFileError::Io { path: path.to_owned(), source })
}

/// A whole file beside `path`, under another name.
fn draft(path: &Path, bytes: &[u8]) -> Result<PathBuf, PrivateFileError> {
    let io = |source| PrivateFileError::Io { path: path.to_owned(), source };
    if let Some(folder) = path.parent() {
        std::fs::create_dir_all(folder).map_err(io)?;
        std::fs::set_permissions(folder, std::fs::Permissions::from_mode(0o700)).map_err(io)?;
    }
    let draft = path.with_extension(format!("{}.draft", std::process::id()));
    let mut file = OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(&draft).map_err(io)?;
    file.write_all(bytes).and_then(|()| file.sync_all()).map_err(io)?;
    Ok(draft)
}
