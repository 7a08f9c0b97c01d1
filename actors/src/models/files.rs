//! What is done with a file that several processes may want: named, locked, and checked.

use super::ModelError;
use sha2::{Digest, Sha256};
use std::io::Read;
use std::path::{Path, PathBuf};

/// What stands beside `target`: its name with `ending` behind it.
pub(super) fn beside(target: &Path, ending: &str) -> PathBuf {
    let mut name = target.as_os_str().to_owned();
    name.push(ending);
    PathBuf::from(name)
}

/// Keeps other processes from fetching `target` at the same time; free again when the file is dropped.
pub(super) async fn lock(target: &Path) -> Result<std::fs::File, ModelError> {
    let folder = target.parent().unwrap_or(Path::new(".")).to_owned();
    let path = beside(target, ".lock");
    let locked = tokio::task::spawn_blocking(move || {
        std::fs::create_dir_all(&folder)
            .and_then(|()| std::fs::File::create(&path))
            .and_then(|file| file.lock().map(|()| file))
            .map_err(|e| ModelError::disk(&path, &e))
    });
    locked.await.map_err(|_| ModelError::Interrupted)?
}

/// The SHA-256 of a file, in hexadecimal.
pub(super) fn sha256(path: &Path) -> Result<String, ModelError> {
    let disk = |e: std::io::Error| ModelError::disk(path, &e);
    let mut file = std::fs::File::open(path).map_err(disk)?;
    let mut hasher = Sha256::new();
    let mut buffer = vec![0; 1 << 20];
    loop {
        match file.read(&mut buffer).map_err(disk)? {
            0 => break,
            read => hasher.update(&buffer[..read]),
        }
    }
    Ok(hasher.finalize().iter().map(|byte| format!("{byte:02x}")).collect())
}
