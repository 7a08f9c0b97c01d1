//! Messages to nodes, this one included: whoever sends need not know where the receiver is.

use crate::control::{ControlMsg, seal};
use crate::outlet::Outlet;
use crate::protocol::ControlMessage;
use exo_net::{DataConnection, NodeId, Outbox, SenderToken};
use ractor::ActorRef;
use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, OnceLock, PoisonError, RwLock};

/// The ways to one node.
#[derive(Debug, Clone)]
pub(crate) struct Line {
    pub(crate) control: ActorRef<ControlMsg>,
    pub(crate) token: SenderToken,
    pub(crate) data: DataConnection,
    /// What is on its way there.
    pub(crate) outbox: Outbox,
}

/// The way to all nodes.
#[derive(Debug, Clone)]
pub(crate) struct Post {
    own: NodeId,
    inner: Arc<Inner>,
}

#[derive(Debug, Default)]
struct Inner {
    lines: RwLock<BTreeMap<NodeId, Line>>,
    /// Who is connected and counts as away.
    apart: RwLock<BTreeSet<NodeId>>,
    here: OnceLock<Outlet<ControlMessage>>,
}

impl Post {
    pub(crate) fn new(own: NodeId) -> Self {
        Self { own, inner: Arc::default() }
    }

    pub(crate) fn own(&self) -> NodeId {
        self.own
    }

    /// Where messages to this node go; said once, when all who receive are there.
    pub(crate) fn deliver_here(&self, here: Outlet<ControlMessage>) {
        let first = self.inner.here.set(here);
        debug_assert!(first.is_ok(), "said once");
    }

    pub(crate) fn connect(&self, node: NodeId, line: Line) {
        self.inner.lines.write().unwrap_or_else(PoisonError::into_inner).insert(node, line);
    }

    pub(crate) fn disconnect(&self, node: NodeId) {
        self.inner.lines.write().unwrap_or_else(PoisonError::into_inner).remove(&node);
    }

    /// From now on `node` is told nothing but what all peers are told.
    pub(crate) fn part(&self, node: NodeId) {
        self.inner.apart.write().unwrap_or_else(PoisonError::into_inner).insert(node);
    }

    /// `node` is told everything again.
    pub(crate) fn join(&self, node: NodeId) {
        self.inner.apart.write().unwrap_or_else(PoisonError::into_inner).remove(&node);
    }

    /// Whether `node` is not of this node's circle.
    pub(crate) fn is_apart(&self, node: NodeId) -> bool {
        self.inner.apart.read().unwrap_or_else(PoisonError::into_inner).contains(&node)
    }

    fn may_hear(&self, node: NodeId, message: &ControlMessage) -> bool {
        message.is_for_all_peers() || !self.is_apart(node)
    }

    fn line(&self, node: NodeId) -> Option<Line> {
        self.inner.lines.read().unwrap_or_else(PoisonError::into_inner).get(&node).cloned()
    }

    /// The data connection with `node`, if it is here.
    pub(crate) fn data(&self, node: NodeId) -> Option<DataConnection> {
        self.line(node).filter(|_| !self.is_apart(node)).map(|line| line.data)
    }

    /// Whether messages to `node` get anywhere.
    pub(crate) fn is_here(&self, node: NodeId) -> bool {
        node == self.own || self.data(node).is_some()
    }

    /// The data connections with all others.
    pub(crate) fn peers(&self) -> Vec<(NodeId, DataConnection)> {
        let lines = self.inner.lines.read().unwrap_or_else(PoisonError::into_inner);
        lines.iter().map(|(&id, line)| (id, line.data.clone())).collect()
    }

    /// Sends a message; to a node that is not here it is lost, as its sender hears otherwise.
    pub(crate) fn tell(&self, to: NodeId, message: ControlMessage) {
        if to == self.own {
            if let Some(here) = self.inner.here.get() {
                here.tell(message);
            }
            return;
        }
        let Some(line) = self.line(to).filter(|_| self.may_hear(to, &message)) else {
            return tracing::debug!(peer = %to, "a message to a node that is not here");
        };
        send(to, &line, &message);
    }

    /// Sends a message to all others.
    pub(crate) fn tell_others(&self, message: &ControlMessage) {
        let lines = self.inner.lines.read().unwrap_or_else(PoisonError::into_inner).clone();
        for (to, line) in lines.iter().filter(|(to, _)| self.may_hear(**to, message)) {
            send(*to, line, message);
        }
    }
}

fn send(to: NodeId, line: &Line, message: &ControlMessage) {
    match seal(line.token, message) {
        Ok(bytes) if !line.outbox.put(bytes.len()) => line.data.close("it does not take what it is told"),
        // A peer that goes now is told of by the network.
        Ok(bytes) => drop(line.control.cast(ControlMsg::Tell(bytes))),
        Err(error) => tracing::error!(peer = %to, %error, "a message could not be sent"),
    }
}
