//! Cluster: the members that are here.
//!
//! - owns: the network, ractor_cluster's server and the one actor that members can reach, each peer's session;
//! - receives: peers that come and go, what they say, the streams that they open;
//! - emits: ways to peers (`post.rs`); what they say, to whom it concerns; links and requests;
//! - dies when: the node stops;
//! - supervised by: the node.
//!
//! ```text
//! Network ─PeerUp─► session of ractor_cluster over its control stream ─ready─► Post::connect, NodeUp
//!                   data connection ─streams─► links.rs, gateway
//! Network ─PeerDown─► Post::disconnect, NodeDown
//! ```

mod evicted;
#[cfg(test)]
mod hostile;
mod probe;
mod sessions;

pub use evicted::Evicted;

use crate::control::{Control, ControlArgs, ControlMsg, Heard, Senders};
use crate::core::members::MemberReport;
use crate::core::plan::Link;
use crate::gateway::{Asking, GatewayMsg};
use crate::links::{self, Switchboard};
use crate::models::{ModelsMsg, ModelsRef};
use crate::outlet::Outlet;
use crate::planner::{PlannerMsg, PlannerRef};
use crate::post::{Line, Post};
use crate::protocol::{ControlMessage, DataHello};
use exo_net::{DataConnection, DataStream, Network, NetworkEvent, NodeId, Outbox, Peer, SenderToken};
use ractor::{Actor, ActorProcessingErr, ActorRef, SupervisionEvent};
use ractor_cluster::{NodeServerMessage, RactorMessage};
use sessions::{SessionEvent, SessionRef};
use std::collections::{BTreeMap, BTreeSet};
use std::net::SocketAddr;
use std::time::{Duration, Instant};
use tokio::sync::mpsc;

pub(crate) type ClusterRef = ActorRef<ClusterMsg>;

/// How often links are looked at.
const LOOK_EVERY: Duration = Duration::from_secs(1);
/// From a peer to the first measurement of its link: it has better to do at first.
const PROBE_AFTER: Duration = Duration::from_secs(2);
const PROBE_EVERY: Duration = Duration::from_secs(600);
/// Whatever disturbs a measurement makes it lower: what was known fades by this much with each.
const DISTURBED: f64 = 0.7;
/// From a peer to its session: what takes longer does not come.
const SESSION_DEADLINE: Duration = Duration::from_secs(5);
/// Addresses of others that one peer tells of: more are not believed.
const TOLD_MAX: usize = 256;
/// From a stream to its first frame.
const HELLO_DEADLINE: Duration = Duration::from_secs(5);

#[derive(Debug, RactorMessage)]
pub(crate) enum ClusterMsg {
    Network(NetworkEvent),
    Session(SessionEvent),
    Heard(Heard),
    /// A link was measured.
    Probed {
        id: NodeId,
        session: u64,
        bytes_per_s: f64,
    },
    /// These are members no more.
    Evict(BTreeSet<NodeId>),
    Look,
}

#[derive(Debug)]
pub(crate) struct ClusterArgs {
    pub own: NodeId,
    pub network: Network,
    pub events: mpsc::Receiver<NetworkEvent>,
    /// What ractor_cluster's sessions ask of each other.
    pub cookie: String,
    pub evicted: Evicted,
    pub post: Post,
    pub board: Switchboard,
    pub planner: PlannerRef,
    pub gateway: ActorRef<GatewayMsg>,
    pub models: ModelsRef,
    /// For this node's other actors.
    pub deliver: Outlet<Heard>,
}

#[derive(Debug)]
pub(crate) struct ClusterState {
    own: NodeId,
    network: Network,
    evicted: Evicted,
    post: Post,
    board: Switchboard,
    planner: PlannerRef,
    gateway: ActorRef<GatewayMsg>,
    models: ModelsRef,
    deliver: Outlet<Heard>,
    senders: Senders,
    server: ActorRef<NodeServerMessage>,
    peers: BTreeMap<NodeId, Present>,
    /// Sessions of ractor_cluster that have not ended, by label; and who waits for one to end.
    sessions: BTreeMap<NodeId, Vec<(u64, SessionRef)>>,
    waiting: BTreeMap<NodeId, Box<Peer>>,
}

/// A peer that is here.
#[derive(Debug)]
struct Present {
    session: u64,
    sender_token: SenderToken,
    expected_token: SenderToken,
    address: SocketAddr,
    data: DataConnection,
    outbox: Outbox,
    since: Instant,
    is_ready: bool,
    bytes_per_s: Option<f64>,
    /// Of the last measurement, or of its beginning.
    probed: Option<Instant>,
    /// Where it has told that it sees others.
    told: BTreeSet<SocketAddr>,
}

#[derive(Debug)]
pub(crate) struct Cluster;

impl Actor for Cluster {
    type Msg = ClusterMsg;
    type State = ClusterState;
    type Arguments = ClusterArgs;

    async fn pre_start(&self, myself: ClusterRef, args: ClusterArgs) -> Result<ClusterState, ActorProcessingErr> {
        let ClusterArgs { own, network, mut events, cookie, evicted, post, board, planner, gateway, models, deliver } =
            args;
        let senders = Senders::default();
        let control = ControlArgs { senders: senders.clone(), heard: Outlet::to(&myself, ClusterMsg::Heard) };
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
        myself.send_interval(LOOK_EVERY, || ClusterMsg::Look);
        Ok(ClusterState {
            own,
            network,
            evicted,
            post,
            board,
            planner,
            gateway,
            models,
            deliver,
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
            ClusterMsg::Network(NetworkEvent::PeerDown { id, session, reason }) => state.on_down(id, session, &reason),
            ClusterMsg::Session(event) => state.on_session(event),
            ClusterMsg::Heard(heard) => state.on_heard(heard),
            ClusterMsg::Probed { id, session, bytes_per_s } => state.on_probed(id, session, bytes_per_s),
            ClusterMsg::Evict(nodes) => {
                let new = state.evicted.add(nodes.into_iter().filter(|node| *node != state.own));
                state.evict(new);
            }
            ClusterMsg::Look => state.look(&myself),
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
            // Without them nobody would be met any more: the node stops, and says why.
            SupervisionEvent::ActorFailed(_, error) => Err(error),
            SupervisionEvent::ActorTerminated(..) => Err("a part of the cluster's actor has stopped".into()),
            _ => Ok(()),
        }
    }
}

impl ClusterState {
    fn on_up(&mut self, peer: Box<Peer>) {
        let id = peer.id;
        if self.sessions.get(&id).is_some_and(|sessions| !sessions.is_empty()) {
            // ractor_cluster would have to choose between two of one name: the old one ends first.
            self.waiting.insert(id, peer);
            return self.end_sessions(id);
        }
        self.open_session(*peer);
    }

    fn open_session(&mut self, peer: Peer) {
        let Peer {
            id, session, address, is_dialled, control, inbox, outbox, sender_token, expected_token, data, ..
        } = peer;
        self.senders.admit(expected_token, id, inbox);
        let present = Present {
            session,
            sender_token,
            expected_token,
            address,
            data,
            outbox,
            since: Instant::now(),
            is_ready: false,
            bytes_per_s: None,
            probed: None,
            told: BTreeSet::new(),
        };
        self.peers.insert(id, present);
        let opened = NodeServerMessage::ConnectionOpenedExternal { stream: Box::new(control), is_server: !is_dialled };
        // A server that is gone takes the node with it.
        let _ = self.server.cast(opened);
    }

    fn end_sessions(&self, id: NodeId) {
        for (_, session) in self.sessions.get(&id).into_iter().flatten() {
            session.kill();
        }
    }

    fn on_down(&mut self, id: NodeId, session: u64, reason: &str) {
        if self.waiting.get(&id).is_some_and(|peer| peer.session == session) {
            self.waiting.remove(&id);
        }
        if self.peers.get(&id).is_none_or(|present| present.session != session) {
            return;
        }
        let Some(present) = self.peers.remove(&id) else { return };
        self.senders.dismiss(present.expected_token);
        self.post.disconnect(id);
        self.end_sessions(id);
        let told = match present.is_ready {
            true => {
                tracing::warn!(peer = %id, reason, "a member is gone");
                PlannerMsg::NodeDown(id)
            }
            // What it said of itself before its session was ready has been heard.
            false => PlannerMsg::NodeMissed(id),
        };
        let _ = self.planner.send_message(told);
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
                // Without its session a peer is of no use: it comes anew.
                if let Some(present) = self.peers.get(&id).filter(|present| present.session == session) {
                    present.data.close("the control session ended");
                }
            }
        }
    }

    fn on_ready(&mut self, id: NodeId, session: u64, control: ActorRef<ControlMsg>) {
        let Some(present) = self.peers.get_mut(&id).filter(|present| present.session == session) else { return };
        if std::mem::replace(&mut present.is_ready, true) {
            return;
        }
        tracing::info!(peer = %id, "a member is here");
        let (data, outbox) = (present.data.clone(), present.outbox.clone());
        let line = Line { control, token: present.sender_token, data, outbox };
        self.post.connect(id, line);
        let doors = Doors { board: self.board.clone(), gateway: self.gateway.clone(), models: self.models.clone() };
        let data = present.data.clone();
        let accepting = data.clone();
        data.spawn(async move {
            while let Ok(stream) = accepting.accept().await {
                accepting.spawn(serve(id, stream, doors.clone()));
            }
        });
        if !self.evicted.nodes().is_empty() {
            self.post.tell(id, ControlMessage::Evicted(self.evicted.nodes().clone()));
        }
        let _ = self.planner.send_message(PlannerMsg::NodeUp(id));
    }

    /// Closes the doors to members, and tells the others.
    fn evict(&self, new: Vec<NodeId>) {
        if new.is_empty() {
            return;
        }
        for node in new {
            tracing::warn!(peer = %node, "a member is evicted");
            self.network.evict(node);
        }
        self.post.tell_others(&ControlMessage::Evicted(self.evicted.nodes().clone()));
    }

    fn on_heard(&mut self, mut heard: Heard) {
        if !self.peers.contains_key(&heard.from) {
            return;
        }
        if let ControlMessage::Evicted(nodes) = heard.message {
            let new = self.evicted.add_heard(nodes.into_iter().filter(|node| *node != self.own));
            return self.evict(new);
        }
        if let ControlMessage::Report(report) = &mut heard.message {
            report.name = exo_net::shown_name(&report.name);
            self.hear_of_others(heard.from, report);
        }
        self.deliver.tell(heard);
    }

    /// Whoever is a member of a member's cluster is one of ours.
    fn hear_of_others(&mut self, from: NodeId, report: &MemberReport) {
        let Some(present) = self.peers.get_mut(&from) else { return };
        let peers: BTreeSet<SocketAddr> = report.peers.iter().copied().take(TOLD_MAX).collect();
        for &address in &report.addresses {
            self.network.add_address(address);
        }
        for &address in &peers {
            match present.told.contains(&address) {
                true => self.network.add_address(address),
                false => self.network.add_sighting(address),
            }
        }
        present.told = peers;
    }

    fn on_probed(&mut self, id: NodeId, session: u64, bytes_per_s: f64) {
        if let Some(present) = self.peers.get_mut(&id).filter(|present| present.session == session) {
            let known = present.bytes_per_s.unwrap_or(0.0);
            present.bytes_per_s = Some(bytes_per_s.max(known * DISTURBED));
        }
    }

    /// Measures the link that has waited longest, if one is due.
    fn probe(&mut self, myself: &ClusterRef) {
        let is_due = |present: &Present| match present.probed {
            None => present.since.elapsed() > PROBE_AFTER,
            Some(probed) => probed.elapsed() > PROBE_EVERY,
        };
        let due = self.peers.iter_mut().filter(|(_, present)| present.is_ready && is_due(present));
        let Some((&id, present)) = due.min_by_key(|(_, present)| present.probed) else { return };
        present.probed = Some(Instant::now());
        let (data, session, cluster) = (present.data.clone(), present.session, myself.clone());
        present.data.spawn(async move {
            if let Some(bytes_per_s) = probe::measure(&data).await {
                // A cluster that is gone has no links.
                let _ = cluster.send_message(ClusterMsg::Probed { id, session, bytes_per_s });
            }
        });
    }

    fn look(&mut self, myself: &ClusterRef) {
        self.probe(myself);
        let (mut links, mut peers) = (BTreeMap::new(), Vec::new());
        for (id, present) in &self.peers {
            if present.is_ready {
                let link = Link { rtt_s: present.data.rtt().as_secs_f64(), bytes_per_s: present.bytes_per_s };
                links.insert(*id, link);
                peers.push(present.address);
            } else if present.since.elapsed() > SESSION_DEADLINE {
                present.data.close("no session in time");
            }
        }
        let _ = self.planner.send_message(PlannerMsg::LinksMeasured { links, peers });
    }
}

/// Where streams of peers go.
#[derive(Debug, Clone)]
struct Doors {
    board: Switchboard,
    gateway: ActorRef<GatewayMsg>,
    models: ModelsRef,
}

/// A stream that a peer has opened: what it is for, and on to there.
async fn serve(from: NodeId, mut stream: DataStream, doors: Doors) {
    let first = stream.reader.receive::<DataHello>(|_, announced| match announced {
        exo_net::Announced::Nothing => Ok(()),
        _ => Err("a payload before it was said what for".to_owned()),
    });
    match tokio::time::timeout(HELLO_DEADLINE, first).await {
        Ok(Ok(Some((DataHello::Link(hello), _)))) => links::serve(doors.board, from, hello, stream).await,
        Ok(Ok(Some((DataHello::Request { instance, request }, _)))) => {
            // Where there is no gateway, the node stops.
            let _ =
                doors.gateway.send_message(GatewayMsg::Serve { asking: Asking { from, instance, request }, stream });
        }
        Ok(Ok(Some((DataHello::Weights(ask), _)))) => drop(doors.models.send_message(ModelsMsg::Serve { ask, stream })),
        Ok(Ok(Some((DataHello::Probe, _)))) => probe::serve(stream).await,
        Ok(Ok(None)) => {}
        Ok(Err(error)) => {
            tracing::info!(peer = %from, %error, "a stream of a peer was not taken");
            stream.give_up();
        }
        Err(_) => stream.give_up(),
    }
}
