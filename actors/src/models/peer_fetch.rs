//! Fetching a model from other nodes: its headers, and the pieces of the layers that this node is to run.
//!
//! ```text
//! Outline ─► headers on the disk, id checked ─► Hashes ─► Pieces ─► each checked, and written to its place in the
//! files
//! ```
//! The job asks one peer after the other until it has all pieces. Fetched pieces stay on the disk.

use super::config::Progress;
use super::files::{blocking, lock};
use super::hashes::{Hash, write_hashes};
use super::partial::{self, PartialCopy};
use super::registry::{Content, RegisteredModel};
use super::{Extent, FetchJob, ModelError};
use crate::core::spec::FilesId;
use crate::transport::protocol::{DataHello, OutlinedFile, WeightsQuery, WeightsRequest, WeightsResponse};
use crate::transport::router::WeightsPeer;
use exo_net::{Announced, DataConnection, DataStream, FrameError, Payload, Priority, Received};
use std::collections::BTreeSet;
use std::fs::OpenOptions;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

/// A peer that sends nothing for this long is given up.
const SILENCE_MAX: Duration = Duration::from_secs(20);
/// A peer that takes longer for a piece is given up. This is half a megabit a second.
const PIECE_WITHIN: Duration = Duration::from_secs(120);
/// A peer whose hashing makes no progress for this long is given up.
const ADVANCES_WITHIN: Duration = Duration::from_secs(60);
/// The most bytes of a model's headers. The headers of the largest vocabularies take some tens of megabytes.
const OUTLINE_BYTES_MAX: u64 = 512 << 20;
/// The most bytes of one file, more than any model's file has.
const FILE_BYTES_MAX: u64 = 1 << 42;
/// The most files of a model.
const FILES_MAX: usize = 1024;
/// The most pieces of one request.
const BATCH: usize = 256;
/// The most pieces that are lost when the process dies.
const KEEP_EVERY: usize = 8;
/// The most bytes of a peer's reason that are shown.
const REASON_BYTES_MAX: usize = 300;
/// How often progress is reported.
const REPORT_EVERY: Duration = Duration::from_millis(200);

/// The reason why a peer did not send the requested bytes.
#[derive(Debug, thiserror::Error)]
enum PeerFetchError {
    #[error(transparent)]
    Frame(#[from] FrameError),
    #[error(transparent)]
    Model(#[from] ModelError),
    #[error("{0}")]
    Refused(String),
    #[error("the peer sent nothing for {} s", SILENCE_MAX.as_secs())]
    Silent,
    #[error("the peer sent a wrong answer: {0}")]
    WrongAnswer(&'static str),
}

impl FetchJob {
    /// Fetches the parts of the model that the request's extent names. Returns `None` if the peers lack some of them.
    pub(super) async fn fetch_from_peers(
        &self,
        peers: &[WeightsPeer],
    ) -> Result<Option<Arc<RegisteredModel>>, ModelError> {
        let Some(models) = self.config.folders.first() else { return Ok(None) };
        let Some(shared) = self.outline(models, peers).await? else { return Ok(None) };
        let needed = match &self.request.extent {
            Extent::Layers(layers) => {
                let count = shared.files.architecture.layers.len();
                shared.pieces.of_shard(&shared.files.weights, layers.clone(), count)
            }
            Extent::Outline | Extent::Whole => BTreeSet::new(),
        };
        let Content::Part(copy) = &shared.content else { return Ok(Some(shared)) };
        if copy.missing(&needed).is_empty() {
            return Ok(Some(shared));
        }
        let _lock = lock(&partial::folder(models, shared.id)).await?;
        let locked = Arc::clone(copy);
        blocking(move || locked.look_again()).await?;
        let mut fetch = Fetch { job: self, shared: &shared, copy, needed: &needed, told: None };
        for peer in peers {
            if copy.missing(&needed).is_empty() {
                break;
            }
            let taken = fetch.take_from(peer).await;
            if let Err(ModelError::DiskFull { .. }) = &taken {
                // What cannot be finished must not fill the disk. The shards that run hold their layers in memory.
                self.registry.forget(shared.id);
                let folder = partial::folder(models, shared.id);
                let _ = blocking(move || Ok(std::fs::remove_dir_all(folder))).await;
            }
            taken?;
        }
        let missing = copy.missing(&needed).len();
        if missing > 0 {
            tracing::info!(model = self.request.model, missing, "the peers lack pieces that this node needs");
            return Ok(None);
        }
        Ok(Some(shared))
    }

    /// Returns the headers: those on this machine, or the first that a peer sends.
    async fn outline(&self, models: &Path, peers: &[WeightsPeer]) -> Result<Option<Arc<RegisteredModel>>, ModelError> {
        if let Some(id) = self.request.files {
            if let Some(shared) = self.registry.find(id) {
                return Ok(Some(shared));
            }
            if let Some(shared) = self.headers(partial::folder(models, id), id).await? {
                return Ok(Some(shared));
            }
        }
        for peer in peers {
            match self.ask_outline(models, &peer.data).await {
                Ok(Some(shared)) => {
                    tracing::info!(model = self.request.model, peer = %peer.id, "a peer sent a model's headers");
                    return Ok(Some(shared));
                }
                Ok(None) => {}
                Err(PeerFetchError::Model(error)) if error.is_of_disk() => return Err(error),
                Err(error) => self.note_failure(peer, &error),
            }
        }
        Ok(None)
    }

    /// Reads the headers in `folder`. Removes a damaged copy, so that it is fetched again.
    async fn headers(&self, folder: PathBuf, id: FilesId) -> Result<Option<Arc<RegisteredModel>>, ModelError> {
        let of = folder.clone();
        let part = blocking(move || if of.exists() { RegisteredModel::part(&of).map(Some) } else { Ok(None) });
        match part.await {
            Ok(None) => Ok(None),
            Ok(Some(shared)) if shared.id == id => Ok(Some(self.registry.insert(&self.request.model, shared))),
            Err(error) if error.is_of_disk() => Err(error),
            // A power cut or an editor may have damaged the headers.
            damaged => {
                let why = damaged.err().map(|error| error.to_string());
                tracing::warn!(folder = %folder.display(), why, "removing a damaged copy of a model");
                blocking(move || std::fs::remove_dir_all(&folder).map_err(|e| ModelError::disk(&folder, &e))).await?;
                Ok(None)
            }
        }
    }

    /// Keeps a peer's reason for the error that the user reads if no peer and no source has the model.
    fn note_failure(&self, peer: &WeightsPeer, error: &PeerFetchError) {
        tracing::info!(model = self.request.model, peer = %peer.id, %error, "a peer did not give all that is needed");
        self.tried.lock().push(format!("{}: {error}", peer.name));
    }

    async fn ask(&self, data: &DataConnection, query: WeightsQuery) -> Result<DataStream, PeerFetchError> {
        let request = WeightsRequest { model: self.request.model.clone(), files: self.request.files, query };
        let asking = async {
            let mut stream = data.open(Priority::Low).await?;
            stream.writer.send(&DataHello::Weights(request), Payload::Nothing).await?;
            Ok(stream)
        };
        tokio::time::timeout(SILENCE_MAX, asking).await.map_err(|_| PeerFetchError::Silent)?
    }

    /// Requests the headers from a peer. Returns `None` if the peer lacks the requested files.
    async fn ask_outline(
        &self,
        models: &Path,
        data: &DataConnection,
    ) -> Result<Option<Arc<RegisteredModel>>, PeerFetchError> {
        let mut stream = self.ask(data, WeightsQuery::Outline).await?;
        let (id, is_folder, files, hashes) = match prepared(&mut stream, SILENCE_MAX).await? {
            (WeightsResponse::Nothing, _) => return Ok(None),
            (WeightsResponse::Outline { id, is_folder, files }, Received::Bytes(hashes)) => {
                (id, is_folder, files, hashes)
            }
            // A model without tensors has no pieces.
            (WeightsResponse::Outline { id, is_folder, files }, Received::Nothing) => {
                (id, is_folder, files, Vec::new())
            }
            _ => return Err(PeerFetchError::WrongAnswer("the answer is not the headers")),
        };
        if self.request.files.is_some_and(|expected| expected != id) {
            return Ok(None);
        }
        check(is_folder, &files)?;
        let folder = partial::folder(models, id);
        if let Some(shared) = self.headers(folder.clone(), id).await? {
            stream.give_up();
            return Ok(Some(shared));
        }
        let fresh = models.join("shared").join(format!("{id}.{}-{}", std::process::id(), self.number));
        let received = receive_outline(&mut stream, &fresh, &files, hashes).await;
        let checked = match received {
            Ok(()) => {
                let fresh = fresh.clone();
                blocking(move || Ok(RegisteredModel::part(&fresh)?.id)).await.map_err(Into::into)
            }
            Err(error) => Err(error),
        };
        let kept = match checked {
            Ok(got) if got == id => {
                let fresh = fresh.clone();
                blocking(move || match std::fs::rename(&fresh, &folder) {
                    // Another process has fetched the headers in the meantime.
                    Err(_) if folder.exists() => Ok(folder),
                    renamed => renamed.map(|()| folder).map_err(|e| ModelError::disk(&fresh, &e)),
                })
                .await
                .map_err(Into::into)
            }
            Ok(_) => Err(PeerFetchError::WrongAnswer("the headers belong to another model")),
            Err(error) => Err(error),
        };
        // Removes what a failed fetch has left; after the rename the folder no longer exists.
        let _ = blocking(move || Ok(std::fs::remove_dir_all(&fresh))).await;
        Ok(self.headers(kept?, id).await?)
    }
}

fn check(is_folder: bool, files: &[OutlinedFile]) -> Result<(), PeerFetchError> {
    let is_plain = |name: &str| {
        !name.is_empty() && !name.starts_with('.') && !name.contains(['/', '\\', '\0']) && name.len() < 256
    };
    let outlines = files.iter().map(|file| file.outline_bytes).fold(0, u64::saturating_add);
    let lengths =
        files.iter().all(|file| file.length_bytes <= FILE_BYTES_MAX && file.outline_bytes <= file.length_bytes);
    let is_one = is_folder || matches!(files, [file] if file.name.ends_with(".gguf"));
    let names: BTreeSet<&str> = files.iter().map(|file| file.name.as_str()).collect();
    let is_model = is_one
        && names.len() == files.len()
        && files.len() <= FILES_MAX
        && files.iter().all(|file| is_plain(&file.name));
    match is_model && lengths && outlines <= OUTLINE_BYTES_MAX {
        true => Ok(()),
        false => Err(PeerFetchError::WrongAnswer("no model can have the listed files")),
    }
}

async fn answer(stream: &mut DataStream, within: Duration) -> Result<(WeightsResponse, Received), PeerFetchError> {
    let fits = |_: &WeightsResponse, announced: Announced| match announced {
        Announced::Numbers { .. } => Err("numbers instead of bytes".to_owned()),
        Announced::Nothing | Announced::Bytes { .. } => Ok(()),
    };
    match tokio::time::timeout(within, stream.reader.receive(fits)).await {
        Err(_) => Err(PeerFetchError::Silent),
        Ok(received) => received?.ok_or(PeerFetchError::WrongAnswer("the stream ended early")),
    }
}

/// Receives an answer for which the peer may have to hash a model first.
async fn prepared(stream: &mut DataStream, within: Duration) -> Result<(WeightsResponse, Received), PeerFetchError> {
    let (mut done, mut advanced) = (0, Instant::now());
    loop {
        match answer(stream, within).await? {
            (WeightsResponse::Preparing { done_bytes }, _) if done_bytes > done => {
                (done, advanced) = (done_bytes, Instant::now());
            }
            (WeightsResponse::Preparing { .. }, _) if advanced.elapsed() < ADVANCES_WITHIN => {}
            (WeightsResponse::Preparing { .. }, _) => {
                return Err(PeerFetchError::WrongAnswer("the computation of its hashes has stalled"));
            }
            (WeightsResponse::Failed { why }, _) => {
                return Err(PeerFetchError::Refused(exo_net::shown(&why, REASON_BYTES_MAX)));
            }
            answer => return Ok(answer),
        }
    }
}

/// Receives the headers, and writes them into files of the model's full length.
async fn receive_outline(
    stream: &mut DataStream,
    fresh: &Path,
    files: &[OutlinedFile],
    hashes: Vec<u8>,
) -> Result<(), PeerFetchError> {
    let model = partial::model_path(fresh, None);
    let path = |file: &OutlinedFile| model.join(&file.name);
    let (folder, sizes) = (model.clone(), files.iter().map(|file| (path(file), file.length_bytes)).collect::<Vec<_>>());
    let kept = fresh.join(partial::HASHES);
    blocking(move || {
        std::fs::create_dir_all(&folder).map_err(|e| ModelError::disk(&folder, &e))?;
        write_hashes(&kept, hashes.as_chunks().0)?;
        sizes.iter().try_for_each(|(path, length_bytes)| {
            let created = std::fs::File::create(path).and_then(|file| file.set_len(*length_bytes));
            created.map_err(|e| ModelError::disk(path, &e))
        })
    })
    .await?;
    let mut left: u64 = files.iter().map(|file| file.outline_bytes).sum();
    while left > 0 {
        let (WeightsResponse::OutlineBytes { file, offset_bytes }, Received::Bytes(bytes)) =
            answer(stream, SILENCE_MAX).await?
        else {
            return Err(PeerFetchError::WrongAnswer("bytes of the headers are missing"));
        };
        let file = files.get(file as usize).ok_or(PeerFetchError::WrongAnswer("bytes of a file that is not listed"))?;
        let length = bytes.len() as u64;
        if length == 0 || offset_bytes.saturating_add(length) > file.outline_bytes || length > left {
            return Err(PeerFetchError::WrongAnswer("bytes beyond the end of the headers"));
        }
        left -= length;
        let path = path(file);
        blocking(move || {
            let written =
                OpenOptions::new().write(true).open(&path).and_then(|file| file.write_all_at(&bytes, offset_bytes));
            written.map_err(|e| ModelError::disk(&path, &e))
        })
        .await?;
    }
    let paths: Vec<PathBuf> = files.iter().map(path).collect();
    // The folder is renamed only after all its files are on the disk.
    let sync = |path: &PathBuf| {
        std::fs::File::open(path).and_then(|file| file.sync_all()).map_err(|e| ModelError::disk(path, &e))
    };
    blocking(move || paths.iter().try_for_each(sync)).await.map_err(Into::into)
}

/// A fetch of pieces in progress.
struct Fetch<'a> {
    job: &'a FetchJob,
    shared: &'a Arc<RegisteredModel>,
    copy: &'a Arc<PartialCopy>,
    needed: &'a BTreeSet<u32>,
    told: Option<Instant>,
}

impl Fetch<'_> {
    /// Fetches the missing pieces that one peer has. Logs the peer's errors.
    ///
    /// # Errors
    /// [`ModelError`] if the disk fails; other peers do not help then.
    async fn take_from(&mut self, peer: &WeightsPeer) -> Result<(), ModelError> {
        let (model, source) = (self.job.request.model.clone(), peer.name.clone());
        (self.job.config.progress)(Progress::Trying { model, source: source.clone() });
        let fetched = self.ask(&peer.data).await;
        let copy = Arc::clone(self.copy);
        blocking(move || copy.keep()).await?;
        match fetched {
            Ok(()) => Ok(()),
            Err(PeerFetchError::Model(error)) if error.is_of_disk() => Err(error),
            Err(error) => {
                self.job.note_failure(peer, &error);
                (self.job.config.progress)(Progress::Failed { source, reason: error.to_string() });
                Ok(())
            }
        }
    }

    async fn ask(&mut self, data: &DataConnection) -> Result<(), PeerFetchError> {
        let Some(have) = self.hashes(data).await? else { return Ok(()) };
        let missing: Vec<u32> = self.copy.missing(self.needed).into_iter().filter(|n| have.contains(n)).collect();
        let mut since_kept = 0;
        for batch in missing.chunks(BATCH) {
            let mut stream = self.job.ask(data, WeightsQuery::Pieces(batch.to_vec())).await?;
            for &expected in batch {
                let (WeightsResponse::Piece { number }, Received::Bytes(bytes)) =
                    prepared(&mut stream, PIECE_WITHIN).await?
                else {
                    return Err(PeerFetchError::WrongAnswer("a piece is missing"));
                };
                if number != expected {
                    return Err(PeerFetchError::WrongAnswer("a piece is out of order"));
                }
                since_kept += 1;
                let (copy, is_due) = (Arc::clone(self.copy), since_kept % KEEP_EVERY == 0);
                blocking(move || {
                    copy.write(number, &bytes)?;
                    if is_due { copy.keep() } else { Ok(()) }
                })
                .await?;
                self.report();
            }
        }
        Ok(())
    }

    /// Requests the numbers of the pieces that a peer has; `None` if it has no such model. The peer's hashes must equal
    /// the known ones.
    async fn hashes(&self, data: &DataConnection) -> Result<Option<BTreeSet<u32>>, PeerFetchError> {
        let mut stream = self.job.ask(data, WeightsQuery::Hashes).await?;
        let told = match prepared(&mut stream, SILENCE_MAX).await? {
            (WeightsResponse::Nothing, _) => return Ok(None),
            (WeightsResponse::Hashes { count }, Received::Bytes(told)) if self.is_count(count, &told) => told,
            _ => return Err(PeerFetchError::WrongAnswer("it sent no hashes")),
        };
        let (hashes, have) = told.split_at(self.shared.pieces.pieces.len() * size_of::<Hash>());
        if hashes != self.copy.hashes().as_flattened() {
            return Err(PeerFetchError::WrongAnswer("its hashes are those of another model"));
        }
        Ok(Some((0u32..).zip(have).filter(|(_, has)| **has != 0).map(|(number, _)| number).collect()))
    }

    fn is_count(&self, count: u32, told: &[u8]) -> bool {
        let pieces = self.shared.pieces.pieces.len();
        count as usize == pieces && told.len() == pieces * (size_of::<Hash>() + 1)
    }

    fn report(&mut self) {
        let missing = self.copy.missing(self.needed);
        if !missing.is_empty() && self.told.is_some_and(|told| told.elapsed() < REPORT_EVERY) {
            return;
        }
        self.told = Some(Instant::now());
        let bytes = |numbers: &BTreeSet<u32>| -> u64 {
            numbers.iter().map(|&number| self.shared.pieces.pieces[number as usize].length_bytes).sum()
        };
        let total_bytes = bytes(self.needed);
        self.job.report(total_bytes - bytes(&missing), total_bytes);
    }
}

#[cfg(test)]
mod tests;
