//! Downloads from the Hugging Face hub, by the hub's own client.
//!
//! The client resumes interrupted downloads, chunk by chunk, in its own cache, but verifies nothing. The ETag of a
//! large file on the hub is its SHA-256, which this module compares.

use super::config::{ModelsConfig, Progress, ProgressSink};
use super::files::{blocking, lock, sha256};
use super::{HubName, ModelError};
use exo_engines::model::FOLDER_FILES;
use hf_hub::api::tokio::{Api, ApiBuilder, ApiError, ApiRepo};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

/// A try of a download fails after this time without progress, at the latest after twice this time.
const STALL_TIMEOUT: Duration = Duration::from_secs(60);
/// The most tries of a download. The client does not retry by itself; each try continues where the last one stopped.
const TRIES: u32 = 4;
/// The wait before the second try. It doubles before each further try.
const FIRST_WAIT: Duration = Duration::from_millis(500);
/// The end of the name of a file that the client has not finished.
const UNFINISHED: &str = ".sync.part";
/// The length of a SHA-256 in hexadecimal digits. The ETag of a small file is git's SHA-1 instead.
const SHA256_DIGITS: usize = 64;

fn api(config: &ModelsConfig) -> Result<Api, ModelError> {
    let mut builder = ApiBuilder::new().with_cache_dir(config.hub_cache.clone()).with_progress(false);
    if let Some(endpoint) = &config.hub_endpoint {
        builder = builder.with_endpoint(endpoint.trim_end_matches('/').to_owned());
    }
    builder = builder.with_token(config.hub_token.clone());
    builder.build().map_err(|e| failed(config, "the hub", &e))
}

fn failed(config: &ModelsConfig, url: &str, error: &ApiError) -> ModelError {
    let url = url.to_owned();
    match error {
        ApiError::RequestError(error) => match error.status().map(|status| status.as_u16()) {
            Some(401 | 403) => ModelError::Forbidden { url },
            Some(404) => ModelError::NotOnHub { url },
            _ => ModelError::Network { url, reason: chain(error) },
        },
        ApiError::IoError(error) => ModelError::disk(&config.hub_cache, error),
        other => ModelError::Network { url, reason: chain(other) },
    }
}

/// The text of an error and its causes, because the client's own text leaves out the causes.
fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        text = format!("{text}: {cause}");
        source = cause.source();
    }
    text
}

/// Fetches one file of a repository to `target`. Returns its SHA-256 in hexadecimal, if the hub sends it.
pub(super) async fn fetch_file(
    config: &ModelsConfig,
    repository: &str,
    file: &str,
    target: &Path,
) -> Result<Option<String>, ModelError> {
    let (cached, presence) = match config.is_offline {
        true => {
            let found = find_cached(config, repository.to_owned(), file).await?;
            (found.ok_or_else(|| ModelError::Offline { what: repository.to_owned() })?, Presence::Before)
        }
        false => cached(config, &api(config)?.model(repository.to_owned()), file).await?,
    };
    let target = target.to_owned();
    blocking(move || {
        let blob = std::fs::canonicalize(&cached).map_err(|e| ModelError::disk(&cached, &e))?;
        let _ = std::fs::remove_file(&target);
        let copied = || std::fs::copy(&blob, &target).map(drop);
        let placed = match presence {
            // The file of another program stays where it is. A link takes no space.
            Presence::Before => std::fs::hard_link(&blob, &target).or_else(|_| copied()),
            // A file that was fetched now moves: a damaged one must not stay in the cache.
            Presence::FetchedNow => {
                let moved =
                    std::fs::rename(&blob, &target).or_else(|_| copied().and_then(|()| std::fs::remove_file(&blob)));
                let _ = std::fs::remove_file(&cached);
                moved
            }
        };
        placed.map_err(|e| ModelError::disk(&target, &e))?;
        Ok(digest_of(&blob))
    })
    .await
}

/// The SHA-256 of a blob in the client's cache, which is named by its ETag; `None` if the ETag is no SHA-256.
fn digest_of(blob: &Path) -> Option<String> {
    let name = blob.file_name()?.to_str()?;
    let is_digest = name.len() == SHA256_DIGITS && name.bytes().all(|b| b.is_ascii_hexdigit());
    is_digest.then(|| name.to_ascii_lowercase())
}

/// Fetches a model by its hub name: one GGUF file, or the files of a folder of safetensors.
pub(super) async fn fetch_named(config: &ModelsConfig, wanted: &HubName) -> Result<PathBuf, ModelError> {
    let folder = config.hub_cache.clone();
    if config.is_offline {
        let (cache, wanted) = (folder, wanted.clone());
        return blocking(move || offline(&cache, &wanted)).await;
    }
    // The client's own lock times out after some seconds, but another process may download for hours.
    let _lock = lock(&config.hub_cache.join(format!("exo--{}", wanted.repository.replace('/', "--")))).await?;
    let repo = api(config)?.model(wanted.repository.clone());
    let source = format!("the hub ({})", wanted.repository);
    (config.progress)(Progress::Trying { model: wanted.repository.clone(), source: source.clone() });
    let files = match &wanted.file {
        Some(file) => vec![file.clone()],
        None => {
            let info = repo.info().await.map_err(|e| failed(config, &wanted.repository, &e))?;
            let names = info.siblings.into_iter().map(|sibling| sibling.rfilename);
            names.filter(|name| is_part_of_a_model(name)).collect()
        }
    };
    let mut last = folder;
    for file in &files {
        last = verified(config, &repo, file).await?;
    }
    let path = match &wanted.file {
        Some(_) => last,
        None => last.parent().map(Path::to_owned).unwrap_or(last),
    };
    (config.progress)(Progress::Fetched { path: path.clone(), source });
    Ok(path)
}

/// Whether the client's cache has a model, or a part of it. Blocks on the disk.
pub(super) fn is_cached(config: &ModelsConfig, wanted: &HubName) -> bool {
    in_cache(&config.hub_cache, wanted).is_some()
}

fn in_cache(cache: &Path, wanted: &HubName) -> Option<PathBuf> {
    cached_path(cache, wanted.repository.clone(), wanted.file.as_deref().unwrap_or("config.json"))
}

/// The path of a repository's file in the client's cache. Blocks on the disk.
fn cached_path(cache: &Path, repository: String, file: &str) -> Option<PathBuf> {
    hf_hub::Cache::new(cache.to_owned()).model(repository).get(file)
}

async fn find_cached(config: &ModelsConfig, repository: String, file: &str) -> Result<Option<PathBuf>, ModelError> {
    let (cache, file) = (config.hub_cache.clone(), file.to_owned());
    blocking(move || Ok(cached_path(&cache, repository, &file))).await
}

fn offline(cache: &Path, wanted: &HubName) -> Result<PathBuf, ModelError> {
    let path = in_cache(cache, wanted).ok_or_else(|| ModelError::Offline { what: wanted.repository.clone() })?;
    Ok(match (&wanted.file, path.parent()) {
        (None, Some(folder)) => folder.to_owned(),
        _ => path,
    })
}

/// Whether a folder of safetensors needs the file. A name that contains a folder is rejected.
fn is_part_of_a_model(name: &str) -> bool {
    let is_plain = !name.contains(['/', '\\']) && !name.starts_with('.');
    is_plain && (FOLDER_FILES.contains(&name) || name.ends_with(".safetensors"))
}

/// The path of a file in the client's cache, fetched if it is missing, and verified if its SHA-256 is known.
async fn verified(config: &ModelsConfig, repo: &ApiRepo, file: &str) -> Result<PathBuf, ModelError> {
    let (path, presence) = cached(config, repo, file).await?;
    let (file, progress) = (file.to_owned(), Arc::clone(&config.progress));
    let marks = config.folders.first().map(|folder| folder.join(".verified"));
    blocking(move || verify(&path, presence, &file, marks.as_deref(), &progress).map(|()| path)).await
}

/// Whether a file of the cache was there before. Another program may have fetched it then.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Presence {
    Before,
    FetchedNow,
}

/// Compares the hash of a cached file with the hub's, if the hub has told it. Removes a damaged file that was fetched
/// now, so that the next try fetches it again. The folder `marks` has an empty file for each hash that was verified, so
/// that a file of many gigabytes is not hashed at every start.
fn verify(
    path: &Path,
    presence: Presence,
    file: &str,
    marks: Option<&Path>,
    progress: &ProgressSink,
) -> Result<(), ModelError> {
    let blob = std::fs::canonicalize(path).map_err(|e| ModelError::disk(path, &e))?;
    let Some(expected) = digest_of(&blob) else { return Ok(()) };
    let mark = marks.map(|marks| marks.join(&expected));
    if presence == Presence::Before && mark.as_ref().is_some_and(|mark| mark.exists()) {
        return Ok(());
    }
    progress(Progress::Verifying);
    let got = sha256(&blob)?;
    if got != expected {
        if presence == Presence::FetchedNow {
            let _ = std::fs::remove_file(path);
            let _ = std::fs::remove_file(&blob);
        }
        let what = if presence == Presence::FetchedNow { file.to_owned() } else { blob.display().to_string() };
        return Err(ModelError::WrongHash { what, got, expected });
    }
    if let (Some(marks), Some(mark)) = (marks, mark) {
        let marked = std::fs::create_dir_all(marks).and_then(|()| std::fs::write(&mark, b""));
        if let Err(error) = marked {
            tracing::warn!(%error, mark = %mark.display(), "a verified file is verified again at the next start");
        }
    }
    Ok(())
}

async fn cached(config: &ModelsConfig, repo: &ApiRepo, file: &str) -> Result<(PathBuf, Presence), ModelError> {
    let url = repo.url(file);
    let mut wait = FIRST_WAIT;
    for attempt in 1.. {
        let fetched = Arc::new(AtomicU64::new(0));
        let meter = Meter { fetched: Arc::clone(&fetched), total: 0, sink: Arc::clone(&config.progress) };
        if let Some(path) = find_cached(config, repository_of(repo), file).await? {
            return Ok((path, Presence::Before));
        }
        let outcome = tokio::select! {
            outcome = repo.download_with_progress(file, meter) => outcome.map_err(|e| failed(config, &url, &e)),
            () = stalled(&fetched) => {
                Err(ModelError::Network { url: url.clone(), reason: "the download has stalled".to_owned() })
            }
        };
        match outcome {
            Ok(path) => return Ok((path, Presence::FetchedNow)),
            Err(error) if error.is_of_disk() => {
                give_back(config, repository_of(repo)).await?;
                return Err(error);
            }
            Err(error) if attempt >= TRIES || is_final(&error) => return Err(error),
            Err(error) => tracing::warn!(%error, attempt, "retrying a download"),
        }
        tokio::time::sleep(wait).await;
        wait *= 2;
    }
    Err(ModelError::Interrupted)
}

/// The repository's name, taken from the URL of any of its files.
fn repository_of(repo: &ApiRepo) -> String {
    let url = repo.url("x");
    let before = url.split("/resolve/").next().unwrap_or_default();
    let mut parts: Vec<&str> = before.rsplit('/').take(2).collect();
    parts.reverse();
    parts.join("/")
}

/// Removes what the client has fetched of a repository's unfinished files: it must not fill a disk that has no room for
/// the rest.
async fn give_back(config: &ModelsConfig, repository: String) -> Result<(), ModelError> {
    let cache = config.hub_cache.clone();
    blocking(move || {
        let blob = hf_hub::Cache::new(cache).model(repository).blob_path("any");
        let blobs = blob.parent().and_then(|folder| std::fs::read_dir(folder).ok());
        for path in blobs.into_iter().flatten().filter_map(|entry| Some(entry.ok()?.path())) {
            if path.to_string_lossy().ends_with(UNFINISHED) {
                // The error of the disk is told, not one of its tidying.
                let _ = std::fs::remove_file(path);
            }
        }
        Ok(())
    })
    .await
}

/// Whether another try would fail with the same error.
fn is_final(error: &ModelError) -> bool {
    matches!(error, ModelError::Forbidden { .. } | ModelError::NotOnHub { .. })
}

async fn stalled(fetched: &AtomicU64) {
    let mut last = None;
    loop {
        let now = fetched.load(Ordering::Relaxed);
        if last == Some(now) {
            return;
        }
        last = Some(now);
        tokio::time::sleep(STALL_TIMEOUT).await;
    }
}

/// The counter of one file's fetched bytes. The client clones it for each chunk.
#[derive(Clone)]
struct Meter {
    fetched: Arc<AtomicU64>,
    total: u64,
    sink: ProgressSink,
}

impl hf_hub::api::tokio::Progress for Meter {
    async fn init(&mut self, size: usize, _: &str) {
        self.total = size as u64;
    }

    async fn update(&mut self, size: usize) {
        let fetched_bytes = self.fetched.fetch_add(size as u64, Ordering::Relaxed) + size as u64;
        (self.sink)(Progress::Fetching { fetched_bytes, total_bytes: Some(self.total).filter(|&total| total > 0) });
    }

    async fn finish(&mut self) {}
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_plain_files_are_part_of_a_model() {
        assert!(is_part_of_a_model("model-00001-of-00002.safetensors") && is_part_of_a_model("config.json"));
        assert!(!is_part_of_a_model("x/config.json") && !is_part_of_a_model(".model.safetensors"));
    }

    /// The cache of another program, with one file in the layout of the Hub's libraries.
    fn filled_cache(cache: &Path, content: &[u8], name: &str) -> PathBuf {
        let model = cache.join("models--owner--model");
        let (blobs, snapshot) = (model.join("blobs"), model.join("snapshots/main-commit"));
        for folder in [&blobs, &snapshot, &model.join("refs")] {
            std::fs::create_dir_all(folder).expect("a folder");
        }
        std::fs::write(model.join("refs/main"), "main-commit").expect("written");
        std::fs::write(blobs.join(name), content).expect("written");
        std::os::unix::fs::symlink(format!("../../blobs/{name}"), snapshot.join("m.gguf")).expect("a link");
        snapshot.join("m.gguf")
    }

    /// R4.1: a file that another program has fetched is used where it lies, also offline, and stays as it is.
    #[tokio::test]
    async fn a_cache_of_another_program_is_used_and_not_changed() {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let config = ModelsConfig::of_folder(folder.path());
        let digest = "ab".repeat(32);
        let snapshot = filled_cache(&config.hub_cache, b"weights", &digest);
        let listing = || {
            let blobs = config.hub_cache.join("models--owner--model/blobs");
            let names = std::fs::read_dir(blobs).expect("readable").map(|entry| entry.expect("an entry").file_name());
            names.collect::<Vec<_>>()
        };
        let before = listing();
        let target = folder.path().join("m.part");
        let hash = fetch_file(&config, "owner/model", "m.gguf", &target).await.expect("it is cached");
        assert_eq!((hash.as_deref(), std::fs::read(&target).expect("readable")), (Some(&*digest), b"weights".to_vec()));
        // A damaged file of another program is reported by its path, and left to its owner.
        let verified = verify(&snapshot, Presence::Before, "m.gguf", None, &config.progress);
        let Err(ModelError::WrongHash { what, .. }) = verified else { panic!("{verified:?}") };
        assert!(what.contains("blobs"), "{what}");
        std::fs::remove_file(&target).expect("removed");
        assert_eq!(std::fs::read(&snapshot).expect("the snapshot is whole"), b"weights");
        assert_eq!(listing(), before);
    }
}
