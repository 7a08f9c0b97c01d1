//! The errors of a node's start.

use crate::config::ConfigError;
use exo_net::{IdentityError, NetworkError, SecretError};
use std::path::PathBuf;

/// Why a node could not be started.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// The folders are unknown.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// The node's identity cannot be loaded or created.
    #[error(transparent)]
    Identity(#[from] IdentityError),
    /// The cluster's secret cannot be loaded or stored.
    #[error(transparent)]
    Secret(#[from] SecretError),
    /// A list of members or secrets in the data folder cannot be read or written.
    #[error("{path}: {source}")]
    Members {
        /// The list's file.
        path: PathBuf,
        /// The system's error.
        source: std::io::Error,
    },
    /// The cluster's network did not start.
    #[error(transparent)]
    Network(#[from] NetworkError),
    /// Engines were to run in processes of their own, but this program cannot run as such a process.
    #[error(
        "engines cannot run in processes of their own: call `exo::run_worker_if_asked()` first in `main`, or name a \
         program that does with `NodeBuilder::worker_program`"
    )]
    NoWorker,
    /// An actor did not start; the text says why.
    #[error("an actor could not be started: {0}")]
    Actor(String),
}
