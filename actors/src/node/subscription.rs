//! A node's status and the facts that change it, as a subscriber holds them.

use crate::core::node_status::{Fact, NodeStatus};
use tokio::sync::broadcast;

/// The node's status, and then the facts that change it.
#[derive(Debug)]
pub struct Subscription {
    status: NodeStatus,
    facts: broadcast::Receiver<(u64, Fact)>,
}

/// A subscriber was too slow, so that facts are missing. It subscribes anew.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("{missed} facts were missed: subscribe anew")]
pub struct Lagged {
    /// The number of facts that are missing.
    pub missed: u64,
}

impl Subscription {
    pub(crate) fn new(status: NodeStatus, facts: broadcast::Receiver<(u64, Fact)>) -> Self {
        Self { status, facts }
    }

    /// The status as of the last fact that [`next`](Self::next) returned.
    pub fn status(&self) -> &NodeStatus {
        &self.status
    }

    /// The status alone.
    pub fn into_status(self) -> NodeStatus {
        self.status
    }

    /// The next fact, applied to the status; `None` when the node has stopped.
    ///
    /// # Errors
    /// [`Lagged`] where this subscriber was too slow.
    pub async fn next(&mut self) -> Result<Option<Fact>, Lagged> {
        loop {
            match self.facts.recv().await {
                // The status had this fact when the subscription began.
                Ok((version, _)) if version <= self.status.version => {}
                Ok((_, fact)) => {
                    self.status.apply(&fact);
                    return Ok(Some(fact));
                }
                Err(broadcast::error::RecvError::Closed) => return Ok(None),
                Err(broadcast::error::RecvError::Lagged(missed)) => return Err(Lagged { missed }),
            }
        }
    }
}
