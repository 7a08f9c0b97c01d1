//! Node identity, and the QUIC network between nodes.
//!
//! ```text
//! secret, identity ─► certificate ─► endpoint (QUIC, mutual TLS) ─► network (dials, reports peers)
//!                                                                       │ Peer
//!                                        ┌──────────────────────────────┴───────────────────┐
//!                   control connection: ractor_cluster, behind a filter       data connection: frames on streams
//! ```
//! This crate knows no engine and no model: `exo-actors` gives frames and messages their meaning.

mod addresses;
mod backlog;
mod certificate;
mod control;
mod departure;
mod dial;
mod dial_failure;
mod dial_guard;
mod discovery;
mod endpoint;
mod frame;
mod identity;
mod link;
mod network;
mod peer;
mod private_file;
mod secret;
#[cfg(test)]
mod tests;
mod token;
pub mod wire;

pub use addresses::{is_shareable, reachable};
pub use backlog::{Inbox, InboxSlot, Outbox};
pub use certificate::{CertificateError, PeerIdError};
pub use control::{CONTROL_FRAME_BYTES_MAX, ControlStream, cluster_name, session_label};
pub use departure::Departure;
pub use dial::{DialPolicy, Source};
pub use dial_failure::DialFailure;
pub use endpoint::{BindError, SOCKET_BYTES};
pub use frame::{
    Announced, FrameError, FrameReader, FrameWriter, PAYLOAD_BYTES_MAX, Payload, Received, UnknownWireType, WireType,
};
pub use identity::{Identity, IdentityError, NodeId, NodeIdError};
pub use link::{CREDITS, DataStream, LinkReceiver, LinkSender, Priority};
pub use network::{Discover, Network, NetworkConfig, NetworkError, NetworkEvent, NetworkThread};
pub use peer::{DataConnection, NAME_BYTES_MAX, Peer, SenderToken, shown, shown_name};
pub use private_file::PrivateFileError;
pub use secret::{ClusterSecret, SecretError};
pub use token::{JoinToken, TokenError};
