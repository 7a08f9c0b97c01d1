//! Who is let in, and who is not.

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

/// Both dial both: each sees the other, and one pair stays.
#[tokio::test(flavor = "multi_thread")]
async fn members_meet_and_part() {
    let (a, mut of_a, id_a) = network(1, Vec::new());
    let (b, mut of_b, id_b) = network(1, vec![a.address().expect("it listens")]);
    a.add_address(b.address().expect("it listens"));
    let (seen_by_a, seen_by_b) = (connected(&mut of_a).await, connected(&mut of_b).await);
    assert_eq!((seen_by_a.id, seen_by_b.id), (id_b, id_a));
    b.stop().await;
    let gone = tokio::time::timeout(Duration::from_secs(10), async {
        while !matches!(of_a.recv().await, Some(NetworkEvent::PeerDown { id, .. }) if id == id_b) {}
    });
    gone.await.expect("a hears that b has gone");
    tokio::task::spawn_blocking(move || drop((a, b))).await.expect("dropped");
}

/// Dials with a client of one's own making; whether the connection stands after a while.
async fn is_let_in(address: SocketAddr, client: quinn::ClientConfig) -> bool {
    let endpoint = quinn::Endpoint::client(loopback()).expect("a socket");
    let Ok(connection) = endpoint.connect_with(client, address, MEMBER_NAME).expect("a dial").await else {
        return false;
    };
    // TLS 1.3 tells a client at once that it is done; that it is refused comes later.
    tokio::time::timeout(Duration::from_millis(700), connection.closed()).await.is_err()
}

/// No certificate, another cluster's, one that is out of date, one that claims another node: none is let in. A member is.
#[tokio::test(flavor = "multi_thread")]
async fn only_members_are_let_in() {
    let (network, mut events, _) = network(1, Vec::new());
    let address = network.address().expect("it listens");
    let (ours, now) = (secret(1), SystemTime::now());
    let with = |secret: &ClusterSecret, validity| {
        let credentials = Credentials::make(&identity(), secret, validity).expect("a certificate");
        quic_client(&credentials, Purpose::Control).expect("a client")
    };
    assert!(is_let_in(address, with(&ours, Validity::from_now(now))).await, "a member");
    let day = Duration::from_secs(24 * 3600);
    let expired = Validity { from: now - 9 * day, to: now - day };
    assert!(!is_let_in(address, with(&ours, expired)).await, "out of date");
    let other = identity().node_id();
    let forged = impostor(&identity(), &ours, other);
    assert!(!is_let_in(address, quic_client(&forged, Purpose::Control).expect("a client")).await, "another's name");
    // A stranger who does not even care whom it speaks to.
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

/// A relay that lets a client begin a handshake and not end it: of what the client sends, the first two datagrams pass (the
/// address it claims, and that it is there); all that the server answers does. How much that was is counted.
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
                        // What the kernel drops is not sent.
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

/// Handshakes that are begun by the hundred and held open by someone who is where he says keep out nobody who is elsewhere,
/// and whoever is at the same address no longer than their deadline; those who are in notice nothing.
#[tokio::test(flavor = "multi_thread")]
async fn half_open_handshakes_keep_nobody_out() {
    let (victim, mut events, _) = network(1, Vec::new());
    let address = victim.address().expect("it listens");
    let (inside, mut of_inside, id_inside) = network_at([127, 0, 0, 3].into(), 1, vec![address]);
    // Whoever drops a peer ends its connections.
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
    // A Retry for each, and for those that are held, the server's half of the handshake.
    assert!(answers.load(Ordering::Relaxed) > 300 + HANDSHAKES_OF_ADDRESS_MAX, "they are held");
    // The attacker's half of them included.
    let grown = resident_bytes().saturating_sub(before);
    println!("{grown} bytes more");
    assert!(grown < 64 << 20, "{grown} bytes more");
    let begun = std::time::Instant::now();
    let (elsewhere, _of_elsewhere, id_elsewhere) = network_at([127, 0, 0, 2].into(), 1, vec![address]);
    let elsewhere_at_victim = connected(&mut events).await;
    assert_eq!(elsewhere_at_victim.id, id_elsewhere);
    assert!(begun.elapsed() < HANDSHAKE_DEADLINE / 2, "{:?}: while they are held", begun.elapsed());
    let (same, _of_same, id_same) = network(1, vec![address]);
    assert_eq!(connected(&mut events).await.id, id_same);
    inside_peer.data.open_link(&1_u8).await.expect("its connections are as they were");
    drop(held);
    tokio::task::spawn_blocking(move || drop((victim, inside, elsewhere, same))).await.expect("dropped");
}

/// Whoever answers a dial must be a member, too: a server of another cluster, one that is out of date and one that claims
/// another's name are not spoken to.
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
        let (endpoint, _accepted) = Endpoint::open(local, loopback()).expect("it listens");
        let dialled = endpoint.dial(address, Purpose::Control).await.map(|authenticated| authenticated.id);
        accepting.abort();
        dialled
    };
    assert!(dial(with(&ours, Validity::from_now(now))).await.is_ok(), "a member");
    let expired = Validity { from: now - 9 * day, to: now - day };
    assert!(dial(with(&ours, expired)).await.is_err(), "out of date");
    assert!(dial(with(&secret(2), Validity::from_now(now))).await.is_err(), "another cluster's");
    let forged = impostor(&identity(), &ours, identity().node_id());
    assert!(dial(forged).await.is_err(), "another's name");
}

/// What a network tells within `time`.
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

/// A second address of a peer that is here is no peer that comes anew: its connections stay.
#[tokio::test(flavor = "multi_thread")]
async fn a_second_address_of_a_peer_changes_nothing() {
    let any = SocketAddr::from(([0, 0, 0, 0], 0));
    let (b, mut of_b, _) = network_at(any.ip(), 1, Vec::new());
    let port = b.address().expect("it listens").port();
    let addresses = [1, 2, 3].map(|last| SocketAddr::from(([127, 0, 0, last], port)));
    let (a, mut of_a, _) = network_at(any.ip(), 1, addresses[..2].to_vec());
    let _peers = (connected(&mut of_a).await, connected(&mut of_b).await);
    a.add_address(addresses[2]);
    let (at_a, at_b) = tokio::join!(told(&mut of_a, Duration::from_secs(2)), told(&mut of_b, Duration::from_secs(2)));
    assert!(at_a.is_empty() && at_b.is_empty(), "{at_a:?} {at_b:?}");
    tokio::task::spawn_blocking(move || drop((a, b))).await.expect("dropped");
}

/// Whoever is evicted is not dialled again and again.
#[tokio::test(flavor = "multi_thread")]
async fn an_evicted_member_is_left_in_peace() {
    let (b, mut of_b, id_b) = network(1, Vec::new());
    let (a, mut of_a, _) = network(1, vec![b.address().expect("it listens")]);
    let _peers = (connected(&mut of_a).await, connected(&mut of_b).await);
    a.evict(id_b);
    let at_b = told(&mut of_b, Duration::from_secs(4)).await;
    let met = at_b.iter().filter(|event| matches!(event, NetworkEvent::PeerUp(_))).count();
    assert!(met <= 8, "it was dialled {met} times in four seconds");
    let at_a = told(&mut of_a, Duration::ZERO).await;
    assert!(!at_a.iter().any(|event| matches!(event, NetworkEvent::PeerUp(_))), "{at_a:?}");
    tokio::task::spawn_blocking(move || drop((a, b))).await.expect("dropped");
}

/// A port that is taken is an error that says so, on whatever runtime.
#[tokio::test(flavor = "multi_thread")]
async fn a_port_that_is_taken_is_named() {
    let (network, _events, _) = network(1, Vec::new());
    let address = network.address().expect("it listens");
    let config =
        NetworkConfig { listen: address, ..NetworkConfig::loopback(secret(1), Vec::new()).expect("random bytes") };
    let refused = Network::start(config).map(drop).expect_err("it is taken").to_string();
    assert!(refused.contains(&address.to_string()) && refused.contains("--listen"), "{refused}");
    tokio::task::spawn_blocking(move || drop(network)).await.expect("dropped");
}

/// Garbage on the port keeps no member out.
#[tokio::test(flavor = "multi_thread")]
async fn noise_keeps_nobody_out() {
    let (a, mut events, _) = network(1, Vec::new());
    let address = a.address().expect("it listens");
    let noise = std::net::UdpSocket::bind(loopback()).expect("a socket");
    let mut random = fastrand::Rng::with_seed(7);
    for _ in 0..2000 {
        let bytes: Vec<u8> = (0..random.usize(1..1400)).map(|_| random.u8(..)).collect();
        // What the kernel drops is no noise.
        let _ = noise.send_to(&bytes, address);
    }
    let (b, _of_b, id_b) = network(1, vec![address]);
    assert_eq!(connected(&mut events).await.id, id_b);
    tokio::task::spawn_blocking(move || drop((a, b))).await.expect("dropped");
}
