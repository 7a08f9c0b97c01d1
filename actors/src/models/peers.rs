//! Getting a model from other nodes: its headers, and the pieces of the layers that are to run here.
//!
//! ```text
//! Outline ─► headers on the disk, id checked ─► Hashes ─► Pieces ─► each checked, in its place
//! ```
//! Nodes are asked one after the other until nothing is missing; what came stays.

use super::config::Progress;
use super::copy::{self, Copy, Hash};
use super::files::lock;
use super::shelf::{Content, Shared};
use super::{Extent, Getting, ModelError, blocking};
use crate::core::spec::FilesId;
use crate::protocol::{DataHello, OutlinedFile, PiecesWanted, WeightsAnswer, WeightsAsk};
use exo_net::{Announced, DataConnection, DataStream, FrameError, NodeId, Payload, Priority, Received};
use std::collections::BTreeSet;
use std::fs::OpenOptions;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

/// A node that says nothing for so long is not waited for.
const SILENCE_MAX: Duration = Duration::from_secs(20);
/// Nor is one that needs longer for a piece: half a megabit a second.
const PIECE_WITHIN: Duration = Duration::from_secs(120);
/// Nor one whose hashes do not advance.
const ADVANCES_WITHIN: Duration = Duration::from_secs(60);
/// Headers of the largest vocabularies take some tens of megabytes.
const OUTLINE_BYTES_MAX: u64 = 512 << 20;
/// Of a file in pieces: more is no model of today.
const FILE_BYTES_MAX: u64 = 1 << 42;
const FILES_MAX: usize = 1024;
/// Pieces that are asked for at once.
const BATCH: usize = 256;
/// What is lost at most when the process dies.
const KEEP_EVERY: usize = 8;
/// How often whoever waits is told how far it is.
const TELL_EVERY: Duration = Duration::from_millis(200);

/// Why a node did not give what it was asked for.
#[derive(Debug, thiserror::Error)]
enum AskError {
    #[error(transparent)]
    Frame(#[from] FrameError),
    #[error(transparent)]
    Model(#[from] ModelError),
    #[error("it said nothing for {} s", SILENCE_MAX.as_secs())]
    Silent,
    #[error("its answer is none: {0}")]
    Nonsense(&'static str),
}

type Connected = (NodeId, DataConnection);

impl Getting {
    /// The model, as far as it is wanted, from nodes that have it; `None` where they have not all of it.
    pub(super) async fn ask_peers(&self, peers: &[Connected]) -> Result<Option<Arc<Shared>>, ModelError> {
        let Some(models) = self.config.folders.first() else { return Ok(None) };
        let Some(shared) = self.outline(models, peers).await? else { return Ok(None) };
        let needed = match &self.wish.extent {
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
        let _lock = lock(&copy::folder(models, shared.id)).await?;
        copy.look_again()?;
        let mut fetch = Fetch { getting: self, shared: &shared, copy, needed: &needed, told: None };
        for peer in peers {
            if copy.missing(&needed).is_empty() {
                break;
            }
            fetch.take_from(peer).await?;
        }
        let missing = copy.missing(&needed).len();
        if missing > 0 {
            tracing::warn!(model = self.wish.model, missing, "no node has all pieces of a model that are needed here");
            return Ok(None);
        }
        Ok(Some(shared))
    }

    /// The headers: those that are here, or the first that a node gives.
    async fn outline(&self, models: &Path, peers: &[Connected]) -> Result<Option<Arc<Shared>>, ModelError> {
        if let Some(id) = self.wish.files {
            if let Some(shared) = self.shelf.find(id) {
                return Ok(Some(shared));
            }
            if let Some(shared) = self.headers(copy::folder(models, id), id).await? {
                return Ok(Some(shared));
            }
        }
        for (peer, data) in peers {
            match self.ask_outline(models, data).await {
                Ok(Some(shared)) => {
                    tracing::info!(model = self.wish.model, peer = %peer, "the headers of a model came from another node");
                    return Ok(Some(shared));
                }
                Ok(None) => {}
                Err(AskError::Model(error @ ModelError::Disk { .. })) => return Err(error),
                Err(error) => tracing::warn!(model = self.wish.model, peer = %peer, %error, "a node gave no headers"),
            }
        }
        Ok(None)
    }

    /// The headers that lie in `folder`; what is damaged there goes, and is brought anew.
    async fn headers(&self, folder: PathBuf, id: FilesId) -> Result<Option<Arc<Shared>>, ModelError> {
        if !folder.exists() {
            return Ok(None);
        }
        let of = folder.clone();
        match blocking(move || Shared::part(&of)).await {
            Ok(shared) if shared.id == id => Ok(Some(self.shelf.put(&self.wish.model, shared))),
            Err(error @ ModelError::Disk { .. }) => Err(error),
            // A power cut, or someone's editor: what it was is not known.
            damaged => {
                let why = damaged.err().map(|error| error.to_string());
                tracing::warn!(folder = %folder.display(), why, "a copy of a model is damaged");
                std::fs::remove_dir_all(&folder).map_err(|e| ModelError::disk(&folder, &e))?;
                Ok(None)
            }
        }
    }

    async fn ask(&self, data: &DataConnection, wanted: PiecesWanted) -> Result<DataStream, AskError> {
        let ask = WeightsAsk { model: self.wish.model.clone(), files: self.wish.files, wanted };
        let asking = async {
            let mut stream = data.open(Priority::Low).await?;
            stream.writer.send(&DataHello::Weights(ask), Payload::Nothing).await?;
            Ok(stream)
        };
        tokio::time::timeout(SILENCE_MAX, asking).await.map_err(|_| AskError::Silent)?
    }

    /// Asks a node for the headers.
    async fn ask_outline(&self, models: &Path, data: &DataConnection) -> Result<Option<Arc<Shared>>, AskError> {
        let mut stream = self.ask(data, PiecesWanted::Outline).await?;
        let (id, is_folder, files) = match answer(&mut stream, SILENCE_MAX).await? {
            (WeightsAnswer::Nothing, _) => return Ok(None),
            (WeightsAnswer::Outline { id, is_folder, files }, _) => (id, is_folder, files),
            _ => return Err(AskError::Nonsense("it was asked for headers")),
        };
        if self.wish.files.is_some_and(|expected| expected != id) {
            return Ok(None);
        }
        check(is_folder, &files)?;
        let folder = copy::folder(models, id);
        if let Some(shared) = self.headers(folder.clone(), id).await? {
            stream.give_up();
            return Ok(Some(shared));
        }
        let fresh = models.join("shared").join(format!("{id}.{}-{}", std::process::id(), self.number));
        let received = receive_outline(&mut stream, &fresh, &files).await;
        let checked = match received {
            Ok(()) => {
                let fresh = fresh.clone();
                blocking(move || Ok(Shared::part(&fresh)?.id)).await.map_err(Into::into)
            }
            Err(error) => Err(error),
        };
        let kept = match checked {
            Ok(got) if got == id => match std::fs::rename(&fresh, &folder) {
                // Another process was as fast.
                Err(_) if folder.exists() => Ok(folder),
                renamed => renamed.map(|()| folder).map_err(|e| ModelError::disk(&fresh, &e).into()),
            },
            Ok(_) => Err(AskError::Nonsense("its headers are of another model")),
            Err(error) => Err(error),
        };
        // What is left there is of no use.
        let _ = std::fs::remove_dir_all(&fresh);
        Ok(self.headers(kept?, id).await?)
    }
}

fn check(is_folder: bool, files: &[OutlinedFile]) -> Result<(), AskError> {
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
        false => Err(AskError::Nonsense("no model has such files")),
    }
}

async fn answer(stream: &mut DataStream, within: Duration) -> Result<(WeightsAnswer, Received), AskError> {
    let fits = |_: &WeightsAnswer, announced: Announced| match announced {
        Announced::Numbers { .. } => Err("numbers where bytes should be".to_owned()),
        Announced::Nothing | Announced::Bytes { .. } => Ok(()),
    };
    match tokio::time::timeout(within, stream.reader.receive(fits)).await {
        Err(_) => Err(AskError::Silent),
        Ok(received) => received?.ok_or(AskError::Nonsense("it ended too soon")),
    }
}

/// Writes headers into files of their full length.
async fn receive_outline(stream: &mut DataStream, fresh: &Path, files: &[OutlinedFile]) -> Result<(), AskError> {
    let model = copy::model_path(fresh, None);
    let path = |file: &OutlinedFile| model.join(&file.name);
    std::fs::create_dir_all(&model).map_err(|e| ModelError::disk(&model, &e))?;
    for file in files {
        let made = std::fs::File::create(path(file)).and_then(|made| made.set_len(file.length_bytes));
        made.map_err(|e| ModelError::disk(&path(file), &e))?;
    }
    let mut left: u64 = files.iter().map(|file| file.outline_bytes).sum();
    while left > 0 {
        let (WeightsAnswer::OutlineBytes { file, offset_bytes }, Received::Bytes(bytes)) =
            answer(stream, SILENCE_MAX).await?
        else {
            return Err(AskError::Nonsense("headers were to follow"));
        };
        let file = files.get(file as usize).ok_or(AskError::Nonsense("a file that it did not name"))?;
        let length = bytes.len() as u64;
        if length == 0 || offset_bytes.saturating_add(length) > file.outline_bytes || length > left {
            return Err(AskError::Nonsense("bytes beyond the headers"));
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
    // The folder gets its name when all of it is on the disk.
    let sync = |path: &PathBuf| {
        std::fs::File::open(path).and_then(|file| file.sync_all()).map_err(|e| ModelError::disk(path, &e))
    };
    blocking(move || paths.iter().try_for_each(sync)).await.map_err(Into::into)
}

/// Pieces on their way.
struct Fetch<'a> {
    getting: &'a Getting,
    shared: &'a Arc<Shared>,
    copy: &'a Arc<Copy>,
    needed: &'a BTreeSet<u32>,
    told: Option<Instant>,
}

impl Fetch<'_> {
    /// What one node has of what is missing.
    ///
    /// # Errors
    /// [`ModelError::Disk`]: no other node helps.
    async fn take_from(&mut self, (peer, data): &Connected) -> Result<(), ModelError> {
        let (model, source) = (self.getting.wish.model.clone(), format!("node {}", peer.short()));
        (self.getting.config.progress)(Progress::Trying { model, source: source.clone() });
        let fetched = self.ask(data).await;
        let copy = Arc::clone(self.copy);
        blocking(move || copy.keep()).await?;
        match fetched {
            Ok(()) => Ok(()),
            Err(AskError::Model(error @ ModelError::Disk { .. })) => Err(error),
            Err(error) => {
                tracing::warn!(model = self.getting.wish.model, peer = %peer, %error, "a node gave no weights");
                (self.getting.config.progress)(Progress::Failed { source, reason: error.to_string() });
                Ok(())
            }
        }
    }

    async fn ask(&mut self, data: &DataConnection) -> Result<(), AskError> {
        let Some(have) = self.hashes(data).await? else { return Ok(()) };
        let missing: Vec<u32> = self.copy.missing(self.needed).into_iter().filter(|n| have.contains(n)).collect();
        let mut since_kept = 0;
        for batch in missing.chunks(BATCH) {
            let mut stream = self.getting.ask(data, PiecesWanted::Pieces(batch.to_vec())).await?;
            for &expected in batch {
                let (WeightsAnswer::Piece { number }, Received::Bytes(bytes)) =
                    answer(&mut stream, PIECE_WITHIN).await?
                else {
                    return Err(AskError::Nonsense("a piece was to follow"));
                };
                if number != expected {
                    return Err(AskError::Nonsense("it gave another piece"));
                }
                since_kept += 1;
                let (copy, is_due) = (Arc::clone(self.copy), since_kept % KEEP_EVERY == 0);
                blocking(move || {
                    copy.write(number, &bytes)?;
                    if is_due { copy.keep() } else { Ok(()) }
                })
                .await?;
                self.tell();
            }
        }
        Ok(())
    }

    /// Which pieces a node has, once its hashes are those that are known here.
    async fn hashes(&self, data: &DataConnection) -> Result<Option<BTreeSet<u32>>, AskError> {
        let mut stream = self.getting.ask(data, PiecesWanted::Hashes).await?;
        let (mut done, mut advanced) = (0, Instant::now());
        let told = loop {
            match answer(&mut stream, SILENCE_MAX).await? {
                (WeightsAnswer::Nothing, _) => return Ok(None),
                (WeightsAnswer::Preparing { done_bytes, .. }, _) if done_bytes > done => {
                    (done, advanced) = (done_bytes, Instant::now());
                }
                (WeightsAnswer::Preparing { .. }, _) if advanced.elapsed() < ADVANCES_WITHIN => {}
                (WeightsAnswer::Hashes { count }, Received::Bytes(told)) if self.is_count(count, &told) => break told,
                _ => return Err(AskError::Nonsense("it was asked for hashes")),
            }
        };
        let (hashes, have) = told.split_at(self.shared.pieces.pieces.len() * size_of::<Hash>());
        let hashes: Vec<Hash> =
            hashes.chunks_exact(size_of::<Hash>()).filter_map(|hash| hash.try_into().ok()).collect();
        match self.copy.hashes() {
            known if known == hashes => {}
            // Hashes that nothing has been found to have are one giver's word against the other's.
            _ if self.copy.is_empty() => self.copy.set_hashes(hashes)?,
            _ => return Err(AskError::Nonsense("its pieces are not those of the others")),
        }
        Ok(Some((0u32..).zip(have).filter(|(_, has)| **has != 0).map(|(number, _)| number).collect()))
    }

    fn is_count(&self, count: u32, told: &[u8]) -> bool {
        let pieces = self.shared.pieces.pieces.len();
        count as usize == pieces && told.len() == pieces * (size_of::<Hash>() + 1)
    }

    fn tell(&mut self) {
        let missing = self.copy.missing(self.needed);
        if !missing.is_empty() && self.told.is_some_and(|told| told.elapsed() < TELL_EVERY) {
            return;
        }
        self.told = Some(Instant::now());
        let bytes = |numbers: &BTreeSet<u32>| -> u64 {
            numbers.iter().map(|&number| self.shared.pieces.pieces[number as usize].length_bytes).sum()
        };
        let total_bytes = bytes(self.needed);
        self.getting.tell(total_bytes - bytes(&missing), total_bytes);
    }
}

#[cfg(test)]
mod givers;
