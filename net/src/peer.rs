//! A peer: the control connection and the data connection of one member, as a pair.
//!
//! ```text
//! dialler                                              listener
//!   control connection ─ Hello{run, nonce, sender_token} ─►
//!                      ◄─ Hello{run, nonce, sender_token} ─
//!   data connection    ─ nonce ─►                 connections with the same nonce are a pair
//! ```
//! ractor_cluster does not tell an actor which peer sent a message. So each side gives the other a token when they
//! connect. Every message to the control actor carries the token that its receiver gave, and so identifies its sender.

use crate::addresses::canonical;
use crate::backlog::{Emptying, Inbox, Outbox};
use crate::control::{ControlStream, filter};
use crate::dial_guard::{DialGuard, DialRegistry};
use crate::endpoint::{Authenticated, DialError, Endpoint, Purpose};
use crate::frame::{FrameError, FrameReader, FrameWriter, Payload};
use crate::identity::NodeId;
use crate::link::{DataStream, LinkSender, Priority};
use quinn::{Connection, VarInt};
use ring::rand::{SecureRandom, SystemRandom};
use serde::{Deserialize, Serialize};
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;
use tokio::runtime::Handle;

/// The protocol version; a peer of another version is refused, with that reason.
const PROTOCOL: u32 = 12;
/// The time limit of the introduction on each connection.
pub(crate) const HELLO_DEADLINE: Duration = Duration::from_secs(5);
/// The most bytes of a name; longer names are cut.
pub const NAME_BYTES_MAX: usize = 64;
/// The size of the buffer between the control filter and ractor_cluster, in bytes.
const PIPE_BYTES: usize = 64 << 10;

/// The token in a member's messages by which their receiver identifies the sender.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct SenderToken(pub [u8; 16]);

#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct Hello {
    pub(crate) protocol: u32,
    pub(crate) name: String,
    /// The number of the sender's process: two nodes with a copied key have different ones.
    pub(crate) run: u64,
    pub(crate) nonce: u64,
    pub(crate) sender_token: SenderToken,
}

/// What this node tells of itself in each hello.
#[derive(Debug, Clone)]
pub(crate) struct OwnHello {
    pub(crate) id: NodeId,
    pub(crate) name: Arc<str>,
    pub(crate) run: u64,
}

/// A connected member.
#[derive(Debug)]
pub struct Peer {
    /// The peer's id, which its certificate proves.
    pub id: NodeId,
    /// The number of this pair of connections in this process; a member that reconnects gets another number.
    pub session: u64,
    /// The name that its user gave it; not unique, and not to be trusted.
    pub name: String,
    /// The peer's UDP address, as this node sees it.
    pub address: SocketAddr,
    /// Whether this node dialled the peer.
    pub is_dialled: bool,
    /// The stream of control messages.
    pub control: ControlStream,
    /// The peer's messages that wait to be handled.
    pub inbox: Inbox,
    /// The bytes that wait to be sent to the peer.
    pub outbox: Outbox,
    /// The token that messages to the peer carry.
    pub sender_token: SenderToken,
    /// The token that messages from the peer carry.
    pub expected_token: SenderToken,
    /// The connection for activations, requests and weights.
    pub data: DataConnection,
}

/// The data connection with a peer.
#[derive(Debug, Clone)]
pub struct DataConnection {
    connection: Connection,
    runtime: Handle,
}

impl DataConnection {
    /// Opens a bidirectional stream of frames. The peer sees the stream when the first frame arrives.
    ///
    /// # Errors
    /// [`FrameError::Io`] where the connection is closed.
    pub async fn open(&self, priority: Priority) -> Result<DataStream, FrameError> {
        let mut stream = DataStream::new(self.connection.open_bi().await.map_err(std::io::Error::from)?);
        stream.set_priority(priority);
        Ok(stream)
    }

    /// Opens a link; its first frame, `hello`, says what the link is for.
    ///
    /// # Errors
    /// [`FrameError`] where the connection is closed.
    pub async fn open_link<H: Serialize>(&self, hello: &H) -> Result<LinkSender, FrameError> {
        let (sender, receiver) = self.connection.open_bi().await.map_err(std::io::Error::from)?;
        let mut writer = FrameWriter::new(sender);
        writer.send(hello, Payload::Nothing).await?;
        let _context = self.runtime.enter();
        Ok(LinkSender::new(writer.into_stream(), receiver))
    }

    /// Waits for the next stream that the peer opens.
    ///
    /// # Errors
    /// [`FrameError::Io`] where the connection is closed.
    pub async fn accept(&self) -> Result<DataStream, FrameError> {
        let streams = self.connection.accept_bi().await.map_err(std::io::Error::from)?;
        Ok(DataStream::new(streams))
    }

    /// Runs `task` on the network's own thread, which compute does not starve.
    pub fn spawn(&self, task: impl Future<Output = ()> + Send + 'static) {
        self.runtime.spawn(task);
    }

    /// Datagrams received so far.
    pub(crate) fn received(&self) -> u64 {
        self.connection.stats().udp_rx.datagrams
    }

    /// The smoothed round-trip time.
    pub fn rtt(&self) -> Duration {
        self.connection.rtt()
    }

    /// Closes the data connection; the network's driver then closes the control connection, too.
    pub fn close(&self, reason: &str) {
        self.connection.close(VarInt::from_u32(0), reason.as_bytes());
    }

    pub(crate) async fn closed(&self) -> quinn::ConnectionError {
        self.connection.closed().await
    }
}

/// Why a connection did not become a peer.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ConnectError {
    #[error(transparent)]
    Dial(#[from] DialError),
    #[error(transparent)]
    Frame(#[from] FrameError),
    #[error("the connection ended: {0}")]
    Connection(#[from] quinn::ConnectionError),
    #[error("the peer speaks protocol {theirs}, this node protocol {PROTOCOL}: run the same version of exo on both")]
    Protocol { theirs: u32 },
    #[error("two connections to the address reached different nodes")]
    TwoNodes,
    #[error("the address belongs to a peer that is already connected, or is being connected")]
    AlreadyConnected { id: NodeId },
    #[error("the address is this node's own")]
    Ourselves,
    #[error("another node there has this node's key")]
    SameKey,
    #[error("the system gave no random bytes")]
    NoRandomness,
    #[error("the peer did not introduce itself in time")]
    TimedOut,
}

/// A control connection with both hellos exchanged, which waits for its data connection.
#[derive(Debug)]
pub(crate) struct Introduced {
    pub(crate) id: NodeId,
    pub(crate) run: u64,
    pub(crate) nonce: u64,
    pub(crate) name: String,
    pub(crate) control: Connection,
    pub(crate) streams: (quinn::SendStream, quinn::RecvStream),
    sender_token: SenderToken,
    expected_token: SenderToken,
    is_dialled: bool,
}

/// Both connections of a pair.
#[derive(Debug)]
pub(crate) struct PeerConnections {
    pub(crate) introduced: Introduced,
    pub(crate) data: Connection,
    /// The dial's claim on the peer; `None` for an accepted pair.
    pub(crate) guard: Option<DialGuard>,
}

impl PeerConnections {
    pub(crate) fn id(&self) -> NodeId {
        self.introduced.id
    }

    pub(crate) fn is_dialled(&self) -> bool {
        self.introduced.is_dialled
    }

    /// The address of the peer.
    pub(crate) fn address(&self) -> SocketAddr {
        canonical(self.data.remote_address())
    }

    pub(crate) fn close(&self, code: u32, reason: &str) {
        for connection in [&self.introduced.control, &self.data] {
            connection.close(VarInt::from_u32(code), reason.as_bytes());
        }
    }

    /// Starts the control filter and returns the peer. Called on the network's runtime.
    pub(crate) fn into_peer(self, session: u64) -> Peer {
        let Introduced {
            id, name, control, streams: (writer, reader), sender_token, expected_token, is_dialled, ..
        } = self.introduced;
        let (to, from) = tokio::io::duplex(PIPE_BYTES);
        let (inbox, outbox) = (Inbox::new(), Outbox::default());
        let writer = Emptying::new(writer, outbox.clone());
        let filtered = filter(reader, to, id, inbox.clone());
        let connection = control.clone();
        tokio::spawn(async move {
            // A filter that waits for a permit does not see that the connection is closed.
            let ended = tokio::select! {
                ended = filtered => ended,
                _ = connection.closed() => return,
            };
            if let Err(error) = ended {
                if connection.close_reason().is_none() {
                    tracing::warn!(peer = %id, %error, "closed the control connection of a peer");
                }
                connection.close(VarInt::from_u32(2), b"control stream");
            }
        });
        Peer {
            id,
            session,
            name,
            address: canonical(self.data.remote_address()),
            is_dialled,
            control: ControlStream { peer: id, session, reader: from, writer },
            inbox,
            outbox,
            sender_token,
            expected_token,
            data: DataConnection { connection: self.data, runtime: Handle::current() },
        }
    }
}

/// Dials both connections of a pair.
pub(crate) async fn dial(
    endpoint: &Endpoint,
    address: SocketAddr,
    own: &OwnHello,
    dials: &DialRegistry,
) -> Result<PeerConnections, ConnectError> {
    let Authenticated { id, connection: control, .. } = endpoint.dial(address, Purpose::Control).await?;
    let guard = Some(dials.claim(id).ok_or(ConnectError::AlreadyConnected { id })?);
    let connection = control.clone();
    let paired = pair(endpoint, address, own, Authenticated { id, purpose: Purpose::Control, connection: control });
    match paired.await {
        Ok((introduced, data)) => Ok(PeerConnections { introduced, data, guard }),
        // The peer's reason says more than the error of a stream.
        Err(ConnectError::Frame(error)) => match connection.close_reason() {
            Some(reason) => Err(ConnectError::Connection(reason)),
            None => Err(ConnectError::Frame(error)),
        },
        Err(error) => Err(error),
    }
}

/// Exchanges hellos on a dialled control connection, and dials its data connection.
async fn pair(
    endpoint: &Endpoint,
    address: SocketAddr,
    own: &OwnHello,
    dialled: Authenticated,
) -> Result<(Introduced, Connection), ConnectError> {
    let Authenticated { id, connection: control, .. } = dialled;
    let hello = hello(own)?;
    let introduced = tokio::time::timeout(HELLO_DEADLINE, async {
        let (sender, receiver) = control.open_bi().await?;
        let (mut writer, mut reader) = (FrameWriter::new(sender), FrameReader::new(receiver));
        writer.send(&hello, Payload::Nothing).await?;
        let theirs = read_hello(&mut reader).await?;
        if id == own.id {
            return Err(if theirs.run == own.run { ConnectError::Ourselves } else { ConnectError::SameKey });
        }
        Ok::<_, ConnectError>(Introduced {
            id,
            run: theirs.run,
            nonce: hello.nonce,
            name: theirs.name,
            control,
            streams: (writer.into_stream(), reader.into_stream()),
            sender_token: theirs.sender_token,
            expected_token: hello.sender_token,
            is_dialled: true,
        })
    });
    let introduced = introduced.await.map_err(|_| ConnectError::TimedOut)??;
    let data = endpoint.dial(address, Purpose::Data).await?;
    if data.id != id {
        return Err(ConnectError::TwoNodes);
    }
    let mut stream = data.connection.open_uni().await?;
    let written = stream.write_all(&hello.nonce.to_le_bytes()).await;
    written.map_err(|error| FrameError::Io(error.into()))?;
    // The nonce is all that this stream carries.
    let _ = stream.finish();
    Ok((introduced, data.connection))
}

/// Exchanges hellos on an accepted control connection.
pub(crate) async fn introduce(id: NodeId, control: Connection, own: &OwnHello) -> Result<Introduced, ConnectError> {
    let introduced = async {
        let (sender, receiver) = control.accept_bi().await?;
        let (mut writer, mut reader) = (FrameWriter::new(sender), FrameReader::new(receiver));
        let theirs = read_hello(&mut reader).await?;
        let mut ours = hello(own)?;
        ours.nonce = theirs.nonce;
        writer.send(&ours, Payload::Nothing).await?;
        Ok(Introduced {
            id,
            run: theirs.run,
            nonce: theirs.nonce,
            name: theirs.name,
            control,
            streams: (writer.into_stream(), reader.into_stream()),
            sender_token: theirs.sender_token,
            expected_token: ours.sender_token,
            is_dialled: false,
        })
    };
    tokio::time::timeout(HELLO_DEADLINE, introduced).await.map_err(|_| ConnectError::TimedOut)?
}

/// Reads the nonce of an accepted data connection, which identifies its control connection.
pub(crate) async fn nonce_of(data: &Connection) -> Result<u64, ConnectError> {
    let read = async {
        let mut stream = data.accept_uni().await?;
        let mut nonce = [0; 8];
        stream.read_exact(&mut nonce).await.map_err(|error| FrameError::Io(std::io::Error::other(error)))?;
        Ok(u64::from_le_bytes(nonce))
    };
    tokio::time::timeout(HELLO_DEADLINE, read).await.map_err(|_| ConnectError::TimedOut)?
}

pub(crate) fn hello(own: &OwnHello) -> Result<Hello, ConnectError> {
    let mut random = [0; 24];
    SystemRandom::new().fill(&mut random).map_err(|_| ConnectError::NoRandomness)?;
    let (mut nonce, mut sender_token) = ([0; 8], [0; 16]);
    nonce.copy_from_slice(&random[..8]);
    sender_token.copy_from_slice(&random[8..]);
    Ok(Hello {
        protocol: PROTOCOL,
        name: shown_name(&own.name),
        run: own.run,
        nonce: u64::from_le_bytes(nonce),
        sender_token: SenderToken(sender_token),
    })
}

async fn read_hello(reader: &mut FrameReader<quinn::RecvStream>) -> Result<Hello, ConnectError> {
    let frame = reader.receive::<Hello>(|_, _| Ok(())).await?;
    let (mut hello, _) = frame.ok_or_else(|| FrameError::Io(std::io::ErrorKind::UnexpectedEof.into()))?;
    if hello.protocol != PROTOCOL {
        return Err(ConnectError::Protocol { theirs: hello.protocol });
    }
    hello.name = shown_name(&hello.name);
    Ok(hello)
}

/// The name without control characters, which a terminal would obey, cut to [`NAME_BYTES_MAX`] bytes.
pub fn shown_name(name: &str) -> String {
    shown(name, NAME_BYTES_MAX)
}

/// A peer's text without control characters, which a terminal would obey, cut to `bytes_max` bytes.
pub fn shown(text: &str, bytes_max: usize) -> String {
    let mut shown = String::new();
    for c in text.chars().filter(|c| !c.is_control()) {
        if shown.len() + c.len_utf8() > bytes_max {
            break;
        }
        shown.push(c);
    }
    shown
}
