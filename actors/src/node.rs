//! Node: the root supervisor.
//!
//! - owns: all other actors, and the state that people see;
//! - receives: facts, and subscriptions to them; messages of nodes for actors of this one;
//! - emits: facts to subscribers; each message to whom it concerns;
//! - dies when: it is stopped, or an actor that nothing works without fails;
//! - supervised by: whoever started it.

use crate::cluster::{Cluster, ClusterArgs, ClusterRef, Evicted};
use crate::control::Heard;
use crate::core::patience::Patience;
use crate::core::view::{Fact, State};
use crate::device::{Device, DeviceArgs, DeviceRef};
use crate::gateway::{Gateway, GatewayArgs, GatewayHandle, permits};
use crate::links::Switchboard;
use crate::machine::measure_once;
use crate::models::{Models, ModelsArgs, ModelsConfig, ModelsRef};
use crate::monitor::{Monitor, MonitorArgs};
use crate::outlet::{Facts, Outlet};
use crate::planner::{Planner, PlannerArgs, PlannerLimits, PlannerMsg, PlannerRef};
use crate::post::Post;
use crate::protocol::ControlMessage;
use crate::stages::{LocalDevice, Stages, StagesArgs, StagesFact, StagesMsg, StagesRef};
use crate::subscription::Subscription;
use exo_engines::engine::{DeviceKind, EngineFactory};
use exo_net::{Network, NetworkEvent, NodeId, WireType};
use ractor::{Actor, ActorProcessingErr, ActorRef, RpcReplyPort, SupervisionEvent};
use ractor_cluster::RactorMessage;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::{broadcast, mpsc, oneshot};

pub(crate) type NodeRef = ActorRef<NodeMsg>;

/// Facts that a slow subscriber may be behind by before it is told to start over: minutes of a quiet node, seconds
/// of a busy one.
const FACTS_BEHIND_MAX: usize = 4096;
/// Children get this long to end what they are at.
const CHILDREN_TIMEOUT: Duration = Duration::from_secs(10);

#[derive(Debug, RactorMessage)]
pub(crate) enum NodeMsg {
    Fact(Fact),
    /// News of this node's shards, for the planner.
    Stages(StagesFact),
    Subscribe(RpcReplyPort<Subscription>),
}

/// What a node is made of.
#[derive(Debug)]
pub struct NodeConfig {
    pub id: NodeId,
    /// As its user calls it.
    pub name: String,
    /// Best first; the processor last.
    pub factories: Vec<Arc<dyn EngineFactory>>,
    pub models: ModelsConfig,
    pub limits: PlannerLimits,
    /// When a device counts as hung.
    pub patience: Patience,
    /// How activations travel to other nodes.
    pub wire_type: WireType,
    /// `None`: this node is alone, and stays so.
    pub joined: Option<Joined>,
}

/// The network of a node that has others.
#[derive(Debug)]
pub struct Joined {
    pub network: Network,
    pub events: mpsc::Receiver<NetworkEvent>,
    /// What ractor_cluster's sessions ask of each other.
    pub cookie: String,
    /// Where others reach this node.
    pub addresses: Vec<SocketAddr>,
    /// Who is not let in.
    pub evicted: Evicted,
}

/// The parts that a handle needs.
#[derive(Debug)]
pub(crate) struct Parts {
    pub(crate) gateway: GatewayHandle,
    pub(crate) planner: PlannerRef,
    pub(crate) models: ModelsRef,
    /// `None` where this node is alone.
    pub(crate) cluster: Option<ClusterRef>,
    /// For tests that speak as a member.
    #[cfg(test)]
    pub(crate) post: Post,
}

#[derive(Debug)]
pub(crate) struct NodeArgs {
    pub(crate) config: NodeConfig,
    /// Gets the parts once all are there.
    pub(crate) started: oneshot::Sender<Parts>,
}

#[derive(Debug)]
pub(crate) struct NodeState {
    state: State,
    planner: PlannerRef,
    subscribers: broadcast::Sender<(u64, Fact)>,
}

#[derive(Debug)]
pub(crate) struct Node;

impl Actor for Node {
    type Msg = NodeMsg;
    type State = NodeState;
    type Arguments = NodeArgs;

    async fn pre_start(&self, myself: NodeRef, args: NodeArgs) -> Result<NodeState, ActorProcessingErr> {
        let NodeArgs { config, started } = args;
        let addresses = config.joined.as_ref().map(|joined| joined.addresses.clone()).unwrap_or_default();
        let state = State::new(config.id, config.name.clone(), addresses);
        let parts = start_children(&myself, config).await?;
        let planner = parts.planner.clone();
        // Whoever started the node waits for this.
        let _ = started.send(parts);
        let (subscribers, _) = broadcast::channel(FACTS_BEHIND_MAX);
        Ok(NodeState { state, planner, subscribers })
    }

    async fn post_stop(&self, myself: NodeRef, _: &mut NodeState) -> Result<(), ActorProcessingErr> {
        myself.stop_children_and_wait(None, Some(CHILDREN_TIMEOUT)).await;
        Ok(())
    }

    async fn handle(&self, _: NodeRef, message: NodeMsg, state: &mut NodeState) -> Result<(), ActorProcessingErr> {
        match message {
            NodeMsg::Fact(fact) => {
                state.state.apply(&fact);
                state.tell_planner(&fact);
                // Nobody may be listening.
                let _ = state.subscribers.send((state.state.version, fact));
            }
            // A planner that fails takes the node with it.
            NodeMsg::Stages(fact) => drop(state.planner.send_message(PlannerMsg::Stages(fact))),
            NodeMsg::Subscribe(reply) => {
                let subscription = Subscription::new(state.state.clone(), state.subscribers.subscribe());
                let _ = reply.send(subscription);
            }
        }
        Ok(())
    }

    async fn handle_supervisor_evt(
        &self,
        _: NodeRef,
        event: SupervisionEvent,
        _: &mut NodeState,
    ) -> Result<(), ActorProcessingErr> {
        match event {
            // These actors hold what cannot be rebuilt beside running requests: the node ends, and says why.
            SupervisionEvent::ActorFailed(who, error) => {
                tracing::error!(actor = %who.get_id(), %error, "an actor failed: the node stops");
                Err(error)
            }
            _ => Ok(()),
        }
    }
}

impl NodeState {
    /// Other nodes are told of the instances of this one, every second and when one begins or ends.
    fn tell_planner(&self, fact: &Fact) {
        let is_of_interest = matches!(
            fact,
            Fact::MachineMeasured(_)
                | Fact::InstanceReady { .. }
                | Fact::InstanceStopped { .. }
                | Fact::ShardFailed { .. }
        );
        if is_of_interest {
            let live = self.state.live().map(|(id, instance)| (id, instance.clone())).collect();
            // A planner that fails takes the node with it.
            let _ = self.planner.send_message(PlannerMsg::Summary(live));
        }
    }
}

async fn start_children(myself: &NodeRef, config: NodeConfig) -> Result<Parts, ActorProcessingErr> {
    let facts = Facts::to(myself, NodeMsg::Fact);
    let cell = || myself.get_cell();
    let (post, board, permits) = (Post::new(config.id), Switchboard::default(), permits());
    let (models, _) =
        Models::spawn_linked(None, Models, ModelsArgs { config: config.models, post: post.clone() }, cell()).await?;
    let devices = start_devices(myself, &config.factories, config.patience, &facts).await?;
    let machine = tokio::task::spawn_blocking(measure_once).await?;
    facts.tell(Fact::MachineMeasured(machine.clone()));
    let reports = devices.iter().map(|local| local.report.clone()).collect();
    let stages_args = StagesArgs {
        devices,
        models: models.clone(),
        post: post.clone(),
        board: board.clone(),
        facts: Outlet::to(myself, NodeMsg::Stages),
    };
    let (stages, _) = Stages::spawn_linked(None, Stages, stages_args, cell()).await?;
    let planner_args = PlannerArgs {
        node: config.id,
        name: config.name,
        addresses: config.joined.as_ref().map(|joined| joined.addresses.clone()).unwrap_or_default(),
        devices: reports,
        machine,
        limits: config.limits,
        patience: config.patience,
        wire_type: config.wire_type,
        models: models.clone(),
        stages: stages.clone(),
        post: post.clone(),
        board: board.clone(),
        heads: config.joined.as_ref().map(|joined| joined.network.thread()),
        facts: facts.clone(),
    };
    let (planner, _) = Planner::spawn_linked(None, Planner, planner_args, cell()).await?;
    let deliver = deliver(stages, planner.clone());
    let (own, here) = (config.id, deliver.clone());
    post.deliver_here(Outlet::new(move |message| here.tell(Heard { from: own, message, place: None })));
    let monitor_args = MonitorArgs { planner: planner.clone(), facts };
    Monitor::spawn_linked(None, Monitor, monitor_args, cell()).await?;
    let gateway_args = GatewayArgs { planner: planner.clone(), post: post.clone(), permits: Arc::clone(&permits) };
    let (gateway, _) = Gateway::spawn_linked(None, Gateway, gateway_args, cell()).await?;
    let mut cluster = None;
    #[cfg(test)]
    let post_of_tests = post.clone();
    if let Some(Joined { network, events, cookie, evicted, .. }) = config.joined {
        let (planner, gateway, models) = (planner.clone(), gateway.clone(), models.clone());
        let cluster_args =
            ClusterArgs { own, network, events, cookie, evicted, post, board, planner, gateway, models, deliver };
        cluster = Some(Cluster::spawn_linked(None, Cluster, cluster_args, cell()).await?.0);
    }
    Ok(Parts {
        gateway: GatewayHandle::new(gateway, permits),
        planner,
        models,
        cluster,
        #[cfg(test)]
        post: post_of_tests,
    })
}

/// Each message to whom it concerns.
fn deliver(stages: StagesRef, planner: PlannerRef) -> Outlet<Heard> {
    Outlet::new(move |Heard { from, message, place }| match message {
        // Actors that are gone take the node with them.
        ControlMessage::Stage(order) => drop(stages.send_message(StagesMsg::Order { from, order, place })),
        message => drop(planner.send_message(PlannerMsg::Heard(Box::new(Heard { from, message, place })))),
    })
}

/// One actor for each device that a factory finds. The processor's goes first, for the others fall back to it.
async fn start_devices(
    myself: &NodeRef,
    factories: &[Arc<dyn EngineFactory>],
    patience: Patience,
    facts: &Facts,
) -> Result<Vec<LocalDevice>, ActorProcessingErr> {
    let mut found = Vec::new();
    for factory in factories {
        found.extend(factory.probe().into_iter().map(|report| (report, Arc::clone(factory))));
    }
    let mut devices: Vec<Option<LocalDevice>> = vec![None; found.len()];
    let mut fallback: Option<DeviceRef> = None;
    // From the last to the first: a GPU falls back to the best processor engine behind it.
    for (index, (report, factory)) in found.into_iter().enumerate().rev() {
        let is_cpu = report.kind == DeviceKind::Cpu;
        let args = DeviceArgs {
            report: report.clone(),
            factory: Arc::clone(&factory),
            fallback: if is_cpu { None } else { fallback.clone() },
            patience,
            facts: facts.clone(),
        };
        let (device, _) = Device::spawn_linked(None, Device, args, myself.get_cell()).await?;
        if is_cpu {
            fallback = Some(device.clone());
        }
        devices[index] = Some(LocalDevice { report, device, factory });
    }
    Ok(devices.into_iter().flatten().collect())
}
