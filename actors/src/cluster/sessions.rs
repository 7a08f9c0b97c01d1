//! Sessions of ractor_cluster: they run over this node's control streams only, and their events name the peer.
//!
//! ractor_cluster's server also opens a TCP listener, which cannot be switched off. The listener is bound to loopback,
//! and a session over it is ended before any message is exchanged.

use super::{ClusterMsg, ClusterRef};
use crate::transport::callback::EventCallback;
use crate::transport::control::ControlMsg;
use exo_net::{CONTROL_FRAME_BYTES_MAX, NodeId, cluster_name};
use ractor::{Actor, ActorRef, SpawnErr};
use ractor_cluster::node::{NodeConnectionMode, NodeServerSessionInformation};
use ractor_cluster::{NodeEventSubscription, NodeServer, NodeServerMessage, NodeSessionMessage};
use std::net::Ipv4Addr;

/// The actor of one session, by which the session can be ended.
#[derive(Debug, Clone)]
pub(crate) struct SessionRef(ActorRef<NodeSessionMessage>);

impl SessionRef {
    pub(super) fn kill(&self) {
        self.0.kill();
    }
}

/// An event of a session.
#[derive(Debug)]
pub(crate) enum SessionEvent {
    Opened {
        id: NodeId,
        session: u64,
        actor: SessionRef,
    },
    /// The peer's control actor can receive messages.
    Ready {
        id: NodeId,
        session: u64,
        control: ActorRef<ControlMsg>,
    },
    Ended {
        id: NodeId,
        session: u64,
    },
}

/// Starts ractor_cluster's server.
pub(super) async fn start(
    own: NodeId,
    cookie: String,
    cluster: &ClusterRef,
) -> Result<ActorRef<NodeServerMessage>, SpawnErr> {
    let name = cluster_name(own);
    let server = NodeServer::new(0, cookie, name.clone(), name, None, Some(NodeConnectionMode::Isolated))
        .with_listen_addr(Ipv4Addr::LOCALHOST.into())
        .with_max_inbound_frame_size(CONTROL_FRAME_BYTES_MAX);
    let (server, _) = NodeServer::spawn_linked(None, server, (), cluster.get_cell()).await?;
    let subscription = Box::new(Sessions(EventCallback::to(cluster, ClusterMsg::Session)));
    let subscribed = NodeServerMessage::SubscribeToEvents { id: "exo".to_owned(), subscription };
    server.cast(subscribed).map_err(|error| SpawnErr::StartupFailed(error.to_string().into()))?;
    Ok(server)
}

struct Sessions(EventCallback<SessionEvent>);

/// The peer of a session and the number of its connection; `None` if the session does not run over a control stream of
/// this node's network.
fn whose(session: &NodeServerSessionInformation) -> Option<(NodeId, u64)> {
    let label = session.peer_addr.strip_prefix("quic/")?;
    let (id, number) = label.split_once('/')?;
    Some((id.parse().ok()?, number.parse().ok()?))
}

impl NodeEventSubscription for Sessions {
    fn node_session_opened(&self, session: NodeServerSessionInformation) {
        match whose(&session) {
            Some((id, number)) => {
                let actor = SessionRef(session.actor);
                self.0.tell(SessionEvent::Opened { id, session: number, actor });
            }
            None => {
                tracing::warn!(peer = session.peer_addr, "refused a session outside this node's network");
                session.actor.kill();
            }
        }
    }

    fn node_session_disconnected(&self, session: NodeServerSessionInformation) {
        if let Some((id, session)) = whose(&session) {
            self.0.tell(SessionEvent::Ended { id, session });
        }
    }

    fn node_session_authenticated(&self, _: NodeServerSessionInformation) {}

    fn node_session_ready(&self, session: NodeServerSessionInformation) {
        let Some((id, number)) = whose(&session) else { return };
        let mut remote = session.actor.get_children().into_iter().filter(|child| !child.get_id().is_local());
        match (remote.next(), remote.next()) {
            (Some(control), None) => {
                self.0.tell(SessionEvent::Ready { id, session: number, control: control.into() });
            }
            // A member exposes exactly one actor: its control actor.
            _ => session.actor.kill(),
        }
    }
}
