//! Folders, disks and model files.

use super::super::gpu::gigabytes;
use super::Check;
use exo_engines::model::ModelFiles;
use std::path::{Path, PathBuf};

/// Less free disk than this holds no model of use.
const DISK_MIN: u64 = 2_000_000_000;
/// The most models of a folder that are opened.
const MODELS_MAX: usize = 100;

pub(super) fn checks(data_dir: &Path, models: &[PathBuf]) -> Vec<Check> {
    let remedy = "choose another folder: --data-dir or EXO_DATA_DIR";
    let mut checks = vec![match can_write(data_dir) {
        Ok(()) => Check::ok("files.data_folder", "data folder", data_dir.display().to_string()),
        Err(what) => Check::fail("files.data_folder", "data folder", what, remedy),
    }];
    // Downloads go to the first folder.
    checks.extend(models.first().map(|folder| downloads(folder)));
    checks.extend(models.iter().flat_map(|folder| model_files(folder)));
    checks
}

/// The nearest folder above, or the folder itself, that exists.
fn nearest_existing(folder: &Path) -> PathBuf {
    let absolute = std::path::absolute(folder).unwrap_or_else(|_| folder.to_owned());
    absolute.ancestors().find(|folder| folder.exists()).unwrap_or(Path::new("/")).to_owned()
}

/// Whether a folder can be made, and files in it; if not, what refuses it.
fn can_write(folder: &Path) -> Result<(), String> {
    let existing = nearest_existing(folder);
    let tried = tempfile::tempfile_in(&existing).map(drop);
    tried.map_err(|error| {
        format!("{} cannot be used: {} refuses new files: {error}", folder.display(), existing.display())
    })
}

fn downloads(folder: &Path) -> Check {
    let (id, subject) = ("files.models_folder", "models folder");
    if let Err(what) = can_write(folder) {
        return Check::fail(id, subject, what, "choose another folder: EXO_MODELS_DIR");
    }
    judge_disk(folder, free_bytes(folder))
}

fn judge_disk(folder: &Path, free: Option<u64>) -> Check {
    let (id, subject, place) = ("files.models_folder", "models folder", folder.display());
    let Some(free) = free else { return Check::ok(id, subject, place.to_string()) };
    let found = format!("{place}, {} free", gigabytes(free));
    match free < DISK_MIN {
        true => Check::warn(id, subject, found, "free some disk, or choose another folder: EXO_MODELS_DIR"),
        false => Check::ok(id, subject, found),
    }
}

#[cfg(unix)]
fn free_bytes(folder: &Path) -> Option<u64> {
    let disk = rustix::fs::statvfs(nearest_existing(folder)).ok()?;
    Some(disk.f_bavail.saturating_mul(disk.f_frsize))
}

#[cfg(not(unix))]
fn free_bytes(_: &Path) -> Option<u64> {
    None
}

/// The models in a folder that cannot be opened, and the number of the others.
fn model_files(folder: &Path) -> Vec<Check> {
    let entries = match std::fs::read_dir(folder) {
        Ok(entries) => entries,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Vec::new(),
        Err(error) => {
            let found = format!("{} cannot be read: {error}", folder.display());
            return vec![Check::warn("files.models", "models", found, "let this user read it")];
        }
    };
    let is_gguf = |path: &PathBuf| path.extension().is_some_and(|extension| extension == "gguf");
    let paths = entries.flatten().map(|entry| entry.path());
    let mut models: Vec<PathBuf> = paths.filter(|path| is_gguf(path) || path.join("config.json").is_file()).collect();
    models.sort();
    let more = models.len().saturating_sub(MODELS_MAX);
    models.truncate(MODELS_MAX);
    let mut checks = Vec::new();
    let mut readable = 0;
    for path in models {
        match ModelFiles::open(&path) {
            Ok(_) => readable += 1,
            Err(error) => {
                let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
                checks.push(Check::warn("files.model", name, error.to_string(), error.remedy()));
            }
        }
    }
    if readable > 0 {
        let others = if more > 0 { format!(", {more} more were not opened") } else { String::new() };
        let found = format!("{readable} in {} can be opened{others}", folder.display());
        checks.push(Check::ok("files.models", "models", found));
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
        let model: Vec<&Check> = checks.iter().filter(|check| check.id == "files.model").collect();
        assert_eq!(model.len(), 1);
        assert_eq!((model[0].subject.as_str(), model[0].verdict), ("broken.gguf", Verdict::Warn));
        assert!(checks.iter().all(|check| check.verdict != Verdict::Fail), "{checks:?}");
    }

    /// R8.1–R8.5: a relative folder that does not exist yet is made where the program runs.
    #[test]
    fn relative_folders_are_found() {
        let here = std::env::current_dir().expect("a folder");
        assert_eq!(nearest_existing(Path::new("a/folder/that/is/not/there")), here);
    }

    #[test]
    fn little_disk_is_a_warning() {
        let verdict = |free| judge_disk(Path::new("/x"), free).verdict;
        assert_eq!(
            [verdict(Some(1 << 30)), verdict(Some(1 << 40)), verdict(None)],
            [Verdict::Warn, Verdict::Ok, Verdict::Ok]
        );
    }

    /// R8.1–R8.5: a data folder that cannot be made is a failure.
    #[test]
    fn a_folder_that_cannot_be_written_is_a_failure() {
        let checks = checks(Path::new("/proc/exo"), &[]);
        assert_eq!((checks[0].subject.as_str(), checks[0].verdict), ("data folder", Verdict::Fail));
    }
}
