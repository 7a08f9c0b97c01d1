//! Planner: which models run, and where.
//!
//! - owns: the instances that are wanted, and what each device has promised to whom;
//! - receives: models that requests need, the machine's free memory, news of instances;
//! - emits: placements, as instances;
//! - dies when: the node stops;
//! - supervised by: the node.
//!
//! A model that nobody has used for a while leaves, and so does, when another needs its room, the one of those that
//! nobody uses now that was used longest ago.

mod demand;
mod wanted;

pub use wanted::RunningModel;

use crate::core::plan::{Offer, PlanError, place};
use crate::core::view::{Fact, InstanceId, Machine, Model};
use crate::device::DeviceRef;
use crate::instance::{Instance, InstanceArgs, InstanceReport};
use crate::machine::measure_once;
use crate::models::{ModelsRef, ResolvedModel};
use crate::outlet::{Facts, Outlet};
use crate::request::{ModelSpec, RequestError};
use crate::room::Room;
use crate::tokenizer::TokenizerRef;
use exo_engines::decoder::pages_for;
use exo_engines::engine::{DeviceId, DeviceReport, EngineFactory, PAGE_TOKENS};
use exo_engines::tokenizer::Tokenizer;
use exo_net::NodeId;
use ractor::{Actor, ActorProcessingErr, ActorRef, RpcReplyPort, SupervisionEvent};
use std::collections::HashMap;
use std::sync::Arc;
use std::time::{Duration, Instant};
use wanted::{Placed, Wanted, reply_all};

pub(crate) type PlannerRef = ActorRef<PlannerMsg>;

/// Context where neither the request nor the model asks for less: more is seldom used, and its cache is reserved.
const CONTEXT_DEFAULT_TOKENS: u32 = 4096;
/// Sequences of full context that the cache holds at once; shorter ones are more.
const FULL_SEQUENCES: u32 = 4;
/// Memory that is left to everything else on the machine.
const RESERVE_BYTES: u64 = 512 << 20;
/// A processor's guess until it is measured: weights that a desktop's memory delivers in a second.
const CPU_BYTES_PER_S: f64 = 2e10;
/// How often the planner looks for models that nobody uses.
const LOOK_EVERY: Duration = Duration::from_secs(1);

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
    /// The memory of an instance that is gone is free.
    Vacated(InstanceId),
    /// Time to look for models that nobody uses.
    Look,
}

/// A device that the planner may use.
#[derive(Debug, Clone)]
pub(crate) struct PlannedDevice {
    pub report: DeviceReport,
    pub device: DeviceRef,
    pub factory: Arc<dyn EngineFactory>,
}

/// What a user bounds.
#[derive(Debug, Clone, Default)]
pub struct PlannerLimits {
    /// A model that nobody has used for so long leaves; `None`: it stays.
    pub idle: Option<Duration>,
    /// Memory of all models together; `None`: what the machine has.
    pub memory_bytes: Option<u64>,
}

#[derive(Debug)]
pub(crate) struct PlannerArgs {
    pub node: NodeId,
    /// Best first.
    pub devices: Vec<PlannedDevice>,
    pub machine: Machine,
    pub limits: PlannerLimits,
    pub models: ModelsRef,
    pub facts: Facts,
}

#[derive(Debug)]
pub(crate) struct PlannerState {
    args: PlannerArgs,
    wanted: HashMap<ModelSpec, Wanted>,
    /// Instances that are gone or going, and the memory that they still have.
    leaving: HashMap<InstanceId, u64>,
    next_instance: u64,
}

#[derive(Debug)]
pub(crate) struct Planner;

impl Actor for Planner {
    type Msg = PlannerMsg;
    type State = PlannerState;
    type Arguments = PlannerArgs;

    async fn pre_start(&self, myself: PlannerRef, args: PlannerArgs) -> Result<PlannerState, ActorProcessingErr> {
        myself.send_interval(LOOK_EVERY, || PlannerMsg::Look);
        Ok(PlannerState { args, wanted: HashMap::new(), leaving: HashMap::new(), next_instance: 0 })
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
            PlannerMsg::MachineMeasured(machine) => state.on_measured(&myself, machine).await,
            PlannerMsg::Vacated(instance) => state.on_vacated(&myself, instance),
            PlannerMsg::Look => state.unload_idle(Instant::now()),
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

impl PlannerState {
    fn ensure(&mut self, myself: &PlannerRef, spec: ModelSpec, reply: EnsureReply) {
        match self.wanted.get_mut(&spec) {
            Some(Wanted::Running { running, last_used }) => {
                *last_used = Instant::now();
                reply_all(vec![reply], &Ok(running.clone()));
            }
            Some(
                Wanted::Resolving { waiting } | Wanted::Crowded { waiting, .. } | Wanted::Starting { waiting, .. },
            ) => {
                waiting.push(reply);
            }
            None => {
                let (models, planner, asked) = (self.args.models.clone(), myself.clone(), spec.clone());
                self.wanted.insert(spec.clone(), Wanted::Resolving { waiting: vec![reply] });
                tokio::spawn(async move {
                    let outcome = crate::models::resolve(&models, asked.model).await;
                    let outcome = outcome.and_then(|model| crate::models::quantised(model, asked.quantize));
                    // A planner that is gone plans nothing.
                    let _ = planner.send_message(PlannerMsg::Resolved { spec, outcome: outcome.map_err(Into::into) });
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
        match outcome {
            Ok(model) => self.start_or_wait(myself, spec, model, waiting).await,
            Err(error) => reply_all(waiting, &Err(error)),
        }
    }

    /// Starts a model; where there is no room, as soon as others have left.
    async fn start_or_wait(
        &mut self,
        myself: &PlannerRef,
        spec: ModelSpec,
        model: Arc<ResolvedModel>,
        waiting: Vec<EnsureReply>,
    ) {
        match self.start(myself, &spec, Arc::clone(&model)).await {
            Ok(placed) => drop(self.wanted.insert(spec, Wanted::Starting { waiting, placed })),
            Err(RequestError::Plan(PlanError::DoesNotFit { .. })) if self.make_room() => {
                self.wanted.insert(spec, Wanted::Crowded { waiting, model });
            }
            Err(RequestError::Plan(PlanError::DoesNotFit { needed_bytes, .. })) if self.others_are_in_use() => {
                reply_all(waiting, &Err(RequestError::Crowded { model: model.name.clone(), needed_bytes }));
            }
            Err(error) => reply_all(waiting, &Err(error)),
        }
    }

    fn others_are_in_use(&self) -> bool {
        self.wanted.values().any(|wanted| wanted.promised_bytes() > 0)
    }

    /// Whether a model is leaving, or is made to: the one of those that nobody uses that was used longest ago.
    fn make_room(&mut self) -> bool {
        if !self.leaving.is_empty() {
            return true;
        }
        let idle = self.wanted.iter().filter_map(|(spec, wanted)| Some((wanted.idle_since()?, spec)));
        let Some(spec) = idle.min_by_key(|(since, _)| *since).map(|(_, spec)| spec.clone()) else { return false };
        self.unload(&spec, "another model needs its room");
        true
    }

    fn unload_idle(&mut self, now: Instant) {
        let Some(limit) = self.args.limits.idle else { return };
        for wanted in self.wanted.values_mut() {
            if let (None, Wanted::Running { last_used, .. }) = (wanted.idle_since(), &mut *wanted) {
                *last_used = now;
            }
        }
        let is_over = |wanted: &Wanted| wanted.idle_since().is_some_and(|since| now.duration_since(since) >= limit);
        let over = self.wanted.iter().filter(|(_, wanted)| is_over(wanted)).map(|(spec, _)| spec.clone());
        for spec in over.collect::<Vec<_>>() {
            self.unload(&spec, "nobody uses it");
        }
    }

    /// Has a running model leave.
    fn unload(&mut self, spec: &ModelSpec, why: &str) {
        let Some(wanted) = self.wanted.remove(spec) else { return };
        self.leaves(&wanted);
        if let Wanted::Running { running, .. } = &wanted {
            tracing::info!(instance = %running.id, model = running.model.name, why, "unloading a model");
            self.args.facts.tell(Fact::InstanceStopped { instance: running.id, error: None });
            running.instance.stop(None);
        }
    }

    fn leaves(&mut self, wanted: &Wanted) {
        if let Some(id) = wanted.id() {
            self.leaving.insert(id, wanted.promised_bytes());
        }
    }

    fn on_vacated(&mut self, myself: &PlannerRef, instance: InstanceId) {
        self.leaving.remove(&instance);
        if self.wanted.values().any(|wanted| matches!(wanted, Wanted::Crowded { .. })) {
            let planner = myself.clone();
            tokio::task::spawn_blocking(move || {
                // A planner that is gone plans nothing.
                let _ = planner.send_message(PlannerMsg::MachineMeasured(measure_once()));
            });
        }
    }

    /// Takes note of what is free now, and tries again what there was no room for.
    async fn on_measured(&mut self, myself: &PlannerRef, machine: Machine) {
        self.args.machine = machine;
        if !self.leaving.is_empty() {
            return;
        }
        let is_crowded = |wanted: &Wanted| matches!(wanted, Wanted::Crowded { .. });
        let crowded = self.wanted.iter().filter(|(_, wanted)| is_crowded(wanted)).map(|(spec, _)| spec.clone());
        for spec in crowded.collect::<Vec<_>>() {
            if let Some(Wanted::Crowded { waiting, model }) = self.wanted.remove(&spec) {
                self.start_or_wait(myself, spec, model, waiting).await;
            }
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
        let placement = place(&demand::demand(files, kv_pages), &offers, spec.shard_count())?;
        self.next_instance += 1;
        let id = InstanceId(self.next_instance);
        let device_of = |device: &DeviceId| {
            let found = candidates.iter().find(|candidate| candidate.report.id == *device);
            found.map(|candidate| (candidate.device.clone(), Arc::clone(&candidate.factory)))
        };
        let devices = placement.stages.iter().filter_map(|stage| device_of(&stage.device)).collect();
        self.args.facts.tell(Fact::InstancePlaced {
            instance: id,
            model: Model {
                name: model.name.clone(),
                family: files.architecture.family.clone(),
                quantization: files.quantization.clone(),
                context_tokens,
            },
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
            room: Arc::new(Room { instance: id, vacated: Outlet::to(myself, PlannerMsg::Vacated) }),
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
        let promised: u64 =
            self.wanted.values().map(Wanted::promised_bytes).chain(self.leaving.values().copied()).sum();
        let free = self.args.machine.memory_free_bytes.unwrap_or(u64::MAX);
        let total = self.args.machine.memory_total_bytes.unwrap_or(u64::MAX);
        // What has been promised counts even where it has not been touched yet.
        let free_bytes = free.min(total.saturating_sub(promised)).saturating_sub(RESERVE_BYTES);
        let limit = self.args.limits.memory_bytes.unwrap_or(u64::MAX);
        let free_bytes = free_bytes.min(limit.saturating_sub(promised));
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
                in_use: Arc::new(()),
            };
            reply_all(std::mem::take(waiting), &Ok(running.clone()));
            *wanted = Wanted::Running { running, last_used: Instant::now() };
        }
    }

    fn on_failed(&mut self, id: InstanceId, error: &RequestError) {
        let spec = self.wanted.iter().find(|(_, wanted)| wanted.id() == Some(id)).map(|(spec, _)| spec.clone());
        let Some(wanted) = spec.and_then(|spec| self.wanted.remove(&spec)) else { return };
        self.leaves(&wanted);
        self.args.facts.tell(Fact::InstanceStopped { instance: id, error: Some(error.to_string()) });
        if let Wanted::Starting { waiting, .. } = wanted {
            reply_all(waiting, &Err(error.clone()));
        }
    }
}
