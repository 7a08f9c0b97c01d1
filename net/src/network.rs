//! The network: connects members, and reports which peers are connected.
//!
//! ```text
//! named members, discovery, peers' reports ─► DialPolicy ─► dial ─┐
//!                                            accepted connections ┴─► pairs ─► election ─► PeerUp … PeerDown
//! ```
//! The driver (`driver.rs`) runs on a thread of its own, so that compute does not make a live node look dead. When two
//! nodes dial each other at once, two pairs of connections arise; both sides keep the pair that the lower id dialled.

mod driver;

use crate::addresses::AddressWatch;
use crate::departure::Departure;
use crate::dial::{DialPolicy, Source};
use crate::dial_failure::DialFailure;
use crate::dial_guard::DialRegistry;
use crate::discovery::Discovery;
use crate::endpoint::{BindError, Endpoint, Local};
use crate::identity::{Identity, IdentityError, NodeId};
use crate::peer::{ConnectError, Introduced, OwnHello, Peer, PeerConnections};
use crate::secret::ClusterSecret;
use driver::Driver;
use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};
use tokio::sync::mpsc;

/// The most [`NetworkEvent`]s that wait for the node; when they are that many, the driver waits.
const EVENTS_MAX: usize = 256;
/// The most events of tasks that wait for the driver.
const DRIVER_EVENTS_MAX: usize = 256;
/// The most connections of each kind that wait for their pair's other connection; the oldest is closed first.
const HALVES_MAX: usize = 64;
/// The most peers at once: each costs two connections and their buffers.
const PEERS_MAX: usize = 256;
/// The interval between checks of the clock that decide whether the certificate is renewed.
const CLOCK_EVERY: Duration = Duration::from_secs(60);
/// The interval between looks at the machine's addresses: a laptop that changes its network is soon back.
const WATCH_EVERY: Duration = Duration::from_secs(3);

/// Whether the node looks for members on the local network.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Discover {
    /// The node announces itself and looks for members, by multicast DNS.
    Multicast,
    /// The node neither announces itself nor looks for members.
    Off,
}

/// This node's identity and settings, and where it looks for members.
#[derive(Debug)]
pub struct NetworkConfig {
    /// The key pair of this node.
    pub identity: Arc<Identity>,
    /// The secret of the cluster to connect to.
    pub secret: ClusterSecret,
    /// The name that other members show.
    pub name: String,
    /// The UDP address to listen on; with port 0 the system chooses a port.
    pub listen: SocketAddr,
    /// The addresses of members to dial, as the user named them.
    pub peers: Vec<SocketAddr>,
    /// The addresses of members in the token that this node joined with.
    pub token_peers: Vec<SocketAddr>,
    /// Whether the node looks for members on the local network.
    pub discover: Discover,
    /// Nodes that are not admitted, even if they have the cluster's secret, and who evicted each.
    pub evicted: BTreeMap<NodeId, String>,
}

impl NetworkConfig {
    /// The configuration of a member with a fresh identity that listens on a free loopback port, dials `peers` and
    /// discovers nobody: for tests and benches.
    ///
    /// # Errors
    /// [`IdentityError`] where the system gives no random bytes.
    pub fn loopback(secret: ClusterSecret, peers: Vec<SocketAddr>) -> Result<Self, IdentityError> {
        Ok(Self {
            identity: Arc::new(Identity::ephemeral()?),
            secret,
            name: "loopback".to_owned(),
            listen: SocketAddr::from(([127, 0, 0, 1], 0)),
            peers,
            token_peers: Vec::new(),
            discover: Discover::Off,
            evicted: BTreeMap::new(),
        })
    }
}

/// Why the network did not start.
#[derive(Debug, thiserror::Error)]
pub enum NetworkError {
    /// The endpoint cannot be opened.
    #[error(transparent)]
    Bind(#[from] BindError),
    /// The system gives no thread.
    #[error("cannot start the network's thread: {0}")]
    Thread(#[from] std::io::Error),
    /// A named member has an IPv6 address, and this node listens on IPv4 only.
    #[error("the member {peer} has an IPv6 address, and this node listens on {listen} only")]
    Family {
        /// The member's address.
        peer: SocketAddr,
        /// The address on which this node listens.
        listen: SocketAddr,
    },
}

/// A change in the set of connected peers, or in what else the user should know of the network.
#[derive(Debug)]
pub enum NetworkEvent {
    /// A peer is connected.
    PeerUp(Box<Peer>),
    /// A peer's connections are closed.
    PeerDown {
        /// The peer's id.
        id: NodeId,
        /// The number of the closed pair of connections, as in [`Peer::session`].
        session: u64,
        /// Why the connections closed.
        departure: Departure,
    },
    /// The user should know why no member answers at an address. Sent when the reason changes; `None` when a member
    /// answers.
    Dialled {
        /// The address.
        address: SocketAddr,
        /// Why the dial failed.
        failure: Option<DialFailure>,
    },
    /// Two running nodes have the same key. The first stays connected.
    SameKey {
        /// The id of both.
        id: NodeId,
        /// The address of the node that was there before.
        first: SocketAddr,
        /// The address of the node that came.
        second: SocketAddr,
    },
    /// Other nodes reach this one at these addresses now.
    AddressesChanged(Vec<SocketAddr>),
}

/// How a peer ended.
#[derive(Debug)]
enum PeerEnd {
    /// A connection was closed.
    Closed(quinn::ConnectionError),
    /// Its process has died.
    Died,
}

#[derive(Debug)]
enum DriverEvent {
    Found(SocketAddr, Source),
    Sighted(SocketAddr),
    Dialled(SocketAddr, Box<Result<PeerConnections, ConnectError>>),
    Introduced(Box<Introduced>),
    Data {
        id: NodeId,
        nonce: u64,
        connection: quinn::Connection,
    },
    Ended {
        id: NodeId,
        session: u64,
        end: PeerEnd,
    },
    /// Whether the connected peer still answered when a node with the same key connected.
    KeyChecked {
        session: u64,
        is_alive: bool,
        newcomer: Box<PeerConnections>,
    },
    Evict(NodeId, String),
    Readmit(NodeId),
    Stop(tokio::sync::oneshot::Sender<()>),
}

/// The network of this node. Dropping this handle stops the network.
#[derive(Debug)]
pub struct Network {
    address: Option<SocketAddr>,
    driver_events: mpsc::Sender<DriverEvent>,
    driver: tokio::task::AbortHandle,
    thread: NetworkThread,
}

impl Drop for Network {
    fn drop(&mut self) {
        // The driver drops its endpoint and its connections.
        self.driver.abort();
    }
}

/// A handle to the network's thread, which runs until the last handle is dropped.
#[derive(Debug, Clone)]
pub struct NetworkThread(Arc<Thread>);

#[derive(Debug)]
struct Thread(Option<tokio::runtime::Runtime>);

impl NetworkThread {
    /// Runs `task` on the network's thread: for tasks that answer peers' frames at once and never compute.
    pub fn spawn<T: Send + 'static>(
        &self,
        task: impl Future<Output = T> + Send + 'static,
    ) -> Option<tokio::task::JoinHandle<T>> {
        // The runtime is taken only when the last handle is dropped.
        self.0.0.as_ref().map(|runtime| runtime.spawn(task))
    }
}

impl Drop for Thread {
    fn drop(&mut self) {
        if let Some(runtime) = self.0.take() {
            // The caller may run on another runtime, which must not block on the shutdown of this one.
            runtime.shutdown_background();
        }
    }
}

impl Network {
    /// Opens the endpoint, and starts to dial and discover members.
    ///
    /// # Errors
    /// [`NetworkError`] where the port is in use, or the system gives no thread.
    pub fn start(config: NetworkConfig) -> Result<(Self, mpsc::Receiver<NetworkEvent>), NetworkError> {
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(1)
            .thread_name("exo-net")
            .enable_all()
            .build()?;
        let _context = runtime.enter();
        let local = Local { identity: Arc::clone(&config.identity), secret: config.secret.clone() };
        let (endpoint, accepted) = match Endpoint::open(local, config.listen) {
            Ok(opened) => opened,
            Err(error) => {
                drop(_context);
                // The caller may run on another runtime, which must not block on the shutdown of this one.
                runtime.shutdown_background();
                return Err(error.into());
            }
        };
        let address = endpoint.address();
        if let Some(listen) = address.filter(SocketAddr::is_ipv4)
            && let Some(&peer) = config.peers.iter().find(|peer| peer.is_ipv6())
        {
            drop(_context);
            runtime.shutdown_background();
            return Err(NetworkError::Family { peer, listen });
        }
        let (driver_events, inputs) = mpsc::channel(DRIVER_EVENTS_MAX);
        let (events, receiver) = mpsc::channel(EVENTS_MAX);
        let own = config.identity.node_id();
        let discovery = match (config.discover, address) {
            (Discover::Multicast, Some(address)) => discover(own, &config.secret, address, &driver_events),
            _ => None,
        };
        let driver = Driver {
            own: OwnHello { id: own, name: config.name.into(), run: fastrand::u64(..) },
            watch: address.map(AddressWatch::new),
            failures: BTreeMap::new(),
            endpoint,
            certified: SystemTime::now(),
            policy: DialPolicy::new(own, fastrand::u64(..)),
            started: Instant::now(),
            driver_events: driver_events.clone(),
            events,
            introduced: Vec::new(),
            data: Vec::new(),
            dials: DialRegistry::default(),
            peers: BTreeMap::new(),
            next_session: 1,
            evicted: config.evicted,
            _discovery: discovery,
        };
        let named = config.peers.into_iter().map(|peer| (peer, Source::Named));
        let of_token = config.token_peers.into_iter().map(|peer| (peer, Source::Token));
        let known = named.chain(of_token).collect();
        drop(_context);
        let driver = runtime.spawn(driver.run(known, inputs, accepted)).abort_handle();
        let thread = NetworkThread(Arc::new(Thread(Some(runtime))));
        Ok((Self { address, driver_events, driver, thread }, receiver))
    }

    /// The address on which this node listens.
    pub fn address(&self) -> Option<SocketAddr> {
        self.address
    }

    /// Adds `address` to the addresses to dial: a member may be there.
    pub fn add_address(&self, address: SocketAddr) {
        // Where the driver's queue is full, this is dropped: peers report the address again.
        let _ = self.driver_events.try_send(DriverEvent::Found(address, Source::Heard));
    }

    /// Reports that a peer has just connected to a node at `address`: dials it at once, however often dials failed.
    pub fn add_sighting(&self, address: SocketAddr) {
        let _ = self.driver_events.try_send(DriverEvent::Sighted(address));
    }

    /// Closes the connections of `id`, and admits it no more. `by` is the name of the member whose user evicted it; the
    /// evicted node is told that name.
    pub fn evict(&self, id: NodeId, by: String) {
        let driver_events = self.driver_events.clone();
        // A driver that has ended has no peers.
        self.thread.spawn(async move { drop(driver_events.send(DriverEvent::Evict(id, by)).await) });
    }

    /// Admits `id` again, after an eviction.
    pub fn readmit(&self, id: NodeId) {
        let driver_events = self.driver_events.clone();
        // A driver that has ended has no peers.
        self.thread.spawn(async move { drop(driver_events.send(DriverEvent::Readmit(id)).await) });
    }

    /// The thread that the network runs on.
    pub fn thread(&self) -> NetworkThread {
        self.thread.clone()
    }

    /// Tells peers that this node leaves, and stops the network.
    pub async fn stop(&self) {
        let (done, stopped) = tokio::sync::oneshot::channel();
        if self.driver_events.send(DriverEvent::Stop(done)).await.is_ok() {
            // An error means that the driver has ended already.
            let _ = stopped.await;
        }
    }
}

fn discover(
    own: NodeId,
    secret: &ClusterSecret,
    address: SocketAddr,
    driver_events: &mpsc::Sender<DriverEvent>,
) -> Option<Discovery> {
    let (found, mut event) = mpsc::channel(DRIVER_EVENTS_MAX);
    let driver_events = driver_events.clone();
    tokio::spawn(async move {
        while let Some(address) = event.recv().await {
            if driver_events.send(DriverEvent::Found(address, Source::Heard)).await.is_err() {
                return;
            }
        }
    });
    match Discovery::start(own, secret.fingerprint(), address, found) {
        Ok(discovery) => Some(discovery),
        Err(error) => {
            tracing::warn!(%error, "multicast discovery failed: name the addresses of members instead");
            None
        }
    }
}
