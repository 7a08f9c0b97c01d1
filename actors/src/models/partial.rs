//! Partial copies of a model's files, fetched from other nodes piece by piece.
//!
//! ```text
//! models folder/shared/<files' id>/model/…   files of their full length, with holes where pieces are missing
//!                                 /hashes    the SHA-256 of every piece
//!                                 /have      numbers of the verified pieces, in order of arrival
//! ```
//! A number is added to `have` after its piece is on the disk, so an interrupted fetch continues from there.

use super::ModelError;
use super::hashes::{Hash, read_hashes};
use crate::core::spec::FilesId;
use exo_engines::format::{FormatError, Writers};
use exo_engines::model::{ModelFiles, Pieces};
use parking_lot::{Mutex, MutexGuard};
use sha2::{Digest, Sha256};
use std::collections::BTreeSet;
use std::fs::{File, OpenOptions};
use std::io::Write;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// The file with the hashes of all pieces, in the folder of a copy.
pub(super) const HASHES: &str = "hashes";

/// The folder of a model's copy in a models folder.
pub(super) fn folder(models: &Path, id: FilesId) -> PathBuf {
    models.join("shared").join(id.to_string())
}

/// The model's path in the folder of its copy. `name` is the name of a single-file model, `None` for a folder of files.
pub(super) fn model_path(folder: &Path, name: Option<&str>) -> PathBuf {
    let model = folder.join("model");
    name.map_or(model.clone(), |name| model.join(name))
}

/// Opens the model in the folder of a copy. Its files have holes where pieces are missing.
pub(super) fn open_model(folder: &Path) -> Result<ModelFiles, ModelError> {
    let model = model_path(folder, None);
    let entries = std::fs::read_dir(&model).map_err(|e| ModelError::disk(&model, &e))?;
    let mut ggufs = entries
        .filter_map(|entry| Some(entry.ok()?.path()))
        .filter(|path| path.extension().is_some_and(|e| e == "gguf"));
    let mut files = ModelFiles::open(&ggufs.next().unwrap_or(model))?;
    // Pieces of other layers may arrive while a shard loads its own.
    files.weights.writers = Writers::Transfer;
    Ok(files)
}

/// The pieces of a model that are on this machine, and the hashes of all its pieces.
#[derive(Debug)]
pub(super) struct PartialCopy {
    folder: PathBuf,
    pieces: Arc<Pieces>,
    hashes: Vec<Hash>,
    known: Mutex<Known>,
}

#[derive(Debug, Default)]
struct Known {
    have: BTreeSet<u32>,
    /// Pieces that are written but not added to `have` on the disk yet.
    fresh: Vec<u32>,
}

impl PartialCopy {
    /// Opens the copy in `folder`, whose model has `pieces`.
    ///
    /// # Errors
    /// The copy lacks the hashes of its pieces, or cannot be read.
    pub(super) fn open(folder: &Path, pieces: Arc<Pieces>) -> Result<Self, ModelError> {
        let path = folder.join(HASHES);
        let hashes = read_hashes(&path, pieces.pieces.len()).ok_or_else(|| FormatError::Malformed {
            path,
            what: "it does not have one hash for each piece".to_owned(),
        })?;
        let copy = Self { folder: folder.to_owned(), pieces, hashes, known: Mutex::default() };
        copy.look_again()?;
        Ok(copy)
    }

    fn known(&self) -> MutexGuard<'_, Known> {
        self.known.lock()
    }

    /// Reads the piece numbers that this or another process has written.
    pub(super) fn look_again(&self) -> Result<(), ModelError> {
        let have = read(&self.folder.join("have"))?;
        let count = self.pieces.pieces.len();
        let mut known = self.known();
        let numbers = have.chunks_exact(4).filter_map(|number| Some(!u32::from_le_bytes(number.try_into().ok()?)));
        known.have.extend(numbers.filter(|&number| (number as usize) < count));
        Ok(())
    }

    pub(super) fn hashes(&self) -> &[Hash] {
        &self.hashes
    }

    pub(super) fn has(&self, number: u32) -> bool {
        self.known().have.contains(&number)
    }

    /// The pieces of `needed` that the copy lacks.
    pub(super) fn missing(&self, needed: &BTreeSet<u32>) -> BTreeSet<u32> {
        needed.difference(&self.known().have).copied().collect()
    }

    /// Writes a piece into its file, if its bytes match the known hash.
    pub(super) fn write(&self, number: u32, bytes: &[u8]) -> Result<(), ModelError> {
        let piece = self.pieces.pieces[number as usize];
        let path = &self.pieces.files[piece.file].path;
        let expected = self.hashes.get(number as usize).copied().unwrap_or_default();
        let got: Hash = Sha256::digest(bytes).into();
        if got != expected || bytes.len() as u64 != piece.length_bytes {
            let what = format!("piece {number} of {}", path.display());
            return Err(ModelError::WrongHash {
                what,
                got: FilesId(got).to_string(),
                expected: FilesId(expected).to_string(),
            });
        }
        let file = OpenOptions::new().write(true).open(path).map_err(|e| ModelError::disk(path, &e))?;
        file.write_all_at(bytes, piece.offset_bytes).map_err(|e| ModelError::disk(path, &e))?;
        let mut known = self.known();
        known.have.insert(number);
        known.fresh.push(number);
        Ok(())
    }

    /// Adds the written pieces to `have`, after it syncs their bytes to the disk.
    pub(super) fn keep(&self) -> Result<(), ModelError> {
        let fresh = std::mem::take(&mut self.known().fresh);
        if fresh.is_empty() {
            return Ok(());
        }
        let files: BTreeSet<usize> = fresh.iter().map(|&number| self.pieces.pieces[number as usize].file).collect();
        for file in files {
            let path = &self.pieces.files[file].path;
            let synced = File::open(path).and_then(|file| file.sync_data());
            synced.map_err(|e| ModelError::disk(path, &e))?;
        }
        let path = self.folder.join("have");
        // Numbers are stored inverted: a power cut may leave zeros, which are not the number of any piece then.
        let numbers: Vec<u8> = fresh.iter().flat_map(|number| (!number).to_le_bytes()).collect();
        let append = || {
            let mut file = OpenOptions::new().create(true).append(true).open(&path)?;
            let torn = file.metadata()?.len() % 4;
            if torn > 0 {
                file.set_len(file.metadata()?.len() - torn)?;
            }
            file.write_all(&numbers)?;
            file.sync_data()
        };
        append().map_err(|e| ModelError::disk(&path, &e))
    }
}

/// Reads a file. A missing file counts as empty.
fn read(path: &Path) -> Result<Vec<u8>, ModelError> {
    match std::fs::read(path) {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(Vec::new()),
        read => read.map_err(|e| ModelError::disk(path, &e)),
    }
}

#[cfg(test)]
mod tests {
    use super::super::files::read_piece;
    use super::super::hashes::write_hashes;
    use super::*;

    /// A copy's folder with a model's header and a hole for its tensors; the model's pieces; the tensors' bytes.
    fn outlined() -> (tempfile::TempDir, Arc<Pieces>, Vec<u8>) {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let model = model_path(folder.path(), None);
        std::fs::create_dir_all(&model).expect("a folder");
        let header = br#"{"a":{"dtype":"F32","shape":[4],"data_offsets":[0,16]},"b":{"dtype":"F32","shape":[2],"data_offsets":[16,24]}}"#;
        let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
        bytes.extend(header);
        let file = File::create(model.join("model.safetensors")).expect("a file");
        file.write_all_at(&bytes, 0).and_then(|()| file.set_len(bytes.len() as u64 + 24)).expect("written");
        let pieces = Pieces::of_folder(&model).expect("headers");
        (folder, Arc::new(pieces), (0..24).collect())
    }

    /// R7.1–R7.5: after a restart a copy has the verified pieces that were synced; it lacks wrong and unsynced pieces.
    #[test]
    fn a_copy_continues_after_an_interruption() {
        let (folder, pieces, weights) = outlined();
        let parts = [&weights[..16], &weights[16..]];
        assert!(PartialCopy::open(folder.path(), Arc::clone(&pieces)).is_err(), "it has no hashes");
        let hashes = parts.map(|part| Sha256::digest(part).into());
        write_hashes(&folder.path().join(HASHES), &hashes).expect("written");
        let copy = PartialCopy::open(folder.path(), Arc::clone(&pieces)).expect("a copy");
        let needed = BTreeSet::from([0, 1]);
        assert_eq!(copy.missing(&needed), needed);
        assert!(matches!(copy.write(1, parts[0]), Err(ModelError::WrongHash { .. })));
        assert_eq!(copy.missing(&needed), needed);
        copy.write(1, parts[1]).and_then(|()| copy.keep()).expect("written");
        copy.write(0, parts[0]).expect("written");
        assert!(copy.missing(&needed).is_empty());
        let again = PartialCopy::open(folder.path(), Arc::clone(&pieces)).expect("a copy");
        assert_eq!(again.missing(&needed), BTreeSet::from([0]));
        assert_eq!(read_piece(&pieces, pieces.pieces[1]).expect("read"), parts[1]);
        assert_eq!(again.hashes(), copy.hashes());
        // A power cut during an append to `have`: earlier numbers stay valid, and torn or zero numbers are ignored.
        let have = folder.path().join("have");
        let whole = std::fs::read(&have).expect("the file exists");
        std::fs::write(&have, [&whole[..], &[0; 6]].concat()).expect("written");
        let torn = PartialCopy::open(folder.path(), Arc::clone(&pieces)).expect("a copy");
        assert_eq!(torn.missing(&needed), BTreeSet::from([0]));
        torn.write(0, parts[0]).and_then(|()| torn.keep()).expect("written");
        let mended = PartialCopy::open(folder.path(), pieces).expect("a copy");
        assert!(mended.missing(&needed).is_empty());
    }
}
