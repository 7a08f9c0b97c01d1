//! Models that are here, whole or in part, and giving them to other nodes.
//!
//! A node gives what has a name that it knows: of its catalogue and folders, or that was asked for here. Its own paths
//! are nobody else's affair.

use super::config::ModelsConfig;
use super::copy::{self, Copy, Hash, id_of, read_at, read_piece};
use super::store::find_named;
use super::{ModelError, blocking};
use crate::core::spec::FilesId;
use crate::protocol::{OutlinedFile, PiecesWanted, WeightsAnswer, WeightsAsk};
use exo_engines::model::{ModelFiles, Pieces, TokenizerSource};
use exo_net::{DataStream, FrameError, Payload, Priority};
use sha2::{Digest, Sha256};
use std::collections::HashMap;
use std::path::{Component, Path};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;
use tokio::sync::OnceCell;

/// How often a node that waits for hashes is told how far they are.
const TELL_EVERY: Duration = Duration::from_millis(500);
/// Whoever takes a frame no faster has given up, or holds up others: a piece at half a megabit a second.
const TAKEN_WITHIN: Duration = Duration::from_secs(120);
/// Of an outline, in one frame.
const CHUNK_BYTES: u64 = 1 << 20;

/// A model whose headers are here.
#[derive(Debug)]
pub(super) struct Shared {
    pub(super) id: FilesId,
    pub(super) files: Arc<ModelFiles>,
    pub(super) pieces: Arc<Pieces>,
    pub(super) content: Content,
}

/// How much of it is.
#[derive(Debug)]
pub(super) enum Content {
    /// All.
    Whole(Hashes),
    Part(Arc<Copy>),
}

/// Hashes of pieces, computed when somebody asks.
#[derive(Debug, Default)]
pub(super) struct Hashes {
    computed: OnceCell<Vec<Hash>>,
    done_bytes: AtomicU64,
}

impl Shared {
    /// A model with all its files.
    pub(super) fn whole(files: ModelFiles) -> Result<Self, ModelError> {
        let pieces = Arc::new(Pieces::of(&files)?);
        let content = Content::Whole(Hashes::default());
        Ok(Self { id: id_of(&pieces)?, files: Arc::new(files), pieces, content })
    }

    /// A model in the folder of a copy.
    pub(super) fn part(folder: &Path) -> Result<Self, ModelError> {
        let files = copy::open_model(folder)?;
        let pieces = Arc::new(Pieces::of(&files)?);
        let content = Content::Part(Arc::new(Copy::open(folder, Arc::clone(&pieces))?));
        Ok(Self { id: id_of(&pieces)?, files: Arc::new(files), pieces, content })
    }

    fn has(&self, number: u32) -> bool {
        match &self.content {
            Content::Whole(_) => (number as usize) < self.pieces.pieces.len(),
            Content::Part(copy) => copy.has(number),
        }
    }
}

/// Models of which somebody has asked for here: bounded by what lies on this machine's disks.
#[derive(Debug, Clone, Default)]
pub(super) struct Shelf(Arc<Mutex<Shelves>>);

#[derive(Debug, Default)]
struct Shelves {
    shared: HashMap<FilesId, Arc<Shared>>,
    names: HashMap<String, FilesId>,
}

impl Shelf {
    fn shelves(&self) -> MutexGuard<'_, Shelves> {
        // Both maps are whole between two statements, whatever panicked.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn find(&self, id: FilesId) -> Option<Arc<Shared>> {
        self.shelves().shared.get(&id).cloned()
    }

    /// Puts a model there; a whole one takes the place of a part.
    pub(super) fn put(&self, name: &str, shared: Shared) -> Arc<Shared> {
        let mut shelves = self.shelves();
        shelves.names.insert(name.to_owned(), shared.id);
        let is_new = |known: &Arc<Shared>| {
            matches!((&known.content, &shared.content), (Content::Part(_), Content::Whole(_)))
                || known.files.path != shared.files.path
        };
        match shelves.shared.get(&shared.id) {
            Some(known) if !is_new(known) => Arc::clone(known),
            _ => {
                let shared = Arc::new(shared);
                shelves.shared.insert(shared.id, Arc::clone(&shared));
                shared
            }
        }
    }

    /// What this node has of what another asks for.
    fn look_up(&self, config: &ModelsConfig, ask: &WeightsAsk) -> Option<Arc<Shared>> {
        let known = ask.files.or_else(|| self.shelves().names.get(&ask.model).copied());
        if let Some(shared) = known.and_then(|id| self.find(id)) {
            return Some(shared);
        }
        let copied = ask.files.zip(config.folders.first()).map(|(id, models)| copy::folder(models, id));
        if let Some(Ok(shared)) = copied.filter(|folder| folder.exists()).map(|folder| Shared::part(&folder)) {
            return Some(self.put(&ask.model, shared));
        }
        // A name, and nothing that leads elsewhere.
        let mut parts = Path::new(&ask.model).components();
        let is_name = matches!((parts.next(), parts.next()), (Some(Component::Normal(_)), None));
        let path = find_named(config, &ask.model).filter(|_| is_name)?;
        let shared = ModelFiles::open(&path).map_err(Into::into).and_then(Shared::whole);
        match shared {
            Ok(shared) => {
                Some(self.put(&ask.model, shared)).filter(|shared| ask.files.is_none_or(|id| id == shared.id))
            }
            Err(error) => {
                tracing::warn!(model = ask.model, %error, "a model that another node wants cannot be read");
                None
            }
        }
    }
}

/// Answers a node that asks for a model's bytes.
pub(super) async fn serve(config: Arc<ModelsConfig>, shelf: Shelf, ask: WeightsAsk, mut stream: DataStream) {
    stream.set_priority(Priority::Low);
    let (model, wanted) = (ask.model.clone(), ask.wanted.clone());
    let served = match blocking(move || Ok(shelf.look_up(&config, &ask))).await {
        Ok(Some(shared)) => match wanted {
            PiecesWanted::Outline => give_outline(&shared, &mut stream).await,
            PiecesWanted::Hashes => give_hashes(&shared, &mut stream).await,
            PiecesWanted::Pieces(numbers) => give_pieces(&shared, &numbers, &mut stream).await,
        },
        _ => give_nothing(&mut stream).await,
    };
    if let Err(error) = served {
        tracing::info!(model, %error, "a node that wanted a model's bytes did not get them");
    }
}

/// Why a model's bytes were not given.
#[derive(Debug, thiserror::Error)]
enum GiveError {
    #[error(transparent)]
    Model(#[from] ModelError),
    #[error(transparent)]
    Frame(#[from] FrameError),
    #[error("it was not taken in {} s", TAKEN_WITHIN.as_secs())]
    NotTaken,
}

/// Sends a frame to one who takes it.
async fn give(stream: &mut DataStream, answer: &WeightsAnswer, payload: Payload<'_>) -> Result<(), GiveError> {
    let sending = stream.writer.send(answer, payload);
    Ok(tokio::time::timeout(TAKEN_WITHIN, sending).await.map_err(|_| GiveError::NotTaken)??)
}

async fn give_nothing(stream: &mut DataStream) -> Result<(), GiveError> {
    give(stream, &WeightsAnswer::Nothing, Payload::Nothing).await
}

async fn give_outline(shared: &Arc<Shared>, stream: &mut DataStream) -> Result<(), GiveError> {
    let files = shared.pieces.files.iter().map(|file| OutlinedFile {
        name: file.path.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default(),
        length_bytes: file.length_bytes,
        outline_bytes: file.outline_bytes(),
    });
    let is_folder = matches!(shared.files.tokenizer, TokenizerSource::Folder(_));
    let outline = WeightsAnswer::Outline { id: shared.id, is_folder, files: files.collect() };
    give(stream, &outline, Payload::Nothing).await?;
    for (number, file) in shared.pieces.files.iter().enumerate() {
        for offset_bytes in (0..file.outline_bytes()).step_by(CHUNK_BYTES as usize) {
            let length = CHUNK_BYTES.min(file.outline_bytes() - offset_bytes) as usize;
            let path = file.path.clone();
            let bytes = blocking(move || read_at(&path, offset_bytes, length)).await?;
            let header = WeightsAnswer::OutlineBytes { file: number as u32, offset_bytes };
            give(stream, &header, Payload::Bytes(&bytes)).await?;
        }
    }
    Ok(())
}

async fn give_hashes(shared: &Arc<Shared>, stream: &mut DataStream) -> Result<(), GiveError> {
    let hashes = match &shared.content {
        Content::Part(copy) => copy.hashes(),
        Content::Whole(hashes) => {
            let total_bytes = shared.pieces.pieces.iter().map(|piece| piece.length_bytes).sum();
            // Whoever asked first may go: what was begun is there for the next.
            let mut computing = tokio::spawn(compute(Arc::clone(shared)));
            loop {
                tokio::select! {
                    computed = &mut computing => break computed.map_err(|_| ModelError::Interrupted)??,
                    () = tokio::time::sleep(TELL_EVERY) => {
                        let done_bytes = hashes.done_bytes.load(Ordering::Relaxed);
                        let preparing = WeightsAnswer::Preparing { done_bytes, total_bytes };
                        give(stream, &preparing, Payload::Nothing).await?;
                    }
                }
            }
        }
    };
    // A part whose hashes nobody has told is as good as nothing.
    if hashes.is_empty() {
        return give_nothing(stream).await;
    }
    let have: Vec<u8> = (0..hashes.len() as u32).map(|number| u8::from(shared.has(number))).collect();
    let count = hashes.len() as u32;
    give(stream, &WeightsAnswer::Hashes { count }, Payload::Bytes(&[hashes.concat(), have].concat())).await
}

/// The hashes of a whole model, computed once, however many ask.
async fn compute(shared: Arc<Shared>) -> Result<Vec<Hash>, ModelError> {
    let Content::Whole(hashes) = &shared.content else { return Ok(Vec::new()) };
    let computing = || {
        let shared = Arc::clone(&shared);
        blocking(move || {
            let hash = |&piece| {
                let bytes = read_piece(&shared.pieces, piece)?;
                if let Content::Whole(hashes) = &shared.content {
                    hashes.done_bytes.fetch_add(bytes.len() as u64, Ordering::Relaxed);
                }
                Ok(Sha256::digest(&bytes).into())
            };
            shared.pieces.pieces.iter().map(hash).collect()
        })
    };
    hashes.computed.get_or_try_init(computing).await.cloned()
}

async fn give_pieces(shared: &Arc<Shared>, numbers: &[u32], stream: &mut DataStream) -> Result<(), GiveError> {
    for &number in numbers.iter().filter(|&&number| shared.has(number)) {
        let (pieces, piece) = (Arc::clone(&shared.pieces), shared.pieces.pieces[number as usize]);
        let bytes = blocking(move || read_piece(&pieces, piece)).await?;
        give(stream, &WeightsAnswer::Piece { number }, Payload::Bytes(&bytes)).await?;
    }
    Ok(())
}
