//! Models: the catalogue of known models, and fetches of models' files to this machine.
//!
//! ```text
//! name ─► path, models folders ─► other nodes: headers, and pieces of some layers ─► ModelFiles
//!              └► sources in order: Hugging Face hub, Python package ─► verified (SHA-256) ─► models folder ─┘
//! ```
//! - owns: the fetches in progress, and the registry of models whose headers are on this machine;
//! - receives: requests for models; other nodes' requests for a model's bytes;
//! - emits: models, to all callers with equal requests; a model's bytes, to other nodes;
//! - dies when: the node stops;
//! - supervised by: the node.

mod catalogue;
mod config;
mod files;
mod hashes;
mod hub;
mod name;
mod partial;
mod peer_fetch;
mod python;
mod registry;
mod request;
mod resolve;
mod serve;

pub use crate::core::model_error::ModelError;
pub use catalogue::{CATALOGUE, CatalogueEntry, Source};
pub use config::{ModelsConfig, Progress, ProgressSink};
pub use name::{HubName, ModelName, absolute_path};
pub(crate) use request::{Extent, Fetched, ModelRequest};
pub use resolve::{Origin, ResolvedModel};

use crate::core::spec::{FilesId, ModelSpec};
use crate::transport::callback::EventCallback;
use crate::transport::protocol::WeightsRequest;
use crate::transport::router::Router;
use exo_engines::model::{ModelFiles, Recipe};
use exo_net::DataStream;
use files::blocking;
use hashes::Reading;
use parking_lot::Mutex;
use ractor::rpc::CallResult;
use ractor::{Actor, ActorProcessingErr, ActorRef, RpcReplyPort};
use ractor_cluster::RactorMessage;
use registry::{ModelRegistry, RegisteredModel};
use std::collections::HashMap;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::Semaphore;

pub(crate) type ModelsRef = ActorRef<ModelsMsg>;
type Outcome = Result<Arc<ResolvedModel>, ModelError>;

/// The most streams of other nodes that are served at once. Each holds a piece in memory.
const SERVED_MAX: usize = 8;
/// How often the progress of hashing is reported.
const HASHED_EVERY: Duration = Duration::from_millis(500);
/// How long a stream waits for its turn. Its peer waits longer.
const SERVED_WITHIN: Duration = Duration::from_secs(15);

#[derive(Debug, RactorMessage)]
pub(crate) enum ModelsMsg {
    Get {
        request: ModelRequest,
        progress: EventCallback<Fetched>,
        reply: RpcReplyPort<Outcome>,
    },
    /// A fetch has ended.
    Got {
        request: ModelRequest,
        outcome: Outcome,
    },
    /// Another node requests a model's bytes.
    Serve {
        request: WeightsRequest,
        stream: DataStream,
    },
}

#[derive(Debug)]
pub(crate) struct ModelsArgs {
    pub(crate) config: ModelsConfig,
    pub(crate) router: Router,
}

#[derive(Debug)]
pub(crate) struct ModelsState {
    config: Arc<ModelsConfig>,
    router: Router,
    registry: ModelRegistry,
    served: Arc<Semaphore>,
    /// The callers that wait for the outcome of each request.
    waiting: HashMap<ModelRequest, Vec<RpcReplyPort<Outcome>>>,
    next: u64,
}

#[derive(Debug)]
pub(crate) struct Models;

impl Actor for Models {
    type Msg = ModelsMsg;
    type State = ModelsState;
    type Arguments = ModelsArgs;

    async fn pre_start(&self, _: ModelsRef, args: ModelsArgs) -> Result<ModelsState, ActorProcessingErr> {
        let ModelsArgs { config, router } = args;
        let served = Arc::new(Semaphore::new(SERVED_MAX));
        let (config, registry) = (Arc::new(config), ModelRegistry::default());
        Ok(ModelsState { config, router, registry, served, waiting: HashMap::new(), next: 0 })
    }

    async fn handle(
        &self,
        myself: ModelsRef,
        message: ModelsMsg,
        state: &mut ModelsState,
    ) -> Result<(), ActorProcessingErr> {
        match message {
            ModelsMsg::Get { request, progress, reply } => state.get(&myself, request, progress, reply),
            ModelsMsg::Got { request, outcome } => {
                for reply in state.waiting.remove(&request).unwrap_or_default() {
                    // Sending fails only if the caller no longer waits.
                    let _ = reply.send(outcome.clone());
                }
            }
            ModelsMsg::Serve { request, stream } => state.serve(request, stream),
        }
        Ok(())
    }
}

impl ModelsState {
    /// Starts a fetch. Callers with equal requests share it.
    fn get(
        &mut self,
        myself: &ModelsRef,
        request: ModelRequest,
        progress: EventCallback<Fetched>,
        reply: RpcReplyPort<Outcome>,
    ) {
        let waiting = self.waiting.entry(request.clone()).or_default();
        waiting.push(reply);
        if waiting.len() > 1 {
            return;
        }
        self.next += 1;
        let (config, registry) = (Arc::clone(&self.config), self.registry.clone());
        let tried = Mutex::default();
        let job = FetchJob { config, registry, request, progress, number: self.next, tried };
        let (router, myself) = (self.router.clone(), myself.clone());
        tokio::spawn(async move {
            let outcome = job.run(&router).await.map(Arc::new);
            let _ = myself.send_message(ModelsMsg::Got { request: job.request, outcome });
        });
    }

    fn serve(&self, request: WeightsRequest, stream: DataStream) {
        let (config, registry, served) = (Arc::clone(&self.config), self.registry.clone(), Arc::clone(&self.served));
        tokio::spawn(async move {
            // The limit of streams per peer bounds the number of these tasks.
            match tokio::time::timeout(SERVED_WITHIN, served.acquire_owned()).await {
                Ok(Ok(_permit)) => serve::serve(config, registry, request, stream).await,
                _ => stream.give_up(),
            }
        });
    }
}

/// A fetch in progress.
#[derive(Debug)]
struct FetchJob {
    config: Arc<ModelsConfig>,
    registry: ModelRegistry,
    request: ModelRequest,
    progress: EventCallback<Fetched>,
    /// Distinguishes the fetch from other fetches of this process.
    number: u64,
    /// The nodes that did not give the model, each with its reason.
    tried: Mutex<Vec<String>>,
}

impl FetchJob {
    /// Gets the model from this machine, else from other nodes, else from its sources.
    async fn run(&self, router: &Router) -> Result<ResolvedModel, ModelError> {
        let (config, name) = (Arc::clone(&self.config), self.request.name());
        let (found, is_cached) =
            blocking(move || Ok((resolve::find_here(&config, &name), resolve::is_cached(&config, &name)))).await?;
        if let Some((path, origin)) = found {
            let model = self.open(path, origin).await?;
            if self.request.files.is_none_or(|files| files == model.id) {
                return Ok(model);
            }
        }
        if self.request.extent != Extent::Whole && !is_cached {
            let peers = router.peers();
            if let Some(model) = self.fetch_from_peers(&peers).await? {
                return Ok(self.resolved(&model, Origin::Peers));
            }
        }
        let located = resolve::locate(&self.config, &self.request.model).await;
        let (path, origin) = located.map_err(|otherwise| self.with_tried(otherwise))?;
        let model = self.open(path, origin).await?;
        match self.request.files {
            Some(files) if files != model.id => Err(ModelError::OtherFiles { model: self.request.model.clone() }),
            _ => Ok(model),
        }
    }

    /// The error of the last source, with the reasons of the nodes that were asked before.
    fn with_tried(&self, otherwise: ModelError) -> ModelError {
        let tried = self.tried.lock();
        match tried.is_empty() {
            true => otherwise,
            false => ModelError::NotGiven { tried: tried.join("; "), otherwise: Box::new(otherwise) },
        }
    }

    async fn open(&self, path: PathBuf, origin: Origin) -> Result<ResolvedModel, ModelError> {
        let origin_is_folder = origin == Origin::Folder;
        let (config, registry) = (Arc::clone(&self.config), self.registry.clone());
        let name = self.request.name();
        let opening = blocking(move || {
            let (model, reading) = registry.open(&config, &path)?;
            // A file that was not fetched by this program may be another one than its name says.
            let is_to_check = reading == Reading::Now && origin_is_folder;
            let unlike = is_to_check && resolve::is_unlike_catalogue(&name, &path)?;
            Ok((model, unlike.then_some(path)))
        });
        let (model, unlike) = self.with_progress(opening).await?;
        if let Some(path) = unlike {
            (self.config.progress)(Progress::Unlike { model: self.request.model.clone(), path });
        }
        let model = self.registry.insert(&self.request.model, model);
        Ok(self.resolved(&model, origin))
    }

    /// Reports the bytes that are hashed while a model is opened: the head of an instance takes silence for a hang.
    async fn with_progress<T>(&self, opening: impl Future<Output = Result<T, ModelError>>) -> Result<T, ModelError> {
        tokio::pin!(opening);
        let begun = self.registry.hashed_bytes();
        let mut told = begun;
        loop {
            tokio::select! {
                opened = &mut opening => return opened,
                () = tokio::time::sleep(HASHED_EVERY) => {
                    let hashed = self.registry.hashed_bytes();
                    if hashed > told {
                        told = hashed;
                        self.progress.tell(Fetched { fetched_bytes: hashed - begun, total_bytes: 0 });
                    }
                }
            }
        }
    }

    fn resolved(&self, model: &RegisteredModel, origin: Origin) -> ResolvedModel {
        ResolvedModel { name: self.request.model.clone(), files: Arc::clone(&model.files), origin, id: model.id }
    }

    fn report(&self, fetched_bytes: u64, total_bytes: u64) {
        self.progress.tell(Fetched { fetched_bytes, total_bytes });
        (self.config.progress)(Progress::Fetching { fetched_bytes, total_bytes: Some(total_bytes) });
    }
}

/// Requests a model from the actor. There is no timeout, because a download has no time limit.
pub(crate) async fn get(models: &ModelsRef, request: ModelRequest, progress: EventCallback<Fetched>) -> Outcome {
    match models.call(|reply| ModelsMsg::Get { request, progress, reply }, None).await {
        Ok(CallResult::Success(outcome)) => outcome,
        _ => Err(ModelError::Interrupted),
    }
}

/// Requests the model of `spec`, with the files that `extent` names and the quantisation that `spec` names.
pub(crate) async fn get_spec(
    models: &ModelsRef,
    spec: &ModelSpec,
    files: Option<FilesId>,
    extent: Extent,
    progress: EventCallback<Fetched>,
) -> Outcome {
    let request = ModelRequest { model: spec.model.clone(), files, extent };
    quantised(get(models, request, progress).await?, spec.quantize)
}

/// Returns the model with a recipe, which quantises the weights while they are loaded and is part of the model's name.
fn quantised(model: Arc<ResolvedModel>, recipe: Option<Recipe>) -> Outcome {
    let Some(recipe) = recipe else { return Ok(model) };
    let files = ModelFiles::clone(&model.files).quantised(recipe)?;
    let name = format!("{}@{recipe}", model.name);
    Ok(Arc::new(ResolvedModel { name, files: Arc::new(files), origin: model.origin.clone(), id: model.id }))
}
