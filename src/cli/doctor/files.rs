//! Folders, disks and model files.

use super::{Check, gigabytes};
use exo_engines::model::ModelFiles;
use std::path::{Path, PathBuf};

const AREA: &str = "files";
/// Less free disk than this holds no model of use.
const DISK_MIN: u64 = 2_000_000_000;
/// The most model files that are looked at.
const MODELS_MAX: usize = 100;

pub(super) fn checks(data_dir: &Path, models: &[PathBuf]) -> Vec<Check> {
    let mut checks = vec![match can_write(data_dir) {
        Ok(()) => Check::ok(AREA, "data folder", data_dir.display().to_string()),
        Err(error) => {
            let found = format!("{} cannot be written: {error}", data_dir.display());
            Check::fail(AREA, "data folder", found, "choose another folder: --data-dir or EXO_DATA_DIR")
        }
    }];
    // Downloads go to the first folder.
    checks.extend(models.first().map(|folder| downloads(folder)));
    checks.extend(models.iter().flat_map(|folder| model_files(folder)).take(MODELS_MAX));
    checks
}

/// Whether files can be made in a folder, or in the nearest folder above that exists.
fn can_write(folder: &Path) -> std::io::Result<()> {
    let existing = folder.ancestors().find(|folder| folder.exists()).unwrap_or(Path::new("/"));
    tempfile::tempfile_in(existing).map(drop)
}

fn downloads(folder: &Path) -> Check {
    let place = folder.display();
    if let Err(error) = can_write(folder) {
        let found = format!("{place} cannot be written: {error}");
        return Check::fail(AREA, "models folder", found, "choose another folder: EXO_MODELS_DIR");
    }
    let Some(free) = free_bytes(folder) else { return Check::ok(AREA, "models folder", place.to_string()) };
    let found = format!("{place}, {} free", gigabytes(free));
    match free < DISK_MIN {
        true => Check::warn(AREA, "models folder", found, "free some disk, or choose another folder: EXO_MODELS_DIR"),
        false => Check::ok(AREA, "models folder", found),
    }
}

#[cfg(unix)]
fn free_bytes(folder: &Path) -> Option<u64> {
    let existing = folder.ancestors().find(|folder| folder.exists())?;
    let disk = rustix::fs::statvfs(existing).ok()?;
    Some(disk.f_bavail.saturating_mul(disk.f_frsize))
}

#[cfg(not(unix))]
fn free_bytes(_: &Path) -> Option<u64> {
    None
}

/// The models in a folder whose files cannot be read, and the number of the others.
fn model_files(folder: &Path) -> Vec<Check> {
    let entries = std::fs::read_dir(folder).into_iter().flatten().flatten().map(|entry| entry.path());
    let is_gguf = |path: &PathBuf| path.extension().is_some_and(|extension| extension == "gguf");
    let mut models: Vec<PathBuf> = entries.filter(|path| is_gguf(path) || path.join("config.json").is_file()).collect();
    models.sort();
    let mut checks = Vec::new();
    let mut readable = 0;
    for path in models {
        match ModelFiles::open(&path) {
            Ok(_) => readable += 1,
            Err(error) => {
                let remedy = format!("{}; or delete the file, and fetch the model again", error.remedy());
                checks.push(Check::warn(AREA, "model", format!("{}: {error}", path.display()), remedy));
            }
        }
    }
    if readable > 0 {
        checks.push(Check::ok(AREA, "models", format!("{readable} in {} can be read", folder.display())));
    }
    checks
}

#[cfg(test)]
mod tests {
    use super::super::Verdict;
    use super::*;

    /// R8.1–R8.5: broken model files are named with what to do; a folder that does not exist yet is no fault.
    #[test]
    fn broken_models_are_named() {
        let folder = tempfile::tempdir().expect("a folder");
        std::fs::write(folder.path().join("broken.gguf"), "GGUF").expect("written");
        std::fs::write(folder.path().join("notes.txt"), "no model").expect("written");
        let checks = checks(&folder.path().join("data"), &[folder.path().to_owned(), "/nowhere".into()]);
        let model: Vec<&Check> = checks.iter().filter(|check| check.subject == "model").collect();
        assert_eq!(model.len(), 1);
        assert!(model[0].found.contains("broken.gguf") && model[0].verdict == Verdict::Warn);
        assert!(checks.iter().all(|check| check.verdict != Verdict::Fail), "{checks:?}");
    }

    /// R8.1–R8.5: a data folder that cannot be made is a failure.
    #[test]
    fn a_folder_that_cannot_be_written_is_a_failure() {
        let checks = checks(Path::new("/proc/exo"), &[]);
        assert_eq!((checks[0].subject.as_str(), checks[0].verdict), ("data folder", Verdict::Fail));
    }
}
