//! Control: the one actor of this node that other nodes can reach.
//!
//! - owns: nothing but the way in;
//! - receives: bytes from members;
//! - emits: messages, with who sent them;
//! - dies when: the node stops;
//! - supervised by: the cluster.
//!
//! ractor_cluster does not tell who a message is from. Each message carries the pass that this node gave to its sender
//! when they met; one without a pass that is valid now is dropped. A test keeps that no other actor is remotable.

use crate::outlet::Outlet;
use crate::protocol::ControlMessage;
use exo_net::{Inbox, InboxSlot, NodeId, SenderToken, wire};
use ractor::{Actor, ActorProcessingErr, ActorRef};
use ractor_cluster::RactorClusterMessage;
use serde::{Deserialize, Serialize};
use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// The only message from other nodes: an [`Envelope`], as bytes.
#[derive(Debug, RactorClusterMessage)]
pub(crate) enum ControlMsg {
    Tell(Vec<u8>),
}

/// A message and whose it is.
#[derive(Debug, Serialize, Deserialize)]
struct Envelope {
    token: SenderToken,
    message: Vec<u8>,
}

/// The bytes of `message`, under the pass that its receiver gave.
pub(crate) fn seal(token: SenderToken, message: &ControlMessage) -> Result<Vec<u8>, wire::WireError> {
    wire::encode(&Envelope { token, message: wire::encode(message)? })
}

/// Who may speak now: by the pass that each was given.
#[derive(Debug, Clone, Default)]
pub(crate) struct Senders(Arc<Mutex<HashMap<SenderToken, (NodeId, Inbox)>>>);

impl Senders {
    fn table(&self) -> MutexGuard<'_, HashMap<SenderToken, (NodeId, Inbox)>> {
        // A map is whole between two statements, whatever panicked.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn admit(&self, token: SenderToken, node: NodeId, inbox: Inbox) {
        self.table().insert(token, (node, inbox));
    }

    pub(crate) fn dismiss(&self, token: SenderToken) {
        self.table().remove(&token);
    }

    fn find(&self, token: SenderToken) -> Option<(NodeId, Inbox)> {
        self.table().get(&token).cloned()
    }
}

/// A message from a member, or from this node itself.
#[derive(Debug)]
pub(crate) struct Heard {
    pub(crate) from: NodeId,
    pub(crate) message: ControlMessage,
    /// Held until it has been handled: a member has only so many on their way.
    pub(crate) place: Option<InboxSlot>,
}

#[derive(Debug)]
pub(crate) struct ControlArgs {
    pub(crate) senders: Senders,
    pub(crate) heard: Outlet<Heard>,
}

#[derive(Debug)]
pub(crate) struct Control;

impl Actor for Control {
    type Msg = ControlMsg;
    type State = ControlArgs;
    type Arguments = ControlArgs;

    async fn pre_start(&self, _: ActorRef<ControlMsg>, args: ControlArgs) -> Result<ControlArgs, ActorProcessingErr> {
        Ok(args)
    }

    async fn handle(
        &self,
        _: ActorRef<ControlMsg>,
        message: ControlMsg,
        state: &mut ControlArgs,
    ) -> Result<(), ActorProcessingErr> {
        let ControlMsg::Tell(bytes) = message;
        state.open(&bytes);
        Ok(())
    }
}

impl ControlArgs {
    fn open(&self, bytes: &[u8]) {
        let envelope: Envelope = match wire::decode(bytes) {
            Ok(envelope) => envelope,
            Err(error) => return tracing::warn!(%error, "dropped a message that is none"),
        };
        let Some((from, inbox)) = self.senders.find(envelope.token) else {
            return tracing::debug!("dropped a message of nobody who is here");
        };
        let place = Some(inbox.message());
        match wire::decode(&envelope.message) {
            Ok(message) => self.heard.tell(Heard { from, message, place }),
            Err(error) => tracing::warn!(peer = %from, %error, "dropped a message that is none"),
        }
    }
}
