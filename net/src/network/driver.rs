//! The network's task: dials who is due, pairs connections, elects one pair of each member, tells who came and went.

use super::{CLOCK_EVERY, HALVES_MAX, NetworkEvent, News, PEERS_MAX};
use crate::certificate::is_stale;
use crate::control::session_label;
use crate::dial::{DialPolicy, Source};
use crate::discovery::Discovery;
use crate::endpoint::{Authenticated, Endpoint, Purpose};
use crate::identity::NodeId;
use crate::meeting::Meetings;
use crate::peer::{DataConnection, Introduced, MeetError, Met, dial, introduce, nonce_of};
use std::collections::{BTreeMap, BTreeSet};
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};
use tokio::sync::mpsc;

/// What became of a pair of connections.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Elected {
    /// Its member is here, by this pair or by another one.
    Here,
    /// Its member is not let in.
    Unwanted,
}

pub(super) struct Here {
    session: u64,
    is_dialled: bool,
    control: quinn::Connection,
    data: DataConnection,
}

pub(super) struct Driver {
    pub(super) own: NodeId,
    pub(super) name: Arc<str>,
    pub(super) endpoint: Endpoint,
    /// When its certificate was made.
    pub(super) certified: SystemTime,
    pub(super) policy: DialPolicy,
    pub(super) started: Instant,
    pub(super) news: mpsc::Sender<News>,
    pub(super) events: mpsc::Sender<NetworkEvent>,
    /// Control connections without their data connection yet, oldest first; and the other way round.
    pub(super) introduced: Vec<Introduced>,
    pub(super) data: Vec<(NodeId, u64, quinn::Connection)>,
    /// Who need not be dialled at another address.
    pub(super) met: Meetings,
    pub(super) peers: BTreeMap<NodeId, Here>,
    pub(super) next_session: u64,
    pub(super) evicted: BTreeSet<NodeId>,
    pub(super) _discovery: Option<Discovery>,
}

impl Driver {
    pub(super) async fn run(
        mut self,
        named: Vec<SocketAddr>,
        mut news: mpsc::Receiver<News>,
        mut accepted: mpsc::Receiver<Authenticated>,
    ) {
        for address in named {
            self.policy.handle_address(address, Source::Named, self.now());
        }
        let mut clock = tokio::time::interval(CLOCK_EVERY);
        loop {
            self.dial_due();
            let due = self.policy.next_due().map(|due| self.started + due);
            // Nothing due: any news changes that.
            let due = due.unwrap_or_else(|| Instant::now() + CLOCK_EVERY);
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
                _ = clock.tick() => self.certify(SystemTime::now()),
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
            News::Sighted(address) => self.policy.handle_sight(address, self.now()),
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
