//! The network's task: dials the addresses that are due, pairs connections, elects one pair per member, and reports
//! which peers connect and disconnect.

use super::{CLOCK_EVERY, DriverEvent, HALVES_MAX, NetworkEvent, PEERS_MAX, PeerEnd, WATCH_EVERY};
use crate::addresses::AddressWatch;
use crate::certificate::is_stale;
use crate::control::session_label;
use crate::departure::Departure;
use crate::dial::{DialPolicy, Source};
use crate::dial_failure::{DialFailure, REASON_BYTES_MAX, close};
use crate::dial_guard::DialRegistry;
use crate::discovery::Discovery;
use crate::endpoint::{Authenticated, Endpoint, LEAVING, Purpose};
use crate::identity::NodeId;
use crate::peer::{
    ConnectError, DataConnection, Introduced, OwnHello, PeerConnections, dial, introduce, nonce_of, shown,
};
use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::time::{Duration, Instant, SystemTime};
use tokio::sync::mpsc;

mod liveness;
mod trouble;

/// The result of electing a pair of connections.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Elected {
    /// The member is connected, by this pair or by another one.
    Kept,
    /// The member is not admitted.
    Unwanted,
}

pub(super) struct ConnectedPeer {
    session: u64,
    /// The number of its process.
    run: u64,
    address: SocketAddr,
    is_dialled: bool,
    control: quinn::Connection,
    data: DataConnection,
}

impl ConnectedPeer {
    /// Datagrams received from the peer so far.
    fn received(&self) -> u64 {
        self.control.stats().udp_rx.datagrams + self.data.received()
    }
}

pub(super) struct Driver {
    pub(super) own: OwnHello,
    /// `None` where the endpoint has no address.
    pub(super) watch: Option<AddressWatch>,
    /// Why no member answers at addresses that concern the user.
    pub(super) failures: BTreeMap<SocketAddr, DialFailure>,
    pub(super) endpoint: Endpoint,
    /// When the endpoint's certificate was made.
    pub(super) certified: SystemTime,
    pub(super) policy: DialPolicy,
    pub(super) started: Instant,
    pub(super) driver_events: mpsc::Sender<DriverEvent>,
    pub(super) events: mpsc::Sender<NetworkEvent>,
    /// Control connections that wait for their data connection, oldest first.
    pub(super) introduced: Vec<Introduced>,
    /// Data connections that wait for their control connection, oldest first.
    pub(super) data: Vec<(NodeId, u64, quinn::Connection)>,
    pub(super) dials: DialRegistry,
    pub(super) peers: BTreeMap<NodeId, ConnectedPeer>,
    pub(super) next_session: u64,
    pub(super) evicted: BTreeMap<NodeId, String>,
    pub(super) _discovery: Option<Discovery>,
}

impl Driver {
    pub(super) async fn run(
        mut self,
        known: Vec<(SocketAddr, Source)>,
        mut driver_events: mpsc::Receiver<DriverEvent>,
        mut accepted: mpsc::Receiver<Authenticated>,
    ) {
        for (address, source) in known {
            self.policy.handle_address(address, source, self.now());
        }
        let mut clock = tokio::time::interval(CLOCK_EVERY);
        let mut watch = tokio::time::interval(WATCH_EVERY);
        loop {
            self.dial_due();
            let due = self.policy.next_due().map(|due| self.started + due);
            // Where nothing is due, only an event can change that.
            let due = due.unwrap_or_else(|| Instant::now() + CLOCK_EVERY);
            tokio::select! {
                event = driver_events.recv() => match event {
                    Some(DriverEvent::Stop(done)) => {
                        self.endpoint.close().await;
                        let _ = done.send(());
                        return;
                    }
                    Some(event) => self.on_event(event).await,
                    None => return,
                },
                Some(connection) = accepted.recv() => self.on_accepted(connection),
                () = tokio::time::sleep_until(due.into()) => {}
                _ = clock.tick() => self.certify(SystemTime::now()),
                _ = watch.tick() => self.watch().await,
            }
        }
    }

    fn now(&self) -> Duration {
        self.started.elapsed()
    }

    fn certify(&mut self, now: SystemTime) {
        if !is_stale(self.certified, now) {
            return;
        }
        match self.endpoint.renew() {
            Ok(()) => self.certified = now,
            Err(error) => tracing::error!(%error, "the node's certificate was not renewed"),
        }
    }

    fn dial_due(&mut self) {
        while let Some(address) = self.policy.poll_dial(self.now()) {
            let (endpoint, own) = (self.endpoint.clone(), self.own.clone());
            let (dials, driver_events) = (self.dials.clone(), self.driver_events.clone());
            tokio::spawn(async move {
                let dialled = dial(&endpoint, address, &own, &dials).await;
                // An error means that the driver has ended.
                let _ = driver_events.send(DriverEvent::Dialled(address, Box::new(dialled))).await;
            });
        }
    }

    /// Handles an accepted connection: exchanges hellos on a control connection, reads the nonce of a data connection.
    fn on_accepted(&self, Authenticated { id, purpose, connection }: Authenticated) {
        if let Some(by) = self.evicted.get(&id) {
            connection.close(quinn::VarInt::from_u32(close::NOT_ADMITTED), by.as_bytes());
            return;
        }
        let (own, driver_events, accepted) = (self.own.clone(), self.driver_events.clone(), connection.clone());
        tokio::spawn(async move {
            let told = match purpose {
                Purpose::Control => {
                    connection.set_max_concurrent_bi_streams(quinn::VarInt::from_u32(1));
                    introduce(id, connection, &own)
                        .await
                        .map(|introduced| DriverEvent::Introduced(Box::new(introduced)))
                }
                Purpose::Data => nonce_of(&connection).await.map(|nonce| DriverEvent::Data { id, nonce, connection }),
            };
            match told {
                // An error means that the driver has ended.
                Ok(told) => drop(driver_events.send(told).await),
                Err(error) => {
                    tracing::info!(peer = %id, %error, "closed an accepted connection that did not introduce itself");
                    accepted.close(quinn::VarInt::from_u32(5), error.to_string().as_bytes());
                }
            }
        });
    }

    async fn on_event(&mut self, event: DriverEvent) {
        match event {
            DriverEvent::Found(address, source) => self.policy.handle_address(address, source, self.now()),
            DriverEvent::Sighted(address) => self.policy.handle_sight(address, self.now()),
            DriverEvent::Dialled(address, dialled) => self.on_dialled(address, *dialled).await,
            DriverEvent::Introduced(introduced) if introduced.id == self.own.id => self.on_own_key(&introduced).await,
            DriverEvent::Introduced(introduced) => {
                let is_its = |(id, nonce, _): &(NodeId, u64, quinn::Connection)| {
                    (*id, *nonce) == (introduced.id, introduced.nonce)
                };
                match self.data.iter().position(is_its) {
                    Some(at) => {
                        let (_, _, data) = self.data.remove(at);
                        self.elect(PeerConnections { introduced: *introduced, data, guard: None }).await;
                    }
                    None => {
                        self.introduced.push(*introduced);
                        if self.introduced.len() > HALVES_MAX {
                            self.introduced
                                .remove(0)
                                .control
                                .close(quinn::VarInt::from_u32(4), b"the second connection of the pair did not come");
                        }
                    }
                }
            }
            DriverEvent::Data { id, nonce, connection } => {
                let is_its = |introduced: &Introduced| (introduced.id, introduced.nonce) == (id, nonce);
                match self.introduced.iter().position(is_its) {
                    Some(at) => {
                        let introduced = self.introduced.remove(at);
                        self.elect(PeerConnections { introduced, data: connection, guard: None }).await;
                    }
                    None => {
                        self.data.push((id, nonce, connection));
                        if self.data.len() > HALVES_MAX {
                            self.data
                                .remove(0)
                                .2
                                .close(quinn::VarInt::from_u32(4), b"the second connection of the pair did not come");
                        }
                    }
                }
            }
            DriverEvent::Ended { id, session, end } => self.on_ended(id, session, &end).await,
            DriverEvent::KeyChecked { session, is_alive, newcomer } => {
                self.on_key_checked(session, is_alive, *newcomer).await;
            }
            DriverEvent::Evict(id, by) => {
                self.evicted.insert(id, by);
                if let Some(peer) = self.peers.get(&id) {
                    peer.data.close("evicted");
                }
            }
            DriverEvent::Readmit(id) => drop(self.evicted.remove(&id)),
            // `run` handles this event, since it ends the loop.
            DriverEvent::Stop(_) => {}
        }
    }

    async fn on_dialled(&mut self, address: SocketAddr, dialled: Result<PeerConnections, ConnectError>) {
        match dialled {
            Ok(connections) => {
                self.policy.handle_dialled(address, connections.id());
                self.tell_failure(address, None).await;
                if self.elect(connections).await == Elected::Unwanted {
                    self.policy.handle_failed(address, self.now());
                }
            }
            // The address is dialled again after a wait, in case the peer's other connections fail.
            Err(ConnectError::AlreadyConnected { id }) => {
                self.policy.handle_dialled(address, id);
                self.policy.handle_failed(address, self.now());
                self.tell_failure(address, None).await;
            }
            Err(ConnectError::Ourselves) => {
                self.policy.handle_dialled(address, self.own.id);
                self.tell_failure(address, None).await;
            }
            Err(ConnectError::SameKey) => {
                self.policy.handle_same_key(address, self.now());
                self.tell_same_key(self.own.id, self.own_address(), address).await;
            }
            Err(error) => {
                tracing::debug!(%address, %error, "dial failed");
                let failure = DialFailure::of(address, &error);
                match failure {
                    DialFailure::SameKey { .. } => self.policy.handle_same_key(address, self.now()),
                    _ => self.policy.handle_failed(address, self.now()),
                }
                self.tell_failure(address, Some(failure)).await;
            }
        }
    }

    /// Admits a pair, or closes it and keeps the existing one.
    async fn elect(&mut self, mut connections: PeerConnections) -> Elected {
        let (id, is_dialled) = (connections.id(), connections.is_dialled());
        // Held until this pair is elected or closed.
        let _guard = connections.guard.take();
        if let Some(by) = self.evicted.get(&id) {
            connections.close(close::NOT_ADMITTED, by);
            return Elected::Unwanted;
        }
        if let Some(peer) = self.peers.get(&id).filter(|peer| peer.run != connections.introduced.run) {
            self.check_key(peer, connections);
            return Elected::Kept;
        }
        if let Some(peer) = self.peers.get(&id) {
            // The lower id's dial wins. A second dial by the same side means that this side has lost the first pair.
            let lower_dialled = is_dialled == (self.own.id < id);
            if peer.is_dialled != is_dialled && !lower_dialled {
                connections.close(0, "already connected");
                return Elected::Kept;
            }
            let session = peer.session;
            self.on_closed(id, session, Departure::Lost { reason: "the peer connected again".to_owned() }).await;
        }
        if self.peers.len() >= PEERS_MAX {
            connections.close(0, "the node has its maximum of peers");
            return Elected::Unwanted;
        }
        let session = self.next_session;
        self.next_session += 1;
        let (control, run) = (connections.introduced.control.clone(), connections.introduced.run);
        let peer = connections.into_peer(session);
        let address = peer.address;
        let data = peer.data.clone();
        let connected = ConnectedPeer { session, run, address, is_dialled, control: control.clone(), data };
        self.policy.handle_up(id, address, self.now());
        self.tell_failure(address, None).await;
        tracing::info!(peer = %id, name = peer.name, %address, session = session_label(id, session), "peer connected");
        let (data, driver_events) = (peer.data.clone(), self.driver_events.clone());
        tokio::spawn(async move {
            let end = tokio::select! {
                error = control.closed() => PeerEnd::Closed(error),
                error = data.closed() => PeerEnd::Closed(error),
                () = liveness::has_died(address, control.clone(), data.clone()) => PeerEnd::Died,
            };
            // An error means that the driver has ended.
            let _ = driver_events.send(DriverEvent::Ended { id, session, end }).await;
        });
        self.peers.insert(id, connected);
        self.dials.set_connected(id, true);
        // An error means that the node is stopping.
        let _ = self.events.send(NetworkEvent::PeerUp(Box::new(peer))).await;
        Elected::Kept
    }

    /// Handles the end of a peer, or of its connections.
    async fn on_ended(&mut self, id: NodeId, session: u64, end: &PeerEnd) {
        let Some(peer) = self.peers.get(&id).filter(|peer| peer.session == session) else { return };
        let address = peer.address;
        let departure = match end {
            PeerEnd::Died => Departure::Died,
            PeerEnd::Closed(quinn::ConnectionError::TimedOut) => {
                Departure::Lost { reason: "it does not answer any more".to_owned() }
            }
            PeerEnd::Closed(quinn::ConnectionError::ApplicationClosed(closed)) if &closed.reason[..] == LEAVING => {
                Departure::Stopped
            }
            PeerEnd::Closed(error) => Departure::Lost { reason: shown(&error.to_string(), REASON_BYTES_MAX) },
        };
        self.on_closed(id, session, departure).await;
        let PeerEnd::Closed(error) = end else { return };
        // A member that refuses this node may do so only after both sides have elected the pair.
        let failure = DialFailure::of_connection(address, error);
        if matches!(failure, DialFailure::SameKey { .. } | DialFailure::Evicted { .. }) {
            self.policy.handle_same_key(address, self.now());
            self.tell_failure(address, Some(failure)).await;
        }
    }

    async fn on_closed(&mut self, id: NodeId, session: u64, departure: Departure) {
        if self.peers.get(&id).is_none_or(|peer| peer.session != session) {
            return;
        }
        if let Some(peer) = self.peers.remove(&id) {
            let reason = departure.to_string();
            peer.data.close(&reason);
            peer.control.close(quinn::VarInt::from_u32(0), reason.as_bytes());
        }
        self.dials.set_connected(id, false);
        self.policy.handle_down(id, self.now());
        tracing::info!(peer = %id, %departure, "peer disconnected");
        let _ = self.events.send(NetworkEvent::PeerDown { id, session, departure }).await;
    }
}
