//! What outsiders hold: handles with methods, never an actor's reference.

use crate::core::view::{Fact, State};
use crate::gateway::GatewayHandle;
use crate::models::{ModelsRef, ResolvedModel};
use crate::node::{NodeMsg, NodeRef};
use crate::planner::{PlannerRef, RunningModel};
use crate::request::{GenerateRequest, Generated, ModelSpec, RequestError};
use exo_net::NodeId;
use futures_core::Stream;
use ractor::rpc::CallResult;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;
use tokio::sync::{broadcast, mpsc};
use tokio_util::sync::DropGuard;

/// An answer on its way. Dropping it cancels the work within one step.
#[derive(Debug)]
pub struct Generation {
    events: mpsc::Receiver<Result<Generated, RequestError>>,
    is_over: bool,
    _cancels: DropGuard,
}

impl Generation {
    pub(crate) fn new(events: mpsc::Receiver<Result<Generated, RequestError>>, cancels: DropGuard) -> Self {
        Self { events, is_over: false, _cancels: cancels }
    }

    /// The next event; `None` behind the last one, which is [`Generated::Finished`] or an error.
    pub async fn next(&mut self) -> Option<Result<Generated, RequestError>> {
        std::future::poll_fn(|context| Pin::new(&mut *self).poll_next(context)).await
    }
}

impl Stream for Generation {
    type Item = Result<Generated, RequestError>;

    fn poll_next(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        if self.is_over {
            return Poll::Ready(None);
        }
        let event = match self.events.poll_recv(context) {
            Poll::Pending => return Poll::Pending,
            Poll::Ready(Some(event)) => event,
            // Whoever should have finished the stream is gone.
            Poll::Ready(None) => Err(RequestError::ShuttingDown),
        };
        self.is_over = matches!(event, Err(_) | Ok(Generated::Finished { .. }));
        Poll::Ready(Some(event))
    }
}

/// The node's state, and then what changes it.
#[derive(Debug)]
pub struct Subscription {
    state: State,
    facts: broadcast::Receiver<(u64, Fact)>,
}

/// A subscriber was so slow that facts are missing: it takes the state anew.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("{missed} facts were missed: subscribe anew")]
pub struct Lagged {
    pub missed: u64,
}

impl Subscription {
    pub(crate) fn new(state: State, facts: broadcast::Receiver<(u64, Fact)>) -> Self {
        Self { state, facts }
    }

    /// The state as of the last fact given.
    pub fn state(&self) -> &State {
        &self.state
    }

    /// The next fact, applied to the state; `None` when the node has stopped.
    ///
    /// # Errors
    /// [`Lagged`] where this subscriber was too slow.
    pub async fn next(&mut self) -> Result<Option<Fact>, Lagged> {
        loop {
            match self.facts.recv().await {
                // Facts that were in the state already.
                Ok((version, _)) if version <= self.state.version => {}
                Ok((_, fact)) => {
                    self.state.apply(&fact);
                    return Ok(Some(fact));
                }
                Err(broadcast::error::RecvError::Closed) => return Ok(None),
                Err(broadcast::error::RecvError::Lagged(missed)) => return Err(Lagged { missed }),
            }
        }
    }
}

/// A running node.
#[derive(Debug, Clone)]
pub struct NodeHandle {
    pub(crate) id: NodeId,
    pub(crate) node: NodeRef,
    pub(crate) gateway: GatewayHandle,
    pub(crate) planner: PlannerRef,
    pub(crate) models: ModelsRef,
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
        Ok(crate::models::resolve(&self.models, model.into()).await?)
    }

    /// The node's state now.
    ///
    /// # Errors
    /// [`RequestError::ShuttingDown`].
    pub async fn state(&self) -> Result<State, RequestError> {
        Ok(self.subscribe().await?.state)
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

    /// Stops every actor; streams end with [`RequestError::ShuttingDown`].
    pub async fn shutdown(self) {
        self.node.stop(None);
        // A node that does not stop in time is stopped with the process.
        let _ = self.node.wait(Some(SHUTDOWN_TIMEOUT)).await;
    }
}
