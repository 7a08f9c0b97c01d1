//! What outsiders hold of a node: a handle with methods, never an actor's reference.

use crate::cluster::{ClusterMsg, ClusterRef};
use crate::core::plan::Preview;
use crate::core::view::State;
use crate::gateway::GatewayHandle;
use crate::generation::Generation;
use crate::models::{Extent, ModelsRef, ResolvedModel, Wish};
use crate::node::{Node, NodeArgs, NodeConfig, NodeMsg, NodeRef, Parts};
use crate::outlet::Outlet;
use crate::planner::{PlannerMsg, PlannerRef, RunningModel};
use crate::request::{GenerateRequest, ModelSpec, RequestError};
use crate::subscription::Subscription;
use exo_net::NodeId;
use ractor::rpc::CallResult;
use ractor::{Actor, SpawnErr};
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::oneshot;

/// Starts a node on the current tokio runtime.
///
/// # Errors
/// ractor's, where an actor could not be started.
pub async fn start(config: NodeConfig) -> Result<NodeHandle, SpawnErr> {
    let id = config.id;
    let (started, parts) = oneshot::channel();
    let (node, _) = Node::spawn(None, Node, NodeArgs { config, started }).await?;
    let parts = parts.await.map_err(|error| SpawnErr::StartupFailed(error.into()))?;
    let Parts { gateway, planner, models, cluster, .. } = parts;
    Ok(NodeHandle { id, node, gateway, planner, models, cluster })
}

/// A running node.
#[derive(Debug, Clone)]
pub struct NodeHandle {
    id: NodeId,
    node: NodeRef,
    gateway: GatewayHandle,
    planner: PlannerRef,
    models: ModelsRef,
    cluster: Option<ClusterRef>,
}

/// Answers come from memory: this is a bound on a node that hangs.
const QUERY_TIMEOUT: Duration = Duration::from_secs(10);
/// Engines finish the step that they are at.
const SHUTDOWN_TIMEOUT: Duration = Duration::from_secs(30);

impl NodeHandle {
    pub fn id(&self) -> NodeId {
        self.id
    }

    /// Starts generating; the model is loaded first where it is not running.
    ///
    /// # Errors
    /// [`RequestError::Params`] and [`RequestError::Overloaded`] at once; everything else comes with the stream.
    pub fn generate(&self, request: GenerateRequest) -> Result<Generation, RequestError> {
        self.gateway.generate(request)
    }

    /// Waits until a model runs.
    ///
    /// # Errors
    /// [`RequestError`] where it cannot be had, placed or loaded.
    pub async fn load(&self, spec: ModelSpec) -> Result<RunningModel, RequestError> {
        crate::gateway::ensure(&self.planner, spec).await
    }

    /// Makes sure that a model's files are on this machine.
    ///
    /// # Errors
    /// [`RequestError::Model`] where no source has them.
    pub async fn pull(&self, model: impl Into<String>) -> Result<Arc<ResolvedModel>, RequestError> {
        let wish = Wish { model: model.into(), files: None, extent: Extent::Whole };
        Ok(crate::models::get(&self.models, wish, Outlet::new(drop)).await?)
    }

    /// What would become of a model that was asked for now: where it would go by each policy, and why. Its headers are
    /// brought here; nothing is loaded.
    ///
    /// # Errors
    /// [`RequestError::Model`] where it cannot be had.
    pub async fn preview(&self, spec: ModelSpec) -> Result<Vec<Preview>, RequestError> {
        let model = crate::models::get_spec(&self.models, &spec, None, Extent::Outline, Outlet::new(drop)).await?;
        let called = self.planner.call(|reply| PlannerMsg::Preview { spec, model, reply }, Some(QUERY_TIMEOUT)).await;
        match called {
            Ok(CallResult::Success(previews)) => Ok(previews),
            _ => Err(RequestError::ShuttingDown),
        }
    }

    /// The node's state now.
    ///
    /// # Errors
    /// [`RequestError::ShuttingDown`].
    pub async fn state(&self) -> Result<State, RequestError> {
        Ok(self.subscribe().await?.into_state())
    }

    /// The node's state, and every fact from now on.
    ///
    /// # Errors
    /// [`RequestError::ShuttingDown`].
    pub async fn subscribe(&self) -> Result<Subscription, RequestError> {
        match self.node.call(NodeMsg::Subscribe, Some(QUERY_TIMEOUT)).await {
            Ok(CallResult::Success(subscription)) => Ok(subscription),
            _ => Err(RequestError::ShuttingDown),
        }
    }

    /// Takes this node out of its cluster: what runs on it moves to others first. Returns when nothing runs on it any
    /// more; where it is alone, at once.
    ///
    /// # Errors
    /// [`RequestError::ShuttingDown`].
    pub async fn drain(&self) -> Result<(), RequestError> {
        // No deadline: others load what moves to them.
        match self.planner.call(PlannerMsg::Drain, None).await {
            Ok(CallResult::Success(())) => Ok(()),
            _ => Err(RequestError::ShuttingDown),
        }
    }

    /// Closes the doors of all members to one of them, now and later. It still has the secret: with a new identity it
    /// comes in again, until there is a new secret.
    ///
    /// # Errors
    /// [`RequestError::Alone`] where this node has no cluster.
    pub fn evict(&self, member: NodeId) -> Result<(), RequestError> {
        let cluster = self.cluster.as_ref().ok_or(RequestError::Alone)?;
        cluster.send_message(ClusterMsg::Evict([member].into())).map_err(|_| RequestError::ShuttingDown)
    }

    /// Stops every actor; streams end with [`RequestError::ShuttingDown`].
    pub async fn shutdown(self) {
        self.node.stop(None);
        // A node that does not stop in time is stopped with the process.
        let _ = self.node.wait(Some(SHUTDOWN_TIMEOUT)).await;
    }
}
