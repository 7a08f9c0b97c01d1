//! Planner: decides which models run, and where.
//!
//! - owns: this node's copy of the desired deployments, the members' reports, the heads of this node, and the
//!   tokenizers of the models that requests of this node use;
//! - receives: model requests, members' messages, reports of its heads, measurements of this machine and of links;
//! - emits: placements, as entries of the desired list that every member receives; heads; facts;
//! - dies when: the node stops;
//! - supervised by: the node.
//!
//! ```text
//! Ensure ─► pending (headers, tokenizer) ─Want─► core/leader (on the leader: place, repair, unload) ─► Desired ─►
//! owned (heads)
//! ```
//! The member with the lowest id leads, among those that are not draining. The leader writes the desired list; only the
//! failure of a head is written by the head's own node. Every member receives the list, and the next leader continues
//! from its own copy. A model that no request has used for a while is unloaded. When another model needs memory, the
//! idle model that was used longest ago is unloaded first.

mod demand;
mod drain;
mod membership;
mod owned;
mod pending;
mod report;
mod seed;
mod tokenizer;

pub(crate) use pending::HeadLocation;
pub use pending::RunningModel;
pub use seed::fresh_seed;
#[cfg(test)]
pub(crate) use tokenizer::TokenizerActor;
pub(crate) use tokenizer::TokenizerMsg;

use crate::core::clique::Clique;
use crate::core::desired::{Desired, Target};
use crate::core::leader::{Effect, Leader, RoundContext};
use crate::core::members::Members;
use crate::core::node_status::Fact;
use crate::core::plan::{Link, Preview};
use crate::core::request::RequestError;
use crate::core::spec::{InstanceId, ModelSpec};
use crate::core::speed::Estimate;
use crate::core::status::{GpuStatus, KeyClash, Machine, measured};
use crate::core::watchdog::HangTimeouts;
use crate::head::{DraftOrder, HeadRef, HeadReport, StageUpdate};
use crate::models::{ModelsRef, ResolvedModel};
use crate::transport::callback::{EventCallback, Facts};
use crate::transport::control::ReceivedMessage;
use crate::transport::protocol::ControlMessage;
use crate::transport::router::Router;
use crate::worker::links::LinkRegistry;
use crate::worker::{WorkerFact, WorkerRef};
use drain::Drain;
use exo_engines::engine::{DeviceId, DeviceReport};
use exo_engines::hardware::{GpuSample, PciAddress};
use exo_engines::tokenizer::Tokenizer;
use exo_net::{Departure, NetworkThread, NodeId, WireType};
use owned::OwnedHead;
use pending::PendingModel;
use ractor::{Actor, ActorProcessingErr, ActorRef, RpcReplyPort, SupervisionEvent};
use ractor_cluster::RactorMessage;
use std::collections::{BTreeMap, HashMap};
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};
use tokenizer::Opened;

pub(crate) type PlannerRef = ActorRef<PlannerMsg>;

/// How often the planner reconciles, and reports to the other members.
const TICK_EVERY: Duration = Duration::from_secs(1);

pub(crate) type EnsureReply = RpcReplyPort<Result<RunningModel, RequestError>>;
/// A head of this node, and a reference that marks the head as in use while it is held.
pub(crate) type ActiveHead = (HeadRef, Arc<()>);

#[derive(Debug, RactorMessage)]
pub(crate) enum PlannerMsg {
    /// Asks for a model to run. The reply comes when the model serves, or cannot be run.
    Ensure {
        spec: ModelSpec,
        /// The spec's draft model, which stays in memory while this node knows the model.
        draft: Option<RunningModel>,
        reply: EnsureReply,
    },
    /// Asks for the head of an instance; `None` where no head on this node takes its requests.
    FindHead {
        instance: InstanceId,
        reply: RpcReplyPort<Option<ActiveHead>>,
    },
    /// The headers of a pending model, or why they could not be found.
    Resolved {
        spec: ModelSpec,
        number: u64,
        outcome: Result<Arc<ResolvedModel>, RequestError>,
    },
    /// The tokenizer of a pending model, or why it could not be opened.
    Tokenizer {
        spec: ModelSpec,
        number: u64,
        opened: Opened,
    },
    /// The tokenizer of a pending model, and whether the draft model has the same tokens.
    DraftChecked {
        spec: ModelSpec,
        number: u64,
        tokenizer: Arc<Tokenizer>,
        shares_tokens: bool,
    },
    HeadReport(HeadReport),
    /// A head of this node reports a fact about its instance.
    HeadFact(Fact),
    /// The actor of a head has ended. Sent by this actor to itself, behind the head's last messages.
    HeadEnded {
        instance: InstanceId,
        what: String,
    },
    MachineMeasured(Machine),
    GpusMeasured(BTreeMap<PciAddress, GpuSample>),
    Worker(WorkerFact),
    /// A message from a member, or from this node.
    Received(Box<ReceivedMessage>),
    NodeUp(NodeId),
    /// A peer was lost, and why.
    NodeDown(NodeId, Departure),
    /// A peer disconnected before its session was ready.
    NodeMissed(NodeId),
    LinksMeasured {
        links: BTreeMap<NodeId, Link>,
        peers: Vec<SocketAddr>,
        /// Pairs of nodes with the same key.
        clashes: Vec<KeyClash>,
    },
    /// Other nodes reach this one at these addresses now.
    AddressesChanged(Vec<SocketAddr>),
    /// Asks where each policy would place a model now.
    Preview {
        spec: ModelSpec,
        model: Arc<ResolvedModel>,
        reply: RpcReplyPort<Result<Vec<Preview>, RequestError>>,
    },
    /// Takes this node out of the cluster. The reply comes when nothing runs on it.
    Drain(RpcReplyPort<()>),
    Tick,
}

/// Bounds that the user sets.
#[derive(Debug, Clone, Default)]
pub struct PlannerLimits {
    /// The time after which an unused model is unloaded; `None`: never.
    pub idle: Option<Duration>,
    /// The most memory of all models together, in bytes; `None`: as much as the machine has.
    pub memory_bytes: Option<u64>,
}

#[derive(Debug)]
pub(crate) struct PlannerArgs {
    pub node: NodeId,
    pub name: String,
    /// The addresses at which other nodes reach this one.
    pub addresses: Vec<SocketAddr>,
    /// The devices of this node, best first.
    pub devices: Vec<DeviceReport>,
    /// The GPUs of this machine, with their latest measurements.
    pub gpus: BTreeMap<PciAddress, GpuStatus>,
    pub machine: Machine,
    pub limits: PlannerLimits,
    pub hang_timeouts: HangTimeouts,
    pub wire_type: WireType,
    pub models: ModelsRef,
    pub worker: WorkerRef,
    pub router: Router,
    pub link_registry: LinkRegistry,
    /// Asks draft models, for this node's heads.
    pub drafter: EventCallback<DraftOrder>,
    /// The network's thread. Heads run on it, since the results of steps arrive there. `None`: the node has no network.
    pub head_thread: Option<NetworkThread>,
    pub facts: Facts,
}

#[derive(Debug)]
pub(crate) struct PlannerState {
    args: PlannerArgs,
    started: Instant,
    desired: Desired,
    members: Members,
    clique: Clique,
    /// Models that requests of this node wait for, or use.
    pending: HashMap<ModelSpec, PendingModel>,
    next_pending: u64,
    leader: Leader,
    owned: HashMap<InstanceId, OwnedHead>,
    /// Memory that shards of this node hold, by instance, in bytes.
    held: BTreeMap<InstanceId, u64>,
    /// Shards of this node that serve or load, without those that only release their memory.
    hosted_shards: usize,
    speeds: HashMap<DeviceId, Estimate>,
    links: BTreeMap<NodeId, Link>,
    peers: Vec<SocketAddr>,
    clashes: Vec<KeyClash>,
    /// When each member was last sent the whole desired list because its own copy differed.
    list_sent: BTreeMap<NodeId, Duration>,
    draining: Option<Drain>,
    last_tick: Instant,
}

#[derive(Debug)]
pub(crate) struct Planner;

impl Actor for Planner {
    type Msg = PlannerMsg;
    type State = PlannerState;
    type Arguments = PlannerArgs;

    async fn pre_start(&self, myself: PlannerRef, args: PlannerArgs) -> Result<PlannerState, ActorProcessingErr> {
        myself.send_interval(TICK_EVERY, || PlannerMsg::Tick);
        let mut state = PlannerState {
            started: Instant::now(),
            desired: Desired::new(args.node),
            members: Members::default(),
            clique: Clique::default(),
            pending: HashMap::new(),
            next_pending: 0,
            leader: Leader::default(),
            owned: HashMap::new(),
            held: BTreeMap::new(),
            hosted_shards: 0,
            speeds: HashMap::new(),
            links: BTreeMap::new(),
            peers: Vec::new(),
            clashes: Vec::new(),
            list_sent: BTreeMap::new(),
            draining: None,
            last_tick: Instant::now(),
            args,
        };
        state.renew_report();
        Ok(state)
    }

    async fn handle(
        &self,
        myself: PlannerRef,
        message: PlannerMsg,
        state: &mut PlannerState,
    ) -> Result<(), ActorProcessingErr> {
        let needs_reconcile = match message {
            PlannerMsg::Ensure { spec, draft, reply } => state.ensure(&myself, spec, draft, reply),
            PlannerMsg::FindHead { instance, reply } => {
                // The caller may no longer wait.
                let _ = reply.send(state.active_head(instance));
                Reconcile::No
            }
            PlannerMsg::Resolved { spec, number, outcome } => {
                state.on_resolved(&myself, &spec, number, outcome).await;
                Reconcile::Yes
            }
            PlannerMsg::Tokenizer { spec, number, opened } => state.on_tokenizer(&myself, spec, number, opened),
            PlannerMsg::DraftChecked { spec, number, tokenizer, shares_tokens } => {
                state.on_draft_checked(&spec, number, tokenizer, shares_tokens)
            }
            PlannerMsg::HeadReport(report) => state.on_head_report(report),
            PlannerMsg::HeadFact(fact) => state.on_head_fact(fact),
            PlannerMsg::HeadEnded { instance, what } => state.on_head_ended(instance, &what),
            PlannerMsg::MachineMeasured(machine) => state.on_machine_measured(machine),
            PlannerMsg::GpusMeasured(samples) => state.on_gpus_measured(&samples),
            PlannerMsg::Worker(fact) => state.on_worker(&myself, fact),
            PlannerMsg::Received(received) => state.on_received(*received),
            PlannerMsg::NodeUp(node) => state.on_node_up(node),
            PlannerMsg::NodeDown(node, departure) => state.on_node_down(node, departure),
            PlannerMsg::NodeMissed(node) => state.on_node_missed(node),
            PlannerMsg::LinksMeasured { links, peers, clashes } => {
                (state.links, state.peers, state.clashes) = (links, peers, clashes);
                Reconcile::No
            }
            PlannerMsg::AddressesChanged(addresses) => {
                state.args.addresses = addresses;
                Reconcile::No
            }
            PlannerMsg::Preview { spec, model, reply } => {
                // The caller may no longer wait.
                let _ = reply.send(state.preview(&spec, &model));
                Reconcile::No
            }
            PlannerMsg::Drain(reply) => state.drain(reply),
            PlannerMsg::Tick => state.on_tick(),
        };
        if needs_reconcile == Reconcile::Yes {
            state.reconcile(&myself).await;
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
            SupervisionEvent::ActorTerminated(who, _, _) => (who, "its actor stopped".to_owned()),
            _ => return Ok(()),
        };
        if let Some(instance) = state.instance_of(who.get_id()) {
            // Supervision events overtake messages, but the head's last messages must be handled first.
            let _ = myself.send_message(PlannerMsg::HeadEnded { instance, what });
        }
        Ok(())
    }
}

/// Whether this node must reconcile after a message.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Reconcile {
    Yes,
    No,
}

impl PlannerState {
    /// The time since the planner started.
    fn now(&self) -> Duration {
        self.started.elapsed()
    }

    fn is_leader(&self) -> bool {
        self.members.leader() == Some(self.args.node)
    }

    /// Lets the leader change the desired list, and sends the changes to the members and to the requests of this node.
    fn lead(&mut self, act: impl FnOnce(&mut Leader, &mut RoundContext<'_>)) {
        // A request may have taken an instance into use since the last report, and the leader unloads unused ones.
        self.renew_report();
        let mut round = RoundContext {
            own: self.args.node,
            now: self.started.elapsed(),
            members: &self.members,
            desired: &mut self.desired,
            idle: self.args.limits.idle,
            seed: fresh_seed(),
            effects: Vec::new(),
        };
        act(&mut self.leader, &mut round);
        for effect in round.effects {
            match effect {
                Effect::Written { id, entry, was } => {
                    if let (Target::Stopped { error: Some(error) }, Some(spec)) = (&entry.target, &was) {
                        self.refuse_here(spec, error);
                    }
                    self.args.router.tell_others(&ControlMessage::Desired(vec![(id, entry)]));
                }
                Effect::Refused { to, spec, error } => {
                    self.args.router.tell(to, ControlMessage::Refused { spec, error });
                }
            }
        }
    }

    fn preview(&mut self, spec: &ModelSpec, model: &ResolvedModel) -> Result<Vec<Preview>, RequestError> {
        let request = pending::placement_request(spec, model)?;
        let mut previews = Vec::new();
        self.lead(|leader, round| previews = leader.preview(round, &request));
        Ok(previews)
    }

    /// Brings this node closer to the desired list: runs a round of the leader if this node leads, starts and retires
    /// heads, and answers requests whose model runs.
    async fn reconcile(&mut self, myself: &PlannerRef) {
        if self.is_leader() {
            self.lead(|leader, round| leader.round(round));
        }
        self.reconcile_owned(myself).await;
        self.advance_all();
    }

    fn on_tick(&mut self) -> Reconcile {
        let now = Instant::now();
        // After a suspension (SIGSTOP, a sleeping laptop) every peer looks lost, though it is probably not.
        if now.duration_since(self.last_tick) > 3 * TICK_EVERY {
            self.leader.handle_suspended(self.now());
        }
        self.last_tick = now;
        self.forget_unused();
        self.renew_report();
        self.update_clique();
        // Peers that have just left the clique receive the renewed report, too, and so exclude this node as well.
        self.renew_report();
        self.tell_report();
        self.answer_drain();
        Reconcile::Yes
    }

    fn on_machine_measured(&mut self, machine: Machine) -> Reconcile {
        self.args.machine = machine;
        Reconcile::Yes
    }

    /// The report goes out with the machine's next measurement.
    fn on_gpus_measured(&mut self, samples: &BTreeMap<PciAddress, GpuSample>) -> Reconcile {
        measured(&mut self.args.gpus, samples);
        Reconcile::No
    }

    fn on_worker(&mut self, myself: &PlannerRef, fact: WorkerFact) -> Reconcile {
        match fact {
            WorkerFact::MemoryChanged { memory, shards } => {
                let is_released = self.held.keys().any(|id| !memory.contains_key(id));
                (self.held, self.hosted_shards) = (memory, shards);
                if is_released {
                    report::measure_again(myself);
                }
            }
            WorkerFact::Measured { device, bytes_per_s } => {
                self.speeds.entry(device).or_default().add(bytes_per_s);
            }
        }
        Reconcile::Yes
    }
}
