//! What the user should know of: failed dials, copies of a key, changes of the machine's network.

use super::{ConnectedPeer, Driver};
use crate::addresses::{NetworkChange, canonical};
use crate::departure::Departure;
use crate::dial::Source;
use crate::dial_failure::{DialFailure, close};
use crate::identity::NodeId;
use crate::network::{DriverEvent, NetworkEvent};
use crate::peer::{HELLO_DEADLINE, Introduced, PeerConnections};
use std::net::SocketAddr;
use std::time::Duration;

/// The time in which a live peer sends several keep-alives.
const KEY_CHECK: Duration = Duration::from_millis(800);

impl Driver {
    /// Tells the node why no member answers at an address, if the user should know: if the user named the address, or
    /// no member is connected and it is in the token, or its members refuse this node. Tells changes only.
    pub(super) async fn tell_failure(&mut self, address: SocketAddr, failure: Option<DialFailure>) {
        let failure = failure.filter(|failure| match (self.policy.source(address), failure) {
            (
                _,
                DialFailure::Evicted { .. }
                | DialFailure::SameKey { .. }
                | DialFailure::Protocol { .. }
                | DialFailure::Unreadable,
            ) => true,
            (Some(Source::Named), _) => true,
            (Some(Source::Token), _) => self.peers.is_empty(),
            (Some(Source::Heard) | None, _) => false,
        });
        let before = match &failure {
            Some(failure) => self.failures.insert(address, failure.clone()),
            None => self.failures.remove(&address),
        };
        if before != failure {
            // An error means that the node is stopping.
            let _ = self.events.send(NetworkEvent::Dialled { address, failure }).await;
        }
    }

    /// Tells that two running nodes have the same key.
    pub(super) async fn tell_same_key(&self, id: NodeId, first: SocketAddr, second: SocketAddr) {
        // An error means that the node is stopping.
        let _ = self.events.send(NetworkEvent::SameKey { id, first, second }).await;
    }

    /// The first address at which others reach this node.
    pub(super) fn own_address(&self) -> SocketAddr {
        let first = self.watch.as_ref().and_then(|watch| watch.addresses().first().copied());
        first.unwrap_or_else(|| SocketAddr::from(([127, 0, 0, 1], 0)))
    }

    /// Handles a connection of a node with this node's own key.
    pub(super) async fn on_own_key(&self, introduced: &Introduced) {
        if introduced.run == self.own.run {
            // This node has dialled itself, and learns so from its own hello: the other end must not close earlier.
            let control = introduced.control.clone();
            tokio::spawn(async move { drop(tokio::time::timeout(HELLO_DEADLINE, control.closed()).await) });
            return;
        }
        let (own, second) = (self.own_address(), canonical(introduced.control.remote_address()));
        introduced.control.close(quinn::VarInt::from_u32(close::SAME_KEY), own.to_string().as_bytes());
        self.tell_same_key(self.own.id, own, second).await;
    }

    /// Finds out whether a connected peer has started again, or another node has its key: a peer whose process has
    /// ended sends nothing more.
    pub(super) fn check_key(&self, peer: &ConnectedPeer, newcomer: PeerConnections) {
        let (control, data, session, before) = (peer.control.clone(), peer.data.clone(), peer.session, peer.received());
        let driver_events = self.driver_events.clone();
        tokio::spawn(async move {
            tokio::select! {
                () = tokio::time::sleep(KEY_CHECK) => {}
                _ = control.closed() => {}
            }
            let received = control.stats().udp_rx.datagrams + data.received();
            let is_alive = control.close_reason().is_none() && received > before;
            let newcomer = Box::new(newcomer);
            // An error means that the driver has ended.
            let _ = driver_events.send(DriverEvent::KeyChecked { session, is_alive, newcomer }).await;
        });
    }

    /// Keeps the peer that was there before, if it is alive; else connects the node that came.
    pub(super) async fn on_key_checked(&mut self, session: u64, is_alive: bool, newcomer: PeerConnections) {
        let id = newcomer.id();
        let first = self.peers.get(&id).filter(|peer| is_alive && peer.session == session).map(|peer| peer.address);
        let Some(first) = first else {
            self.on_closed(id, session, Departure::Lost { reason: "it has started again".to_owned() }).await;
            self.elect(newcomer).await;
            return;
        };
        let second = newcomer.address();
        newcomer.close(close::SAME_KEY, &first.to_string());
        if newcomer.is_dialled() {
            self.policy.handle_same_key(second, self.now());
        }
        self.tell_same_key(id, first, second).await;
    }

    /// Looks whether the machine has other addresses, or has slept.
    pub(super) async fn watch(&mut self) {
        let Some(watch) = &mut self.watch else { return };
        let change = watch.look();
        if change == NetworkChange::Nothing {
            return;
        }
        self.policy.handle_network_changed(self.now());
        if let NetworkChange::Addresses(addresses) = change {
            tracing::info!(?addresses, "this machine has other addresses now");
            // An error means that the node is stopping.
            let _ = self.events.send(NetworkEvent::AddressesChanged(addresses)).await;
        }
    }
}
