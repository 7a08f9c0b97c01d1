//! Why a node could not be started.

use crate::config::ConfigError;
use exo_net::{IdentityError, NetworkError, SecretError};
use std::path::PathBuf;

/// Why a node could not be started.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    #[error(transparent)]
    Config(#[from] ConfigError),
    #[error(transparent)]
    Identity(#[from] IdentityError),
    #[error(transparent)]
    Secret(#[from] SecretError),
    #[error("{path}: {source}")]
    Members { path: PathBuf, source: std::io::Error },
    #[error(transparent)]
    Network(#[from] NetworkError),
    #[error("an actor could not be started: {0}")]
    Actor(String),
}
