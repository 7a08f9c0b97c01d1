//! Why a peer is connected no more.

use std::fmt;

/// Why a peer is connected no more.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Departure {
    /// It said that it stops.
    Stopped,
    /// Its process has died: its host answers that nobody listens at its port.
    Died,
    /// It is silent, or its connections failed. It may still run, and this node may be the one that is cut off.
    Lost {
        /// What was noticed, in a few words.
        reason: String,
    },
}

impl fmt::Display for Departure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Stopped => f.write_str("it was stopped"),
            Self::Died => f.write_str("its process has died"),
            Self::Lost { reason } => f.write_str(reason),
        }
    }
}
