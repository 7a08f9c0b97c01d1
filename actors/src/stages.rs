//! Stages: the shards of this node, whoever owns their instances.
//!
//! - owns: which shard of which instance is on which device here, for whom;
//! - receives: orders of the instances' owners, here or on other nodes; what becomes of shards;
//! - emits: shards to devices; news of them to their owners; the memory that they hold;
//! - dies when: the node stops;
//! - supervised by: the node.
//!
//! An order of an earlier stamp than was seen is dropped. A shard that a later stamp wants just as it is stays loaded; one
//! that is to have other layers is loaded beside the one that serves.

mod leaving;
mod wiring;

use crate::core::desired::{Listed, Stamp};
use crate::core::line::{StageNews, StageTask};
use crate::core::plan::PlanError;
use crate::core::spec::InstanceId;
use crate::device::{DeviceMsg, DeviceRef};
use crate::host::{EnginePort, HostTask, Outgoing};
use crate::links::Switchboard;
use crate::models::{Extent, Fetched, ModelsRef, ResolvedModel};
use crate::outlet::Outlet;
use crate::post::Post;
use crate::protocol::{ControlMessage, End, StageOrder};
use crate::request::RequestError;
use crate::room::Room;
use crate::shard::{ShardReport, ShardTask};
use exo_engines::EngineError;
use exo_engines::engine::{DeviceId, DeviceReport, EngineFactory, Incarnation, KvElement, ShardSpec, TensorRank};
use exo_engines::model::ModelFiles;
use exo_net::{InboxSlot, NodeId};
use ractor::{Actor, ActorProcessingErr, ActorRef};
use ractor_cluster::RactorMessage;
use std::collections::{BTreeMap, HashMap};
use std::ops::Range;
use std::sync::Arc;
use std::time::{Duration, Instant};
use tokio_util::sync::CancellationToken;
use wiring::Wiring;

pub(crate) type StagesRef = ActorRef<StagesMsg>;

/// Shards of other nodes' instances at once.
const STAGES_MAX: usize = 256;

/// Which shard: a stage's before and after a move are two.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(crate) struct Key {
    instance: InstanceId,
    stage: usize,
    layers: Range<usize>,
}

impl Key {
    fn of(task: &StageTask) -> Self {
        Self { instance: task.instance, stage: task.stage, layers: task.layers.clone() }
    }
}

#[derive(Debug, RactorMessage)]
pub(crate) enum StagesMsg {
    Order {
        from: NodeId,
        order: StageOrder,
        place: Option<InboxSlot>,
    },
    /// What is to run; shards of others go.
    Keep(Listed),
    /// The model of a stage is here, or cannot be had.
    Resolved {
        key: Key,
        tenancy: u64,
        outcome: Result<Arc<ResolvedModel>, RequestError>,
    },
    /// So much of its weights has come.
    Fetched {
        key: Key,
        tenancy: u64,
        fetched: Fetched,
    },
    Shard {
        key: Key,
        tenancy: u64,
        report: ShardReport,
    },
    /// The way out of a shard is open, or not.
    Linked {
        key: Key,
        wiring: Box<Wiring>,
        outcome: Result<Outgoing, String>,
    },
    /// Rows do not get through.
    Cut {
        key: Key,
        incarnation: Incarnation,
        what: String,
    },
    Vacated {
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
}

/// What the planner hears of this node's shards.
#[derive(Debug, Clone)]
pub(crate) enum StagesFact {
    /// Memory that shards hold, by instance; and how many shards are kept, where the rest is going, or hangs.
    Held { memory: BTreeMap<InstanceId, u64>, kept: usize },
    /// A device goes through so much work in a second, in bytes.
    Measured { device: DeviceId, bytes_per_s: f64 },
}

#[derive(Debug)]
pub(crate) struct StagesArgs {
    pub devices: Vec<LocalDevice>,
    pub models: ModelsRef,
    pub post: Post,
    pub board: Switchboard,
    pub facts: Outlet<StagesFact>,
}

#[derive(Debug)]
pub(crate) struct StagesState {
    args: StagesArgs,
    held: HashMap<Key, Held>,
    /// The latest stamp that was seen of each instance here.
    stamps: HashMap<InstanceId, Stamp>,
    memory: BTreeMap<InstanceId, u64>,
    next_tenancy: u64,
}

/// A shard that is here, or on its way.
#[derive(Debug)]
struct Held {
    /// Tells it from earlier ones in the same place.
    tenancy: u64,
    owner: NodeId,
    task: StageTask,
    /// When its owner last ordered it.
    ordered: Instant,
    /// What a row goes through, in bytes; 0 until its model is here.
    work: u64,
    loaded: Option<Loaded>,
    /// The life that it was wired for.
    wired: Option<Incarnation>,
    is_over: CancellationToken,
}

#[derive(Debug, Clone)]
struct Loaded {
    port: EnginePort,
    hidden: usize,
    vocabulary: u32,
}

#[derive(Debug)]
pub(crate) struct Stages;

impl Actor for Stages {
    type Msg = StagesMsg;
    type State = StagesState;
    type Arguments = StagesArgs;

    async fn pre_start(&self, _: StagesRef, args: StagesArgs) -> Result<StagesState, ActorProcessingErr> {
        Ok(StagesState { args, held: HashMap::new(), stamps: HashMap::new(), memory: BTreeMap::new(), next_tenancy: 0 })
    }

    async fn handle(
        &self,
        myself: StagesRef,
        message: StagesMsg,
        state: &mut StagesState,
    ) -> Result<(), ActorProcessingErr> {
        match message {
            StagesMsg::Order { from, order, place: _handled } => state.on_order(&myself, from, order),
            StagesMsg::Keep(listed) => state.keep(&listed),
            StagesMsg::Resolved { key, tenancy, outcome } => state.on_resolved(&myself, key, tenancy, outcome),
            StagesMsg::Fetched { key, tenancy, fetched } => state.on_fetched(key, tenancy, fetched),
            StagesMsg::Shard { key, tenancy, report } => state.on_report(key, tenancy, report),
            StagesMsg::Linked { key, wiring, outcome } => state.on_linked(&key, &wiring, outcome),
            StagesMsg::Cut { key, incarnation, what } => state.on_cut(&key, incarnation, what),
            StagesMsg::Vacated { instance, bytes } => state.on_vacated(instance, bytes),
        }
        Ok(())
    }
}

impl StagesState {
    fn on_order(&mut self, myself: &StagesRef, from: NodeId, order: StageOrder) {
        if self.args.post.is_apart(from) {
            // Two do not part at the same moment.
            return tracing::debug!(peer = %from, "an order of a peer that is apart");
        }
        match order {
            StageOrder::Start(task) => self.start(myself, from, *task),
            StageOrder::Clear { instance, below } => self.clear(instance, below),
            StageOrder::Wire { instance, stage, layers, incarnation, from: before, next, to, wire_type } => {
                let wiring = Wiring { incarnation, from: before, next, to, wire_type };
                self.wire(myself, from, Key { instance, stage, layers }, wiring);
            }
        }
    }

    fn start(&mut self, myself: &StagesRef, owner: NodeId, task: StageTask) {
        let key = Key::of(&task);
        if !task.is_plausible() {
            return tracing::warn!(peer = %owner, instance = %task.instance, "refused a shard that cannot be");
        }
        let latest = self.stamps.get(&task.instance).copied();
        if latest.is_some_and(|latest| task.stamp < latest) {
            return tracing::warn!(peer = %owner, instance = %task.instance, "refused a shard of the past");
        }
        if self.held.len() >= STAGES_MAX && !self.held.contains_key(&key) {
            let error = RequestError::Crowded { model: task.spec.model, needed_bytes: task.memory_bytes };
            let (stamp, news) = (task.stamp, StageNews::NoModel { stage: task.stage, error });
            return self.args.post.tell(owner, ControlMessage::News { instance: task.instance, stamp, news });
        }
        self.stamps.insert(task.instance, task.stamp);
        if let Some(held) = self.held.get_mut(&key) {
            let is_the_same = StageTask { stamp: task.stamp, ..held.task.clone() } == task;
            if is_the_same {
                (held.owner, held.task, held.ordered) = (owner, task, Instant::now());
                if held.loaded.is_some() {
                    self.tell(&key, StageNews::Up { stage: key.stage });
                }
                return;
            }
            self.stop(&key);
        }
        self.stop_unused(&key);
        self.next_tenancy += 1;
        let tenancy = self.next_tenancy;
        let (models, spec, stages) = (self.args.models.clone(), task.spec.clone(), myself.clone());
        let (files, extent) = (Some(task.files), Extent::Layers(task.layers.clone()));
        let of = key.clone();
        let progress = Outlet::to(myself, move |fetched| StagesMsg::Fetched { key: of.clone(), tenancy, fetched });
        let held = Held {
            tenancy,
            owner,
            task,
            ordered: Instant::now(),
            work: 0,
            loaded: None,
            wired: None,
            is_over: CancellationToken::new(),
        };
        self.held.insert(key.clone(), held);
        tokio::spawn(async move {
            let outcome = crate::models::get_spec(&models, &spec, files, extent, progress).await;
            // Where nobody hosts shards any more, the node stops.
            let _ = stages.send_message(StagesMsg::Resolved { key, tenancy, outcome: outcome.map_err(Into::into) });
        });
    }

    fn on_resolved(
        &mut self,
        myself: &StagesRef,
        key: Key,
        tenancy: u64,
        outcome: Result<Arc<ResolvedModel>, RequestError>,
    ) {
        let Some(held) = self.held.get_mut(&key).filter(|held| held.tenancy == tenancy) else { return };
        let layers = held.task.layers.clone();
        let fitting = outcome.and_then(|model| match model.files.architecture.layers.len() {
            count if layers.is_empty() || layers.end > count => Err(PlanError::BadSplit { layers: count }.into()),
            _ => Ok(model),
        });
        let model = match fitting {
            Ok(model) => model,
            Err(error) => {
                self.tell(&key, StageNews::NoModel { stage: key.stage, error });
                return self.stop(&key);
            }
        };
        let task = held.task.clone();
        let Some(local) = self.args.devices.iter().find(|local| local.report.id == task.device) else {
            let error = EngineError::NoDevice { engine: "exo".to_owned(), device: task.device.to_string() };
            self.tell(&key, StageNews::Lost { stage: key.stage, error });
            return self.stop(&key);
        };
        let spec = ShardSpec {
            architecture: model.files.architecture.for_context(task.context_tokens as usize),
            layers: task.layers.clone(),
            tensor: TensorRank::WHOLE,
            kv_element: KvElement::F16,
            kv_pages: task.kv_pages,
        };
        let hidden = spec.architecture.hidden;
        let vacated = Outlet::to(myself, |(instance, bytes)| StagesMsg::Vacated { instance, bytes });
        let instance = key.instance;
        let room = Room { instance, bytes: task.memory_bytes, vacated };
        let host = HostTask {
            factory: Arc::clone(&local.factory),
            device: task.device.clone(),
            spec,
            weights: Arc::new(model.files.weights.clone()),
            _room: Arc::new(room),
        };
        let of = key.clone();
        let owner = Outlet::to(myself, move |report| StagesMsg::Shard { key: of.clone(), tenancy, report });
        let held_bytes: &mut u64 = self.memory.entry(instance).or_default();
        *held_bytes = held_bytes.saturating_add(task.memory_bytes);
        held.work = work(&model.files, &task.layers);
        let shard = ShardTask { instance, stage: key.stage, host, owner, hidden, is_over: held.is_over.clone() };
        // A device that is gone is noticed by the node, which stops.
        let _ = local.device.send_message(DeviceMsg::Start(Box::new(shard)));
        self.tell_memory();
    }

    fn on_fetched(&self, key: Key, tenancy: u64, fetched: Fetched) {
        let Fetched { fetched_bytes, total_bytes } = fetched;
        if self.held.get(&key).is_some_and(|held| held.tenancy == tenancy) {
            self.tell(&key, StageNews::Fetching { stage: key.stage, fetched_bytes, total_bytes });
        }
    }

    fn on_report(&mut self, key: Key, tenancy: u64, report: ShardReport) {
        let Some(held) = self.held.get_mut(&key).filter(|held| held.tenancy == tenancy) else { return };
        let stage = key.stage;
        let news = match report {
            ShardReport::Loading(progress) => {
                let (loaded_bytes, total_bytes) = (progress.loaded_bytes, progress.total_bytes);
                StageNews::Loading { stage, loaded_bytes, total_bytes }
            }
            ShardReport::Up { port, hidden, vocabulary, device, row } => {
                held.loaded = Some(Loaded { port, hidden, vocabulary });
                if row > Duration::ZERO {
                    let bytes_per_s = held.work as f64 / row.as_secs_f64();
                    self.args.facts.tell(StagesFact::Measured { device, bytes_per_s });
                }
                StageNews::Up { stage }
            }
            ShardReport::Down(error) => {
                held.loaded = None;
                let wired = held.wired.take();
                self.args.board.forget(key.instance, End::Stage(stage), wired);
                StageNews::Down { stage, error }
            }
            ShardReport::Lost(error) => {
                self.tell(&key, StageNews::Lost { stage, error });
                return self.stop(&key);
            }
        };
        self.tell(&key, news);
    }

    fn on_cut(&self, key: &Key, incarnation: Incarnation, what: String) {
        self.tell(key, StageNews::Cut { stage: key.stage, incarnation, what });
    }

    fn tell_memory(&self) {
        self.args.facts.tell(StagesFact::Held { memory: self.memory.clone(), kept: self.held.len() });
    }

    fn tell(&self, key: &Key, news: StageNews) {
        let Some(held) = self.held.get(key) else { return };
        let message = ControlMessage::News { instance: key.instance, stamp: held.task.stamp, news };
        self.args.post.tell(held.owner, message);
    }
}

/// What a row goes through in a shard of `layers`, in bytes.
fn work(files: &ModelFiles, layers: &Range<usize>) -> u64 {
    let head = if layers.end == files.architecture.layers.len() { files.head_cost_bytes() } else { 0 };
    head + files.layer_cost_bytes()[layers.clone()].iter().sum::<u64>()
}
