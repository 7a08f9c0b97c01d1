//! Files that several processes may fetch: paths beside them, locks, hashes, ranges.

use super::ModelError;
use exo_engines::model::{Piece, Pieces};
use sha2::{Digest, Sha256};
use std::fs::File;
use std::io::Read;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

/// The path of `target` with `ending` appended to its name.
pub(super) fn beside(target: &Path, ending: &str) -> PathBuf {
    let mut name = target.as_os_str().to_owned();
    name.push(ending);
    PathBuf::from(name)
}

/// Locks `target` against fetches by other processes, until the returned file is dropped.
pub(super) async fn lock(target: &Path) -> Result<std::fs::File, ModelError> {
    let folder = target.parent().unwrap_or(Path::new(".")).to_owned();
    let path = beside(target, ".lock");
    blocking(move || {
        std::fs::create_dir_all(&folder)
            .and_then(|()| std::fs::File::create(&path))
            .and_then(|file| file.lock().map(|()| file))
            .map_err(|e| ModelError::disk(&path, &e))
    })
    .await
}

/// Runs work with files on the pool of blocking threads, so that no message waits for the disk.
pub(super) async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, ModelError> + Send + 'static,
) -> Result<T, ModelError> {
    tokio::task::spawn_blocking(work).await.map_err(|_| ModelError::Interrupted)?
}

/// The SHA-256 of a file, in hexadecimal.
pub(super) fn sha256(path: &Path) -> Result<String, ModelError> {
    let mut hasher = Sha256::new();
    let hashed = std::fs::File::open(path).and_then(|mut file| update(&mut hasher, &mut file));
    hashed.map_err(|e| ModelError::disk(path, &e))?;
    Ok(data_encoding::HEXLOWER.encode(&hasher.finalize()))
}

/// Hashes all bytes of `reader`.
pub(super) fn update(hasher: &mut Sha256, reader: &mut impl Read) -> std::io::Result<()> {
    let mut buffer = vec![0; 1 << 20];
    loop {
        match reader.read(&mut buffer)? {
            0 => return Ok(()),
            read => hasher.update(&buffer[..read]),
        }
    }
}

/// Reads the bytes of a piece.
pub(super) fn read_piece(pieces: &Pieces, piece: Piece) -> Result<Vec<u8>, ModelError> {
    let path = &pieces.files[piece.file].path;
    read_at(path, piece.offset_bytes, piece.length_bytes as usize)
}

/// Reads `length` bytes of a file, from `offset_bytes`.
pub(super) fn read_at(path: &Path, offset_bytes: u64, length: usize) -> Result<Vec<u8>, ModelError> {
    let mut bytes = vec![0; length];
    let read = File::open(path).and_then(|file| file.read_exact_at(&mut bytes, offset_bytes));
    read.map_err(|e| ModelError::disk(path, &e))?;
    Ok(bytes)
}
