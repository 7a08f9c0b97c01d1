//! Why a model's files are not available.

use exo_engines::format::FormatError;
use std::io::ErrorKind;
use std::path::PathBuf;

/// Why a model's files are not available.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error, serde::Serialize, serde::Deserialize)]
#[non_exhaustive]
pub enum ModelError {
    /// No model has this name.
    #[error("no model is called `{model}`")]
    Unknown {
        /// The name.
        model: String,
    },
    /// No file or folder has this path.
    #[error("no file or folder has the path `{path}`")]
    NoFile {
        /// The path.
        path: String,
    },
    /// The files are not a model that can be read.
    #[error(transparent)]
    Format(#[from] FormatError),
    /// Every source of a catalogue model failed.
    #[error("`{model}` could not be fetched from any source: {tried}")]
    NoSource {
        /// The name in the catalogue.
        model: String,
        /// The sources that were tried, each with its error.
        tried: String,
    },
    /// Fetched bytes do not have the expected SHA-256.
    #[error("{what}: the SHA-256 is {got}, not {expected}")]
    WrongHash {
        /// The file, or part of it.
        what: String,
        /// The SHA-256 of the fetched bytes, in hexadecimal.
        got: String,
        /// The expected SHA-256, in hexadecimal.
        expected: String,
    },
    /// A file or folder cannot be read or written.
    #[error("{path}: {reason}")]
    Disk {
        /// The file or folder.
        path: PathBuf,
        /// What failed.
        reason: String,
    },
    /// The disk has no space for a file that is fetched. What was fetched of it is removed.
    #[error("{path}: the disk is full")]
    DiskFull {
        /// The file or folder.
        path: PathBuf,
    },
    /// A file has changed since its content was hashed.
    #[error("{path}: the file has changed since it was hashed")]
    Stale {
        /// The file.
        path: PathBuf,
    },
    /// No member gave the model's bytes, and there is no other source.
    #[error("{otherwise}; the members that were asked did not send the model: {tried}")]
    NotGiven {
        /// The nodes that were asked, each with its reason.
        tried: String,
        /// Why there is no other source.
        otherwise: Box<ModelError>,
    },
    /// A download failed.
    #[error("{url}: {reason}")]
    Network {
        /// The address.
        url: String,
        /// What failed.
        reason: String,
    },
    /// The hub refuses access to a file.
    #[error("{url}: the hub refuses access")]
    Forbidden {
        /// The address.
        url: String,
    },
    /// The hub does not have a file.
    #[error("{url}: the hub has no such file")]
    NotOnHub {
        /// The address.
        url: String,
    },
    /// A command that fetches a model failed.
    #[error("{command}: {reason}")]
    Command {
        /// The command line.
        command: String,
        /// What failed.
        reason: String,
    },
    /// The files are not on this machine, and offline mode forbids fetching them.
    #[error("offline mode forbids fetching {what}")]
    Offline {
        /// The source or repository.
        what: String,
    },
    /// This node and other nodes have different files under one name.
    #[error("other nodes have different files under the name `{model}`")]
    OtherFiles {
        /// The name.
        model: String,
    },
    /// The download ended before the files were complete.
    #[error("the download was interrupted")]
    Interrupted,
}

impl ModelError {
    pub(crate) fn disk(path: &std::path::Path, error: &std::io::Error) -> Self {
        let path = path.to_owned();
        match error.kind() {
            ErrorKind::StorageFull | ErrorKind::QuotaExceeded => Self::DiskFull { path },
            _ => Self::Disk { path, reason: error.to_string() },
        }
    }

    /// Whether this machine's disk failed: another source does not help then.
    pub(crate) fn is_of_disk(&self) -> bool {
        matches!(self, Self::Disk { .. } | Self::DiskFull { .. })
    }

    /// Returns what the user can do about the error.
    pub fn remedy(&self) -> &'static str {
        match self {
            Self::Unknown { .. } => "take a name from the catalogue, or a path to a .gguf file or a model's folder",
            Self::NoFile { .. } => "check the path; a relative one counts from the working directory of the node",
            Self::Format(error) => error.remedy(),
            Self::NoSource { .. } | Self::Network { .. } => {
                "check the connection to the hub, or put the files into a models folder"
            }
            Self::Forbidden { .. } => "accept the model's licence on the hub, and give the account's token",
            Self::NotOnHub { .. } => {
                "look the repository and the file up on the hub; a private one needs the account's token"
            }
            Self::OtherFiles { .. } => "rename one of the two models, or ask for it by its path",
            Self::WrongHash { .. } => "the download was thrown away: try again, or take another source",
            Self::NotGiven { otherwise, .. } => otherwise.remedy(),
            Self::Stale { .. } => "try again: the file is then hashed anew",
            Self::Disk { .. } | Self::DiskFull { .. } => "free space on the disk, or choose another models folder",
            Self::Command { .. } => "install Python 3 with pip, or put the files into a models folder",
            Self::Offline { .. } => "end offline mode, or put the files into a models folder",
            Self::Interrupted => "start the download again: it continues where it stopped",
        }
    }
}
