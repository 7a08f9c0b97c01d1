//! Hashes of a model's pieces. They distinguish files of the same name by their content.
//!
//! Hashing reads the files once. The hashes are kept in the models folder, by the files' paths, lengths, times and
//! inode numbers, so that no later start reads them again.

use super::ModelError;
use super::files::read_piece;
use crate::core::spec::FilesId;
use exo_engines::format::FormatError;
use exo_engines::model::Pieces;
use parking_lot::Mutex;
use sha2::{Digest, Sha256};
use std::collections::HashMap;
use std::fs::File;
use std::io::{Read, Write};
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};

pub(super) type Hash = [u8; 32];

pub(super) const HASH_BYTES: usize = size_of::<Hash>();

/// The folder of the kept hashes in a models folder.
const FOLDER: &str = ".hashes";
/// The most models whose hashes stay in memory.
const REMEMBERED_MAX: usize = 64;

/// When files were read to hash them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Reading {
    Now,
    Before,
}

/// Hashes models, each once. Clones share their results.
#[derive(Debug, Clone, Default)]
pub(super) struct PieceHasher(Arc<State>);

type Entry = Arc<Mutex<Option<Arc<Vec<Hash>>>>>;

#[derive(Debug, Default)]
struct State {
    /// By the files' version. The lock of an entry is held while its files are hashed.
    known: Mutex<HashMap<Hash, Entry>>,
    /// Bytes hashed so far, of all models.
    done_bytes: AtomicU64,
}

impl PieceHasher {
    /// The hashes of all pieces, in their order, and whether the files were read for them. Kept in the models folder
    /// `models`, where there is one. Blocks on the disk.
    ///
    /// # Errors
    /// A file cannot be read, or has changed in the meantime.
    pub(super) fn hashes(
        &self,
        pieces: &Pieces,
        models: Option<&Path>,
    ) -> Result<(Arc<Vec<Hash>>, Reading), ModelError> {
        let version = version(pieces)?;
        let entry = {
            let mut known = self.0.known.lock();
            if known.len() >= REMEMBERED_MAX && !known.contains_key(&version) {
                known.clear();
            }
            Arc::clone(known.entry(version).or_default())
        };
        // A second caller with the same model waits for the result, callers with others do not.
        let mut entry = entry.lock();
        if let Some(hashes) = &*entry {
            return Ok((Arc::clone(hashes), Reading::Before));
        }
        let kept = models.map(|models| models.join(FOLDER).join(FilesId(version).to_string()));
        let found = kept.as_deref().and_then(|kept| read_hashes(kept, pieces.pieces.len()));
        let (hashes, reading) = match found {
            Some(hashes) => (hashes, Reading::Before),
            None => {
                let hashes = self.hash_all(pieces)?;
                if self::version(pieces)? != version {
                    let path = pieces.files.first().map(|file| file.path.clone()).unwrap_or_default();
                    return Err(FormatError::Changed { path }.into());
                }
                if let Some(error) = kept.and_then(|kept| write_hashes(&kept, &hashes).err()) {
                    tracing::info!(%error, "the hashes of a model could not be stored: it is hashed again at the next start");
                }
                (hashes, Reading::Now)
            }
        };
        let hashes = Arc::new(hashes);
        *entry = Some(Arc::clone(&hashes));
        Ok((hashes, reading))
    }

    /// Bytes hashed so far, of all models: grows as long as a caller of [`PieceHasher::hashes`] waits for its hashes.
    pub(super) fn done_bytes(&self) -> u64 {
        self.0.done_bytes.load(Ordering::Relaxed)
    }

    fn hash_all(&self, pieces: &Pieces) -> Result<Vec<Hash>, ModelError> {
        let hashes: Vec<Mutex<Hash>> = pieces.pieces.iter().map(|_| Mutex::default()).collect();
        let (next, failure) = (AtomicUsize::new(0), Mutex::new(None));
        let work = || {
            while let Some((&piece, hash)) = {
                let index = next.fetch_add(1, Ordering::Relaxed);
                pieces.pieces.get(index).zip(hashes.get(index))
            } {
                match read_piece(pieces, piece) {
                    Ok(bytes) => {
                        *hash.lock() = Sha256::digest(&bytes).into();
                        self.0.done_bytes.fetch_add(bytes.len() as u64, Ordering::Relaxed);
                    }
                    Err(error) => {
                        failure.lock().get_or_insert(error);
                        return;
                    }
                }
            }
        };
        std::thread::scope(|scope| {
            let others = std::thread::available_parallelism().map_or(1, std::num::NonZero::get) - 1;
            // If a thread cannot be started, this thread does its work.
            let started: Vec<_> =
                (0..others).map_while(|_| std::thread::Builder::new().spawn_scoped(scope, work).ok()).collect();
            work();
            drop(started);
        });
        match failure.into_inner() {
            Some(error) => Err(error),
            None => Ok(hashes.into_iter().map(Mutex::into_inner).collect()),
        }
    }
}

/// What changes when one of the files is written to or replaced.
pub(super) fn version(pieces: &Pieces) -> Result<Hash, ModelError> {
    let mut hasher = Sha256::new();
    for file in &pieces.files {
        let metadata = std::fs::metadata(&file.path).map_err(|e| ModelError::disk(&file.path, &e))?;
        hasher.update(file.path.as_os_str().as_encoded_bytes());
        for number in [metadata.len() as i64, metadata.mtime(), metadata.mtime_nsec(), metadata.ino() as i64] {
            hasher.update(number.to_le_bytes());
        }
    }
    Ok(hasher.finalize().into())
}

/// Reads `count` hashes; `None` if the file does not have as many.
pub(super) fn read_hashes(path: &Path, count: usize) -> Option<Vec<Hash>> {
    let bytes = std::fs::read(path).ok()?;
    let (hashes, rest) = bytes.as_chunks::<HASH_BYTES>();
    (rest.is_empty() && hashes.len() == count).then(|| hashes.to_vec())
}

/// Writes hashes into a file that is complete from its first moment.
pub(super) fn write_hashes(path: &Path, hashes: &[Hash]) -> Result<(), ModelError> {
    let disk = |e: std::io::Error| ModelError::disk(path, &e);
    let folder = path.parent().unwrap_or(Path::new("."));
    std::fs::create_dir_all(folder).map_err(disk)?;
    // Other users may share the models folder; the umask applies.
    let mode = std::fs::Permissions::from_mode(0o666);
    let mut draft = tempfile::Builder::new().permissions(mode).tempfile_in(folder).map_err(disk)?;
    draft.write_all(hashes.as_flattened()).map_err(disk)?;
    draft.persist(path).map(drop).map_err(|e| disk(e.error))
}

/// Computes the [`FilesId`] of a model with these pieces, and these hashes of them.
pub(super) fn id_of(pieces: &Pieces, hashes: &[Hash]) -> Result<FilesId, ModelError> {
    let mut hasher = Sha256::new();
    for file in &pieces.files {
        hasher.update(file.length_bytes.to_le_bytes());
        hasher.update(file.outline_bytes().to_le_bytes());
        let disk = |e: std::io::Error| ModelError::disk(&file.path, &e);
        let mut outline = File::open(&file.path).map_err(disk)?.take(file.outline_bytes());
        super::files::update(&mut hasher, &mut outline).map_err(disk)?;
    }
    hasher.update(hashes.as_flattened());
    Ok(FilesId(hasher.finalize().into()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use exo_engines::model::ModelFiles;

    fn tiny(folder: &Path) -> Pieces {
        let fixture = Path::new(env!("CARGO_MANIFEST_DIR")).join("../engines/tests/fixtures/llama");
        for file in ["config.json", "model.safetensors"] {
            std::fs::copy(fixture.join(file), folder.join(file)).expect("copied");
        }
        std::fs::write(folder.join("tokenizer.json"), "{}").expect("written");
        Pieces::of(&ModelFiles::open(folder).expect("a model")).expect("headers")
    }

    /// Two files whose headers are equal, but not their tensors, have different ids. A file that has not changed is
    /// hashed once; one that has changed is hashed again.
    #[test]
    fn files_are_identified_by_their_content() {
        let (folder, models) = (tempfile::tempdir().expect("a folder"), tempfile::tempdir().expect("a folder"));
        let pieces = tiny(folder.path());
        let id = |hasher: &PieceHasher| {
            id_of(&pieces, &hasher.hashes(&pieces, Some(models.path())).expect("readable").0).expect("readable")
        };
        let hasher = PieceHasher::default();
        let first = id(&hasher);
        let hashed = hasher.done_bytes();
        assert!(hashed > 0 && id(&hasher) == first && hasher.done_bytes() == hashed);
        let again = PieceHasher::default();
        assert_eq!((id(&again), again.done_bytes()), (first, 0), "the hashes were kept");
        let path = folder.path().join("model.safetensors");
        let mut bytes = std::fs::read(&path).expect("readable");
        *bytes.last_mut().expect("a byte") ^= 1;
        std::fs::write(&path, bytes).expect("written");
        assert_ne!(id(&hasher), first);
    }

    /// Where the hashes cannot be kept, the model is used all the same.
    #[test]
    fn hashes_that_cannot_be_kept_are_computed_again() {
        let folder = tempfile::tempdir().expect("a folder");
        let pieces = tiny(folder.path());
        let blocked = folder.path().join("blocked");
        std::fs::write(&blocked, "no folder").expect("written");
        let hasher = PieceHasher::default();
        let (hashes, reading) = hasher.hashes(&pieces, Some(&blocked)).expect("readable");
        assert_eq!((hashes.len(), reading), (pieces.pieces.len(), Reading::Now));
    }
}
