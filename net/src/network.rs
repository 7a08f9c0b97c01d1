//! The network: who is here.
//!
//! ```text
//! --peer, discovery, peers' addresses ─► DialPolicy ─► dial ─┐
//!                                        accepted connections ┴─► pairs ─► election ─► PeerUp … PeerDown
//! ```
//! All of it runs on a thread of its own, so that compute does not make a living node look dead. Of two pairs with one
//! member, which happens when both dial at once, both sides keep the one that the lower id dialled.

use crate::control::session_label;
use crate::dial::{DialPolicy, Source};
use crate::discovery::Discovery;
use crate::endpoint::{Authenticated, BindError, Endpoint, Local, Purpose};
use crate::identity::{Identity, NodeId};
use crate::meeting::Meetings;
use crate::peer::{DataConnection, Introduced, MeetError, Met, Peer, dial, introduce, nonce_of};
use crate::secret::ClusterSecret;
use std::collections::{BTreeMap, BTreeSet};
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};
use tokio::sync::mpsc;

/// Peers that came or went and have not been heard of above; the driver waits beyond.
const EVENTS_MAX: usize = 256;
/// What tasks have to tell the driver.
const NEWS_MAX: usize = 256;
/// Connections that wait for the other one of their pair; the oldest goes first.
const HALVES_MAX: usize = 64;
/// Members at once: each costs two connections and their buffers.
const PEERS_MAX: usize = 256;
/// A certificate is valid for weeks.
const RENEW_EVERY: Duration = Duration::from_secs(24 * 3600);

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
enum News {
    Found(SocketAddr, Source),
    Dialled(SocketAddr, Box<Result<Met, MeetError>>),
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
    news: mpsc::Sender<News>,
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
        let (news, inputs) = mpsc::channel(NEWS_MAX);
        let (events, receiver) = mpsc::channel(EVENTS_MAX);
        let own = config.identity.node_id();
        let discovery = match (config.discover, address) {
            (Discover::Multicast, Some(address)) => discover(own, &config.secret, address, &news),
            _ => None,
        };
        let driver = Driver {
            own,
            name: config.name.into(),
            endpoint,
            policy: DialPolicy::new(own, fastrand::u64(..)),
            started: Instant::now(),
            news: news.clone(),
            events,
            introduced: Vec::new(),
            data: Vec::new(),
            met: Meetings::default(),
            peers: BTreeMap::new(),
            next_session: 1,
            evicted: config.evicted,
            _discovery: discovery,
        };
        let named = config.peers;
        drop(_context);
        let driver = runtime.spawn(driver.run(named, inputs, accepted)).abort_handle();
        let thread = NetworkThread(Arc::new(Thread(Some(runtime))));
        Ok((Self { address, news, driver, thread }, receiver))
    }

    /// Where this node listens.
    pub fn address(&self) -> Option<SocketAddr> {
        self.address
    }

    /// Someone may be at `address`.
    pub fn hear_of(&self, address: SocketAddr) {
        // Where the driver is busy, others will tell again.
        let _ = self.news.try_send(News::Found(address, Source::Heard));
    }

    /// Closes the connections of `id`, and lets it in no more.
    pub fn evict(&self, id: NodeId) {
        let news = self.news.clone();
        // A driver that has ended has no peers.
        self.thread.spawn(async move { drop(news.send(News::Evict(id)).await) });
    }

    /// The thread that it runs on.
    pub fn thread(&self) -> NetworkThread {
        self.thread.clone()
    }

    /// Tells peers that this node goes, and ends.
    pub async fn stop(&self) {
        let (done, stopped) = tokio::sync::oneshot::channel();
        if self.news.send(News::Stop(done)).await.is_ok() {
            // A driver that has ended has stopped.
            let _ = stopped.await;
        }
    }
}

fn discover(own: NodeId, secret: &ClusterSecret, address: SocketAddr, news: &mpsc::Sender<News>) -> Option<Discovery> {
    let (found, mut heard) = mpsc::channel(NEWS_MAX);
    let news = news.clone();
    tokio::spawn(async move {
        while let Some(address) = heard.recv().await {
            if news.send(News::Found(address, Source::Heard)).await.is_err() {
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

/// What became of a pair of connections.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Elected {
    /// Its member is here, by this pair or by another one.
    Here,
    /// Its member is not let in.
    Unwanted,
}

struct Here {
    session: u64,
    is_dialled: bool,
    control: quinn::Connection,
    data: DataConnection,
}

struct Driver {
    own: NodeId,
    name: Arc<str>,
    endpoint: Endpoint,
    policy: DialPolicy,
    started: Instant,
    news: mpsc::Sender<News>,
    events: mpsc::Sender<NetworkEvent>,
    /// Control connections without their data connection yet, oldest first; and the other way round.
    introduced: Vec<Introduced>,
    data: Vec<(NodeId, u64, quinn::Connection)>,
    /// Who need not be dialled at another address.
    met: Meetings,
    peers: BTreeMap<NodeId, Here>,
    next_session: u64,
    evicted: BTreeSet<NodeId>,
    _discovery: Option<Discovery>,
}

impl Driver {
    async fn run(
        mut self,
        named: Vec<SocketAddr>,
        mut news: mpsc::Receiver<News>,
        mut accepted: mpsc::Receiver<Authenticated>,
    ) {
        for address in named {
            self.policy.handle_address(address, Source::Named, self.now());
        }
        let mut renewal = tokio::time::interval(RENEW_EVERY);
        renewal.tick().await;
        loop {
            self.dial_due();
            let due = self.policy.next_due().map(|due| self.started + due);
            // Nothing due: any news changes that.
            let due = due.unwrap_or_else(|| Instant::now() + RENEW_EVERY);
            tokio::select! {
                heard = news.recv() => match heard {
                    Some(News::Stop(done)) => {
                        self.endpoint.close().await;
                        let _ = done.send(());
                        return;
                    }
                    Some(heard) => self.hear(heard).await,
                    None => return,
                },
                Some(connection) = accepted.recv() => self.welcome(connection),
                () = tokio::time::sleep_until(due.into()) => {}
                _ = renewal.tick() => {
                    if let Err(error) = self.endpoint.renew() {
                        tracing::error!(%error, "the node's certificate was not renewed");
                    }
                }
            }
        }
    }

    fn now(&self) -> Duration {
        self.started.elapsed()
    }

    fn dial_due(&mut self) {
        while let Some(address) = self.policy.poll_dial(self.now()) {
            let (endpoint, own, name, news) =
                (self.endpoint.clone(), self.own, Arc::clone(&self.name), self.news.clone());
            let meetings = self.met.clone();
            tokio::spawn(async move {
                let met = dial(&endpoint, address, own, &name, &meetings).await;
                // A driver that has ended dials nobody.
                let _ = news.send(News::Dialled(address, Box::new(met))).await;
            });
        }
    }

    /// A connection that was accepted: it introduces itself, or says whose data connection it is.
    fn welcome(&self, Authenticated { id, purpose, connection }: Authenticated) {
        if self.evicted.contains(&id) || id == self.own {
            connection.close(quinn::VarInt::from_u32(3), b"not let in");
            return;
        }
        let (name, news, accepted) = (Arc::clone(&self.name), self.news.clone(), connection.clone());
        tokio::spawn(async move {
            let told = match purpose {
                Purpose::Control => {
                    connection.set_max_concurrent_bi_streams(quinn::VarInt::from_u32(1));
                    introduce(id, connection, &name).await.map(|introduced| News::Introduced(Box::new(introduced)))
                }
                Purpose::Data => nonce_of(&connection).await.map(|nonce| News::Data { id, nonce, connection }),
            };
            match told {
                // A driver that has ended welcomes nobody.
                Ok(told) => drop(news.send(told).await),
                Err(error) => {
                    tracing::info!(peer = %id, %error, "a connection was not introduced");
                    accepted.close(quinn::VarInt::from_u32(5), error.to_string().as_bytes());
                }
            }
        });
    }

    async fn hear(&mut self, news: News) {
        match news {
            News::Found(address, source) => self.policy.handle_address(address, source, self.now()),
            News::Dialled(address, met) => match *met {
                Ok(met) => {
                    self.policy.handle_dialled(address, met.id());
                    if self.elect(met).await == Elected::Unwanted {
                        self.policy.handle_failed(address, self.now());
                    }
                }
                // Where its other connections end before they are taken in, it is dialled here after a wait.
                Err(MeetError::Met { id }) => {
                    self.policy.handle_dialled(address, id);
                    self.policy.handle_failed(address, self.now());
                }
                Err(MeetError::Ourselves) => self.policy.handle_dialled(address, self.own),
                Err(error) => {
                    match error {
                        MeetError::Protocol { .. } => tracing::warn!(%address, %error, "a member is not met"),
                        _ => tracing::debug!(%address, %error, "nobody reached"),
                    }
                    self.policy.handle_failed(address, self.now());
                }
            },
            News::Introduced(introduced) => {
                let is_its = |(id, nonce, _): &(NodeId, u64, quinn::Connection)| {
                    (*id, *nonce) == (introduced.id, introduced.nonce)
                };
                match self.data.iter().position(is_its) {
                    Some(at) => {
                        let (_, _, data) = self.data.remove(at);
                        self.elect(Met { introduced: *introduced, data, meeting: None }).await;
                    }
                    None => {
                        self.introduced.push(*introduced);
                        if self.introduced.len() > HALVES_MAX {
                            self.introduced.remove(0).control.close(quinn::VarInt::from_u32(4), b"half a peer");
                        }
                    }
                }
            }
            News::Data { id, nonce, connection } => {
                let is_its = |introduced: &Introduced| (introduced.id, introduced.nonce) == (id, nonce);
                match self.introduced.iter().position(is_its) {
                    Some(at) => {
                        let introduced = self.introduced.remove(at);
                        self.elect(Met { introduced, data: connection, meeting: None }).await;
                    }
                    None => {
                        self.data.push((id, nonce, connection));
                        if self.data.len() > HALVES_MAX {
                            self.data.remove(0).2.close(quinn::VarInt::from_u32(4), b"half a peer");
                        }
                    }
                }
            }
            News::Closed { id, session, reason } => self.on_closed(id, session, reason).await,
            News::Evict(id) => {
                self.evicted.insert(id);
                if let Some(here) = self.peers.get(&id) {
                    here.data.close("evicted");
                }
            }
            // Handled where the loop can end.
            News::Stop(_) => {}
        }
    }

    /// Takes a pair in, or keeps the one that is there.
    async fn elect(&mut self, mut met: Met) -> Elected {
        let (id, is_dialled) = (met.id(), met.is_dialled());
        // Until it is known whether it is here.
        let _meeting = met.meeting.take();
        if self.evicted.contains(&id) {
            met.close("not let in");
            return Elected::Unwanted;
        }
        if let Some(here) = self.peers.get(&id) {
            // The lower id's dial wins; a second dial of the same side says that it has lost the first.
            let lower_dialled = is_dialled == (self.own < id);
            if here.is_dialled != is_dialled && !lower_dialled {
                met.close("met already");
                return Elected::Here;
            }
            let session = here.session;
            self.on_closed(id, session, "the peer came anew".to_owned()).await;
        }
        if self.peers.len() >= PEERS_MAX {
            met.close("full");
            return Elected::Unwanted;
        }
        let session = self.next_session;
        self.next_session += 1;
        let control = met.introduced.control.clone();
        let peer = met.into_peer(session);
        let address = peer.address;
        let here = Here { session, is_dialled, control: control.clone(), data: peer.data.clone() };
        self.policy.handle_up(id, address, self.now());
        tracing::info!(peer = %id, name = peer.name, %address, session = session_label(id, session), "a peer is here");
        let (data, news) = (peer.data.clone(), self.news.clone());
        tokio::spawn(async move {
            let reason = tokio::select! {
                reason = control.closed() => reason,
                reason = data.closed() => reason,
            };
            // A driver that has ended wants no news.
            let _ = news.send(News::Closed { id, session, reason: reason.to_string() }).await;
        });
        self.peers.insert(id, here);
        self.met.set_here(id, true);
        // Where nobody listens any more, the node stops.
        let _ = self.events.send(NetworkEvent::PeerUp(Box::new(peer))).await;
        Elected::Here
    }

    async fn on_closed(&mut self, id: NodeId, session: u64, reason: String) {
        if self.peers.get(&id).is_none_or(|here| here.session != session) {
            return;
        }
        if let Some(here) = self.peers.remove(&id) {
            here.data.close(&reason);
            here.control.close(quinn::VarInt::from_u32(0), reason.as_bytes());
        }
        self.met.set_here(id, false);
        self.policy.handle_down(id, self.now());
        tracing::info!(peer = %id, reason, "a peer is gone");
        let _ = self.events.send(NetworkEvent::PeerDown { id, session, reason }).await;
    }
}
