//! Planner: which models run, and where.
//!
//! - owns: this node's copy of the desired deployments, the members' reports, the heads of this node, and the tokenizers of
//!   the models that requests of this node use;
//! - receives: models that requests need, members' messages, the events of its heads, measurements of this machine;
//! - emits: placements, as entries of the desired list that every member receives; heads; facts;
//! - dies when: the node stops;
//! - supervised by: the node.
//!
//! ```text
//! Ensure ─► pending (headers, tokenizer) ─Want─► core/leader (on the leader: place, repair, unload) ─► Desired ─► owned (heads)
//! ```
//! The member with the lowest id leads: it alone writes the desired list, every member receives it, and the next leader
//! goes on from its own copy. A model that nobody has used for a while is unloaded. When another model needs its memory, the
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
use crate::core::status::Machine;
use crate::core::watchdog::HangTimeouts;
use crate::head::{HeadRef, HeadReport, StageUpdate};
use crate::models::{ModelsRef, ResolvedModel};
use crate::transport::callback::Facts;
use crate::transport::control::ReceivedMessage;
use crate::transport::protocol::ControlMessage;
use crate::transport::router::Router;
use crate::worker::links::LinkRegistry;
use crate::worker::{WorkerFact, WorkerRef};
use drain::Drain;
use exo_engines::engine::{DeviceId, DeviceReport};
use exo_net::{NetworkThread, NodeId, WireType};
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

/// How often the planner checks everything, and reports to the other members.
const TICK_EVERY: Duration = Duration::from_secs(1);

pub(crate) type EnsureReply = RpcReplyPort<Result<RunningModel, RequestError>>;
/// A head of this node, and the count that marks it as in use while it is held.
pub(crate) type ActiveHead = (HeadRef, Arc<()>);

#[derive(Debug, RactorMessage)]
pub(crate) enum PlannerMsg {
    /// A model is to run. The reply comes when it does.
    Ensure {
        spec: ModelSpec,
        reply: EnsureReply,
    },
    /// Asks for the head of an instance; `None` where it is not on this node.
    FindHead {
        instance: InstanceId,
        reply: RpcReplyPort<Option<ActiveHead>>,
    },
    /// The headers of a pending model were found, or not.
    Resolved {
        spec: ModelSpec,
        number: u64,
        outcome: Result<Arc<ResolvedModel>, RequestError>,
    },
    /// The tokenizer of a pending model was opened, or not.
    Tokenizer {
        spec: ModelSpec,
        number: u64,
        opened: Opened,
    },
    HeadReport(HeadReport),
    /// A head of this node reports a fact about its instance.
    HeadFact(Fact),
    /// The actor of a head has ended, whatever it reported before.
    HeadEnded {
        instance: InstanceId,
        what: String,
    },
    MachineMeasured(Machine),
    Worker(WorkerFact),
    /// A message from a member, or from this node.
    Received(Box<ReceivedMessage>),
    NodeUp(NodeId),
    NodeDown(NodeId),
    /// A peer disconnected before its session was ready.
    NodeMissed(NodeId),
    LinksMeasured {
        links: BTreeMap<NodeId, Link>,
        peers: Vec<SocketAddr>,
    },
    /// Asks where a model would be placed now.
    Preview {
        spec: ModelSpec,
        model: Arc<ResolvedModel>,
        reply: RpcReplyPort<Vec<Preview>>,
    },
    /// Takes this node out of the cluster. The reply comes when nothing runs on it.
    Drain(RpcReplyPort<()>),
    Tick,
}

/// Bounds that the user sets.
#[derive(Debug, Clone, Default)]
pub struct PlannerLimits {
    /// A model that nobody has used for this long is unloaded; `None`: never.
    pub idle: Option<Duration>,
    /// Memory of all models together, in bytes; `None`: what the machine has.
    pub memory_bytes: Option<u64>,
}

#[derive(Debug)]
pub(crate) struct PlannerArgs {
    pub node: NodeId,
    pub name: String,
    /// The addresses at which other nodes reach this one.
    pub addresses: Vec<SocketAddr>,
    /// Best first.
    pub devices: Vec<DeviceReport>,
    pub machine: Machine,
    pub limits: PlannerLimits,
    pub hang_timeouts: HangTimeouts,
    pub wire_type: WireType,
    pub models: ModelsRef,
    pub worker: WorkerRef,
    pub router: Router,
    pub link_registry: LinkRegistry,
    /// The thread that heads run on: the results of steps arrive there. `None`: the node has no network.
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
    speeds: HashMap<DeviceId, f64>,
    links: BTreeMap<NodeId, Link>,
    peers: Vec<SocketAddr>,
    /// When each member was last sent the whole desired list because its own differed.
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
            PlannerMsg::Ensure { spec, reply } => state.ensure(&myself, spec, reply),
            PlannerMsg::FindHead { instance, reply } => {
                // The caller may have gone.
                let _ = reply.send(state.active_head(instance));
                Reconcile::No
            }
            PlannerMsg::Resolved { spec, number, outcome } => {
                state.on_resolved(&myself, &spec, number, outcome).await;
                Reconcile::Yes
            }
            PlannerMsg::Tokenizer { spec, number, opened } => state.on_tokenizer(&spec, number, opened),
            PlannerMsg::HeadReport(report) => state.on_head_report(report),
            PlannerMsg::HeadFact(fact) => state.on_head_fact(fact),
            PlannerMsg::HeadEnded { instance, what } => state.on_head_ended(instance, &what),
            PlannerMsg::MachineMeasured(machine) => state.on_machine_measured(machine),
            PlannerMsg::Worker(fact) => state.on_worker(&myself, fact),
            PlannerMsg::Received(received) => state.on_received(*received),
            PlannerMsg::NodeUp(node) => state.on_node_up(node),
            PlannerMsg::NodeDown(node) => state.on_node_down(node),
            PlannerMsg::NodeMissed(node) => state.on_node_missed(node),
            PlannerMsg::LinksMeasured { links, peers } => {
                (state.links, state.peers) = (links, peers);
                Reconcile::No
            }
            PlannerMsg::Preview { spec, model, reply } => {
                // The caller may have gone.
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
            SupervisionEvent::ActorTerminated(who, _, _) => (who, "it has stopped".to_owned()),
            _ => return Ok(()),
        };
        if let Some(instance) = state.instance_of(who.get_id()) {
            // Supervision events overtake messages: the head's last messages are to be handled first.
            let _ = myself.send_message(PlannerMsg::HeadEnded { instance, what });
        }
        Ok(())
    }
}

/// Whether a message may have changed what this node has to do.
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

    /// Lets the leader change the desired list, and tells members and requests what changed.
    fn lead(&mut self, act: impl FnOnce(&mut Leader, &mut RoundContext<'_>)) {
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

    fn preview(&mut self, spec: &ModelSpec, model: &ResolvedModel) -> Vec<Preview> {
        let request = pending::placement_request(spec, model);
        let mut previews = Vec::new();
        self.lead(|leader, round| previews = leader.preview(round, &request));
        previews
    }

    /// Brings this node closer to the desired list: leads where it is the leader, starts and stops heads, answers requests
    /// whose model runs.
    async fn reconcile(&mut self, myself: &PlannerRef) {
        self.renew_report();
        if self.is_leader() {
            self.lead(|leader, round| leader.round(round));
        }
        self.reconcile_owned(myself).await;
        self.advance_all();
    }

    fn on_tick(&mut self) -> Reconcile {
        let now = Instant::now();
        // After a suspension (SIGSTOP, a sleeping laptop) every peer looks lost, though none is.
        if now.duration_since(self.last_tick) > 3 * TICK_EVERY {
            self.leader.handle_suspended(self.now());
        }
        self.last_tick = now;
        self.forget_unused();
        self.renew_report();
        self.update_clique();
        // The report is sent to peers that have just left the clique, too: they are to exclude this node as well.
        self.renew_report();
        self.tell_report();
        self.answer_drain();
        Reconcile::Yes
    }

    fn on_machine_measured(&mut self, machine: Machine) -> Reconcile {
        self.args.machine = machine;
        Reconcile::Yes
    }

    fn on_worker(&mut self, myself: &PlannerRef, fact: WorkerFact) -> Reconcile {
        match fact {
            WorkerFact::MemoryChanged { memory, shards } => {
                let is_released = self.held.keys().any(|id| !memory.contains_key(id));
                (self.held, self.hosted_shards) = (memory, shards);
                if is_released {
                    report::measure_machine(myself);
                }
            }
            WorkerFact::Measured { device, bytes_per_s } => {
                // Whatever disturbs a measurement lowers it, so the highest one is kept.
                let known = self.speeds.entry(device).or_insert(bytes_per_s);
                *known = known.max(bytes_per_s);
            }
        }
        Reconcile::Yes
    }
}
