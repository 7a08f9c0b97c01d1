//! The node's state and its changes, as whoever watches holds them.

use crate::core::view::{Fact, State};
use tokio::sync::broadcast;

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

    /// The state alone.
    pub fn into_state(self) -> State {
        self.state
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
