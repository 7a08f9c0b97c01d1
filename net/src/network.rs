//! The network: which peers are connected.
//!
//! ```text
//! --peer, discovery, peers' addresses ─► DialPolicy ─► dial ─┐
//!                                        accepted connections ┴─► pairs ─► election ─► PeerUp … PeerDown
//! ```
//! All of it (`driver.rs`) runs on a thread of its own, so that compute does not make a living node look dead. Of two pairs with one
//! member, which happens when both dial at once, both sides keep the one that the lower id dialled.

mod driver;

use crate::dial::{DialPolicy, Source};
use crate::dial_guard::DialRegistry;
use crate::discovery::Discovery;
use crate::endpoint::{BindError, Endpoint, Local};
use crate::identity::{Identity, IdentityError, NodeId};
use crate::peer::{ConnectError, Introduced, Peer, PeerConnections};
use crate::secret::ClusterSecret;
use driver::Driver;
use std::collections::{BTreeMap, BTreeSet};
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};
use tokio::sync::mpsc;

/// Connections and losses that the node has not taken yet; beyond, the driver waits.
const EVENTS_MAX: usize = 256;
/// What tasks report to the driver.
const DRIVER_EVENTS_MAX: usize = 256;
/// Connections that wait for the other one of their pair; the oldest goes first.
const HALVES_MAX: usize = 64;
/// Members at once: each costs two connections and their buffers.
const PEERS_MAX: usize = 256;
/// How often the clock is looked at, for the certificate's sake.
const CLOCK_EVERY: Duration = Duration::from_secs(60);

/// Whether others on the local network are looked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Discover {
    Multicast,
    Off,
}

/// Who we are, and where we look for others.
#[derive(Debug)]
pub struct NetworkConfig {
    pub identity: Arc<Identity>,
    pub secret: ClusterSecret,
    /// As others show it.
    pub name: String,
    /// UDP; port 0 takes any.
    pub listen: SocketAddr,
    /// Members' addresses.
    pub peers: Vec<SocketAddr>,
    pub discover: Discover,
    /// Who is not let in, whatever it knows.
    pub evicted: BTreeSet<NodeId>,
}

impl NetworkConfig {
    /// A member with a fresh identity that listens on a free port of loopback, dials `peers` and discovers nobody: for
    /// tests and benches.
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
            discover: Discover::Off,
            evicted: BTreeSet::new(),
        })
    }
}

/// Why there is no network.
#[derive(Debug, thiserror::Error)]
pub enum NetworkError {
    #[error(transparent)]
    Bind(#[from] BindError),
    #[error("no thread for the network: {0}")]
    Thread(#[from] std::io::Error),
}

/// What happened.
#[derive(Debug)]
pub enum NetworkEvent {
    PeerUp(Box<Peer>),
    PeerDown { id: NodeId, session: u64, reason: String },
}

#[derive(Debug)]
enum DriverEvent {
    Found(SocketAddr, Source),
    Sighted(SocketAddr),
    Dialled(SocketAddr, Box<Result<PeerConnections, ConnectError>>),
    Introduced(Box<Introduced>),
    Data { id: NodeId, nonce: u64, connection: quinn::Connection },
    Closed { id: NodeId, session: u64, reason: String },
    Evict(NodeId),
    Stop(tokio::sync::oneshot::Sender<()>),
}

/// The network of this node. It ends when this is dropped.
#[derive(Debug)]
pub struct Network {
    address: Option<SocketAddr>,
    driver_events: mpsc::Sender<DriverEvent>,
    driver: tokio::task::AbortHandle,
    thread: NetworkThread,
}

impl Drop for Network {
    fn drop(&mut self) {
        // With it its endpoint, and the connections.
        self.driver.abort();
    }
}

/// The thread that the network runs on. It is there as long as anyone holds this.
#[derive(Debug, Clone)]
pub struct NetworkThread(Arc<Thread>);

#[derive(Debug)]
struct Thread(Option<tokio::runtime::Runtime>);

impl NetworkThread {
    /// Runs `task` there: what hears of peers' frames and answers at once, and never computes.
    pub fn spawn<T: Send + 'static>(
        &self,
        task: impl Future<Output = T> + Send + 'static,
    ) -> Option<tokio::task::JoinHandle<T>> {
        // It is taken when nobody holds this any more.
        self.0.0.as_ref().map(|runtime| runtime.spawn(task))
    }
}

impl Drop for Thread {
    fn drop(&mut self) {
        if let Some(runtime) = self.0.take() {
            // Whoever drops it may be on a runtime of its own, where none may be waited for.
            runtime.shutdown_background();
        }
    }
}

impl Network {
    /// Opens the endpoint and begins to look for others.
    ///
    /// # Errors
    /// [`NetworkError`] where the port is taken, or the system gives no thread.
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
                // Whoever starts a network may be on a runtime of its own, where none may be waited for.
                runtime.shutdown_background();
                return Err(error.into());
            }
        };
        let address = endpoint.address();
        let (driver_events, inputs) = mpsc::channel(DRIVER_EVENTS_MAX);
        let (events, receiver) = mpsc::channel(EVENTS_MAX);
        let own = config.identity.node_id();
        let discovery = match (config.discover, address) {
            (Discover::Multicast, Some(address)) => discover(own, &config.secret, address, &driver_events),
            _ => None,
        };
        let driver = Driver {
            own,
            name: config.name.into(),
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
        let named = config.peers;
        drop(_context);
        let driver = runtime.spawn(driver.run(named, inputs, accepted)).abort_handle();
        let thread = NetworkThread(Arc::new(Thread(Some(runtime))));
        Ok((Self { address, driver_events, driver, thread }, receiver))
    }

    /// Where this node listens.
    pub fn address(&self) -> Option<SocketAddr> {
        self.address
    }

    /// Someone may be at `address`.
    pub fn add_address(&self, address: SocketAddr) {
        // Where the driver is busy, others will tell again.
        let _ = self.driver_events.try_send(DriverEvent::Found(address, Source::Heard));
    }

    /// A peer has just met someone at `address`: it is dialled at once, however often that was in vain before.
    pub fn add_sighting(&self, address: SocketAddr) {
        let _ = self.driver_events.try_send(DriverEvent::Sighted(address));
    }

    /// Closes the connections of `id`, and lets it in no more.
    pub fn evict(&self, id: NodeId) {
        let driver_events = self.driver_events.clone();
        // A driver that has ended has no peers.
        self.thread.spawn(async move { drop(driver_events.send(DriverEvent::Evict(id)).await) });
    }

    /// The thread that it runs on.
    pub fn thread(&self) -> NetworkThread {
        self.thread.clone()
    }

    /// Tells peers that this node goes, and ends.
    pub async fn stop(&self) {
        let (done, stopped) = tokio::sync::oneshot::channel();
        if self.driver_events.send(DriverEvent::Stop(done)).await.is_ok() {
            // A driver that has ended has stopped.
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
            tracing::warn!(%error, "nobody will be found by multicast: name members with --peer");
            None
        }
    }
}
