//! What a network tells of addresses that are dialled in vain, and of copied keys.

use super::loopback::{connected, loopback, network, network_at, secret};
use crate::{DialFailure, Identity, Network, NetworkConfig, NetworkEvent, NodeId};
use std::net::{Ipv6Addr, SocketAddr, UdpSocket};
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::mpsc;

type Events = mpsc::Receiver<NetworkEvent>;

/// The first event that `read` accepts.
async fn first<T>(events: &mut Events, read: impl Fn(NetworkEvent) -> Option<T>) -> T {
    let found = async {
        loop {
            if let Some(found) = read(events.recv().await.expect("the network runs")) {
                return found;
            }
        }
    };
    tokio::time::timeout(Duration::from_secs(20), found).await.expect("in time")
}

async fn failure(events: &mut Events) -> (SocketAddr, Option<DialFailure>) {
    first(events, |event| match event {
        NetworkEvent::Dialled { address, failure } => Some((address, failure)),
        _ => None,
    })
    .await
}

async fn clash(events: &mut Events) -> (NodeId, SocketAddr, SocketAddr) {
    first(events, |event| match event {
        NetworkEvent::SameKey { id, first, second } => Some((id, first, second)),
        _ => None,
    })
    .await
}

/// A node learns why nobody answers: another cluster, silence, a network without a route, an eviction. It is told again
/// when a member answers.
#[tokio::test(flavor = "multi_thread")]
async fn a_dial_in_vain_has_a_reason() {
    let (stranger, _of_stranger, _) = network(2, Vec::new());
    let address = stranger.address().expect("an address");
    let (a, mut of_a, _) = network(1, vec![address]);
    assert_eq!(failure(&mut of_a).await, (address, Some(DialFailure::OtherCluster)));
    let silent = UdpSocket::bind(loopback()).expect("a socket").local_addr().expect("an address");
    let (b, mut of_b, _) = network(1, vec![silent]);
    assert_eq!(failure(&mut of_b).await, (silent, Some(DialFailure::Silent)));
    let config =
        NetworkConfig { listen: silent, ..NetworkConfig::loopback(secret(1), Vec::new()).expect("random bytes") };
    let (late, _of_late) = Network::start(config).expect("started");
    assert_eq!(failure(&mut of_b).await, (silent, None), "a member answers now");
    let (c, _of_c, _) = network(1, Vec::new());
    let address = c.address().expect("an address");
    let config = NetworkConfig::loopback(secret(1), vec![address]).expect("random bytes");
    c.evict(config.identity.node_id(), "c".to_owned());
    let (evicted, mut of_evicted) = Network::start(config).expect("started");
    assert_eq!(failure(&mut of_evicted).await, (address, Some(DialFailure::Evicted { by: "c".to_owned() })));
    tokio::task::spawn_blocking(move || drop((stranger, a, b, late, c, evicted))).await.expect("dropped");
}

/// Of two running nodes with the same key, the first stays connected. The member, and the second node, are told.
#[tokio::test(flavor = "multi_thread")]
async fn a_copied_key_is_told_and_the_first_node_stays() {
    let (member, mut of_member, _) = network(1, Vec::new());
    let address = member.address().expect("an address");
    let identity = Arc::new(Identity::ephemeral().expect("random bytes"));
    let id = identity.node_id();
    let with_key = |peers| {
        let config = NetworkConfig::loopback(secret(1), peers).expect("random bytes");
        Network::start(NetworkConfig { identity: Arc::clone(&identity), ..config }).expect("started")
    };
    let (original, mut of_original) = with_key(vec![address]);
    // Dropping a peer closes its connections.
    let (peer, _at_original) = (connected(&mut of_member).await, connected(&mut of_original).await);
    assert_eq!(peer.id, id);
    let (copy, mut of_copy) = with_key(vec![address, original.address().expect("an address")]);
    let places = (original.address().expect("an address"), copy.address().expect("an address"));
    assert_eq!(clash(&mut of_member).await, (id, places.0, places.1));
    let told = first(&mut of_copy, |event| match event {
        NetworkEvent::Dialled { address: at, failure: Some(failure) } if at == address => Some(failure),
        _ => None,
    });
    assert_eq!(told.await, DialFailure::SameKey { first: places.0.to_string() });
    assert_eq!(clash(&mut of_original).await.0, id, "the copy has dialled it, too");
    let ended = tokio::time::timeout(Duration::from_secs(1), peer.data.closed()).await;
    assert!(ended.is_err(), "the first does not go on: {ended:?}");
    tokio::task::spawn_blocking(move || drop((member, original, copy))).await.expect("dropped");
}

/// A node that is killed and starts again is connected again, although the member still has its old connection.
#[tokio::test(flavor = "multi_thread")]
async fn a_node_that_starts_again_is_no_copy() {
    let (member, mut of_member, _) = network(1, Vec::new());
    let address = member.address().expect("an address");
    let identity = Arc::new(Identity::ephemeral().expect("random bytes"));
    let with_key = || {
        let config = NetworkConfig::loopback(secret(1), vec![address]).expect("random bytes");
        Network::start(NetworkConfig { identity: Arc::clone(&identity), ..config }).expect("started")
    };
    let (before, _of_before) = with_key();
    let session = connected(&mut of_member).await.session;
    // Dropping the network closes no connection: its thread ends, as that of a killed process.
    tokio::task::spawn_blocking(move || drop(before)).await.expect("dropped");
    let (after, _of_after) = with_key();
    let again = connected(&mut of_member).await;
    assert!(again.id == identity.node_id() && again.session > session);
    tokio::task::spawn_blocking(move || drop((member, after))).await.expect("dropped");
}

/// A node on `::` is reached over both families, and shows addresses of IPv4 as such.
#[tokio::test(flavor = "multi_thread")]
async fn one_socket_serves_both_families() {
    let (a, mut of_a, _) = network_at(Ipv6Addr::UNSPECIFIED.into(), 1, Vec::new());
    let port = a.address().expect("an address").port();
    for listen in ["127.0.0.1", "::1"] {
        let ip = listen.parse().expect("an address");
        if UdpSocket::bind(SocketAddr::new(ip, 0)).is_err() {
            eprintln!("SKIPPED: this machine has no {ip}");
            continue;
        }
        let (b, mut of_b, _) = network_at(ip, 1, vec![SocketAddr::new(ip, port)]);
        let (at_a, at_b) = (connected(&mut of_a).await, connected(&mut of_b).await);
        assert_eq!((at_a.address.ip(), at_b.address), (ip, SocketAddr::new(ip, port)));
        tokio::task::spawn_blocking(move || drop(b)).await.expect("dropped");
    }
    let config = NetworkConfig::loopback(secret(1), vec!["[::1]:9".parse().expect("an address")]);
    let refused = Network::start(config.expect("random bytes")).expect_err("IPv4 only");
    assert!(refused.to_string().contains("[::1]:9 has an IPv6 address"), "{refused}");
    tokio::task::spawn_blocking(move || drop(a)).await.expect("dropped");
}
