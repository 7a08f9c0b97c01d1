//! Planner: which models run, and where.
//!
//! - owns: this node's copy of what is wanted, what members tell of themselves, the instances whose head is here;
//! - receives: models that requests need, news of members, of instances, of this machine;
//! - emits: placements, as entries that all members hear of; instances, where the head is here;
//! - dies when: the node stops;
//! - supervised by: the node.
//!
//! ```text
//! Ensure ─► wanting (headers, tokenizer) ─Want─► core/lead (on the leader: place, mend, unload) ─► Desired ─► own (heads here)
//! ```
//! The member with the lowest id leads: it alone writes what is wanted, all hear of it, and whoever leads next goes on
//! from what it has heard. A model that nobody has used for a while leaves, and so does, when another needs its room, the
//! one of those that nobody uses now that was used longest ago.

mod demand;
mod others;
mod own;
mod wanting;

pub(crate) use wanting::Home;
pub use wanting::RunningModel;

use crate::control::Heard;
use crate::core::circle::Circle;
use crate::core::desired::{Desired, Want};
use crate::core::lead::{Effect, Leader, World};
use crate::core::members::Members;
use crate::core::patience::Patience;
use crate::core::plan::{Link, Preview};
use crate::core::spec::{InstanceId, ModelSpec};
use crate::core::state::{InstanceState, Machine};
use crate::instance::{InstanceRef, InstanceReport, News};
use crate::links::Switchboard;
use crate::models::{ModelsRef, ResolvedModel};
use crate::outlet::Facts;
use crate::post::Post;
use crate::protocol::ControlMessage;
use crate::request::{RequestError, fresh_seed};
use crate::stages::{StagesFact, StagesRef};
use crate::tokenizer::Opened;
use exo_engines::engine::{DeviceId, DeviceReport};
use exo_net::{NetworkThread, NodeId, WireType};
use own::{Draining, Owned};
use ractor::{Actor, ActorProcessingErr, ActorRef, RpcReplyPort, SupervisionEvent};
use ractor_cluster::RactorMessage;
use std::collections::{BTreeMap, HashMap};
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};
use wanting::Wanting;

pub(crate) type PlannerRef = ActorRef<PlannerMsg>;

/// How often the planner looks after everything, and tells the others of this node.
const LOOK_EVERY: Duration = Duration::from_secs(1);

pub(crate) type EnsureReply = RpcReplyPort<Result<RunningModel, RequestError>>;
/// A head of this node, and what says that it is in use.
pub(crate) type Head = (InstanceRef, Arc<()>);

#[derive(Debug, RactorMessage)]
pub(crate) enum PlannerMsg {
    /// Wants a model to run; the reply comes when it does.
    Ensure {
        spec: ModelSpec,
        reply: EnsureReply,
    },
    /// Wants the head of an instance; `None` where it is not here.
    Head {
        instance: InstanceId,
        reply: RpcReplyPort<Option<Head>>,
    },
    /// The files of a wanted model are there, or not.
    Resolved {
        spec: ModelSpec,
        number: u64,
        outcome: Result<Arc<ResolvedModel>, RequestError>,
    },
    Tokenizer {
        spec: ModelSpec,
        number: u64,
        opened: Opened,
    },
    Instance(InstanceReport),
    /// An instance is gone, whatever it has said before.
    InstanceEnded {
        instance: InstanceId,
        what: String,
    },
    MachineMeasured(Machine),
    /// What is known of the instances whose head is here, for the others.
    Summary(BTreeMap<InstanceId, InstanceState>),
    Stages(StagesFact),
    /// A member says something.
    Heard(Box<Heard>),
    NodeUp(NodeId),
    NodeDown(NodeId),
    /// A peer whose session never began comes no more.
    NodeMissed(NodeId),
    LinksMeasured {
        links: BTreeMap<NodeId, Link>,
        peers: Vec<SocketAddr>,
    },
    /// What would become of a model.
    Preview {
        spec: ModelSpec,
        model: Arc<ResolvedModel>,
        reply: RpcReplyPort<Vec<Preview>>,
    },
    /// Takes this node out of the cluster; the reply comes when nothing runs on it.
    Drain(RpcReplyPort<()>),
    Look,
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
    pub name: String,
    /// Where others reach this node.
    pub addresses: Vec<SocketAddr>,
    /// Best first.
    pub devices: Vec<DeviceReport>,
    pub machine: Machine,
    pub limits: PlannerLimits,
    pub patience: Patience,
    pub wire_type: WireType,
    pub models: ModelsRef,
    pub stages: StagesRef,
    pub post: Post,
    pub board: Switchboard,
    /// Where heads decide: results of steps come in there. `None`: there is no network.
    pub heads: Option<NetworkThread>,
    pub facts: Facts,
}

#[derive(Debug)]
pub(crate) struct PlannerState {
    args: PlannerArgs,
    started: Instant,
    desired: Desired,
    members: Members,
    circle: Circle,
    /// What requests of this node wait for, and use.
    wanting: HashMap<ModelSpec, Wanting>,
    next_wanting: u64,
    leader: Leader,
    owned: HashMap<InstanceId, Owned>,
    /// Memory that shards of this node hold, by instance.
    held: BTreeMap<InstanceId, u64>,
    /// Shards of this node that serve, or are to.
    kept: usize,
    speeds: HashMap<DeviceId, f64>,
    links: BTreeMap<NodeId, Link>,
    peers: Vec<SocketAddr>,
    summary: BTreeMap<InstanceId, InstanceState>,
    /// When each member was last told the whole list because it had another one.
    listed: BTreeMap<NodeId, Duration>,
    draining: Option<Draining>,
    last_look: Instant,
}

#[derive(Debug)]
pub(crate) struct Planner;

impl Actor for Planner {
    type Msg = PlannerMsg;
    type State = PlannerState;
    type Arguments = PlannerArgs;

    async fn pre_start(&self, myself: PlannerRef, args: PlannerArgs) -> Result<PlannerState, ActorProcessingErr> {
        myself.send_interval(LOOK_EVERY, || PlannerMsg::Look);
        let mut state = PlannerState {
            started: Instant::now(),
            desired: Desired::new(args.node),
            members: Members::default(),
            circle: Circle::default(),
            wanting: HashMap::new(),
            next_wanting: 0,
            leader: Leader::default(),
            owned: HashMap::new(),
            held: BTreeMap::new(),
            kept: 0,
            speeds: HashMap::new(),
            links: BTreeMap::new(),
            peers: Vec::new(),
            summary: BTreeMap::new(),
            listed: BTreeMap::new(),
            draining: None,
            last_look: Instant::now(),
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
        match message {
            PlannerMsg::Ensure { spec, reply } => state.ensure(&myself, spec, reply),
            PlannerMsg::Head { instance, reply } => drop(reply.send(state.head(instance))),
            PlannerMsg::Resolved { spec, number, outcome } => state.on_resolved(&myself, &spec, number, outcome).await,
            PlannerMsg::Tokenizer { spec, number, opened } => state.on_tokenizer(&spec, number, opened),
            PlannerMsg::Instance(report) => state.on_instance(report),
            PlannerMsg::InstanceEnded { instance, what } => state.on_instance_ended(instance, &what),
            PlannerMsg::MachineMeasured(machine) => state.args.machine = machine,
            PlannerMsg::Summary(summary) => {
                state.summary = summary;
                state.tell_report();
                return Ok(());
            }
            PlannerMsg::Stages(fact) => state.on_stages(&myself, fact),
            PlannerMsg::Heard(heard) => match *heard {
                // Of another circle's head.
                Heard { from, message: ControlMessage::News { .. }, .. } if state.circle.is_apart(from) => {
                    return Ok(());
                }
                // News of a stage, many while it loads, are its head's affair: nothing is to be brought about.
                Heard { from, message: ControlMessage::News { instance, stamp, news }, place } => {
                    state.on_news(instance, News { from, stamp, news, place });
                    return Ok(());
                }
                Heard { from, message, place: _handled } => state.on_heard(from, message),
            },
            PlannerMsg::NodeUp(node) => state.on_node_up(node),
            PlannerMsg::NodeDown(node) => state.on_node_down(node),
            PlannerMsg::NodeMissed(node) => drop(state.forget(node)),
            PlannerMsg::LinksMeasured { links, peers } => {
                (state.links, state.peers) = (links, peers);
                return Ok(());
            }
            PlannerMsg::Preview { spec, model, reply } => {
                // Whoever asked may have gone.
                let _ = reply.send(state.preview(&spec, &model));
                return Ok(());
            }
            PlannerMsg::Drain(reply) => state.drain(reply),
            PlannerMsg::Look => state.look(),
        }
        state.reconcile(&myself).await;
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
        if let Some(instance) = state.owned_by_actor(who.get_id()) {
            // Supervision overtakes messages: what the instance itself said last is to be heard first.
            let _ = myself.send_message(PlannerMsg::InstanceEnded { instance, what });
        }
        Ok(())
    }
}

impl PlannerState {
    /// Since the planner began.
    fn now(&self) -> Duration {
        self.started.elapsed()
    }

    fn is_leader(&self) -> bool {
        self.members.leader() == Some(self.args.node)
    }

    /// What is done to the list, told to whom it concerns.
    fn decide(&mut self, decide: impl FnOnce(&mut Leader, &mut World<'_>)) {
        let mut world = World {
            own: self.args.node,
            now: self.started.elapsed(),
            members: &self.members,
            desired: &mut self.desired,
            idle: self.args.limits.idle,
            seed: fresh_seed(),
            effects: Vec::new(),
        };
        decide(&mut self.leader, &mut world);
        for effect in world.effects {
            match effect {
                Effect::Written { id, entry, was } => {
                    if let (Want::Gone { error: Some(error) }, Some(spec)) = (&entry.want, &was) {
                        self.refuse_here(spec, error);
                    }
                    self.args.post.tell_others(&ControlMessage::Desired(vec![(id, entry)]));
                }
                Effect::Refused { to, spec, error } => {
                    self.args.post.tell(to, ControlMessage::Refused { spec, error });
                }
            }
        }
    }

    fn preview(&mut self, spec: &ModelSpec, model: &ResolvedModel) -> Vec<Preview> {
        let ask = wanting::ask(spec, model);
        let mut previews = Vec::new();
        self.decide(|leader, world| previews = leader.preview(world, &ask));
        previews
    }

    /// Brings about what is wanted, as far as it is this node's to do.
    async fn reconcile(&mut self, myself: &PlannerRef) {
        self.renew_report();
        if self.is_leader() {
            self.decide(|leader, world| leader.round(world));
        }
        self.reconcile_owned(myself).await;
        self.advance_all();
    }

    fn look(&mut self) {
        let now = Instant::now();
        // A process that was stopped, or a machine that slept, finds its peers gone; they are not.
        if now.duration_since(self.last_look) > 3 * LOOK_EVERY {
            self.leader.handle_absence(self.now());
        }
        self.last_look = now;
        self.forget_unused();
        self.renew_report();
        self.look_around();
        // Who is apart hears of it at once: it is to part, too.
        self.renew_report();
        self.tell_report();
        self.answer_drain();
    }

    fn on_stages(&mut self, myself: &PlannerRef, fact: StagesFact) {
        match fact {
            StagesFact::Held { memory, kept } => {
                let has_left = self.held.keys().any(|id| !memory.contains_key(id));
                (self.held, self.kept) = (memory, kept);
                if has_left {
                    Self::measure_again(myself);
                }
            }
            StagesFact::Measured { device, bytes_per_s } => {
                // Whatever disturbs a measurement makes it lower.
                let known = self.speeds.entry(device).or_insert(bytes_per_s);
                *known = known.max(bytes_per_s);
            }
        }
    }
}
