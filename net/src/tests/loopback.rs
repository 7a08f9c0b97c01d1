//! Networks on loopback, and helpers that observe them.

use crate::{ClusterSecret, Network, NetworkConfig, NetworkEvent, NodeId, Peer};
use std::net::{IpAddr, SocketAddr};
use std::time::Duration;
use tokio::sync::mpsc;

pub(super) fn loopback() -> SocketAddr {
    SocketAddr::from(([127, 0, 0, 1], 0))
}

pub(super) fn secret(byte: u8) -> ClusterSecret {
    ClusterSecret::from_bytes([byte; 32])
}

pub(super) type Started = (Network, mpsc::Receiver<NetworkEvent>, NodeId);

/// A member of the cluster of `secret(byte)` that dials `peers`.
pub(super) fn network(byte: u8, peers: Vec<SocketAddr>) -> Started {
    network_at(loopback().ip(), byte, peers)
}

/// The same member, but listening on `ip`.
pub(super) fn network_at(ip: IpAddr, byte: u8, peers: Vec<SocketAddr>) -> Started {
    let config = NetworkConfig::loopback(secret(byte), peers).expect("random bytes");
    let config = NetworkConfig { listen: SocketAddr::new(ip, 0), ..config };
    let id = config.identity.node_id();
    let (network, events) = Network::start(config).expect("started");
    (network, events, id)
}

/// The next peer that connects.
pub(super) async fn connected(events: &mut mpsc::Receiver<NetworkEvent>) -> Box<Peer> {
    loop {
        let event = tokio::time::timeout(Duration::from_secs(10), events.recv()).await.expect("in time");
        if let NetworkEvent::PeerUp(peer) = event.expect("the network runs") {
            return peer;
        }
    }
}

/// The resident memory of this process, in bytes.
pub(super) fn resident_bytes() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").expect("Linux");
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).expect("a VmRSS line");
    line.trim().trim_end_matches(" kB").parse::<u64>().expect("a number") << 10
}
