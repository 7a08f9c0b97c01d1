//! Planner: which models run, and where.
//!
//! - owns: the instances that are wanted, and what each device has promised to whom;
//! - receives: models that requests need, the machine's free memory, news of instances;
//! - emits: placements, as instances;
//! - dies when: the node stops;
//! - supervised by: the node.

use crate::core::plan::{Demand, Offer, Placement, place};
use crate::core::view::{Fact, InstanceId, Machine};
use crate::device::DeviceRef;
use crate::instance::{Instance, InstanceArgs, InstanceRef, InstanceReport};
use crate::models::{ModelsRef, ResolvedModel};
use crate::outlet::{Facts, Outlet};
use crate::request::{ModelSpec, RequestError};
use crate::tokenizer::TokenizerRef;
use exo_engines::decoder::pages_for;
use exo_engines::engine::{DeviceId, DeviceReport, EngineFactory, KvElement, PAGE_TOKENS};
use exo_engines::model::{ModelFiles, Role};
use exo_engines::tokenizer::Tokenizer;
use exo_net::NodeId;
use ractor::{Actor, ActorProcessingErr, ActorRef, RpcReplyPort, SupervisionEvent};
use std::collections::HashMap;
use std::sync::Arc;

pub(crate) type PlannerRef = ActorRef<PlannerMsg>;

/// Context where neither the request nor the model asks for less: more is seldom used, and its cache is reserved.
const CONTEXT_DEFAULT_TOKENS: u32 = 4096;
/// Sequences of full context that the cache holds at once; shorter ones are more.
const FULL_SEQUENCES: u32 = 4;
/// Memory that is left to everything else on the machine.
const RESERVE_BYTES: u64 = 512 << 20;
/// A processor's guess until it is measured: weights that a desktop's memory delivers in a second.
const CPU_BYTES_PER_S: f64 = 2e10;

/// A running model, as requests use it.
#[derive(Debug, Clone)]
pub struct RunningModel {
    pub id: InstanceId,
    pub(crate) instance: InstanceRef,
    pub(crate) tokenizer_ref: TokenizerRef,
    pub tokenizer: Arc<Tokenizer>,
    pub model: Arc<ResolvedModel>,
    pub placement: Placement,
    pub context_tokens: u32,
}

pub(crate) type EnsureReply = RpcReplyPort<Result<RunningModel, RequestError>>;

#[derive(Debug)]
pub(crate) enum PlannerMsg {
    /// Wants a model to run; the reply comes when it does.
    Ensure {
        spec: ModelSpec,
        reply: EnsureReply,
    },
    /// The files of a wanted model are there, or not.
    Resolved {
        spec: ModelSpec,
        outcome: Result<Arc<ResolvedModel>, RequestError>,
    },
    Instance(InstanceReport),
    /// An instance is gone, whatever it has said before.
    InstanceEnded {
        instance: InstanceId,
        what: String,
    },
    MachineMeasured(Machine),
}

/// A device that the planner may use.
#[derive(Debug, Clone)]
pub(crate) struct PlannedDevice {
    pub report: DeviceReport,
    pub device: DeviceRef,
    pub factory: Arc<dyn EngineFactory>,
}

#[derive(Debug)]
pub(crate) struct PlannerArgs {
    pub node: NodeId,
    /// Best first.
    pub devices: Vec<PlannedDevice>,
    pub machine: Machine,
    pub models: ModelsRef,
    pub facts: Facts,
}

#[derive(Debug)]
pub(crate) struct PlannerState {
    args: PlannerArgs,
    wanted: HashMap<ModelSpec, Wanted>,
    next_instance: u64,
}

#[derive(Debug)]
enum Wanted {
    Resolving { waiting: Vec<EnsureReply> },
    Starting { waiting: Vec<EnsureReply>, placed: Placed },
    Running(RunningModel),
}

#[derive(Debug)]
struct Placed {
    id: InstanceId,
    instance: InstanceRef,
    model: Arc<ResolvedModel>,
    placement: Placement,
    context_tokens: u32,
}

#[derive(Debug)]
pub(crate) struct Planner;

impl Actor for Planner {
    type Msg = PlannerMsg;
    type State = PlannerState;
    type Arguments = PlannerArgs;

    async fn pre_start(&self, _: PlannerRef, args: PlannerArgs) -> Result<PlannerState, ActorProcessingErr> {
        Ok(PlannerState { args, wanted: HashMap::new(), next_instance: 0 })
    }

    async fn handle(
        &self,
        myself: PlannerRef,
        message: PlannerMsg,
        state: &mut PlannerState,
    ) -> Result<(), ActorProcessingErr> {
        match message {
            PlannerMsg::Ensure { spec, reply } => state.ensure(&myself, spec, reply),
            PlannerMsg::Resolved { spec, outcome } => state.on_resolved(&myself, spec, outcome).await,
            PlannerMsg::Instance(InstanceReport::Ready { instance, tokenizer_ref, tokenizer }) => {
                state.on_ready(instance, &tokenizer_ref, &tokenizer);
            }
            PlannerMsg::InstanceEnded { instance, what } => {
                let what = format!("the instance ended: {what}");
                state.on_failed(instance, &RequestError::Engine { what, remedy: "report it, with the log" });
            }
            PlannerMsg::Instance(InstanceReport::Failed { instance, error }) => state.on_failed(instance, &error),
            PlannerMsg::MachineMeasured(machine) => state.args.machine = machine,
        }
        Ok(())
    }

    async fn handle_supervisor_evt(
        &self,
        myself: PlannerRef,
        event: SupervisionEvent,
        state: &mut PlannerState,
    ) -> Result<(), ActorProcessingErr> {
        let (who, what) = match event {
            SupervisionEvent::ActorFailed(who, error) => (who, error.to_string()),
            SupervisionEvent::ActorTerminated(who, _, _) => (who, "it has stopped".to_owned()),
            _ => return Ok(()),
        };
        if let Some(instance) = state.wanted.values().find_map(|wanted| wanted.id_of(who.get_id())) {
            // Supervision overtakes messages: what the instance itself said last is to be heard first.
            let _ = myself.send_message(PlannerMsg::InstanceEnded { instance, what });
        }
        Ok(())
    }
}

impl Wanted {
    fn id(&self) -> Option<InstanceId> {
        match self {
            Self::Resolving { .. } => None,
            Self::Starting { placed, .. } => Some(placed.id),
            Self::Running(running) => Some(running.id),
        }
    }

    fn id_of(&self, actor: ractor::ActorId) -> Option<InstanceId> {
        let (id, instance) = match self {
            Self::Resolving { .. } => return None,
            Self::Starting { placed, .. } => (placed.id, &placed.instance),
            Self::Running(running) => (running.id, &running.instance),
        };
        (instance.get_id() == actor).then_some(id)
    }

    fn placement(&self) -> Option<&Placement> {
        match self {
            Self::Resolving { .. } => None,
            Self::Starting { placed, .. } => Some(&placed.placement),
            Self::Running(running) => Some(&running.placement),
        }
    }
}

fn reply_all(waiting: Vec<EnsureReply>, outcome: &Result<RunningModel, RequestError>) {
    for reply in waiting {
        // Whoever asked may have gone.
        let _ = reply.send(outcome.clone());
    }
}

impl PlannerState {
    fn ensure(&mut self, myself: &PlannerRef, spec: ModelSpec, reply: EnsureReply) {
        match self.wanted.get_mut(&spec) {
            Some(Wanted::Running(running)) => reply_all(vec![reply], &Ok(running.clone())),
            Some(Wanted::Resolving { waiting } | Wanted::Starting { waiting, .. }) => waiting.push(reply),
            None => {
                let (models, planner, model) = (self.args.models.clone(), myself.clone(), spec.model.clone());
                self.wanted.insert(spec.clone(), Wanted::Resolving { waiting: vec![reply] });
                tokio::spawn(async move {
                    let outcome = crate::models::resolve(&models, model).await.map_err(RequestError::from);
                    // A planner that is gone plans nothing.
                    let _ = planner.send_message(PlannerMsg::Resolved { spec, outcome });
                });
            }
        }
    }

    async fn on_resolved(
        &mut self,
        myself: &PlannerRef,
        spec: ModelSpec,
        outcome: Result<Arc<ResolvedModel>, RequestError>,
    ) {
        let Some(Wanted::Resolving { waiting }) = self.wanted.remove(&spec) else { return };
        let started = match outcome {
            Ok(model) => self.start(myself, &spec, model).await,
            Err(error) => Err(error),
        };
        match started {
            Ok(placed) => drop(self.wanted.insert(spec, Wanted::Starting { waiting, placed })),
            Err(error) => reply_all(waiting, &Err(error)),
        }
    }

    async fn start(
        &mut self,
        myself: &PlannerRef,
        spec: &ModelSpec,
        model: Arc<ResolvedModel>,
    ) -> Result<Placed, RequestError> {
        let files = &model.files;
        let trained = u32::try_from(files.architecture.context_tokens).unwrap_or(u32::MAX);
        let context_tokens = spec.context_tokens.unwrap_or(CONTEXT_DEFAULT_TOKENS).min(trained).max(PAGE_TOKENS);
        let kv_pages = pages_for(context_tokens) * FULL_SEQUENCES;
        let candidates = self.candidates(spec)?;
        let offers = self.offers(&candidates);
        let placement = place(&demand(files, kv_pages), &offers, spec.shard_count())?;
        self.next_instance += 1;
        let id = InstanceId(self.next_instance);
        let device_of = |device: &DeviceId| {
            let found = candidates.iter().find(|candidate| candidate.report.id == *device);
            found.map(|candidate| (candidate.device.clone(), Arc::clone(&candidate.factory)))
        };
        let devices = placement.stages.iter().filter_map(|stage| device_of(&stage.device)).collect();
        self.args.facts.tell(Fact::InstancePlaced {
            instance: id,
            model: model.name.clone(),
            placement: placement.clone(),
        });
        let args = InstanceArgs {
            id,
            node: self.args.node,
            files: Arc::clone(files),
            placement: placement.clone(),
            devices,
            context_tokens,
            kv_pages,
            planner: Outlet::to(myself, PlannerMsg::Instance),
            facts: self.args.facts.clone(),
        };
        match Instance::spawn_linked(None, Instance, args, myself.get_cell()).await {
            Ok((instance, _)) => Ok(Placed { id, instance, model, placement, context_tokens }),
            Err(error) => Err(RequestError::Engine { what: error.to_string(), remedy: "report it, with the log" }),
        }
    }

    /// Devices that may be used: those of the engine that is best for this node, or the one that is named.
    fn candidates(&self, spec: &ModelSpec) -> Result<Vec<PlannedDevice>, RequestError> {
        let devices = &self.args.devices;
        let chosen: Vec<PlannedDevice> = match &spec.device {
            Some(id) => devices.iter().filter(|device| device.report.id == *id).cloned().collect(),
            None => {
                let best = devices.first().map(|device| device.report.engine.clone());
                devices.iter().filter(|device| Some(&device.report.engine) == best.as_ref()).cloned().collect()
            }
        };
        match (&spec.device, chosen.is_empty()) {
            (Some(id), true) => Err(RequestError::NoDevice { device: id.to_string() }),
            _ => Ok(chosen),
        }
    }

    /// What the devices can still take. All share the machine's memory as long as all are processors.
    fn offers(&self, candidates: &[PlannedDevice]) -> Vec<Offer> {
        let placements = self.wanted.values().filter_map(Wanted::placement);
        let starting: u64 = placements.flat_map(|placement| &placement.stages).map(|stage| stage.memory_bytes).sum();
        let free = self.args.machine.memory_free_bytes.unwrap_or(u64::MAX);
        let total = self.args.machine.memory_total_bytes.unwrap_or(u64::MAX);
        // What has been promised counts even where it has not been touched yet.
        let free_bytes = free.min(total.saturating_sub(starting)).saturating_sub(RESERVE_BYTES);
        let offer = |candidate: &PlannedDevice| Offer {
            node: self.args.node,
            device: candidate.report.id.clone(),
            free_bytes,
            bytes_per_s: CPU_BYTES_PER_S,
        };
        candidates.iter().map(offer).collect()
    }

    fn on_ready(&mut self, id: InstanceId, tokenizer_ref: &TokenizerRef, tokenizer: &Arc<Tokenizer>) {
        let found = self.wanted.iter_mut().find(|(_, wanted)| wanted.id() == Some(id));
        let Some((_, wanted)) = found else { return };
        // A later life of a running instance changes nothing here.
        if let Wanted::Starting { waiting, placed } = wanted {
            let running = RunningModel {
                id,
                instance: placed.instance.clone(),
                tokenizer_ref: tokenizer_ref.clone(),
                tokenizer: Arc::clone(tokenizer),
                model: Arc::clone(&placed.model),
                placement: placed.placement.clone(),
                context_tokens: placed.context_tokens,
            };
            reply_all(std::mem::take(waiting), &Ok(running.clone()));
            *wanted = Wanted::Running(running);
        }
    }

    fn on_failed(&mut self, id: InstanceId, error: &RequestError) {
        let spec = self.wanted.iter().find(|(_, wanted)| wanted.id() == Some(id)).map(|(spec, _)| spec.clone());
        let Some(wanted) = spec.and_then(|spec| self.wanted.remove(&spec)) else { return };
        self.args.facts.tell(Fact::InstanceStopped { instance: id, error: Some(error.to_string()) });
        if let Wanted::Starting { waiting, .. } = wanted {
            reply_all(waiting, &Err(error.clone()));
        }
    }
}

/// What a model needs in memory, with caches of `kv_pages` pages.
fn demand(files: &ModelFiles, kv_pages: u32) -> Demand {
    let architecture = &files.architecture;
    let layers = architecture.layers.len();
    let bytes_of = |wanted: &dyn Fn(&Role) -> bool| -> u64 {
        let tensors = files.weights.tensors.iter().filter(|(role, _)| wanted(role));
        tensors.map(|(_, slice)| slice.kept_bytes()).sum()
    };
    let kv_tokens = u64::from(kv_pages) * u64::from(PAGE_TOKENS);
    let place = |role| files.weights.tensors.get(&role).map(|slice| (slice.file, slice.offset_bytes));
    Demand {
        layer_bytes: (0..layers)
            .map(|layer| bytes_of(&|role| matches!(role, Role::Layer(l, _) if *l as usize == layer)))
            .collect(),
        kv_bytes: (0..layers)
            .map(|layer| architecture.kv_bytes_per_token(layer..layer + 1, KvElement::F16.bytes()) * kv_tokens)
            .collect(),
        embedding_bytes: bytes_of(&|role| *role == Role::TokenEmbedding),
        head_bytes: bytes_of(&|role| *role == Role::Output),
        ties_embeddings: place(Role::Output) == place(Role::TokenEmbedding),
    }
}
