//! Worker: the shards that this node hosts, for owners on any node.
//!
//! - owns: the table of this node's shards, with the owner, engines and memory of each; the health of the devices;
//! - receives: orders of the instances' owners, from any node; reports of engines and probes; ticks, at which probes
//!   start;
//! - emits: engines and probes to devices; events of shards to their owners; the memory that shards hold, to the
//!   planner; the health of devices, as facts;
//! - dies when: the node stops;
//! - supervised by: the node.
//!
//! The worker drops an order with an earlier stamp than the instance's latest. A shard that a later order repeats
//! unchanged stays loaded. A shard with other layers loads beside the serving one.

mod recovery;
mod release;
mod reports;
mod wiring;

use super::device::DeviceRef;
use super::engine_thread::{EngineHandle, EngineTask, LinkQueue};
use super::links::LinkRegistry;
use super::memory_guard::MemoryGuard;
use super::probe::ProbeOutcome;
use super::shard::{ShardReport, ShardTask};
use crate::core::desired::{DesiredSnapshot, Stamp};
use crate::core::failover::{EngineNumber, Failover, ShardNumber};
use crate::core::plan::PlanError;
use crate::core::request::RequestError;
use crate::core::spec::InstanceId;
use crate::core::stage::{StageEvent, StageTask};
use crate::models::{Extent, Fetched, ModelsRef, ResolvedModel};
use crate::transport::callback::{EventCallback, Facts};
use crate::transport::protocol::{ControlMessage, StageOrder};
use crate::transport::router::Router;
use exo_engines::EngineError;
use exo_engines::engine::{DeviceId, DeviceReport, EngineFactory, Incarnation, ShardSpec, TensorRank};
use exo_engines::model::ModelFiles;
use exo_net::{InboxSlot, NodeId};
use ractor::{Actor, ActorProcessingErr, ActorRef};
use ractor_cluster::RactorMessage;
use std::collections::{BTreeMap, HashMap};
use std::ops::Range;
use std::sync::Arc;
use std::time::{Duration, Instant};
use wiring::Wiring;

pub(crate) type WorkerRef = ActorRef<WorkerMsg>;

/// The most shards that this node hosts at once.
const SHARDS_MAX: usize = 256;
/// How often the worker looks for a probe that is due.
const TICK_EVERY: Duration = Duration::from_secs(1);

/// The key of a shard. A stage has two shards while it moves to other layers or to another device.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(crate) struct ShardKey {
    instance: InstanceId,
    stage: usize,
    layers: Range<usize>,
    /// The device of its placement. The shard may run on the fallback.
    device: DeviceId,
}

impl ShardKey {
    fn of(task: &StageTask) -> Self {
        Self { instance: task.instance, stage: task.stage, layers: task.layers.clone(), device: task.device.clone() }
    }
}

#[derive(Debug, RactorMessage)]
pub(crate) enum WorkerMsg {
    Order {
        from: NodeId,
        order: StageOrder,
        /// The inbox slot of the message that carried the order.
        slot: Option<InboxSlot>,
    },
    /// Stops the shards that the desired list does not keep.
    Reconcile(DesiredSnapshot),
    /// The files of a shard's layers are on this machine, or cannot be fetched.
    Resolved {
        key: ShardKey,
        serial: ShardNumber,
        outcome: Result<Arc<ResolvedModel>, RequestError>,
    },
    /// The fetch of a shard's weights has made progress.
    Fetched {
        key: ShardKey,
        serial: ShardNumber,
        fetched: Fetched,
    },
    Shard {
        key: ShardKey,
        serial: ShardNumber,
        /// The engine that the report is about.
        of: EngineNumber,
        report: ShardReport,
    },
    Probed {
        device: DeviceId,
        outcome: ProbeOutcome,
    },
    Tick,
    /// The link to a shard's successor is open, or cannot be opened.
    Linked {
        key: ShardKey,
        wiring: Box<Wiring>,
        outcome: Result<LinkQueue, String>,
    },
    /// The link to a shard's successor broke.
    Cut {
        key: ShardKey,
        incarnation: Incarnation,
        what: String,
    },
    MemoryReleased {
        instance: InstanceId,
        bytes: u64,
    },
}

/// A device of this node.
#[derive(Debug, Clone)]
pub(crate) struct LocalDevice {
    pub report: DeviceReport,
    pub device: DeviceRef,
    pub factory: Arc<dyn EngineFactory>,
    /// The device that serves the shards which cannot run on this one.
    pub fallback: Option<DeviceId>,
}

/// A report of the worker to the planner.
#[derive(Debug, Clone)]
pub(crate) enum WorkerFact {
    /// The memory that the shards of each instance hold, in bytes, and the number of hosted shards. The memory of a
    /// stopped shard counts until its engine is dropped; a hung engine keeps it.
    MemoryChanged { memory: BTreeMap<InstanceId, u64>, shards: usize },
    /// The speed of a device: the bytes of weights that it computes with per second of decoding.
    Measured { device: DeviceId, bytes_per_s: f64 },
}

#[derive(Debug)]
pub(crate) struct WorkerArgs {
    pub devices: Vec<LocalDevice>,
    /// The first pause before a device that has failed is probed.
    pub probe_after: Duration,
    pub models: ModelsRef,
    pub router: Router,
    pub link_registry: LinkRegistry,
    pub facts: EventCallback<WorkerFact>,
    /// Receives the health of devices.
    pub health: Facts,
}

#[derive(Debug)]
pub(crate) struct WorkerState {
    args: WorkerArgs,
    started: Instant,
    shards: HashMap<ShardKey, HostedShard>,
    failover: Failover<Loaded>,
    /// The latest stamp of each instance.
    stamps: HashMap<InstanceId, Stamp>,
    memory: BTreeMap<InstanceId, u64>,
    next_serial: ShardNumber,
}

/// A shard that serves or starts.
#[derive(Debug)]
struct HostedShard {
    /// Distinguishes the shard from earlier ones with the same key.
    serial: ShardNumber,
    owner: NodeId,
    task: StageTask,
    /// What each of its engines starts with, but for the engine's number; `None` until the model's headers are read.
    start: Option<ShardTask>,
    /// When the owner last ordered the shard.
    ordered: Instant,
    /// The cost of a row, in bytes of weights; 0 until the model's headers are read.
    cost_bytes: u64,
    /// The incarnation for which the shard is connected.
    wired: Option<Incarnation>,
}

#[derive(Debug, Clone)]
struct Loaded {
    engine: EngineHandle,
    hidden: usize,
    vocabulary: u32,
}

#[derive(Debug)]
pub(crate) struct Worker;

impl Actor for Worker {
    type Msg = WorkerMsg;
    type State = WorkerState;
    type Arguments = WorkerArgs;

    async fn pre_start(&self, myself: WorkerRef, args: WorkerArgs) -> Result<WorkerState, ActorProcessingErr> {
        myself.send_interval(TICK_EVERY, || WorkerMsg::Tick);
        let devices = args.devices.iter().map(|local| (local.report.id.clone(), local.fallback.clone()));
        let failover = Failover::new(devices, args.probe_after);
        Ok(WorkerState {
            args,
            started: Instant::now(),
            shards: HashMap::new(),
            failover,
            stamps: HashMap::new(),
            memory: BTreeMap::new(),
            next_serial: 0,
        })
    }

    async fn handle(
        &self,
        myself: WorkerRef,
        message: WorkerMsg,
        state: &mut WorkerState,
    ) -> Result<(), ActorProcessingErr> {
        match message {
            // The slot is held until the order has been handled.
            WorkerMsg::Order { from, order, slot: _slot } => state.on_order(&myself, from, order),
            WorkerMsg::Reconcile(snapshot) => state.reconcile(&snapshot),
            WorkerMsg::Resolved { key, serial, outcome } => state.on_resolved(&myself, key, serial, outcome),
            WorkerMsg::Fetched { key, serial, fetched } => state.on_fetched(key, serial, fetched),
            WorkerMsg::Shard { key, serial, of, report } => state.on_report(&key, serial, of, report),
            WorkerMsg::Probed { device, outcome } => state.on_probed(&device, outcome),
            WorkerMsg::Tick => state.start_probes(&myself),
            WorkerMsg::Linked { key, wiring, outcome } => state.on_linked(&key, &wiring, outcome),
            WorkerMsg::Cut { key, incarnation, what } => state.on_cut(&key, incarnation, what),
            WorkerMsg::MemoryReleased { instance, bytes } => state.on_memory_released(instance, bytes),
        }
        Ok(())
    }
}

impl WorkerState {
    fn on_order(&mut self, myself: &WorkerRef, from: NodeId, order: StageOrder) {
        if self.args.router.is_excluded(from) {
            // The peer may still count this node in its clique.
            return tracing::debug!(peer = %from, "ignored an order of a peer outside the clique");
        }
        match order {
            StageOrder::Start(task) => self.start(myself, from, *task),
            StageOrder::Clear { instance, below } => self.clear(instance, below),
            StageOrder::Wire { instance, stage, layers, device, incarnation, from: before, next, to, wire_type } => {
                let wiring = Wiring { incarnation, from: before, next, to, wire_type };
                self.wire(myself, from, ShardKey { instance, stage, layers, device }, wiring);
            }
        }
    }

    fn start(&mut self, myself: &WorkerRef, owner: NodeId, task: StageTask) {
        let key = ShardKey::of(&task);
        if !task.is_plausible() {
            return tracing::warn!(peer = %owner, instance = %task.instance, "refused a shard with impossible values");
        }
        let latest = self.stamps.get(&task.instance).copied();
        if latest.is_some_and(|latest| task.stamp < latest) {
            return tracing::warn!(peer = %owner, instance = %task.instance, "refused a shard of an earlier placement");
        }
        if self.shards.len() >= SHARDS_MAX && !self.shards.contains_key(&key) {
            let error = RequestError::MemoryBusy { model: task.spec.model, needed_bytes: task.memory_bytes };
            let (stamp, event) = (task.stamp, StageEvent::NoModel { stage: task.stage, error });
            let message = ControlMessage::StageEvent { instance: task.instance, stamp, event };
            return self.args.router.tell(owner, message);
        }
        self.stamps.insert(task.instance, task.stamp);
        if let Some(shard) = self.shards.get_mut(&key) {
            let is_unchanged = StageTask { stamp: task.stamp, ..shard.task.clone() } == task;
            if is_unchanged {
                (shard.owner, shard.task, shard.ordered) = (owner, task, Instant::now());
                return self.tell_up(&key);
            }
            self.stop(&key);
        }
        self.stop_unused(&key);
        self.next_serial += 1;
        let serial = self.next_serial;
        let (models, spec, worker) = (self.args.models.clone(), task.spec.clone(), myself.clone());
        let (files, extent) = (Some(task.files), Extent::Layers(task.layers.clone()));
        let of = key.clone();
        let progress =
            EventCallback::to(myself, move |fetched| WorkerMsg::Fetched { key: of.clone(), serial, fetched });
        let (start, wired, ordered) = (None, None, Instant::now());
        let shard = HostedShard { serial, owner, task, start, ordered, cost_bytes: 0, wired };
        self.shards.insert(key.clone(), shard);
        tokio::spawn(async move {
            let outcome = crate::models::get_spec(&models, &spec, files, extent, progress).await;
            // Sending fails only if the worker has stopped; the node stops, too.
            let _ = worker.send_message(WorkerMsg::Resolved { key, serial, outcome: outcome.map_err(Into::into) });
        });
    }

    fn on_resolved(
        &mut self,
        myself: &WorkerRef,
        key: ShardKey,
        serial: ShardNumber,
        outcome: Result<Arc<ResolvedModel>, RequestError>,
    ) {
        let Some(shard) = self.shards.get_mut(&key).filter(|shard| shard.serial == serial) else { return };
        let layers = shard.task.layers.clone();
        let fitting = outcome.and_then(|model| match model.files.architecture.layers.len() {
            count if layers.is_empty() || layers.end > count => Err(PlanError::BadSplit { layers: count }.into()),
            _ => Ok(model),
        });
        let model = match fitting {
            Ok(model) => model,
            Err(error) => {
                self.tell(&key, StageEvent::NoModel { stage: key.stage, error });
                return self.stop(&key);
            }
        };
        let task = shard.task.clone();
        let Some(local) = self.args.devices.iter().find(|local| local.report.id == task.device) else {
            let error = EngineError::NoDevice { engine: "exo".to_owned(), device: task.device.to_string() };
            self.tell(&key, StageEvent::Lost { stage: key.stage, error });
            return self.stop(&key);
        };
        let spec = ShardSpec {
            architecture: model.files.architecture.for_context(task.context_tokens as usize),
            layers: task.layers.clone(),
            tensor: TensorRank::WHOLE,
            kv_element: task.spec.kv_element(),
            activations: task.spec.activation_bits(),
            kv_pages: task.kv_pages,
        };
        let hidden = spec.architecture.hidden;
        let on_release = EventCallback::to(myself, |(instance, bytes)| WorkerMsg::MemoryReleased { instance, bytes });
        let instance = key.instance;
        let memory = MemoryGuard { instance, bytes: task.memory_bytes, on_release };
        let engine = EngineTask {
            instance,
            stage: key.stage,
            factory: Arc::clone(&local.factory),
            device: task.device.clone(),
            spec,
            weights: Arc::new(model.files.weights.clone()),
            memory: Arc::new(memory),
        };
        let of = key.clone();
        let reports = EventCallback::to(myself, move |(engine, report)| {
            let key = of.clone();
            WorkerMsg::Shard { key, serial, of: engine, report }
        });
        let held_bytes: &mut u64 = self.memory.entry(instance).or_default();
        *held_bytes = held_bytes.saturating_add(task.memory_bytes);
        shard.cost_bytes = cost_bytes(&model.files, &task.layers);
        let number = EngineNumber::UNSET;
        shard.start = Some(ShardTask { number, instance, stage: key.stage, engine, reports, hidden });
        let orders = self.failover.place(serial, task.device);
        self.carry_out(orders);
        self.tell_memory();
    }

    fn on_fetched(&self, key: ShardKey, serial: ShardNumber, fetched: Fetched) {
        let Fetched { fetched_bytes, total_bytes } = fetched;
        if self.shards.get(&key).is_some_and(|shard| shard.serial == serial) {
            self.tell(&key, StageEvent::Fetching { stage: key.stage, fetched_bytes, total_bytes });
        }
    }

    fn on_cut(&self, key: &ShardKey, incarnation: Incarnation, what: String) {
        self.tell(key, StageEvent::Cut { stage: key.stage, incarnation, what });
    }

    fn tell_memory(&self) {
        self.args.facts.tell(WorkerFact::MemoryChanged { memory: self.memory.clone(), shards: self.shards.len() });
    }

    fn tell(&self, key: &ShardKey, event: StageEvent) {
        let Some(shard) = self.shards.get(key) else { return };
        let message = ControlMessage::StageEvent { instance: key.instance, stamp: shard.task.stamp, event };
        self.args.router.tell(shard.owner, message);
    }
}

/// The cost of a row in a shard of `layers`, in bytes of weights.
fn cost_bytes(files: &ModelFiles, layers: &Range<usize>) -> u64 {
    let head = if layers.end == files.architecture.layers.len() { files.head_cost_bytes() } else { 0 };
    head + files.layer_cost_bytes()[layers.clone()].iter().sum::<u64>()
}
