//! A peer: the two connections with one member, made one.
//!
//! ```text
//! dialler                                              listener
//!   control connection ─ Hello{nonce, sender_token} ─►
//!                      ◄─ Hello{nonce, sender_token} ─
//!   data connection    ─ nonce ─►                 the two with one nonce are a pair
//! ```
//! ractor_cluster does not tell an actor who sent a message. So each side gives the other a token when they connect, and
//! every message to the control actor carries the token that its receiver gave: the receiver knows the sender by it.

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
use std::time::Duration;
use tokio::runtime::Handle;

/// Both sides speak this; a peer of another is told so.
const PROTOCOL: u32 = 6;
/// From a connection to a peer.
const HELLO_DEADLINE: Duration = Duration::from_secs(5);
/// Longer names are cut.
pub const NAME_BYTES_MAX: usize = 64;
/// Bytes between the control filter and ractor_cluster.
const PIPE_BYTES: usize = 64 << 10;

/// What a member puts into its messages, so that their receiver knows whose they are.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct SenderToken(pub [u8; 16]);

#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct Hello {
    pub(crate) protocol: u32,
    pub(crate) name: String,
    pub(crate) nonce: u64,
    pub(crate) sender_token: SenderToken,
}

/// A member that is here.
#[derive(Debug)]
pub struct Peer {
    pub id: NodeId,
    /// Counts the peers of this process: the same member has another number when it comes again.
    pub session: u64,
    /// As its user calls it; not unique, and not to be trusted.
    pub name: String,
    pub address: SocketAddr,
    pub is_dialled: bool,
    pub control: ControlStream,
    /// Its messages that wait.
    pub inbox: Inbox,
    /// What it has not taken of ours.
    pub outbox: Outbox,
    /// For messages to it.
    pub sender_token: SenderToken,
    /// In messages from it.
    pub expected_token: SenderToken,
    pub data: DataConnection,
}

/// The data connection with a peer.
#[derive(Debug, Clone)]
pub struct DataConnection {
    connection: Connection,
    runtime: Handle,
}

impl DataConnection {
    /// Opens a stream of frames both ways. The peer sees it with the first frame.
    ///
    /// # Errors
    /// [`FrameError::Io`] where the peer is gone.
    pub async fn open(&self, priority: Priority) -> Result<DataStream, FrameError> {
        let mut stream = DataStream::new(self.connection.open_bi().await.map_err(std::io::Error::from)?);
        stream.set_priority(priority);
        Ok(stream)
    }

    /// Opens a link; `hello` says what it is for.
    ///
    /// # Errors
    /// [`FrameError`] where the peer is gone.
    pub async fn open_link<H: Serialize>(&self, hello: &H) -> Result<LinkSender, FrameError> {
        let (sender, receiver) = self.connection.open_bi().await.map_err(std::io::Error::from)?;
        let mut writer = FrameWriter::new(sender);
        writer.send(hello, Payload::Nothing).await?;
        let _context = self.runtime.enter();
        Ok(LinkSender::new(writer.into_stream(), receiver))
    }

    /// The next stream that the peer opens.
    ///
    /// # Errors
    /// [`FrameError::Io`] where the peer is gone.
    pub async fn accept(&self) -> Result<DataStream, FrameError> {
        let streams = self.connection.accept_bi().await.map_err(std::io::Error::from)?;
        Ok(DataStream::new(streams))
    }

    /// Runs `task` on the network's own thread, which compute does not starve.
    pub fn spawn(&self, task: impl Future<Output = ()> + Send + 'static) {
        self.runtime.spawn(task);
    }

    /// The time there and back, smoothed.
    pub fn rtt(&self) -> Duration {
        self.connection.rtt()
    }

    /// Ends both connections with the peer.
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
    #[error("the peer speaks protocol {theirs}, and we {PROTOCOL}: run the same version of exo on both")]
    Protocol { theirs: u32 },
    #[error("the address answered as two different nodes")]
    TwoNodes,
    #[error("the address is one more of a peer that is here")]
    AlreadyConnected { id: NodeId },
    #[error("the address is this node's own")]
    Ourselves,
    #[error("the system gave no random bytes")]
    NoRandomness,
    #[error("the peer did not introduce itself in time")]
    TimedOut,
}

/// A control connection that has been introduced, and waits for its data connection.
#[derive(Debug)]
pub(crate) struct Introduced {
    pub(crate) id: NodeId,
    pub(crate) nonce: u64,
    pub(crate) name: String,
    pub(crate) control: Connection,
    pub(crate) streams: (quinn::SendStream, quinn::RecvStream),
    sender_token: SenderToken,
    expected_token: SenderToken,
    is_dialled: bool,
}

/// Both connections.
#[derive(Debug)]
pub(crate) struct PeerConnections {
    pub(crate) introduced: Introduced,
    pub(crate) data: Connection,
    /// Of a pair that was dialled.
    pub(crate) guard: Option<DialGuard>,
}

impl PeerConnections {
    pub(crate) fn id(&self) -> NodeId {
        self.introduced.id
    }

    pub(crate) fn is_dialled(&self) -> bool {
        self.introduced.is_dialled
    }

    pub(crate) fn close(&self, reason: &str) {
        for connection in [&self.introduced.control, &self.data] {
            connection.close(VarInt::from_u32(0), reason.as_bytes());
        }
    }

    /// Starts the filter, and gives the peer. Called on the network's runtime.
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
            // A filter that waits for a permit does not see that its peer is gone.
            let ended = tokio::select! {
                ended = filtered => ended,
                _ = connection.closed() => return,
            };
            if let Err(error) = ended {
                if connection.close_reason().is_none() {
                    tracing::warn!(peer = %id, %error, "ended the control stream of a peer");
                }
                connection.close(VarInt::from_u32(2), b"control stream");
            }
        });
        Peer {
            id,
            session,
            name,
            address: self.data.remote_address(),
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

/// Dials both connections.
pub(crate) async fn dial(
    endpoint: &Endpoint,
    address: SocketAddr,
    own: NodeId,
    name: &str,
    dials: &DialRegistry,
) -> Result<PeerConnections, ConnectError> {
    let Authenticated { id, connection: control, .. } = endpoint.dial(address, Purpose::Control).await?;
    if id == own {
        return Err(ConnectError::Ourselves);
    }
    let guard = Some(dials.claim(id).ok_or(ConnectError::AlreadyConnected { id })?);
    let hello = hello(name)?;
    let introduced = tokio::time::timeout(HELLO_DEADLINE, async {
        let (sender, receiver) = control.open_bi().await?;
        let (mut writer, mut reader) = (FrameWriter::new(sender), FrameReader::new(receiver));
        writer.send(&hello, Payload::Nothing).await?;
        let theirs = read_hello(&mut reader).await?;
        Ok::<_, ConnectError>(Introduced {
            id,
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
    // Nothing else goes this way.
    let _ = stream.finish();
    Ok(PeerConnections { introduced, data: data.connection, guard })
}

/// Answers the introduction on a control connection that was accepted.
pub(crate) async fn introduce(id: NodeId, control: Connection, name: &str) -> Result<Introduced, ConnectError> {
    let introduced = async {
        let (sender, receiver) = control.accept_bi().await?;
        let (mut writer, mut reader) = (FrameWriter::new(sender), FrameReader::new(receiver));
        let theirs = read_hello(&mut reader).await?;
        let mut ours = hello(name)?;
        ours.nonce = theirs.nonce;
        writer.send(&ours, Payload::Nothing).await?;
        Ok(Introduced {
            id,
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

/// Which control connection a data connection that was accepted belongs to.
pub(crate) async fn nonce_of(data: &Connection) -> Result<u64, ConnectError> {
    let read = async {
        let mut stream = data.accept_uni().await?;
        let mut nonce = [0; 8];
        stream.read_exact(&mut nonce).await.map_err(|error| FrameError::Io(std::io::Error::other(error)))?;
        Ok(u64::from_le_bytes(nonce))
    };
    tokio::time::timeout(HELLO_DEADLINE, read).await.map_err(|_| ConnectError::TimedOut)?
}

pub(crate) fn hello(name: &str) -> Result<Hello, ConnectError> {
    let mut random = [0; 24];
    SystemRandom::new().fill(&mut random).map_err(|_| ConnectError::NoRandomness)?;
    let (mut nonce, mut sender_token) = ([0; 8], [0; 16]);
    nonce.copy_from_slice(&random[..8]);
    sender_token.copy_from_slice(&random[8..]);
    Ok(Hello {
        protocol: PROTOCOL,
        name: shown_name(name),
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

/// A name as it may be shown: short, and without what a terminal would obey.
pub fn shown_name(name: &str) -> String {
    let mut shown: String = name.chars().filter(|c| !c.is_control()).collect();
    while shown.len() > NAME_BYTES_MAX {
        shown.pop();
    }
    shown
}
