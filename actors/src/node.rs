//! Node: the root supervisor.
//!
//! - owns: all other actors, and the status that users see;
//! - receives: facts, and subscriptions to them; facts of the worker, for the planner;
//! - emits: facts to subscribers;
//! - dies when: it is stopped, or an actor that the node cannot work without fails;
//! - supervised by: the caller of [`start`].

mod handle;
mod subscription;
#[cfg(test)]
mod tests;

pub use handle::{NodeHandle, start};
pub use subscription::{Lagged, Subscription};

use crate::cluster::{Cluster, ClusterArgs, ClusterRef, Evicted};
use crate::core::node_status::{Fact, NodeStatus};
use crate::core::watchdog::HangTimeouts;
use crate::gateway::{Gateway, GatewayArgs, GatewayHandle, draft_orders};
use crate::models::{Models, ModelsArgs, ModelsConfig, ModelsRef};
use crate::monitor::{Monitor, MonitorArgs};
use crate::planner::{Planner, PlannerArgs, PlannerLimits, PlannerMsg, PlannerRef};
use crate::transport::callback::{EventCallback, Facts};
use crate::transport::control::ReceivedMessage;
use crate::transport::protocol::ControlMessage;
use crate::transport::router::Router;
use crate::worker::device::{Device, DeviceArgs};
use crate::worker::discovery::discover;
use crate::worker::links::LinkRegistry;
use crate::worker::machine::measure_machine;
use crate::worker::{LocalDevice, Worker, WorkerArgs, WorkerFact, WorkerMsg, WorkerRef};
use exo_engines::engine::{DeviceKind, DeviceReport, EngineFactory};
use exo_engines::hardware::SystemRoot;
use exo_net::{Network, NetworkEvent, NodeId, WireType};
use ractor::{Actor, ActorProcessingErr, ActorRef, RpcReplyPort, SupervisionEvent};
use ractor_cluster::RactorMessage;
use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::{broadcast, mpsc, oneshot};

pub(crate) type NodeRef = ActorRef<NodeMsg>;

/// The number of facts that a subscriber may lag behind before it must subscribe anew: minutes of a quiet node, seconds
/// of a busy one.
const FACTS_BEHIND_MAX: usize = 4096;
/// The time in which the node's actors must stop.
const CHILDREN_TIMEOUT: Duration = Duration::from_secs(10);

#[derive(Debug, RactorMessage)]
pub(crate) enum NodeMsg {
    Fact(Fact),
    /// A fact of the worker, for the planner.
    Worker(WorkerFact),
    Subscribe(RpcReplyPort<Subscription>),
}

/// The configuration of a node.
#[derive(Debug)]
pub struct NodeConfig {
    /// The node's id.
    pub id: NodeId,
    /// The node's name, as its user chose it.
    pub name: String,
    /// The engines' factories, best first. Devices of those behind the first that finds any are used only by name.
    pub factories: Vec<Arc<dyn EngineFactory>>,
    /// Devices that are not used, by id, engine or PCI address.
    pub disabled_devices: Vec<String>,
    /// The folders of models, and the sources of models that are in none of them.
    pub models: ModelsConfig,
    /// Bounds that the user sets.
    pub limits: PlannerLimits,
    /// How long work on a device may take before the device counts as hung.
    pub hang_timeouts: HangTimeouts,
    /// The first pause before a device that has failed is tried again; each further failure doubles it.
    pub probe_after: Duration,
    /// How activations are encoded on links to other nodes.
    pub wire_type: WireType,
    /// The node's cluster; `None`: the node has no network.
    pub cluster: Option<ClusterConfig>,
}

/// The configuration of a node that is a member of a cluster.
#[derive(Debug)]
pub struct ClusterConfig {
    /// The started network.
    pub network: Network,
    /// The network's events.
    pub events: mpsc::Receiver<NetworkEvent>,
    /// The cookie by which ractor_cluster's sessions authenticate each other.
    pub cookie: String,
    /// The addresses at which other nodes reach this one.
    pub addresses: Vec<SocketAddr>,
    /// The nodes that are not admitted.
    pub evicted: Evicted,
}

/// The parts of a node that its handle needs.
#[derive(Debug)]
pub(crate) struct NodeActors {
    pub(crate) gateway: GatewayHandle,
    pub(crate) planner: PlannerRef,
    pub(crate) models: ModelsRef,
    /// `None` where the node has no network.
    pub(crate) cluster: Option<ClusterRef>,
    /// For tests that act as a hostile member.
    #[cfg(test)]
    pub(crate) router: Router,
}

#[derive(Debug)]
pub(crate) struct NodeArgs {
    pub(crate) config: NodeConfig,
    /// Receives the parts once all have started.
    pub(crate) started: oneshot::Sender<NodeActors>,
}

#[derive(Debug)]
pub(crate) struct NodeState {
    status: NodeStatus,
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
        let addresses = config.cluster.as_ref().map(|cluster| cluster.addresses.clone()).unwrap_or_default();
        let status = NodeStatus::new(config.id, config.name.clone(), addresses);
        let parts = start_children(&myself, config).await?;
        let planner = parts.planner.clone();
        // The caller of `start` waits for the parts.
        let _ = started.send(parts);
        let (subscribers, _) = broadcast::channel(FACTS_BEHIND_MAX);
        Ok(NodeState { status, planner, subscribers })
    }

    async fn post_stop(&self, myself: NodeRef, _: &mut NodeState) -> Result<(), ActorProcessingErr> {
        myself.stop_children_and_wait(None, Some(CHILDREN_TIMEOUT)).await;
        Ok(())
    }

    async fn handle(&self, _: NodeRef, message: NodeMsg, state: &mut NodeState) -> Result<(), ActorProcessingErr> {
        match message {
            NodeMsg::Fact(fact) => {
                state.status.apply(&fact);
                // There may be no subscribers.
                let _ = state.subscribers.send((state.status.version, fact));
            }
            // If the planner has stopped, the node stops, too.
            NodeMsg::Worker(fact) => drop(state.planner.send_message(PlannerMsg::Worker(fact))),
            NodeMsg::Subscribe(reply) => {
                let subscription = Subscription::new(state.status.clone(), state.subscribers.subscribe());
                // The caller may no longer wait.
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
            // These actors hold state that cannot be rebuilt while requests run, so the node stops.
            SupervisionEvent::ActorFailed(who, error) => {
                tracing::error!(actor = %who.get_id(), %error, "an actor failed: the node stops");
                Err(error)
            }
            _ => Ok(()),
        }
    }
}

async fn start_children(myself: &NodeRef, config: NodeConfig) -> Result<NodeActors, ActorProcessingErr> {
    let facts = Facts::to(myself, NodeMsg::Fact);
    let cell = || myself.get_cell();
    let (router, link_registry) = (Router::new(config.id), LinkRegistry::default());
    let models_args = ModelsArgs { config: config.models, router: router.clone() };
    let (models, _) = Models::spawn_linked(None, Models, models_args, cell()).await?;
    let (factories, disabled) = (config.factories, config.disabled_devices);
    let found = tokio::task::spawn_blocking(move || discover(&factories, &disabled, &SystemRoot::default())).await?;
    for name in &found.unknown {
        tracing::warn!(name, "a disabled device is not here: `exo-node doctor` lists the devices of this machine");
    }
    let gpus: BTreeMap<_, _> = found.gpus.into_iter().map(|status| (status.gpu.address, status)).collect();
    for status in gpus.values() {
        facts.tell(Fact::GpuFound(Box::new(status.clone())));
    }
    let devices = start_devices(myself, found.devices, config.hang_timeouts, &facts).await?;
    let machine = tokio::task::spawn_blocking(measure_machine).await?;
    facts.tell(Fact::MachineMeasured(machine.clone()));
    let reports = devices.iter().map(|local| local.report.clone()).collect();
    let worker_args = WorkerArgs {
        devices,
        probe_after: config.probe_after,
        models: models.clone(),
        router: router.clone(),
        link_registry: link_registry.clone(),
        facts: EventCallback::to(myself, NodeMsg::Worker),
        health: facts.clone(),
    };
    let (worker, _) = Worker::spawn_linked(None, Worker, worker_args, cell()).await?;
    let (drafter, drafts) = draft_orders();
    let planner_args = PlannerArgs {
        node: config.id,
        name: config.name,
        addresses: config.cluster.as_ref().map(|cluster| cluster.addresses.clone()).unwrap_or_default(),
        devices: reports,
        gpus: gpus.clone(),
        machine,
        limits: config.limits,
        hang_timeouts: config.hang_timeouts,
        wire_type: config.wire_type,
        models: models.clone(),
        worker: worker.clone(),
        router: router.clone(),
        link_registry: link_registry.clone(),
        drafter,
        head_thread: config.cluster.as_ref().map(|cluster| cluster.network.thread()),
        facts: facts.clone(),
    };
    let (planner, _) = Planner::spawn_linked(None, Planner, planner_args, cell()).await?;
    let deliver = deliver(worker, planner.clone());
    let (own, local) = (config.id, deliver.clone());
    router.deliver_locally(EventCallback::new(move |message| {
        local.tell(ReceivedMessage { from: own, message, slot: None });
    }));
    let gpus = gpus.into_values().map(|status| status.gpu).collect();
    let monitor_args = MonitorArgs { planner: planner.clone(), facts: facts.clone(), gpus };
    Monitor::spawn_linked(None, Monitor, monitor_args, cell()).await?;
    let handle = GatewayHandle::new(planner.clone(), router.clone());
    let gateway_args = GatewayArgs { gateway: handle.clone(), drafts };
    let (gateway, _) = Gateway::spawn_linked(None, Gateway, gateway_args, cell()).await?;
    #[cfg(test)]
    let router_of_tests = router.clone();
    let mut cluster = None;
    if let Some(ClusterConfig { network, events, cookie, evicted, .. }) = config.cluster {
        let (planner, models) = (planner.clone(), models.clone());
        let cluster_args = ClusterArgs {
            own,
            network,
            events,
            cookie,
            evicted,
            router,
            link_registry,
            planner,
            gateway,
            models,
            deliver,
            facts,
        };
        cluster = Some(Cluster::spawn_linked(None, Cluster, cluster_args, cell()).await?.0);
    }
    Ok(NodeActors {
        gateway: handle,
        planner,
        models,
        cluster,
        #[cfg(test)]
        router: router_of_tests,
    })
}

/// Passes each message to the actor that handles it.
fn deliver(worker: WorkerRef, planner: PlannerRef) -> EventCallback<ReceivedMessage> {
    EventCallback::new(move |ReceivedMessage { from, message, slot }| match message {
        // If the receiver has stopped, the node stops, too.
        ControlMessage::Stage(order) => drop(worker.send_message(WorkerMsg::Order { from, order, slot })),
        message => {
            let received = Box::new(ReceivedMessage { from, message, slot });
            drop(planner.send_message(PlannerMsg::Received(received)));
        }
    })
}

/// Starts an actor for each device. A GPU falls back to the best CPU engine.
async fn start_devices(
    myself: &NodeRef,
    found: Vec<(DeviceReport, Arc<dyn EngineFactory>)>,
    hang_timeouts: HangTimeouts,
    facts: &Facts,
) -> Result<Vec<LocalDevice>, ActorProcessingErr> {
    let cpu = found.iter().find(|(report, _)| report.kind == DeviceKind::Cpu).map(|(report, _)| report.id.clone());
    let mut devices = Vec::with_capacity(found.len());
    for (report, factory) in found {
        let args =
            DeviceArgs { report: report.clone(), factory: Arc::clone(&factory), hang_timeouts, facts: facts.clone() };
        let (device, _) = Device::spawn_linked(None, Device, args, myself.get_cell()).await?;
        let fallback = if report.kind == DeviceKind::Cpu { None } else { cpu.clone() };
        devices.push(LocalDevice { report, device, factory, fallback });
    }
    Ok(devices)
}
