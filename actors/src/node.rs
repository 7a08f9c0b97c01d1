//! Node: the root supervisor.
//!
//! - owns: all other actors, and the state that people see;
//! - receives: facts, and subscriptions to them;
//! - emits: facts to subscribers;
//! - dies when: it is stopped, or an actor that nothing works without fails;
//! - supervised by: whoever started it.

use crate::core::view::{Fact, State};
use crate::device::{Device, DeviceArgs, DeviceRef};
use crate::gateway::{Gateway, GatewayArgs, GatewayHandle};
use crate::machine::measure_once;
use crate::models::{Models, ModelsArgs, ModelsConfig, ModelsRef};
use crate::monitor::{Monitor, MonitorArgs};
use crate::outlet::Facts;
use crate::planner::{PlannedDevice, Planner, PlannerArgs, PlannerLimits, PlannerRef};
use crate::subscription::Subscription;
use exo_engines::engine::{DeviceKind, EngineFactory};
use exo_net::NodeId;
use ractor::{Actor, ActorProcessingErr, ActorRef, RpcReplyPort, SupervisionEvent};
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::{broadcast, oneshot};

pub(crate) type NodeRef = ActorRef<NodeMsg>;

/// Facts that a slow subscriber may be behind by before it is told to start over: minutes of a quiet node, seconds
/// of a busy one.
const FACTS_BEHIND_MAX: usize = 4096;
/// Children get this long to end what they are at.
const CHILDREN_TIMEOUT: Duration = Duration::from_secs(10);

#[derive(Debug)]
pub(crate) enum NodeMsg {
    Fact(Fact),
    Subscribe(RpcReplyPort<Subscription>),
}

/// What a node is made of.
#[derive(Debug)]
pub struct NodeConfig {
    pub id: NodeId,
    /// Best first; the processor last.
    pub factories: Vec<Arc<dyn EngineFactory>>,
    pub models: ModelsConfig,
    pub limits: PlannerLimits,
}

/// The parts that a handle needs.
#[derive(Debug)]
pub(crate) struct Parts {
    pub(crate) gateway: GatewayHandle,
    pub(crate) planner: PlannerRef,
    pub(crate) models: ModelsRef,
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
        let state = State::new(config.id);
        let parts = start_children(&myself, config).await?;
        // Whoever started the node waits for this.
        let _ = started.send(parts);
        let (subscribers, _) = broadcast::channel(FACTS_BEHIND_MAX);
        Ok(NodeState { state, subscribers })
    }

    async fn post_stop(&self, myself: NodeRef, _: &mut NodeState) -> Result<(), ActorProcessingErr> {
        myself.stop_children_and_wait(None, Some(CHILDREN_TIMEOUT)).await;
        Ok(())
    }

    async fn handle(&self, _: NodeRef, message: NodeMsg, state: &mut NodeState) -> Result<(), ActorProcessingErr> {
        match message {
            NodeMsg::Fact(fact) => {
                state.state.apply(&fact);
                // Nobody may be listening.
                let _ = state.subscribers.send((state.state.version, fact));
            }
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

async fn start_children(myself: &NodeRef, config: NodeConfig) -> Result<Parts, ActorProcessingErr> {
    let facts = Facts::to(myself, NodeMsg::Fact);
    let cell = || myself.get_cell();
    let models_args = ModelsArgs { config: config.models };
    let (models, _) = Models::spawn_linked(None, Models, models_args, cell()).await?;
    let devices = start_devices(myself, &config.factories, &facts).await?;
    let machine = tokio::task::spawn_blocking(measure_once).await?;
    facts.tell(Fact::MachineMeasured(machine.clone()));
    let planner_args = PlannerArgs {
        node: config.id,
        devices,
        machine,
        limits: config.limits,
        models: models.clone(),
        facts: facts.clone(),
    };
    let (planner, _) = Planner::spawn_linked(None, Planner, planner_args, cell()).await?;
    let monitor_args = MonitorArgs { planner: planner.clone(), facts };
    Monitor::spawn_linked(None, Monitor, monitor_args, cell()).await?;
    let gateway_args = GatewayArgs { planner: planner.clone() };
    let (gateway, _) = Gateway::spawn_linked(None, Gateway, gateway_args, cell()).await?;
    Ok(Parts { gateway: GatewayHandle::new(gateway), planner, models })
}

/// One actor for each device that a factory finds. The processor's goes first, for the others fall back to it.
async fn start_devices(
    myself: &NodeRef,
    factories: &[Arc<dyn EngineFactory>],
    facts: &Facts,
) -> Result<Vec<PlannedDevice>, ActorProcessingErr> {
    let mut found = Vec::new();
    for factory in factories {
        found.extend(factory.probe().into_iter().map(|report| (report, Arc::clone(factory))));
    }
    let mut devices: Vec<Option<PlannedDevice>> = vec![None; found.len()];
    let mut fallback: Option<DeviceRef> = None;
    // From the last to the first: a GPU falls back to the best processor engine behind it.
    for (index, (report, factory)) in found.into_iter().enumerate().rev() {
        let is_cpu = report.kind == DeviceKind::Cpu;
        let args = DeviceArgs {
            report: report.clone(),
            factory: Arc::clone(&factory),
            fallback: if is_cpu { None } else { fallback.clone() },
            facts: facts.clone(),
        };
        let (device, _) = Device::spawn_linked(None, Device, args, myself.get_cell()).await?;
        if is_cpu {
            fallback = Some(device.clone());
        }
        devices[index] = Some(PlannedDevice { report, device, factory });
    }
    Ok(devices.into_iter().flatten().collect())
}
