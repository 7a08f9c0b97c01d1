//! Cluster: the peers of this node.
//!
//! - owns: the network, ractor_cluster's server, the control actor that peers can reach, each peer's session;
//! - receives: peers that connect and disconnect, their messages, the streams that they open;
//! - emits: channels to peers (`transport/router.rs`); messages, links and requests to the actors that handle them;
//! - dies when: the node stops;
//! - supervised by: the node.
//!
//! ```text
//! Network ─PeerUp─► session of ractor_cluster over the control stream ─ready─► Router::connect, NodeUp
//!                   data connection ─streams─► worker/links.rs, gateway, models
//! Network ─PeerDown─► Router::disconnect, NodeDown
//! ```

mod evicted;
mod probe;
mod sessions;
mod streams;
mod trouble;

pub use evicted::Evicted;
use evicted::EvictionChange;

use crate::core::members::MemberReport;
use crate::core::node_status::Fact;
use crate::core::speed::Estimate;
use crate::core::status::KeyClash;
use crate::gateway::GatewayMsg;
use crate::models::ModelsRef;
use crate::planner::{PlannerMsg, PlannerRef};
use crate::transport::callback::{EventCallback, Facts};
use crate::transport::control::{Control, ControlArgs, ControlMsg, ReceivedMessage, Senders};
use crate::transport::protocol::ControlMessage;
use crate::transport::router::{PeerChannel, Router};
use crate::worker::links::LinkRegistry;
use exo_net::{DataConnection, Departure, Network, NetworkEvent, NodeId, Outbox, Peer, SenderToken};
use ractor::{Actor, ActorProcessingErr, ActorRef, SupervisionEvent};
use ractor_cluster::{NodeServerMessage, RactorMessage};
use sessions::{SessionEvent, SessionRef};
use std::collections::{BTreeMap, BTreeSet};
use std::net::SocketAddr;
use std::time::{Duration, Instant};
use tokio::sync::mpsc;

pub(crate) type ClusterRef = ActorRef<ClusterMsg>;

/// How often round-trip times are reported to the planner, and a due measurement of bandwidth is started.
const TICK_EVERY: Duration = Duration::from_secs(1);
/// The time from a peer's connection to its session.
const SESSION_DEADLINE: Duration = Duration::from_secs(5);
/// The most addresses of other nodes that are read from one report; further ones are ignored.
const REPORTED_PEERS_MAX: usize = 256;

#[derive(Debug, RactorMessage)]
pub(crate) enum ClusterMsg {
    Network(NetworkEvent),
    Session(SessionEvent),
    Received(ReceivedMessage),
    /// The bandwidth of a link was measured.
    Probed {
        id: NodeId,
        session: u64,
        bytes_per_s: f64,
    },
    /// This node's user evicts members.
    Evict(BTreeSet<NodeId>),
    /// This node's user undoes an eviction.
    Readmit(NodeId),
    Tick,
}

#[derive(Debug)]
pub(crate) struct ClusterArgs {
    pub own: NodeId,
    pub network: Network,
    pub events: mpsc::Receiver<NetworkEvent>,
    /// The cookie by which ractor_cluster's sessions authenticate each other.
    pub cookie: String,
    pub evicted: Evicted,
    pub router: Router,
    pub link_registry: LinkRegistry,
    pub planner: PlannerRef,
    pub gateway: ActorRef<GatewayMsg>,
    pub models: ModelsRef,
    /// Passes messages to this node's other actors.
    pub deliver: EventCallback<ReceivedMessage>,
    pub facts: Facts,
}

#[derive(Debug)]
pub(crate) struct ClusterState {
    own: NodeId,
    network: Network,
    evicted: Evicted,
    router: Router,
    link_registry: LinkRegistry,
    planner: PlannerRef,
    gateway: ActorRef<GatewayMsg>,
    models: ModelsRef,
    deliver: EventCallback<ReceivedMessage>,
    facts: Facts,
    /// Pairs of nodes with the same key that the user was told of, and when.
    clashes: BTreeMap<KeyClash, Instant>,
    senders: Senders,
    server: ActorRef<NodeServerMessage>,
    peers: BTreeMap<NodeId, ConnectedPeer>,
    /// The sessions of ractor_cluster that have not ended, by peer.
    sessions: BTreeMap<NodeId, Vec<(u64, SessionRef)>>,
    /// Connected peers whose session can begin only when their earlier session has ended.
    waiting: BTreeMap<NodeId, Box<Peer>>,
}

/// A connected peer.
#[derive(Debug)]
struct ConnectedPeer {
    session: u64,
    sender_token: SenderToken,
    expected_token: SenderToken,
    name: String,
    address: SocketAddr,
    data: DataConnection,
    outbox: Outbox,
    since: Instant,
    is_ready: bool,
    /// The measured bandwidth, in bytes per second.
    bandwidth: Estimate,
    /// The measured round-trip time, in seconds.
    rtt: Estimate,
    /// When the round-trip time was last taken.
    rtt_taken: Option<Instant>,
    /// When the last measurement of bandwidth began.
    probed: Option<Instant>,
    /// The addresses of other nodes in the peer's last report.
    reported: BTreeSet<SocketAddr>,
}

#[derive(Debug)]
pub(crate) struct Cluster;

impl Actor for Cluster {
    type Msg = ClusterMsg;
    type State = ClusterState;
    type Arguments = ClusterArgs;

    async fn pre_start(&self, myself: ClusterRef, args: ClusterArgs) -> Result<ClusterState, ActorProcessingErr> {
        let ClusterArgs {
            own,
            network,
            mut events,
            cookie,
            evicted,
            router,
            link_registry,
            planner,
            gateway,
            models,
            deliver,
            facts,
        } = args;
        let senders = Senders::default();
        let control =
            ControlArgs { senders: senders.clone(), received: EventCallback::to(&myself, ClusterMsg::Received) };
        Control::spawn_linked(None, Control, control, myself.get_cell()).await?;
        let server = sessions::start(own, cookie, &myself).await?;
        let cluster = myself.clone();
        tokio::spawn(async move {
            while let Some(event) = events.recv().await {
                if cluster.send_message(ClusterMsg::Network(event)).is_err() {
                    return;
                }
            }
        });
        myself.send_interval(TICK_EVERY, || ClusterMsg::Tick);
        facts.tell(Fact::EvictionsChanged(evicted.nodes()));
        Ok(ClusterState {
            own,
            network,
            evicted,
            router,
            link_registry,
            planner,
            gateway,
            models,
            deliver,
            facts,
            clashes: BTreeMap::new(),
            senders,
            server,
            peers: BTreeMap::new(),
            sessions: BTreeMap::new(),
            waiting: BTreeMap::new(),
        })
    }

    async fn post_stop(&self, _: ClusterRef, state: &mut ClusterState) -> Result<(), ActorProcessingErr> {
        state.network.stop().await;
        Ok(())
    }

    async fn handle(
        &self,
        myself: ClusterRef,
        message: ClusterMsg,
        state: &mut ClusterState,
    ) -> Result<(), ActorProcessingErr> {
        match message {
            ClusterMsg::Network(NetworkEvent::PeerUp(peer)) => state.on_up(peer),
            ClusterMsg::Network(NetworkEvent::PeerDown { id, session, departure }) => {
                state.on_down(id, session, departure)
            }
            ClusterMsg::Network(event) => state.on_trouble(event),
            ClusterMsg::Session(event) => state.on_session(event),
            ClusterMsg::Received(received) => state.on_received(received),
            ClusterMsg::Probed { id, session, bytes_per_s } => state.on_probed(id, session, bytes_per_s),
            ClusterMsg::Evict(nodes) => {
                let changes = state.evicted.evict(nodes.into_iter().filter(|node| *node != state.own));
                state.apply_evictions(&changes);
            }
            ClusterMsg::Readmit(node) => {
                let changes = state.evicted.readmit(node);
                state.apply_evictions(&changes);
            }
            ClusterMsg::Tick => state.on_tick(&myself),
        }
        Ok(())
    }

    async fn handle_supervisor_evt(
        &self,
        _: ClusterRef,
        event: SupervisionEvent,
        _: &mut ClusterState,
    ) -> Result<(), ActorProcessingErr> {
        match event {
            // Without its children the cluster actor can connect no peer, so the node stops.
            SupervisionEvent::ActorFailed(_, error) => Err(error),
            SupervisionEvent::ActorTerminated(..) => Err("a child of the cluster actor has stopped".into()),
            _ => Ok(()),
        }
    }
}

impl ClusterState {
    fn on_up(&mut self, peer: Box<Peer>) {
        let id = peer.id;
        if self.sessions.get(&id).is_some_and(|sessions| !sessions.is_empty()) {
            // ractor_cluster cannot have two sessions of one name: the old session ends first.
            self.waiting.insert(id, peer);
            return self.end_sessions(id);
        }
        self.open_session(*peer);
    }

    fn open_session(&mut self, peer: Peer) {
        let Peer {
            id,
            session,
            name,
            address,
            is_dialled,
            control,
            inbox,
            outbox,
            sender_token,
            expected_token,
            data,
            ..
        } = peer;
        self.senders.admit(expected_token, id, inbox);
        let peer = ConnectedPeer {
            session,
            sender_token,
            expected_token,
            name,
            address,
            data,
            outbox,
            since: Instant::now(),
            is_ready: false,
            bandwidth: Estimate::default(),
            rtt: Estimate::default(),
            rtt_taken: None,
            probed: None,
            reported: BTreeSet::new(),
        };
        self.peers.insert(id, peer);
        let opened = NodeServerMessage::ConnectionOpenedExternal { stream: Box::new(control), is_server: !is_dialled };
        // If the server has stopped, the node stops, too.
        let _ = self.server.cast(opened);
    }

    fn end_sessions(&self, id: NodeId) {
        for (_, session) in self.sessions.get(&id).into_iter().flatten() {
            session.kill();
        }
    }

    fn on_down(&mut self, id: NodeId, session: u64, departure: Departure) {
        if self.waiting.get(&id).is_some_and(|peer| peer.session == session) {
            self.waiting.remove(&id);
        }
        if self.peers.get(&id).is_none_or(|peer| peer.session != session) {
            return;
        }
        let Some(peer) = self.peers.remove(&id) else { return };
        self.senders.dismiss(peer.expected_token);
        self.router.disconnect(id);
        self.end_sessions(id);
        let reported = match peer.is_ready {
            true => {
                tracing::info!(peer = %id, %departure, "peer lost");
                PlannerMsg::NodeDown(id, departure)
            }
            // The session was never ready, but the planner may have received reports of the peer.
            false => PlannerMsg::NodeMissed(id),
        };
        let _ = self.planner.send_message(reported);
    }

    fn on_session(&mut self, event: SessionEvent) {
        match event {
            SessionEvent::Opened { id, session, actor } => self.sessions.entry(id).or_default().push((session, actor)),
            SessionEvent::Ready { id, session, control } => self.on_ready(id, session, control),
            SessionEvent::Ended { id, session } => {
                if let Some(sessions) = self.sessions.get_mut(&id) {
                    sessions.retain(|(other, _)| *other != session);
                    if sessions.is_empty() {
                        self.sessions.remove(&id);
                        if let Some(peer) = self.waiting.remove(&id) {
                            self.open_session(*peer);
                        }
                    }
                }
                // Messages need a session, so the connection is closed, and the peer connects again.
                if let Some(peer) = self.peers.get(&id).filter(|peer| peer.session == session) {
                    peer.data.close("the control session ended");
                }
            }
        }
    }

    fn on_ready(&mut self, id: NodeId, session: u64, control: ActorRef<ControlMsg>) {
        let Some(peer) = self.peers.get_mut(&id).filter(|peer| peer.session == session) else { return };
        if std::mem::replace(&mut peer.is_ready, true) {
            return;
        }
        tracing::info!(peer = %id, "peer ready");
        let (data, outbox) = (peer.data.clone(), peer.outbox.clone());
        let channel = PeerChannel { name: peer.name.clone(), control, token: peer.sender_token, data, outbox };
        self.router.connect(id, channel);
        let handlers = streams::StreamHandlers {
            link_registry: self.link_registry.clone(),
            gateway: self.gateway.clone(),
            models: self.models.clone(),
        };
        let data = peer.data.clone();
        let accepting = data.clone();
        data.spawn(async move {
            while let Ok(stream) = accepting.accept().await {
                accepting.spawn(streams::serve(id, stream, handlers.clone()));
            }
        });
        if !self.evicted.revisions().is_empty() {
            self.router.tell(id, ControlMessage::Evicted(self.evicted.revisions().clone()));
        }
        let _ = self.planner.send_message(PlannerMsg::NodeUp(id));
    }

    /// Disconnects evicted members, admits others again, and reports the changes to the other members.
    fn apply_evictions(&self, changes: &[EvictionChange]) {
        if changes.is_empty() {
            return;
        }
        for change in changes {
            tracing::info!(?change, "evictions changed");
            match change {
                EvictionChange::Evicted { node, by } => self.network.evict(*node, by.clone()),
                EvictionChange::Readmitted(node) => self.network.readmit(*node),
            }
        }
        self.facts.tell(Fact::EvictionsChanged(self.evicted.nodes()));
        self.router.tell_others(&ControlMessage::Evicted(self.evicted.revisions().clone()));
    }

    fn on_received(&mut self, mut received: ReceivedMessage) {
        if !self.peers.contains_key(&received.from) {
            return;
        }
        if let ControlMessage::Evicted(nodes) = received.message {
            let others = nodes.into_iter().filter(|(node, _)| *node != self.own).collect();
            let changes = self.evicted.merge(&others);
            return self.apply_evictions(&changes);
        }
        if let ControlMessage::Report(report) = &mut received.message {
            report.name = exo_net::shown_name(&report.name);
            self.note_reported_clashes(report);
            self.note_reported_peers(received.from, report);
        }
        self.deliver.tell(received);
    }

    /// Dials the nodes that a peer reports, since they are members of the same cluster; newly reported ones at once.
    fn note_reported_peers(&mut self, from: NodeId, report: &MemberReport) {
        let Some(peer) = self.peers.get_mut(&from) else { return };
        let peers: BTreeSet<SocketAddr> = report.peers.iter().copied().take(REPORTED_PEERS_MAX).collect();
        for &address in &report.addresses {
            self.network.add_address(address);
        }
        for &address in &peers {
            match peer.reported.contains(&address) {
                true => self.network.add_address(address),
                false => self.network.add_sighting(address),
            }
        }
        peer.reported = peers;
    }

    fn on_tick(&mut self, myself: &ClusterRef) {
        self.probe(myself);
        let (mut links, mut peers) = (BTreeMap::new(), Vec::new());
        for (id, peer) in &mut self.peers {
            if peer.is_ready {
                peer.take_rtt();
                links.insert(*id, peer.link());
                peers.extend(Some(peer.address).filter(|&address| exo_net::is_shareable(address)));
            } else if peer.since.elapsed() > SESSION_DEADLINE {
                peer.data.close("the session did not begin in time");
            }
        }
        self.forget_old_clashes();
        let clashes = self.clashes.keys().copied().collect();
        let _ = self.planner.send_message(PlannerMsg::LinksMeasured { links, peers, clashes });
    }
}
