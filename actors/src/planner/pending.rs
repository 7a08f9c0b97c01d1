//! The models that requests of this node use or wait for: headers, tokenizer, and the requests that wait.

use super::tokenizer::{Opened, TokenizerActor, TokenizerArgs, TokenizerRef};
use super::{EnsureReply, PlannerMsg, PlannerRef, PlannerState, Reconcile, demand};
use crate::core::context::Context;
use crate::core::leader::PlacementRequest;
use crate::core::model_error::ModelError;
use crate::core::plan::Placement;
use crate::core::request::{Answerer, RequestError};
use crate::core::spec::{InstanceId, Model, ModelSpec};
use crate::head::HeadRef;
use crate::models::{Extent, ResolvedModel};
use crate::transport::callback::EventCallback;
use crate::transport::protocol::ControlMessage;
use exo_engines::tokenizer::{Tokenizer, Tools};
use exo_net::NodeId;
use ractor::Actor;
use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// How often the leader is asked for a model again: a leader may be lost, or may not have received the request.
const ASK_EVERY: Duration = Duration::from_secs(2);

/// The node of a running model's head.
#[derive(Debug, Clone)]
pub(crate) enum HeadLocation {
    Local(HeadRef),
    Remote(NodeId),
}

/// A running model. The model stays in memory as long as this value or a clone of it exists.
#[derive(Debug, Clone)]
pub struct RunningModel {
    pub(crate) id: InstanceId,
    pub(crate) head: HeadLocation,
    pub(crate) tokenizer_ref: TokenizerRef,
    pub(crate) tokenizer: Arc<Tokenizer>,
    pub(crate) spec: ModelSpec,
    pub(crate) context: Context,
    pub(crate) in_use: Arc<()>,
    model: Arc<ResolvedModel>,
    placement: Placement,
}

impl RunningModel {
    /// The instance that serves the model.
    pub fn id(&self) -> InstanceId {
        self.id
    }

    /// What answers a request of this model now.
    pub(crate) fn answerer(&self) -> Answerer {
        Answerer {
            instance: self.id,
            model: self.name().to_owned(),
            quantization: self.quantization().to_owned(),
            placement: self.placement.clone(),
        }
    }

    /// The model's name, with the recipe that its weights are quantised by.
    pub fn name(&self) -> &str {
        &self.model.name
    }

    /// How most of its weights are stored: `Q4_K`, `F16`, ….
    pub fn quantization(&self) -> &str {
        &self.model.files.quantization
    }

    /// The weights in the model's files, in bytes.
    pub fn file_bytes(&self) -> u64 {
        self.model.files.weight_bytes()
    }

    /// The devices that hold its layers.
    pub fn placement(&self) -> &Placement {
        &self.placement
    }

    /// The most tokens of a prompt and its answer together, and what set that number.
    pub fn context(&self) -> Context {
        self.context
    }

    /// The number of tokens in the model's vocabulary. Token ids are less than this number.
    pub fn vocabulary(&self) -> usize {
        self.tokenizer.vocabulary()
    }

    /// The tokens that end an answer.
    pub fn end_tokens(&self) -> &BTreeSet<u32> {
        self.tokenizer.ends()
    }

    /// The bytes of a token; empty for a control token, and for an id beyond the vocabulary.
    pub fn token_bytes(&self, id: u32) -> &[u8] {
        self.tokenizer.bytes(id)
    }

    /// Whether the model has a chat template. A model without one continues the messages' texts.
    pub fn has_chat_template(&self) -> bool {
        self.tokenizer.template(Tools::Absent).is_some()
    }
}

/// A model that requests of this node use or wait for.
#[derive(Debug)]
pub(super) struct PendingModel {
    /// Distinguishes this value from earlier ones of the same spec, whose messages may still arrive.
    number: u64,
    waiting: Vec<EnsureReply>,
    model: Option<Arc<ResolvedModel>>,
    tokenizer_ref: Option<TokenizerRef>,
    tokenizer: Option<Arc<Tokenizer>>,
    /// The draft model, which stays in memory as long as this value exists.
    draft: Option<RunningModel>,
    in_use: Arc<()>,
    asked: Option<Instant>,
}

impl PendingModel {
    fn new(number: u64, draft: Option<RunningModel>) -> Self {
        Self {
            number,
            waiting: Vec::new(),
            model: None,
            tokenizer_ref: None,
            tokenizer: None,
            draft,
            in_use: Arc::new(()),
            asked: None,
        }
    }

    /// Whether a request of this node or an embedder uses the model or waits for it.
    pub(super) fn is_in_use(&self) -> bool {
        // This value holds one reference itself.
        Arc::strong_count(&self.in_use) > 1 || !self.waiting.is_empty()
    }

    /// Has the next reconcile ask the leader again.
    pub(super) fn ask_again(&mut self) {
        self.asked = None;
    }

    fn reply(&mut self, outcome: &Result<RunningModel, RequestError>) {
        for reply in self.waiting.drain(..) {
            // The caller may no longer wait.
            let _ = reply.send(outcome.clone());
        }
    }
}

impl Drop for PendingModel {
    fn drop(&mut self) {
        if let Some(tokenizer) = &self.tokenizer_ref {
            tokenizer.stop(None);
        }
    }
}

impl PlannerState {
    /// Replies at once if the model runs, and otherwise when it runs or cannot be run.
    pub(super) fn ensure(
        &mut self,
        myself: &PlannerRef,
        spec: ModelSpec,
        draft: Option<RunningModel>,
        reply: EnsureReply,
    ) -> Reconcile {
        if let Some(running) = self.running_model(&spec) {
            // The caller may no longer wait.
            let _ = reply.send(Ok(running));
            return Reconcile::No;
        }
        if let Some(pending) = self.pending.get_mut(&spec) {
            pending.waiting.push(reply);
            return Reconcile::Yes;
        }
        self.next_pending += 1;
        let number = self.next_pending;
        let mut pending = PendingModel::new(number, draft);
        pending.waiting.push(reply);
        self.pending.insert(spec.clone(), pending);
        let (models, planner) = (self.args.models.clone(), myself.clone());
        tokio::spawn(async move {
            // The head needs no weights: shards fetch their own.
            let outcome = crate::models::get_spec(&models, &spec, None, Extent::Outline, EventCallback::ignore()).await;
            // The planner may have stopped.
            let _ = planner.send_message(PlannerMsg::Resolved { spec, number, outcome: outcome.map_err(Into::into) });
        });
        Reconcile::Yes
    }

    pub(super) async fn on_resolved(
        &mut self,
        myself: &PlannerRef,
        spec: &ModelSpec,
        number: u64,
        outcome: Result<Arc<ResolvedModel>, RequestError>,
    ) {
        let Some(pending) = self.pending.get_mut(spec).filter(|pending| pending.number == number) else { return };
        let model = match outcome {
            Ok(model) => model,
            Err(error) => return self.refuse_here(spec, &error),
        };
        let of = spec.clone();
        let opened =
            EventCallback::to(myself, move |opened| PlannerMsg::Tokenizer { spec: of.clone(), number, opened });
        let args = TokenizerArgs { files: Arc::clone(&model.files), opened };
        pending.model = Some(model);
        match TokenizerActor::spawn_linked(None, TokenizerActor, args, myself.get_cell()).await {
            Ok((tokenizer, _)) => pending.tokenizer_ref = Some(tokenizer),
            Err(error) => {
                let remedy = "report it, with the log".into();
                self.refuse_here(spec, &RequestError::Engine { what: error.to_string(), remedy });
            }
        }
    }

    pub(super) fn on_tokenizer(
        &mut self,
        myself: &PlannerRef,
        spec: ModelSpec,
        number: u64,
        opened: Opened,
    ) -> Reconcile {
        if let Some(pending) = self.pending.get_mut(&spec).filter(|pending| pending.number == number) {
            match (opened, &pending.draft) {
                (Ok(tokenizer), None) => pending.tokenizer = Some(tokenizer),
                (Ok(tokenizer), Some(draft)) => {
                    let (planner, draft) = (myself.clone(), Arc::clone(&draft.tokenizer));
                    tokio::task::spawn_blocking(move || {
                        let shares_tokens = tokenizer.shares_tokens(&draft);
                        // The planner may have stopped.
                        let checked = PlannerMsg::DraftChecked { spec, number, tokenizer, shares_tokens };
                        let _ = planner.send_message(checked);
                    });
                }
                (Err(error), _) => self.refuse_here(&spec, &ModelError::from(error).into()),
            }
        }
        Reconcile::Yes
    }

    /// Takes the tokenizer into use, unless the draft model has other tokens. The model is not loaded before that.
    pub(super) fn on_draft_checked(
        &mut self,
        spec: &ModelSpec,
        number: u64,
        tokenizer: Arc<Tokenizer>,
        shares_tokens: bool,
    ) -> Reconcile {
        if let Some(pending) = self.pending.get_mut(spec).filter(|pending| pending.number == number) {
            match shares_tokens {
                true => pending.tokenizer = Some(tokenizer),
                false => self.refuse_here(spec, &RequestError::bad_draft(spec, "the two have different tokens")),
            }
        }
        Reconcile::Yes
    }

    /// Refuses the requests of this node that wait for a model.
    pub(super) fn refuse_here(&mut self, spec: &ModelSpec, error: &RequestError) {
        if let Some(mut pending) = self.pending.remove(spec) {
            pending.reply(&Err(error.clone()));
        }
    }

    /// Answers the requests whose model runs; asks the leader for models that do not run.
    pub(super) fn advance_all(&mut self) {
        let waiting = self.pending.iter().filter(|(_, pending)| !pending.waiting.is_empty());
        let waiting: Vec<ModelSpec> = waiting.map(|(spec, _)| spec.clone()).collect();
        for spec in waiting {
            self.advance(&spec);
        }
    }

    fn advance(&mut self, spec: &ModelSpec) {
        if let Some(running) = self.running_model(spec) {
            if let Some(pending) = self.pending.get_mut(spec) {
                pending.asked = None;
                pending.reply(&Ok(running));
            }
            return;
        }
        let files = self.desired.find_for(spec).map(|(.., deployment)| deployment.model.files);
        let Some(pending) = self.pending.get_mut(spec) else { return };
        // A model without a tokenizer could not be used, so it is not loaded.
        let (Some(model), Some(_)) = (&pending.model, &pending.tokenizer) else { return };
        match files {
            Some(files) if files != model.id => {
                let error = ModelError::OtherFiles { model: spec.model.clone() };
                self.refuse_here(spec, &error.into());
            }
            // The instance is loading.
            Some(_) => {}
            None if pending.asked.is_some_and(|asked| asked.elapsed() < ASK_EVERY) => {}
            None => {
                pending.asked = Some(Instant::now());
                match placement_request(spec, model) {
                    Ok(request) => self.tell_leader(ControlMessage::Want(Box::new(request))),
                    Err(error) => self.refuse_here(spec, &error),
                }
            }
        }
    }

    /// The model of `spec`, if it runs and this node has its headers and tokenizer. Marks the instance as used now.
    fn running_model(&mut self, spec: &ModelSpec) -> Option<RunningModel> {
        let pending = self.pending.get(spec)?;
        let (model, tokenizer) = (pending.model.clone()?, pending.tokenizer.clone()?);
        let (tokenizer_ref, in_use) = (pending.tokenizer_ref.clone()?, Arc::clone(&pending.in_use));
        let (id, _, deployment) = self.desired.find_for(spec)?;
        let head = self.head_location(id, deployment.owner()?)?;
        let Model { context, files, .. } = deployment.model;
        let (placement, spec) = (deployment.placement.clone(), spec.clone());
        if files != model.id {
            return None;
        }
        let now = self.now();
        self.leader.handle_use(id, now);
        Some(RunningModel { id, head, tokenizer_ref, tokenizer, spec, context, in_use, model, placement })
    }

    /// The location of an instance's head; `None` while the head accepts no requests.
    fn head_location(&self, id: InstanceId, owner: NodeId) -> Option<HeadLocation> {
        if owner == self.args.node {
            return self.active_head(id).map(|(head, _)| HeadLocation::Local(head));
        }
        let report = self.members.0.get(&owner)?;
        report.owned.get(&id).filter(|owned| owned.is_ready).map(|_| HeadLocation::Remote(owner))
    }

    /// Drops models that are not deployed, and that no request of this node uses or waits for.
    pub(super) fn forget_unused(&mut self) {
        let desired = &self.desired;
        self.pending.retain(|spec, pending| pending.is_in_use() || desired.find_for(spec).is_some());
    }

    /// Instances that requests of this node use.
    pub(super) fn used_here(&self) -> Vec<InstanceId> {
        let used = self.pending.iter().filter(|(_, pending)| pending.is_in_use());
        used.filter_map(|(spec, _)| self.desired.find_for(spec)).map(|(id, ..)| id).collect()
    }
}

/// The request with which the leader can place a model.
///
/// # Errors
/// [`RequestError::ContextTooLong`] if the spec demands a longer context than the model's own.
pub(super) fn placement_request(spec: &ModelSpec, model: &ResolvedModel) -> Result<PlacementRequest, RequestError> {
    let files = &model.files;
    let tokens = |tokens: usize| u32::try_from(tokens).unwrap_or(u32::MAX);
    let model_tokens = tokens(files.architecture.context_tokens);
    if let Some(requested_tokens) = spec.context_tokens.filter(|&requested| requested > model_tokens) {
        return Err(RequestError::ContextTooLong { requested_tokens, model_tokens });
    }
    let original = files.architecture.long_ropes.as_ref().map(|long| tokens(long.above_tokens));
    let context = Context::largest(spec.context_tokens, model_tokens, original);
    Ok(PlacementRequest {
        spec: spec.clone(),
        model: Model {
            name: model.name.clone(),
            family: files.architecture.family.clone(),
            quantization: files.quantization.clone(),
            context,
            vocabulary: tokens(files.architecture.vocabulary),
            files: model.id,
        },
        demand: demand::demand(files, spec.kv_element(), context.cache_pages()),
    })
}
