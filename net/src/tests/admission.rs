//! Admission: which nodes may connect, and which may not.

use super::loopback::{connected, loopback, network, network_at, resident_bytes, secret};
use crate::certificate::tests::{client_trusting, impostor};
use crate::certificate::{Credentials, MEMBER_NAME, Validity};
use crate::endpoint::{
    Endpoint, HANDSHAKE_DEADLINE, HANDSHAKES_OF_ADDRESS_MAX, Local, Purpose, quic_client, quic_server,
};
use crate::{ClusterSecret, Identity, Network, NetworkConfig, NetworkEvent};
use quinn::crypto::rustls::QuicClientConfig;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, SystemTime};
use tokio::sync::mpsc;

fn identity() -> Identity {
    Identity::ephemeral().expect("random bytes")
}

/// Both nodes dial: each reports the other as connected, and reports when the other stops.
#[tokio::test(flavor = "multi_thread")]
async fn members_connect_and_disconnect() {
    let (a, mut of_a, id_a) = network(1, Vec::new());
    let (b, mut of_b, id_b) = network(1, vec![a.address().expect("an address")]);
    a.add_address(b.address().expect("an address"));
    let (seen_by_a, seen_by_b) = (connected(&mut of_a).await, connected(&mut of_b).await);
    assert_eq!((seen_by_a.id, seen_by_b.id), (id_b, id_a));
    b.stop().await;
    let gone = tokio::time::timeout(Duration::from_secs(10), async {
        while !matches!(of_a.recv().await, Some(NetworkEvent::PeerDown { id, .. }) if id == id_b) {}
    });
    gone.await.expect("a reports that b is disconnected");
    tokio::task::spawn_blocking(move || drop((a, b))).await.expect("dropped");
}

/// Dials with `client`; returns whether the connection is still open after 700 ms.
async fn is_let_in(address: SocketAddr, client: quinn::ClientConfig) -> bool {
    let endpoint = quinn::Endpoint::client(loopback()).expect("a socket");
    let Ok(connection) = endpoint.connect_with(client, address, MEMBER_NAME).expect("a dial").await else {
        return false;
    };
    // In TLS 1.3 the client finishes its handshake before it learns that the server refuses its certificate.
    tokio::time::timeout(Duration::from_millis(700), connection.closed()).await.is_err()
}

/// A member is admitted. A client is refused if its certificate is missing, expired, or of another cluster or node.
#[tokio::test(flavor = "multi_thread")]
async fn only_members_are_admitted() {
    let (network, mut events, _) = network(1, Vec::new());
    let address = network.address().expect("an address");
    let (ours, now) = (secret(1), SystemTime::now());
    let with = |secret: &ClusterSecret, validity| {
        let credentials = Credentials::make(&identity(), secret, validity).expect("a certificate");
        quic_client(&credentials, Purpose::Control).expect("a client")
    };
    assert!(is_let_in(address, with(&ours, Validity::from_now(now))).await, "a member");
    let day = Duration::from_secs(24 * 3600);
    let expired = Validity { from: now - 9 * day, to: now - day };
    assert!(!is_let_in(address, with(&ours, expired)).await, "expired");
    let other = identity().node_id();
    let forged = impostor(&identity(), &ours, other);
    assert!(!is_let_in(address, quic_client(&forged, Purpose::Control).expect("a client")).await, "another name");
    // A client that accepts this cluster's server, but shows other credentials or none.
    let careless = |credentials: Option<&Credentials>| {
        let theirs = Credentials::make(&identity(), &ours, Validity::from_now(now)).expect("a certificate");
        let tls = client_trusting(&theirs, credentials, b"exo-control/1");
        quinn::ClientConfig::new(Arc::new(QuicClientConfig::try_from(tls).expect("a cipher")))
    };
    let strange = Credentials::make(&identity(), &secret(2), Validity::from_now(now)).expect("a certificate");
    assert!(!is_let_in(address, careless(None)).await, "no certificate");
    assert!(!is_let_in(address, careless(Some(&strange))).await, "another cluster's");
    assert!(events.try_recv().is_err(), "nobody became a peer");
    tokio::task::spawn_blocking(move || drop(network)).await.expect("dropped");
}

/// Starts a relay that lets a client begin a handshake but not finish it, and returns the relay's address. The relay
/// forwards the client's first two datagrams (its claimed address and the proof of it) and all of the server's, and
/// counts the server's in `answers`.
async fn half_open(server: SocketAddr, answers: Arc<AtomicUsize>) -> SocketAddr {
    let near = tokio::net::UdpSocket::bind(loopback()).await.expect("a socket");
    let far = tokio::net::UdpSocket::bind(loopback()).await.expect("a socket");
    let address = near.local_addr().expect("an address");
    tokio::spawn(async move {
        let (mut from_client, mut from_server) = (vec![0; 2048], vec![0; 2048]);
        let (mut client, mut passed) = (None, 0);
        loop {
            tokio::select! {
                Ok((length, from)) = near.recv_from(&mut from_client) => {
                    client = Some(from);
                    passed += 1;
                    if passed <= 2 {
                        // A datagram that the kernel drops is lost, as on any network.
                        let _ = far.send_to(&from_client[..length], server).await;
                    }
                }
                Ok((length, _)) = far.recv_from(&mut from_server) => {
                    answers.fetch_add(1, Ordering::Relaxed);
                    if let Some(client) = client {
                        let _ = near.send_to(&from_server[..length], client).await;
                    }
                }
            }
        }
    });
    address
}

/// Hundreds of half-open handshakes from one validated address keep out no node at another address, and nodes at the
/// same address only until the handshakes' deadline. Connected members stay connected.
#[tokio::test(flavor = "multi_thread")]
async fn half_open_handshakes_keep_nobody_out() {
    let (victim, mut events, _) = network(1, Vec::new());
    let address = victim.address().expect("an address");
    let (inside, mut of_inside, id_inside) = network_at([127, 0, 0, 3].into(), 1, vec![address]);
    // Dropping a peer closes its connections.
    let inside_at_victim = connected(&mut events).await;
    let inside_peer = connected(&mut of_inside).await;
    assert_eq!(inside_at_victim.id, id_inside);
    let credentials = Credentials::make(&identity(), &secret(1), Validity::from_now(SystemTime::now())).expect("made");
    let client = quic_client(&credentials, Purpose::Data).expect("a client");
    let endpoint = quinn::Endpoint::client(loopback()).expect("a socket");
    let answers = Arc::new(AtomicUsize::new(0));
    let (before, mut held) = (resident_bytes(), Vec::new());
    for _ in 0..300 {
        let relay = half_open(address, Arc::clone(&answers)).await;
        held.push(endpoint.connect_with(client.clone(), relay, MEMBER_NAME).expect("a dial"));
    }
    tokio::time::sleep(Duration::from_millis(500)).await;
    // Each handshake gets a Retry, and each held one the server's half of the handshake, too.
    assert!(answers.load(Ordering::Relaxed) > 300 + HANDSHAKES_OF_ADDRESS_MAX, "handshakes are held open");
    // The memory of the attacker's half of the handshakes is included.
    let grown = resident_bytes().saturating_sub(before);
    println!("{grown} bytes more");
    assert!(grown < 64 << 20, "{grown} bytes more");
    let begun = std::time::Instant::now();
    let (elsewhere, _of_elsewhere, id_elsewhere) = network_at([127, 0, 0, 2].into(), 1, vec![address]);
    let elsewhere_at_victim = connected(&mut events).await;
    assert_eq!(elsewhere_at_victim.id, id_elsewhere);
    assert!(begun.elapsed() < HANDSHAKE_DEADLINE / 2, "connected after {:?}", begun.elapsed());
    let (same, _of_same, id_same) = network(1, vec![address]);
    assert_eq!(connected(&mut events).await.id, id_same);
    inside_peer.data.open_link(&1_u8).await.expect("the inside member's connections are open");
    drop(held);
    tokio::task::spawn_blocking(move || drop((victim, inside, elsewhere, same))).await.expect("dropped");
}

/// A dialled server must be a member, too: a dial fails if the server's certificate is expired, or of another cluster
/// or node.
#[tokio::test(flavor = "multi_thread")]
async fn only_members_are_dialled() {
    let (ours, now, day) = (secret(1), SystemTime::now(), Duration::from_secs(24 * 3600));
    let with = |secret: &ClusterSecret, validity| Credentials::make(&identity(), secret, validity).expect("made");
    let dial = async |server: Credentials| {
        let config = quic_server(&server).expect("a server");
        let server = quinn::Endpoint::server(config, loopback()).expect("a socket");
        let address = server.local_addr().expect("an address");
        let accepting = tokio::spawn(async move {
            while let Some(incoming) = server.accept().await {
                if let Ok(connection) = incoming.await {
                    connection.closed().await;
                }
            }
        });
        let local = Local { identity: Arc::new(identity()), secret: secret(1) };
        let (endpoint, _accepted) = Endpoint::open(local, loopback()).expect("started");
        let dialled = endpoint.dial(address, Purpose::Control).await.map(|authenticated| authenticated.id);
        accepting.abort();
        dialled
    };
    assert!(dial(with(&ours, Validity::from_now(now))).await.is_ok(), "a member");
    let expired = Validity { from: now - 9 * day, to: now - day };
    assert!(dial(with(&ours, expired)).await.is_err(), "expired");
    assert!(dial(with(&secret(2), Validity::from_now(now))).await.is_err(), "another cluster's");
    let forged = impostor(&identity(), &ours, identity().node_id());
    assert!(dial(forged).await.is_err(), "another name");
}

/// The events that a network reports within `time`.
async fn told(events: &mut mpsc::Receiver<NetworkEvent>, time: Duration) -> Vec<NetworkEvent> {
    let mut told = Vec::new();
    let _ = tokio::time::timeout(time, async {
        while let Some(event) = events.recv().await {
            told.push(event);
        }
    })
    .await;
    told
}

/// A dial to a second address of a connected peer does not replace the peer's connections.
#[tokio::test(flavor = "multi_thread")]
async fn a_second_address_of_a_peer_changes_nothing() {
    let any = SocketAddr::from(([0, 0, 0, 0], 0));
    let (b, mut of_b, _) = network_at(any.ip(), 1, Vec::new());
    let port = b.address().expect("an address").port();
    let addresses = [1, 2, 3].map(|last| SocketAddr::from(([127, 0, 0, last], port)));
    let (a, mut of_a, _) = network_at(any.ip(), 1, addresses[..2].to_vec());
    let _peers = (connected(&mut of_a).await, connected(&mut of_b).await);
    a.add_address(addresses[2]);
    let (at_a, at_b) = tokio::join!(told(&mut of_a, Duration::from_secs(2)), told(&mut of_b, Duration::from_secs(2)));
    assert!(at_a.is_empty() && at_b.is_empty(), "{at_a:?} {at_b:?}");
    tokio::task::spawn_blocking(move || drop((a, b))).await.expect("dropped");
}

/// An evicted member is not dialled again and again.
#[tokio::test(flavor = "multi_thread")]
async fn an_evicted_member_is_not_dialled_repeatedly() {
    let (b, mut of_b, id_b) = network(1, Vec::new());
    let (a, mut of_a, _) = network(1, vec![b.address().expect("an address")]);
    let _peers = (connected(&mut of_a).await, connected(&mut of_b).await);
    a.evict(id_b, "a".to_owned());
    let at_b = told(&mut of_b, Duration::from_secs(4)).await;
    let met = at_b.iter().filter(|event| matches!(event, NetworkEvent::PeerUp(_))).count();
    assert!(met <= 8, "the evicted member was dialled {met} times in four seconds");
    let at_a = told(&mut of_a, Duration::ZERO).await;
    assert!(!at_a.iter().any(|event| matches!(event, NetworkEvent::PeerUp(_))), "{at_a:?}");
    tokio::task::spawn_blocking(move || drop((a, b))).await.expect("dropped");
}

/// A port in use is an error that names the address, also when the caller runs on a tokio runtime.
#[tokio::test(flavor = "multi_thread")]
async fn a_port_in_use_is_reported() {
    let (network, _events, _) = network(1, Vec::new());
    let address = network.address().expect("an address");
    let config =
        NetworkConfig { listen: address, ..NetworkConfig::loopback(secret(1), Vec::new()).expect("random bytes") };
    let refused = Network::start(config).map(drop).expect_err("the port is in use").to_string();
    assert!(refused.contains(&address.to_string()) && refused.contains("choose another port"), "{refused}");
    tokio::task::spawn_blocking(move || drop(network)).await.expect("dropped");
}

/// Garbage on the port keeps no member out.
#[tokio::test(flavor = "multi_thread")]
async fn noise_keeps_nobody_out() {
    let (a, mut events, _) = network(1, Vec::new());
    let address = a.address().expect("an address");
    let noise = std::net::UdpSocket::bind(loopback()).expect("a socket");
    let mut random = fastrand::Rng::with_seed(7);
    for _ in 0..2000 {
        let bytes: Vec<u8> = (0..random.usize(1..1400)).map(|_| random.u8(..)).collect();
        // The test does not need the datagrams that the kernel drops.
        let _ = noise.send_to(&bytes, address);
    }
    let (b, _of_b, id_b) = network(1, vec![address]);
    assert_eq!(connected(&mut events).await.id, id_b);
    tokio::task::spawn_blocking(move || drop((a, b))).await.expect("dropped");
}
