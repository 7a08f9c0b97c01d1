//! Why a dial failed, as a user reads it.

use crate::addresses::no_route;
use crate::endpoint::DialError;
use crate::frame::FrameError;
use crate::peer::ConnectError;
use quinn::{ApplicationClose, ConnectionError, TransportErrorCode};
use std::net::SocketAddr;

/// The codes with which a node closes connections to others.
pub(crate) mod close {
    /// The node has been evicted. The reason is the name of the member whose user evicted it.
    pub(crate) const NOT_ADMITTED: u32 = 3;
    /// Another node with the same key is connected. The reason is that node's address.
    pub(crate) const SAME_KEY: u32 = 6;
}

/// The most bytes of a peer's reason that are shown.
pub(crate) const REASON_BYTES_MAX: usize = 300;

/// Why no member answers at an address.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum DialFailure {
    /// The node there does not have the cluster's secret.
    #[error("is a member of another cluster, or has an older secret of this one")]
    OtherCluster,
    /// Nothing answers.
    #[error("does not answer")]
    Silent,
    /// This node cannot send packets there.
    #[error("cannot be reached from here: {what}")]
    NoRoute {
        /// The system's error.
        what: String,
    },
    /// The members have evicted this node.
    #[error("does not admit this node, which was evicted on {by}")]
    Evicted {
        /// The name of the member whose user evicted it.
        by: String,
    },
    /// The node there speaks another protocol version.
    #[error("runs another version of exo (protocol {theirs})")]
    Protocol {
        /// Its protocol version.
        theirs: u32,
    },
    /// The node there speaks a protocol of which this version cannot read the first message.
    #[error("runs a version of exo whose messages this one cannot read")]
    Unreadable,
    /// A node with the same key is connected there.
    #[error("is connected to another node with this node's key, at {first}")]
    SameKey {
        /// The address of that node.
        first: String,
    },
    /// Another failure.
    #[error("cannot be connected: {what}")]
    Other {
        /// The error.
        what: String,
    },
}

impl DialFailure {
    /// Returns what the user can do about the failure.
    pub fn remedy(&self) -> &'static str {
        match self {
            Self::OtherCluster => "join that node's cluster with a new token of one of its members",
            Self::Silent => "check the address, that the node runs, and that no firewall blocks its UDP port",
            Self::NoRoute { .. } => "give an address in a network that this machine is in",
            Self::Evicted { .. } => {
                "undo the eviction on a member, or start this node in another data folder with a token"
            }
            Self::Protocol { .. } | Self::Unreadable => "run the same version on both machines",
            Self::SameKey { .. } => "one data folder is a copy of the other: delete node.key on the copy",
            Self::Other { .. } => "turn on the log of the node at that address, and try again",
        }
    }

    /// The failure of a dial, as the error of its connection tells it.
    pub(crate) fn of(address: SocketAddr, error: &ConnectError) -> Self {
        match error {
            ConnectError::Protocol { theirs } => Self::Protocol { theirs: *theirs },
            ConnectError::Frame(FrameError::Wire(_)) => Self::Unreadable,
            ConnectError::Dial(DialError::Connection(error)) | ConnectError::Connection(error) => {
                Self::of_connection(address, error)
            }
            ConnectError::Dial(DialError::TimedOut) | ConnectError::TimedOut => Self::silent(address),
            error => Self::other(&error.to_string()),
        }
    }

    /// The failure that an error of a connection tells.
    pub(crate) fn of_connection(address: SocketAddr, error: &ConnectionError) -> Self {
        match error {
            ConnectionError::TimedOut => Self::silent(address),
            ConnectionError::ApplicationClosed(closed) => Self::of_close(closed),
            // Either side refuses a certificate that the cluster's secret has not made.
            ConnectionError::TransportError(error) if is_tls(error.code) => Self::OtherCluster,
            ConnectionError::ConnectionClosed(closed) if is_tls(closed.error_code) => Self::OtherCluster,
            error => Self::other(&error.to_string()),
        }
    }

    fn of_close(closed: &ApplicationClose) -> Self {
        let reason = || String::from_utf8_lossy(&closed.reason).into_owned();
        match u32::try_from(closed.error_code.into_inner()) {
            Ok(close::NOT_ADMITTED) => Self::Evicted { by: crate::shown_name(&reason()) },
            Ok(close::SAME_KEY) => Self::SameKey { first: crate::shown_name(&reason()) },
            _ => {
                Self::Other { what: format!("the node there closed the connection: {}", crate::shown_name(&reason())) }
            }
        }
    }

    /// A failure in words that a stranger may have chosen.
    fn other(what: &str) -> Self {
        Self::Other { what: crate::shown(what, REASON_BYTES_MAX) }
    }

    fn silent(address: SocketAddr) -> Self {
        match no_route(address) {
            Some(error) => Self::NoRoute { what: error.to_string() },
            None => Self::Silent,
        }
    }
}

/// Whether an error's code is a TLS alert: QUIC puts them at 0x100 (RFC 9001, §4.8).
fn is_tls(code: TransportErrorCode) -> bool {
    (0x100..0x200).contains(&u64::from(code))
}
