//! The round trip of a row of activations between two nodes, compared with the same bytes on a plain quinn stream.

use anyhow::Context;
use exo_net::{
    Announced, ClusterSecret, DataConnection, LinkReceiver, LinkSender, Network, NetworkConfig, NetworkEvent, Payload,
    Peer, Received, WireType,
};
use quinn::crypto::rustls::{QuicClientConfig, QuicServerConfig};
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use std::net::{Ipv4Addr, SocketAddr};
use std::sync::Arc;
use std::time::{Duration, Instant};

/// The numbers of a row: 16 KiB of f32.
const NUMBERS: usize = 4096;
const HOPS: usize = 2000;
/// The size of `exo-net`'s socket buffers.
const SOCKET_BYTES: usize = 4 << 20;
/// The first hops of each round, which are not counted.
const WARM_UP: usize = 200;

/// One-way times (half a round trip): median and 99th percentile, in microseconds.
struct Times {
    p50: f64,
    p99: f64,
}

impl Times {
    fn of(mut took: Vec<Duration>) -> Self {
        took.sort_unstable();
        let at = |share: f64| took[(took.len() as f64 * share) as usize].as_secs_f64() * 1e6 / 2.0;
        Self { p50: at(0.5), p99: at(0.99) }
    }
}

pub(crate) fn bench(repeat: usize) -> anyhow::Result<()> {
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build()?;
    let mut rounds = Vec::new();
    for _ in 0..repeat {
        let link = runtime.block_on(over_link())?;
        let stream = runtime.block_on(over_stream())?;
        rounds.push((Times::of(link), Times::of(stream)));
    }
    for (name, of) in [("p50", (|times| times.p50) as fn(&Times) -> f64), ("p99", |times| times.p99)] {
        let [link, stream, ratio] = [
            rounds.iter().map(|(link, _)| of(link)).collect(),
            rounds.iter().map(|(_, stream)| of(stream)).collect(),
            rounds.iter().map(|(link, stream)| of(link) / of(stream)).collect(),
        ]
        .map(crate::median);
        println!("hop of 16 KiB, {name}: {link:.0} µs over a link, {stream:.0} µs over a stream: {ratio:.2}×");
    }
    Ok(())
}

fn network(
    secret: &ClusterSecret,
    peers: Vec<SocketAddr>,
) -> anyhow::Result<(Network, tokio::sync::mpsc::Receiver<NetworkEvent>)> {
    let config = NetworkConfig::loopback(secret.clone(), peers)?;
    Ok(Network::start(config)?)
}

async fn peer(events: &mut tokio::sync::mpsc::Receiver<NetworkEvent>) -> anyhow::Result<Box<Peer>> {
    loop {
        // Dropping the peer closes its connections.
        if let NetworkEvent::PeerUp(peer) = events.recv().await.context("the network has stopped")? {
            return Ok(peer);
        }
    }
}

async fn pass_back(mut from: LinkReceiver, mut to: LinkSender) -> anyhow::Result<()> {
    while let Some((count, Received::Numbers(numbers))) = from.receive::<u64>(fits).await? {
        from.taken().await?;
        to.send(&count, Payload::Numbers(&numbers, WireType::F32)).await?;
    }
    Ok(())
}

fn fits(_: &u64, announced: Announced) -> Result<(), String> {
    match announced {
        Announced::Numbers { count: NUMBERS } => Ok(()),
        _ => Err("a row of another size".to_owned()),
    }
}

async fn receiver(data: &DataConnection) -> anyhow::Result<LinkReceiver> {
    let mut stream = data.accept().await?;
    stream.reader.receive::<u8>(|_, _| Ok(())).await?.context("the link closed before its greeting")?;
    Ok(LinkReceiver::new(stream))
}

async fn over_link() -> anyhow::Result<Vec<Duration>> {
    let secret = ClusterSecret::random()?;
    let (far, mut far_events) = network(&secret, Vec::new())?;
    let address = far.address().context("the network has no address")?;
    let (near, mut near_events) = network(&secret, vec![address])?;
    let (near_peer, far_peer) = (peer(&mut near_events).await?, peer(&mut far_events).await?);
    let (near_data, far_data) = (near_peer.data.clone(), far_peer.data.clone());
    // As in a node, links are served on the network's own thread.
    let (back, there) = (far_data.clone(), near_data.clone());
    far_data.spawn(async move {
        let Ok(from) = receiver(&back).await else { return };
        let Ok(to) = back.open_link(&0u8).await else { return };
        // An error means that the connection has closed.
        let _ = pass_back(from, to).await;
    });
    let (done, result) = tokio::sync::oneshot::channel();
    near_data.spawn(async move {
        // The receiver waits below, so the send succeeds.
        let _ = done.send(ping(&there).await);
    });
    let mut took = result.await??;
    near.stop().await;
    far.stop().await;
    tokio::task::spawn_blocking(move || drop((near, far))).await?;
    Ok(took.split_off(WARM_UP))
}

async fn ping(data: &DataConnection) -> anyhow::Result<Vec<Duration>> {
    let mut to = data.open_link(&0u8).await?;
    let mut from = receiver(data).await?;
    let numbers = vec![0.5; NUMBERS];
    let mut took = Vec::with_capacity(HOPS);
    for hop in 0..HOPS as u64 {
        let begun = Instant::now();
        to.send(&hop, Payload::Numbers(&numbers, WireType::F32)).await?;
        from.receive::<u64>(fits).await?.context("the link closed before the row came back")?;
        took.push(begun.elapsed());
        from.taken().await?;
    }
    Ok(took)
}

/// An endpoint whose socket buffers are as large as a node's.
fn endpoint(any: SocketAddr, server: Option<quinn::ServerConfig>) -> anyhow::Result<quinn::Endpoint> {
    let socket = socket2::Socket::new(socket2::Domain::IPV4, socket2::Type::DGRAM, Some(socket2::Protocol::UDP))?;
    socket.set_recv_buffer_size(SOCKET_BYTES)?;
    socket.set_send_buffer_size(SOCKET_BYTES)?;
    socket.set_nonblocking(true)?;
    socket.bind(&any.into())?;
    let runtime = Arc::new(quinn::TokioRuntime);
    Ok(quinn::Endpoint::new(quinn::EndpointConfig::default(), server, socket.into(), runtime)?)
}

async fn over_stream() -> anyhow::Result<Vec<Duration>> {
    let key = rcgen::generate_simple_self_signed(["localhost".to_owned()])?;
    let certificate = CertificateDer::from(key.cert.der().to_vec());
    let secret = PrivateKeyDer::try_from(key.signing_key.serialize_der()).map_err(anyhow::Error::msg)?;
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let server = rustls::ServerConfig::builder_with_provider(Arc::clone(&provider))
        .with_protocol_versions(&[&rustls::version::TLS13])?
        .with_no_client_auth()
        .with_single_cert(vec![certificate.clone()], secret)?;
    let server = quinn::ServerConfig::with_crypto(Arc::new(QuicServerConfig::try_from(server)?));
    let mut roots = rustls::RootCertStore::empty();
    roots.add(certificate)?;
    let client = rustls::ClientConfig::builder_with_provider(provider)
        .with_protocol_versions(&[&rustls::version::TLS13])?
        .with_root_certificates(roots)
        .with_no_client_auth();
    let client = quinn::ClientConfig::new(Arc::new(QuicClientConfig::try_from(client)?));
    let any = SocketAddr::from((Ipv4Addr::LOCALHOST, 0));
    let (far, near) = (endpoint(any, Some(server))?, endpoint(any, None)?);
    let address = far.local_addr()?;
    let accepting = tokio::spawn(async move {
        let connection = far.accept().await.context("no client connected")?.await?;
        let (mut to, mut from) = connection.accept_bi().await?;
        let mut bytes = vec![0; NUMBERS * 4];
        // The loop ends when the connection closes.
        while from.read_exact(&mut bytes).await.is_ok() {
            to.write_all(&bytes).await?;
        }
        Ok::<_, anyhow::Error>(())
    });
    let connection = near.connect_with(client, address, "localhost")?.await?;
    let (mut to, mut from) = connection.open_bi().await?;
    let mut bytes = vec![1; NUMBERS * 4];
    let mut took = Vec::with_capacity(HOPS);
    for _ in 0..HOPS {
        let begun = Instant::now();
        to.write_all(&bytes).await?;
        from.read_exact(&mut bytes).await?;
        took.push(begun.elapsed());
    }
    connection.close(quinn::VarInt::from_u32(0), b"done");
    let _ = accepting.await?;
    Ok(took.split_off(WARM_UP))
}
