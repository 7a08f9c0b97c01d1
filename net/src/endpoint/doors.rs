//! Who is let in, and who is not.

use super::*;
use crate::certificate::tests::impostor;
use crate::{Discover, Network, NetworkConfig, NetworkEvent};
use std::collections::BTreeSet;

fn loopback() -> SocketAddr {
    SocketAddr::from(([127, 0, 0, 1], 0))
}

fn identity() -> Identity {
    Identity::ephemeral().expect("random bytes")
}

pub(crate) fn secret(byte: u8) -> ClusterSecret {
    ClusterSecret::from_bytes([byte; 32])
}

pub(crate) fn network(byte: u8, peers: Vec<SocketAddr>) -> (Network, mpsc::Receiver<NetworkEvent>, NodeId) {
    let identity = Arc::new(identity());
    let id = identity.node_id();
    let config = NetworkConfig {
        identity,
        secret: secret(byte),
        name: "test".to_owned(),
        listen: loopback(),
        peers,
        discover: Discover::Off,
        evicted: BTreeSet::new(),
    };
    let (network, events) = Network::start(config).expect("it listens");
    (network, events, id)
}

pub(crate) async fn up(events: &mut mpsc::Receiver<NetworkEvent>) -> Box<crate::Peer> {
    loop {
        let event = tokio::time::timeout(Duration::from_secs(10), events.recv()).await.expect("in time");
        if let NetworkEvent::PeerUp(peer) = event.expect("the network lives") {
            return peer;
        }
    }
}

/// Both dial both: each sees the other, and one pair stays.
#[tokio::test(flavor = "multi_thread")]
async fn members_meet_and_part() {
    let (a, mut of_a, id_a) = network(1, Vec::new());
    let (b, mut of_b, id_b) = network(1, vec![a.address().expect("it listens")]);
    a.hear_of(b.address().expect("it listens"));
    let (seen_by_a, seen_by_b) = (up(&mut of_a).await, up(&mut of_b).await);
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
        let tls = crate::certificate::tests::client_trusting(&theirs, credentials, b"exo-control/1");
        quinn::ClientConfig::new(Arc::new(QuicClientConfig::try_from(tls).expect("a cipher")))
    };
    let strange = Credentials::make(&identity(), &secret(2), Validity::from_now(now)).expect("a certificate");
    assert!(!is_let_in(address, careless(None)).await, "no certificate");
    assert!(!is_let_in(address, careless(Some(&strange))).await, "another cluster's");
    assert!(events.try_recv().is_err(), "nobody became a peer");
    tokio::task::spawn_blocking(move || drop(network)).await.expect("dropped");
}

/// Garbage on the port, and handshakes that are begun and not ended, keep no member out.
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
    let credentials = Credentials::make(&identity(), &secret(1), Validity::from_now(SystemTime::now())).expect("made");
    let client = quic_client(&credentials, Purpose::Data).expect("a client");
    let mut begun = Vec::new();
    for _ in 0..300 {
        let endpoint = quinn::Endpoint::client(loopback()).expect("a socket");
        begun.push((endpoint.connect_with(client.clone(), address, MEMBER_NAME).expect("a dial"), endpoint));
    }
    drop(begun);
    let (b, _of_b, id_b) = network(1, vec![address]);
    assert_eq!(up(&mut events).await.id, id_b);
    tokio::task::spawn_blocking(move || drop((a, b))).await.expect("dropped");
}
