//! Dial deduplication: a peer with several addresses is connected through one of them.
//!
//! A dial learns which peer it reached only from the handshake. A dial that reaches a peer that is already connected,
//! or that another dial is connecting, ends there, before either side replaces the connection that it has.

use crate::identity::NodeId;
use parking_lot::{Mutex, MutexGuard};
use std::collections::BTreeSet;
use std::sync::Arc;

#[derive(Debug, Default)]
struct Peers {
    connected: BTreeSet<NodeId>,
    dialled: BTreeSet<NodeId>,
}

/// The peers that are connected, and those that a dial is connecting.
#[derive(Debug, Clone, Default)]
pub(crate) struct DialRegistry(Arc<Mutex<Peers>>);

/// One dial's claim on a peer: until it is dropped, no other dial connects the same peer.
#[derive(Debug)]
pub(crate) struct DialGuard {
    registry: DialRegistry,
    id: NodeId,
}

impl DialRegistry {
    fn peers(&self) -> MutexGuard<'_, Peers> {
        self.0.lock()
    }

    /// Claims `id` for a dial that has reached it; `None` where the peer is connected or claimed already.
    pub(crate) fn claim(&self, id: NodeId) -> Option<DialGuard> {
        let mut peers = self.peers();
        (!peers.connected.contains(&id) && peers.dialled.insert(id)).then(|| DialGuard { registry: self.clone(), id })
    }

    pub(crate) fn set_connected(&self, id: NodeId, is_connected: bool) {
        let mut peers = self.peers();
        match is_connected {
            true => peers.connected.insert(id),
            false => peers.connected.remove(&id),
        };
    }
}

impl Drop for DialGuard {
    fn drop(&mut self) {
        self.registry.peers().dialled.remove(&self.id);
    }
}
