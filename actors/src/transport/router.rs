//! Router: sends messages to nodes, this one included, so that senders treat local and remote receivers alike.

use super::callback::EventCallback;
use super::control::{ControlMsg, seal};
use super::protocol::ControlMessage;
use exo_net::{DataConnection, NodeId, Outbox, SenderToken};
use parking_lot::RwLock;
use ractor::ActorRef;
use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, OnceLock};

/// The connections with one peer.
#[derive(Debug, Clone)]
pub(crate) struct PeerChannel {
    /// The peer's name, which its user chose.
    pub(crate) name: String,
    pub(crate) control: ActorRef<ControlMsg>,
    /// The token by which the peer identifies this node.
    pub(crate) token: SenderToken,
    pub(crate) data: DataConnection,
    /// The count of bytes that are queued for the peer.
    pub(crate) outbox: Outbox,
}

/// A connected peer, as a source of weights.
#[derive(Debug, Clone)]
pub(crate) struct WeightsPeer {
    pub(crate) id: NodeId,
    /// The peer's name, which its user chose.
    pub(crate) name: String,
    pub(crate) data: DataConnection,
}

/// Sends messages to all nodes. Clones share one table.
#[derive(Debug, Clone)]
pub(crate) struct Router {
    own: NodeId,
    inner: Arc<Inner>,
}

#[derive(Debug, Default)]
struct Inner {
    channels: RwLock<BTreeMap<NodeId, PeerChannel>>,
    /// Connected peers outside this node's clique.
    excluded: RwLock<BTreeSet<NodeId>>,
    local: OnceLock<EventCallback<ControlMessage>>,
}

impl Router {
    pub(crate) fn new(own: NodeId) -> Self {
        Self { own, inner: Arc::default() }
    }

    pub(crate) fn own(&self) -> NodeId {
        self.own
    }

    /// Sets the receiver of messages to this node itself. Called once, when all receivers have started.
    pub(crate) fn deliver_locally(&self, local: EventCallback<ControlMessage>) {
        let first = self.inner.local.set(local);
        debug_assert!(first.is_ok(), "the local receiver is set only once");
    }

    pub(crate) fn connect(&self, node: NodeId, channel: PeerChannel) {
        self.inner.channels.write().insert(node, channel);
    }

    pub(crate) fn disconnect(&self, node: NodeId) {
        self.inner.channels.write().remove(&node);
    }

    /// Marks `node` as outside the clique: from now on it receives only messages for all peers.
    pub(crate) fn exclude(&self, node: NodeId) {
        self.inner.excluded.write().insert(node);
    }

    /// Marks `node` as inside the clique: from now on it receives all messages again.
    pub(crate) fn include(&self, node: NodeId) {
        self.inner.excluded.write().remove(&node);
    }

    /// Whether `node` is outside this node's clique.
    pub(crate) fn is_excluded(&self, node: NodeId) -> bool {
        self.inner.excluded.read().contains(&node)
    }

    fn may_send(&self, node: NodeId, message: &ControlMessage) -> bool {
        message.is_for_all_peers() || !self.is_excluded(node)
    }

    fn channel(&self, node: NodeId) -> Option<PeerChannel> {
        self.inner.channels.read().get(&node).cloned()
    }

    /// The data connection with `node`, if the node is connected and inside the clique.
    pub(crate) fn data(&self, node: NodeId) -> Option<DataConnection> {
        self.channel(node).filter(|_| !self.is_excluded(node)).map(|channel| channel.data)
    }

    /// Whether messages to `node` arrive: it is this node, or a connected one inside the clique.
    pub(crate) fn is_reachable(&self, node: NodeId) -> bool {
        node == self.own || self.data(node).is_some()
    }

    /// All peers, those outside the clique included.
    pub(crate) fn peers(&self) -> Vec<WeightsPeer> {
        let channels = self.inner.channels.read();
        let peer = |(&id, channel): (&NodeId, &PeerChannel)| WeightsPeer {
            id,
            name: channel.name.clone(),
            data: channel.data.clone(),
        };
        channels.iter().map(peer).collect()
    }

    /// Sends a message to a node. If the node is not connected, the message is dropped; the planner reports lost nodes.
    pub(crate) fn tell(&self, to: NodeId, message: ControlMessage) {
        if to == self.own {
            if let Some(local) = self.inner.local.get() {
                local.tell(message);
            }
            return;
        }
        let Some(channel) = self.channel(to).filter(|_| self.may_send(to, &message)) else {
            return tracing::debug!(peer = %to, "dropped a message to an unreachable node");
        };
        send(to, &channel, &message);
    }

    /// Sends a message to all peers that may receive it.
    pub(crate) fn tell_others(&self, message: &ControlMessage) {
        let channels = self.inner.channels.read().clone();
        for (to, channel) in channels.iter().filter(|(to, _)| self.may_send(**to, message)) {
            send(*to, channel, message);
        }
    }
}

fn send(to: NodeId, channel: &PeerChannel, message: &ControlMessage) {
    match seal(channel.token, message) {
        Ok(bytes) if !channel.outbox.put(bytes.len()) => channel.data.close("the peer does not read its messages"),
        // If the peer disconnects now, the network reports that.
        Ok(bytes) => drop(channel.control.cast(ControlMsg::Tell(bytes))),
        Err(error) => tracing::error!(peer = %to, %error, "a message could not be encoded"),
    }
}
