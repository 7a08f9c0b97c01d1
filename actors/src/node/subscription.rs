//! A node's status and the facts that change it, as a subscriber holds them.

use crate::core::node_status::{Fact, NodeStatus};
use tokio::sync::broadcast;

/// The node's status, and then the facts that change it.
#[derive(Debug)]
pub struct Subscription {
    status: NodeStatus,
    facts: broadcast::Receiver<(u64, Fact)>,
}

/// The error of a subscriber that was too slow: facts are missing, and it must subscribe anew.
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

    /// Ends the subscription, and returns the status.
    pub fn into_status(self) -> NodeStatus {
        self.status
    }

    /// The next fact, applied to the status; `None` when the node has stopped.
    ///
    /// # Errors
    /// [`Lagged`] if this subscriber was too slow.
    pub async fn next(&mut self) -> Result<Option<Fact>, Lagged> {
        loop {
            match self.facts.recv().await {
                // The status included this fact already when the subscription began.
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
