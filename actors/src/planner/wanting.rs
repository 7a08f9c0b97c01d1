//! Models that requests of this node want, wherever they run: files, tokenizer, and who waits.

use super::{EnsureReply, PlannerMsg, PlannerRef, PlannerState, demand};
use crate::core::lead::Ask;
use crate::core::plan::Placement;
use crate::core::spec::{InstanceId, Model, ModelSpec};
use crate::instance::InstanceRef;
use crate::models::{Extent, ModelError, ResolvedModel};
use crate::outlet::Outlet;
use crate::protocol::ControlMessage;
use crate::request::RequestError;
use crate::tokenizer::{Opened, TokenizerActor, TokenizerArgs, TokenizerRef};
use exo_engines::decoder::pages_for;
use exo_engines::engine::PAGE_TOKENS;
use exo_engines::tokenizer::Tokenizer;
use exo_net::NodeId;
use ractor::Actor;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// Context where neither the request nor the model asks for less: more is seldom used, and its cache is reserved.
const CONTEXT_DEFAULT_TOKENS: u32 = 4096;
/// Sequences of full context that the cache holds at once; shorter ones are more.
const FULL_SEQUENCES: u32 = 4;
/// A leader that has gone, or has not heard, is asked again.
const ASK_EVERY: Duration = Duration::from_secs(2);

/// Where the head of a running model is.
#[derive(Debug, Clone)]
pub(crate) enum Home {
    Here(InstanceRef),
    There(NodeId),
}

/// A running model, as requests use it. It stays in memory as long as anyone holds this.
#[derive(Debug, Clone)]
pub struct RunningModel {
    pub id: InstanceId,
    pub(crate) home: Home,
    pub(crate) tokenizer_ref: TokenizerRef,
    pub tokenizer: Arc<Tokenizer>,
    pub model: Arc<ResolvedModel>,
    pub placement: Placement,
    pub context_tokens: u32,
    pub(crate) in_use: Arc<()>,
}

/// A model that is wanted here.
#[derive(Debug)]
pub(super) struct Wanting {
    /// Tells it from earlier ones of the same model, whose news may still come.
    number: u64,
    waiting: Vec<EnsureReply>,
    model: Option<Arc<ResolvedModel>>,
    tokenizer_ref: Option<TokenizerRef>,
    tokenizer: Option<Arc<Tokenizer>>,
    in_use: Arc<()>,
    asked: Option<Instant>,
}

impl Wanting {
    fn new(number: u64) -> Self {
        let in_use = Arc::new(());
        Self { number, waiting: Vec::new(), model: None, tokenizer_ref: None, tokenizer: None, in_use, asked: None }
    }

    /// Whether a request of this node, or whoever loaded it, has it in use.
    pub(super) fn is_in_use(&self) -> bool {
        // One is the planner's own.
        Arc::strong_count(&self.in_use) > 1 || !self.waiting.is_empty()
    }

    pub(super) fn ask_again(&mut self) {
        self.asked = None;
    }

    fn reply(&mut self, outcome: &Result<RunningModel, RequestError>) {
        for reply in self.waiting.drain(..) {
            // Whoever asked may have gone.
            let _ = reply.send(outcome.clone());
        }
    }
}

impl Drop for Wanting {
    fn drop(&mut self) {
        if let Some(tokenizer) = &self.tokenizer_ref {
            tokenizer.stop(None);
        }
    }
}

impl PlannerState {
    pub(super) fn ensure(&mut self, myself: &PlannerRef, spec: ModelSpec, reply: EnsureReply) {
        if let Some(wanting) = self.wanting.get_mut(&spec) {
            return wanting.waiting.push(reply);
        }
        self.next_wanting += 1;
        let number = self.next_wanting;
        let mut wanting = Wanting::new(number);
        wanting.waiting.push(reply);
        self.wanting.insert(spec.clone(), wanting);
        let (models, planner) = (self.args.models.clone(), myself.clone());
        tokio::spawn(async move {
            // Whoever asks needs no weights: shards get their own.
            let outcome = crate::models::get_spec(&models, &spec, None, Extent::Outline, Outlet::new(drop)).await;
            // A planner that is gone plans nothing.
            let _ = planner.send_message(PlannerMsg::Resolved { spec, number, outcome: outcome.map_err(Into::into) });
        });
    }

    pub(super) async fn on_resolved(
        &mut self,
        myself: &PlannerRef,
        spec: &ModelSpec,
        number: u64,
        outcome: Result<Arc<ResolvedModel>, RequestError>,
    ) {
        let Some(wanting) = self.wanting.get_mut(spec).filter(|wanting| wanting.number == number) else { return };
        let model = match outcome {
            Ok(model) => model,
            Err(error) => return self.refuse_here(spec, &error),
        };
        let of = spec.clone();
        let owner = Outlet::to(myself, move |opened| PlannerMsg::Tokenizer { spec: of.clone(), number, opened });
        let args = TokenizerArgs { files: Arc::clone(&model.files), owner };
        wanting.model = Some(model);
        match TokenizerActor::spawn_linked(None, TokenizerActor, args, myself.get_cell()).await {
            Ok((tokenizer, _)) => wanting.tokenizer_ref = Some(tokenizer),
            Err(error) => {
                let remedy = "report it, with the log".into();
                self.refuse_here(spec, &RequestError::Engine { what: error.to_string(), remedy });
            }
        }
    }

    pub(super) fn on_tokenizer(&mut self, spec: &ModelSpec, number: u64, opened: Opened) {
        let Some(wanting) = self.wanting.get_mut(spec).filter(|wanting| wanting.number == number) else { return };
        match opened {
            Ok(tokenizer) => wanting.tokenizer = Some(tokenizer),
            Err(error) => self.refuse_here(spec, &ModelError::from(error).into()),
        }
    }

    /// A model cannot be had: whoever waits for it here is told.
    pub(super) fn refuse_here(&mut self, spec: &ModelSpec, error: &RequestError) {
        if let Some(mut wanting) = self.wanting.remove(spec) {
            wanting.reply(&Err(error.clone()));
        }
    }

    /// Asks for what is wanted here and does not run; answers where it runs.
    pub(super) fn advance_all(&mut self) {
        let wanted: Vec<ModelSpec> = self
            .wanting
            .iter()
            .filter(|(_, wanting)| !wanting.waiting.is_empty())
            .map(|(spec, _)| spec.clone())
            .collect();
        for spec in wanted {
            self.advance(&spec);
        }
    }

    fn advance(&mut self, spec: &ModelSpec) {
        let found = self
            .desired
            .find(spec)
            .map(|(id, _, wanted)| (id, wanted.owner(), wanted.placement.clone(), wanted.model.clone()));
        let home = found.as_ref().and_then(|(id, owner, ..)| self.home(*id, (*owner)?));
        let Some(wanting) = self.wanting.get_mut(spec) else { return };
        // A model without a tokenizer is of no use: it is not even loaded.
        let (Some(model), Some(tokenizer), Some(tokenizer_ref)) =
            (&wanting.model, &wanting.tokenizer, &wanting.tokenizer_ref)
        else {
            return;
        };
        match (found, home) {
            (Some((.., running)), _) if running.files != model.id => {
                let error = ModelError::OtherFiles { model: spec.model.clone() };
                self.refuse_here(spec, &error.into());
            }
            (Some((id, _, placement, Model { context_tokens, .. })), Some(home)) => {
                let running = RunningModel {
                    id,
                    home,
                    tokenizer_ref: tokenizer_ref.clone(),
                    tokenizer: Arc::clone(tokenizer),
                    model: Arc::clone(model),
                    placement,
                    context_tokens,
                    in_use: Arc::clone(&wanting.in_use),
                };
                wanting.asked = None;
                wanting.reply(&Ok(running));
                let now = self.started.elapsed();
                self.leader.handle_use(id, now);
            }
            // It is on its way.
            (Some(_), None) => {}
            (None, _) if wanting.asked.is_some_and(|asked| asked.elapsed() < ASK_EVERY) => {}
            (None, _) => {
                wanting.asked = Some(Instant::now());
                let ask = ask(spec, model);
                self.tell_leader(ControlMessage::Want(Box::new(ask)));
            }
        }
    }

    /// Where the head of an instance takes requests.
    fn home(&self, id: InstanceId, owner: NodeId) -> Option<Home> {
        if owner == self.args.node {
            return self.owned_ready(id).map(Home::Here);
        }
        let report = self.members.0.get(&owner)?;
        report.owned.get(&id).filter(|owned| owned.is_ready).map(|_| Home::There(owner))
    }

    /// Lets go of what nobody here wants any more, and what does not run.
    pub(super) fn forget_unused(&mut self) {
        let desired = &self.desired;
        self.wanting.retain(|spec, wanting| wanting.is_in_use() || desired.find(spec).is_some());
    }

    /// Instances that are used through this node.
    pub(super) fn used_here(&self) -> Vec<InstanceId> {
        let used = self.wanting.iter().filter(|(_, wanting)| wanting.is_in_use());
        used.filter_map(|(spec, _)| self.desired.find(spec)).map(|(id, ..)| id).collect()
    }
}

pub(super) fn ask(spec: &ModelSpec, model: &ResolvedModel) -> Ask {
    let files = &model.files;
    let trained = u32::try_from(files.architecture.context_tokens).unwrap_or(u32::MAX);
    let context_tokens = spec.context_tokens.unwrap_or(CONTEXT_DEFAULT_TOKENS).min(trained).max(PAGE_TOKENS);
    let kv_pages = pages_for(context_tokens) * FULL_SEQUENCES;
    Ask {
        spec: spec.clone(),
        model: Model {
            name: model.name.clone(),
            family: files.architecture.family.clone(),
            quantization: files.quantization.clone(),
            context_tokens,
            vocabulary: u32::try_from(files.architecture.vocabulary).unwrap_or(u32::MAX),
            files: model.id,
        },
        demand: demand::demand(files, kv_pages),
    }
}
