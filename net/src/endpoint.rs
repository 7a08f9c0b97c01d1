//! The QUIC endpoint: one UDP socket that dials and accepts members.
//!
//! ```text
//! datagrams ─► quinn: address validated (Retry), TLS 1.3 both ways ─► member's key ─► id ─► Authenticated
//! ```
//! A node without the cluster's secret gets no further than the handshake. Few handshakes run at once, and each has a
//! deadline.

use crate::addresses::is_shareable;
use crate::certificate::{CertificateError, Credentials, MEMBER_NAME, PeerIdError, Validity, peer_id};
use crate::identity::{Identity, NodeId};
use crate::secret::ClusterSecret;
use parking_lot::{Mutex, MutexGuard};
use quinn::crypto::rustls::{NoInitialCipherSuite, QuicClientConfig, QuicServerConfig};
use quinn::{IdleTimeout, TransportConfig, VarInt};
use rustls::pki_types::CertificateDer;
use std::collections::HashMap;
use std::net::{IpAddr, SocketAddr, UdpSocket};
use std::sync::Arc;
use std::time::{Duration, SystemTime};
use tokio::sync::{Semaphore, mpsc};

/// The purpose of a connection, which ALPN negotiates.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Purpose {
    Control,
    Data,
}

impl Purpose {
    const ALL: [Self; 2] = [Self::Control, Self::Data];

    fn protocol(self) -> &'static [u8] {
        match self {
            Self::Control => b"exo-control/1",
            Self::Data => b"exo-data/1",
        }
    }
}

/// The time limit of a handshake, from the first datagram to the last.
pub(crate) const HANDSHAKE_DEADLINE: Duration = Duration::from_secs(5);
/// The most handshakes that run at once; quinn queues as many more, and refuses further ones.
const HANDSHAKES_MAX: usize = 64;
/// The most handshakes of one address: a node that never finishes its handshakes blocks only its own address.
pub(crate) const HANDSHAKES_OF_ADDRESS_MAX: usize = 16;
/// The most bytes of buffered datagrams, for all connections that are not accepted yet together.
const INCOMING_BYTES_MAX: u64 = 4 << 20;
/// The most authenticated connections that wait for the driver.
const AUTHENTICATED_MAX: usize = 64;
/// The silence after which a peer counts as dead, in milliseconds: a killed peer closes no connection.
const IDLE_TIMEOUT_MS: u32 = 2000;
/// The interval of keep-alives: several must be missed before a peer counts as dead.
const KEEP_ALIVE: Duration = Duration::from_millis(150);
/// A connection's window: the bytes in flight on a fast link with some latency, 10 Gbit/s over 25 ms.
const WINDOW_BYTES: u32 = 32 << 20;
/// A stream's window: a stream whose receiver does not read leaves the others seven eighths of the connection's window.
const STREAM_WINDOW_BYTES: u32 = 4 << 20;
/// The most data streams of one peer at once: requests, pipeline links and weights.
const DATA_STREAMS_MAX: u32 = 1024;
/// The kernel's socket buffers: smaller ones lose datagrams of a burst, and QUIC waits for their retransmission.
pub const SOCKET_BYTES: usize = 4 << 20;

/// The reason that a node gives when it stops.
pub(crate) const LEAVING: &[u8] = b"leaving";

/// This node's identity and its cluster's secret.
#[derive(Debug, Clone)]
pub(crate) struct Local {
    pub(crate) identity: Arc<Identity>,
    pub(crate) secret: ClusterSecret,
}

/// Why the endpoint could not be opened.
#[derive(Debug, thiserror::Error)]
pub enum BindError {
    /// The UDP socket cannot be opened.
    #[error("cannot open UDP port {address}: {source}; choose another port")]
    Socket {
        /// The address to listen on.
        address: SocketAddr,
        /// The system's error.
        source: std::io::Error,
    },
    /// The node's certificate cannot be made.
    #[error(transparent)]
    Certificate(#[from] CertificateError),
    /// The TLS configuration has no cipher suite for QUIC's first packets.
    #[error("no cipher for QUIC: {0}")]
    Cipher(#[from] NoInitialCipherSuite),
}

/// Why a dial did not reach a member.
#[derive(Debug, thiserror::Error)]
pub(crate) enum DialError {
    #[error("{0}")]
    Connect(#[from] quinn::ConnectError),
    #[error("{0}")]
    Connection(#[from] quinn::ConnectionError),
    #[error(transparent)]
    Peer(#[from] PeerIdError),
    #[error(transparent)]
    Credentials(#[from] BindError),
    #[error("no answer within {} s", HANDSHAKE_DEADLINE.as_secs())]
    TimedOut,
}

/// A connection to an authenticated member.
#[derive(Debug)]
pub(crate) struct Authenticated {
    pub(crate) id: NodeId,
    pub(crate) purpose: Purpose,
    pub(crate) connection: quinn::Connection,
}

#[derive(Debug, Clone)]
pub(crate) struct Endpoint {
    quinn: quinn::Endpoint,
    local: Local,
}

impl Endpoint {
    /// Opens the socket and answers handshakes; the channel yields members' connections. Runs on the network's runtime.
    pub(crate) fn open(local: Local, listen: SocketAddr) -> Result<(Self, mpsc::Receiver<Authenticated>), BindError> {
        let socket = match socket(listen) {
            // A system without IPv6 still has IPv4.
            Err(error) if listen.ip().is_unspecified() && is_without_ipv6(&error) => {
                socket(SocketAddr::from(([0, 0, 0, 0], listen.port())))
            }
            opened => opened,
        };
        let socket = socket.map_err(|source| BindError::Socket { address: listen, source })?;
        let server = server_config(&local)?;
        let runtime = Arc::new(quinn::TokioRuntime);
        let quinn = quinn::Endpoint::new(quinn::EndpointConfig::default(), Some(server), socket, runtime)
            .map_err(|source| BindError::Socket { address: listen, source })?;
        let (sender, receiver) = mpsc::channel(AUTHENTICATED_MAX);
        tokio::spawn(answer(quinn.clone(), sender));
        Ok((Self { quinn, local }, receiver))
    }

    pub(crate) fn address(&self) -> Option<SocketAddr> {
        self.quinn.local_addr().ok()
    }

    /// Replaces the server's certificate before it expires.
    pub(crate) fn renew(&self) -> Result<(), BindError> {
        self.quinn.set_server_config(Some(server_config(&self.local)?));
        Ok(())
    }

    pub(crate) async fn dial(&self, address: SocketAddr, purpose: Purpose) -> Result<Authenticated, DialError> {
        let config = client_config(&self.local, purpose)?;
        let connecting = self.quinn.connect_with(config, address, MEMBER_NAME)?;
        let connection = tokio::time::timeout(HANDSHAKE_DEADLINE, connecting).await;
        let connection = connection.map_err(|_| DialError::TimedOut)??;
        Ok(Authenticated { id: identify(&connection)?, purpose, connection })
    }

    /// Tells all peers that this node leaves, and waits a moment for the delivery.
    pub(crate) async fn close(&self) {
        self.quinn.close(VarInt::from_u32(0), LEAVING);
        let _ = tokio::time::timeout(KEEP_ALIVE, self.quinn.wait_idle()).await;
    }
}

/// Answers incoming handshakes until the endpoint closes.
async fn answer(endpoint: quinn::Endpoint, members: mpsc::Sender<Authenticated>) {
    let handshakes = Arc::new(Semaphore::new(HANDSHAKES_MAX));
    let by_address = ByAddress::default();
    while let Some(incoming) = endpoint.accept().await {
        // A client that cannot receive at its claimed address is not worth a handshake. quinn's Retry token has no room
        // for the scope of a link-local address, and so never holds; such clients share the handshakes of one address.
        if !incoming.remote_address_validated() && is_shareable(incoming.remote_address()) {
            if let Err(error) = incoming.retry() {
                error.into_incoming().ignore();
            }
            continue;
        }
        let place = by_address.take(incoming.remote_address().ip());
        let (Some(place), Ok(permit)) = (place, Arc::clone(&handshakes).try_acquire_owned()) else {
            incoming.refuse();
            continue;
        };
        let members = members.clone();
        tokio::spawn(async move {
            let address = incoming.remote_address();
            match tokio::time::timeout(HANDSHAKE_DEADLINE, accept(incoming)).await {
                // An error means that the node is stopping.
                Ok(Ok(member)) => drop(members.send(member).await),
                Ok(Err(error)) => tracing::info!(%address, %error, "refused a connection"),
                Err(_) => tracing::info!(%address, "a handshake took too long"),
            }
            drop((permit, place));
        });
    }
}

/// The number of running handshakes of each address.
#[derive(Debug, Clone, Default)]
struct ByAddress(Arc<Mutex<HashMap<IpAddr, usize>>>);

impl ByAddress {
    fn counts(&self) -> MutexGuard<'_, HashMap<IpAddr, usize>> {
        self.0.lock()
    }

    /// A slot for one more handshake; `None` where the address has [`HANDSHAKES_OF_ADDRESS_MAX`] already.
    fn take(&self, address: IpAddr) -> Option<HandshakeSlot> {
        let network = network_of(address);
        let mut counts = self.counts();
        let count = counts.entry(network).or_default();
        (*count < HANDSHAKES_OF_ADDRESS_MAX).then(|| {
            *count += 1;
            HandshakeSlot { of: self.clone(), network }
        })
    }
}

/// The network that counts as one address: a /64 of IPv6, of which one machine can have many addresses.
fn network_of(address: IpAddr) -> IpAddr {
    match address.to_canonical() {
        IpAddr::V6(address) => IpAddr::V6((address.to_bits() & (u128::MAX << 64)).into()),
        address => address,
    }
}

/// A running handshake of an address; dropping it frees the slot.
#[derive(Debug)]
struct HandshakeSlot {
    of: ByAddress,
    network: IpAddr,
}

impl Drop for HandshakeSlot {
    fn drop(&mut self) {
        let mut counts = self.of.counts();
        if let Some(count) = counts.get_mut(&self.network) {
            *count -= 1;
            if *count == 0 {
                counts.remove(&self.network);
            }
        }
    }
}

async fn accept(incoming: quinn::Incoming) -> Result<Authenticated, DialError> {
    let connection = incoming.accept()?.await?;
    let data =
        connection.handshake_data().and_then(|data| data.downcast::<quinn::crypto::rustls::HandshakeData>().ok());
    let protocol = data.and_then(|data| data.protocol);
    let purpose = Purpose::ALL.into_iter().find(|purpose| protocol.as_deref() == Some(purpose.protocol()));
    let id = identify(&connection)?;
    // TLS has negotiated one of `Purpose::ALL`.
    let purpose = purpose.ok_or(DialError::Peer(PeerIdError::Unreadable))?;
    Ok(Authenticated { id, purpose, connection })
}

fn identify(connection: &quinn::Connection) -> Result<NodeId, PeerIdError> {
    let identity = connection.peer_identity().ok_or(PeerIdError::Unreadable)?;
    let chain = identity.downcast::<Vec<CertificateDer<'static>>>().map_err(|_| PeerIdError::Unreadable)?;
    let id = chain.first().ok_or(PeerIdError::Unreadable).and_then(peer_id);
    if let Err(error) = id {
        connection.close(VarInt::from_u32(1), error.to_string().as_bytes());
    }
    id
}

fn credentials(local: &Local) -> Result<Credentials, CertificateError> {
    Credentials::make(&local.identity, &local.secret, Validity::from_now(SystemTime::now()))
}

fn server_config(local: &Local) -> Result<quinn::ServerConfig, BindError> {
    quic_server(&credentials(local)?)
}

pub(crate) fn quic_server(credentials: &Credentials) -> Result<quinn::ServerConfig, BindError> {
    let tls = credentials.server(&Purpose::ALL.map(Purpose::protocol))?;
    let mut config = quinn::ServerConfig::with_crypto(Arc::new(QuicServerConfig::try_from(tls)?));
    config.transport_config(Arc::new(transport(DATA_STREAMS_MAX)));
    config.max_incoming(HANDSHAKES_MAX).incoming_buffer_size_total(INCOMING_BYTES_MAX);
    // A home's machines keep their addresses; a peer whose address changes dials again.
    config.migration(false);
    Ok(config)
}

fn client_config(local: &Local, purpose: Purpose) -> Result<quinn::ClientConfig, BindError> {
    quic_client(&credentials(local)?, purpose)
}

pub(crate) fn quic_client(credentials: &Credentials, purpose: Purpose) -> Result<quinn::ClientConfig, BindError> {
    let tls = credentials.client(purpose.protocol())?;
    let mut config = quinn::ClientConfig::new(Arc::new(QuicClientConfig::try_from(tls)?));
    // The control connection has one stream, which its dialler opens.
    let streams = if purpose == Purpose::Control { 0 } else { DATA_STREAMS_MAX };
    config.transport_config(Arc::new(transport(streams)));
    Ok(config)
}

fn transport(streams: u32) -> TransportConfig {
    let mut config = TransportConfig::default();
    config
        .max_idle_timeout(Some(IdleTimeout::from(VarInt::from_u32(IDLE_TIMEOUT_MS))))
        .keep_alive_interval(Some(KEEP_ALIVE))
        .stream_receive_window(VarInt::from_u32(STREAM_WINDOW_BYTES))
        .receive_window(VarInt::from_u32(WINDOW_BYTES))
        .send_window(u64::from(WINDOW_BYTES))
        .max_concurrent_bidi_streams(VarInt::from_u32(streams))
        .max_concurrent_uni_streams(VarInt::from_u32(1))
        .datagram_receive_buffer_size(None);
    config
}

/// Whether the system has no IPv6: it knows no such sockets, or has no such addresses.
fn is_without_ipv6(error: &std::io::Error) -> bool {
    error.kind() == std::io::ErrorKind::AddrNotAvailable
        || error.raw_os_error() == Some(rustix::io::Errno::AFNOSUPPORT.raw_os_error())
}

fn socket(listen: SocketAddr) -> std::io::Result<UdpSocket> {
    use socket2::{Domain, Protocol, Socket, Type};
    let socket = Socket::new(Domain::for_address(listen), Type::DGRAM, Some(Protocol::UDP))?;
    if listen.is_ipv6() {
        socket.set_only_v6(false)?;
    }
    // The system may allow less.
    let _ = socket.set_recv_buffer_size(SOCKET_BYTES);
    let _ = socket.set_send_buffer_size(SOCKET_BYTES);
    socket.set_nonblocking(true)?;
    socket.bind(&listen.into())?;
    Ok(socket.into())
}
