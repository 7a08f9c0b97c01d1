//! Control: the only actor of this node that other nodes can reach.
//!
//! - owns: the table of sender tokens;
//! - receives: bytes from members;
//! - emits: messages, with the id of their sender;
//! - dies when: the node stops;
//! - supervised by: the cluster.
//!
//! ractor_cluster does not identify the sender of a message. So each message carries the token that this node gave to
//! the sender when the two connected. Control drops a message without a valid token. A test checks that no other actor
//! is remotable.

use super::callback::EventCallback;
use super::protocol::ControlMessage;
use exo_net::{Inbox, InboxSlot, NodeId, SenderToken, wire};
use parking_lot::Mutex;
use ractor::{Actor, ActorProcessingErr, ActorRef};
use ractor_cluster::RactorClusterMessage;
use serde::{Deserialize, Serialize};
use std::collections::HashMap;
use std::sync::Arc;

/// The only message from other nodes: an encoded [`Envelope`].
#[derive(Debug, RactorClusterMessage)]
pub(crate) enum ControlMsg {
    Tell(Vec<u8>),
}

/// A message, with the token that identifies its sender.
#[derive(Debug, Serialize, Deserialize)]
struct Envelope {
    token: SenderToken,
    message: Vec<u8>,
}

/// Encodes `message`, with the token that its receiver gave to this node.
pub(crate) fn seal(token: SenderToken, message: &ControlMessage) -> Result<Vec<u8>, wire::WireError> {
    wire::encode(&Envelope { token, message: wire::encode(message)? })
}

/// The peers whose messages are accepted now, by the token that each peer received.
#[derive(Debug, Clone, Default)]
pub(crate) struct Senders(Arc<Mutex<HashMap<SenderToken, (NodeId, Inbox)>>>);

impl Senders {
    pub(crate) fn admit(&self, token: SenderToken, node: NodeId, inbox: Inbox) {
        self.0.lock().insert(token, (node, inbox));
    }

    pub(crate) fn dismiss(&self, token: SenderToken) {
        self.0.lock().remove(&token);
    }

    fn find(&self, token: SenderToken) -> Option<(NodeId, Inbox)> {
        self.0.lock().get(&token).cloned()
    }
}

/// A message from a member, or from this node itself.
#[derive(Debug)]
pub(crate) struct ReceivedMessage {
    pub(crate) from: NodeId,
    pub(crate) message: ControlMessage,
    /// The slot, held until the message has been handled. Slots bound a member's unhandled messages. `None` for a
    /// message of this node.
    pub(crate) slot: Option<InboxSlot>,
}

#[derive(Debug)]
pub(crate) struct ControlArgs {
    pub(crate) senders: Senders,
    pub(crate) received: EventCallback<ReceivedMessage>,
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
            Err(error) => return tracing::warn!(%error, "dropped a message that cannot be decoded"),
        };
        let Some((from, inbox)) = self.senders.find(envelope.token) else {
            return tracing::debug!("dropped a message without a valid sender token");
        };
        let slot = Some(inbox.message());
        match wire::decode(&envelope.message) {
            Ok(message) => self.received.tell(ReceivedMessage { from, message, slot }),
            Err(error) => tracing::warn!(peer = %from, %error, "dropped a message that cannot be decoded"),
        }
    }
}
