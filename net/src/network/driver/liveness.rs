//! Finds out soon that a peer's process has died.
//!
//! ```text
//! no datagram for SUSPECT_AFTER ─► a datagram to its port ─► "port unreachable" ─► still none for PROBE_WITHIN ─► dead
//! ```
//! A live peer sends keep-alives. A host whose process has died answers with an ICMP error, long before QUIC's idle
//! timeout. ICMP can be forged, and a network can stall, so that neither sign is enough alone: a peer counts as dead
//! only if its port is closed, and QUIC hears nothing from it meanwhile.

use crate::peer::DataConnection;
use quinn::Connection;
use std::io::ErrorKind;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::time::Duration;
use tokio::net::UdpSocket;
use tokio::time::Instant;

/// How often datagrams are counted.
const LOOK_EVERY: Duration = Duration::from_millis(50);
/// The silence after which a peer is suspected: it has missed a keep-alive.
const SUSPECT_AFTER: Duration = Duration::from_millis(250);
/// The time for the answer of the peer's host. On a local network it takes a millisecond.
const ICMP_WITHIN: Duration = Duration::from_millis(100);
/// The time in which a suspected peer must be heard: it sends a keep-alive in it.
const PROBE_WITHIN: Duration = Duration::from_millis(200);

/// Ends when the process of a connected peer has died.
pub(super) async fn has_died(address: SocketAddr, control: Connection, data: DataConnection) {
    let received = || control.stats().udp_rx.datagrams + data.received();
    let (mut heard, mut since) = (received(), Instant::now());
    loop {
        tokio::time::sleep(LOOK_EVERY).await;
        let now = received();
        if now != heard {
            (heard, since) = (now, Instant::now());
            continue;
        }
        if since.elapsed() < SUSPECT_AFTER {
            continue;
        }
        if is_port_closed(address).await {
            tokio::time::sleep(PROBE_WITHIN).await;
            if received() == heard {
                return;
            }
        }
        since = Instant::now();
    }
}

/// Whether the host of an address says that nobody listens at its port. A node ignores the datagram, which QUIC cannot
/// read.
async fn is_port_closed(address: SocketAddr) -> bool {
    let any = match address {
        SocketAddr::V4(_) => IpAddr::V4(Ipv4Addr::UNSPECIFIED),
        SocketAddr::V6(_) => IpAddr::V6(Ipv6Addr::UNSPECIFIED),
    };
    let asked = async {
        let socket = UdpSocket::bind((any, 0)).await?;
        socket.connect(address).await?;
        socket.send(&[0]).await?;
        // A connected socket gets the ICMP error of its own datagram.
        socket.recv(&mut [0]).await
    };
    let answered = tokio::time::timeout(ICMP_WITHIN, asked).await;
    matches!(answered, Ok(Err(error)) if error.kind() == ErrorKind::ConnectionRefused)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_closed_port_is_told_from_a_silent_one() {
        let socket = UdpSocket::bind(("127.0.0.1", 0)).await.expect("a socket");
        let address = socket.local_addr().expect("an address");
        assert!(!is_port_closed(address).await);
        drop(socket);
        assert!(is_port_closed(address).await);
    }
}
