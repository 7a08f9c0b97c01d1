//! The handle of a running node: methods for embedders, the API and the command line.

use super::subscription::Subscription;
use super::{Node, NodeActors, NodeArgs, NodeConfig, NodeMsg, NodeRef};
use crate::cluster::{ClusterMsg, ClusterRef};
use crate::core::node_status::NodeStatus;
use crate::core::plan::Preview;
use crate::core::request::{GenerateRequest, ModelSpec, RequestError};
use crate::gateway::{GatewayHandle, Generation};
use crate::models::{Extent, ModelRequest, ModelsRef, ResolvedModel};
use crate::planner::{PlannerMsg, PlannerRef, RunningModel};
use crate::transport::callback::EventCallback;
use exo_net::NodeId;
use ractor::rpc::CallResult;
use ractor::{Actor, SpawnErr};
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::oneshot;

/// Starts a node on the current tokio runtime.
///
/// # Errors
/// [`SpawnErr`] if an actor cannot be started.
pub async fn start(config: NodeConfig) -> Result<NodeHandle, SpawnErr> {
    let id = config.id;
    let (started, parts) = oneshot::channel();
    let (node, _) = Node::spawn(None, Node, NodeArgs { config, started }).await?;
    let parts = parts.await.map_err(|error| SpawnErr::StartupFailed(error.into()))?;
    let NodeActors { gateway, planner, models, cluster, .. } = parts;
    Ok(NodeHandle { id, node, gateway, planner, models, cluster })
}

/// A handle of a running node. Clones are handles of the same node.
#[derive(Debug, Clone)]
pub struct NodeHandle {
    id: NodeId,
    node: NodeRef,
    gateway: GatewayHandle,
    planner: PlannerRef,
    models: ModelsRef,
    cluster: Option<ClusterRef>,
}

/// The time limit of a query: queries are answered from memory, so only a node that hangs takes longer.
const QUERY_TIMEOUT: Duration = Duration::from_secs(10);
/// The time limit of a shutdown: engines finish their current step first.
const SHUTDOWN_TIMEOUT: Duration = Duration::from_secs(30);

impl NodeHandle {
    /// The node's id.
    pub fn id(&self) -> NodeId {
        self.id
    }

    /// Starts an answer. Loads the model first if it does not run.
    ///
    /// # Errors
    /// [`RequestError::Params`] and [`RequestError::Overloaded`] at once; other errors come with the stream.
    pub fn generate(&self, request: GenerateRequest) -> Result<Generation, RequestError> {
        self.gateway.generate(request, None)
    }

    /// Starts an answer of a model that [`load`](Self::load) returned, without resolving the model again. The model
    /// that the request names is ignored.
    ///
    /// # Errors
    /// As [`generate`](Self::generate).
    pub fn generate_with(&self, model: &RunningModel, request: GenerateRequest) -> Result<Generation, RequestError> {
        let request = GenerateRequest { model: model.spec.clone(), ..request };
        self.gateway.generate(request, Some(model.clone()))
    }

    /// Loads a model if it does not run, and waits until it runs.
    ///
    /// # Errors
    /// [`RequestError`] if the model cannot be found, placed or loaded.
    pub async fn load(&self, spec: ModelSpec) -> Result<RunningModel, RequestError> {
        self.gateway.ensure(spec).await
    }

    /// Fetches those of a model's files that this machine does not have.
    ///
    /// # Errors
    /// [`RequestError::Model`] if no source has them.
    pub async fn pull(&self, model: impl Into<String>) -> Result<Arc<ResolvedModel>, RequestError> {
        let request = ModelRequest { model: model.into(), files: None, extent: Extent::Whole };
        Ok(crate::models::get(&self.models, request, EventCallback::ignore()).await?)
    }

    /// The placement that each policy would choose now, and why. Fetches the model's headers; loads nothing.
    ///
    /// # Errors
    /// [`RequestError::Model`] if the model cannot be found; [`RequestError::ShuttingDown`].
    pub async fn preview(&self, spec: ModelSpec) -> Result<Vec<Preview>, RequestError> {
        let ignore = EventCallback::ignore();
        let model = crate::models::get_spec(&self.models, &spec, None, Extent::Outline, ignore).await?;
        let called = self.planner.call(|reply| PlannerMsg::Preview { spec, model, reply }, Some(QUERY_TIMEOUT)).await;
        match called {
            Ok(CallResult::Success(previews)) => previews,
            _ => Err(RequestError::ShuttingDown),
        }
    }

    /// The node's status now.
    ///
    /// # Errors
    /// [`RequestError::ShuttingDown`].
    pub async fn status(&self) -> Result<NodeStatus, RequestError> {
        Ok(self.subscribe().await?.into_status())
    }

    /// The node's status, and every fact from now on.
    ///
    /// # Errors
    /// [`RequestError::ShuttingDown`].
    pub async fn subscribe(&self) -> Result<Subscription, RequestError> {
        match self.node.call(NodeMsg::Subscribe, Some(QUERY_TIMEOUT)).await {
            Ok(CallResult::Success(subscription)) => Ok(subscription),
            _ => Err(RequestError::ShuttingDown),
        }
    }

    /// Takes this node out of its cluster: its work moves to other members first. Returns when nothing runs on the node
    /// any more; at once if the node is the only member.
    ///
    /// # Errors
    /// [`RequestError::ShuttingDown`].
    pub async fn drain(&self) -> Result<(), RequestError> {
        // No timeout: the other members first load the models that move to them.
        match self.planner.call(PlannerMsg::Drain, None).await {
            Ok(CallResult::Success(())) => Ok(()),
            _ => Err(RequestError::ShuttingDown),
        }
    }

    /// Undoes an eviction: all members admit the node again.
    ///
    /// # Errors
    /// [`RequestError::NotClustered`] without a network; [`RequestError::ShuttingDown`].
    pub fn readmit(&self, member: NodeId) -> Result<(), RequestError> {
        let cluster = self.cluster.as_ref().ok_or(RequestError::NotClustered)?;
        cluster.send_message(ClusterMsg::Readmit(member)).map_err(|_| RequestError::ShuttingDown)
    }

    /// Evicts a member: all members disconnect it, and admit it no more. The evicted machine still has the cluster's
    /// secret: under a new identity it is admitted, until the secret is renewed.
    ///
    /// # Errors
    /// [`RequestError::NotClustered`] if this node has no cluster; [`RequestError::ShuttingDown`].
    pub fn evict(&self, member: NodeId) -> Result<(), RequestError> {
        let cluster = self.cluster.as_ref().ok_or(RequestError::NotClustered)?;
        cluster.send_message(ClusterMsg::Evict([member].into())).map_err(|_| RequestError::ShuttingDown)
    }

    /// Stops every actor. Streams end with [`RequestError::ShuttingDown`].
    pub async fn shutdown(self) {
        self.node.stop(None);
        // A node that does not stop in time stops with the process.
        let _ = self.node.wait(Some(SHUTDOWN_TIMEOUT)).await;
    }
}
