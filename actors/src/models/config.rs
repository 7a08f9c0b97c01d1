//! Where models come from and go to, and who hears of it.

use std::path::PathBuf;
use std::sync::Arc;

/// Where models are, and how others are fetched.
#[derive(Clone)]
pub struct ModelsConfig {
    /// Looked through in order; downloads go to the first.
    pub folders: Vec<PathBuf>,
    /// The hub's address; `None`: the hub's own.
    pub hub_endpoint: Option<String>,
    pub hub_token: Option<String>,
    /// The hub client's cache.
    pub hub_cache: PathBuf,
    /// Fetch nothing.
    pub is_offline: bool,
    /// The Python to call pip with.
    pub python: String,
    pub progress: ProgressSink,
}

impl std::fmt::Debug for ModelsConfig {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("ModelsConfig").field("folders", &self.folders).finish_non_exhaustive()
    }
}

/// Hears how fetching goes. Called from any thread; must not block.
pub type ProgressSink = Arc<dyn Fn(Progress) + Send + Sync>;

/// How fetching goes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Progress {
    /// A source is tried.
    Trying { model: String, source: String },
    /// A source failed; the next one is tried.
    Failed { source: String, reason: String },
    /// Bytes fetched so far; the total where it is known.
    Fetching { fetched_bytes: u64, total_bytes: Option<u64> },
    /// The SHA-256 is computed.
    Verifying,
    /// The model is there.
    Fetched { path: PathBuf, source: String },
}

#[cfg(test)]
impl ModelsConfig {
    /// One models folder, and no source.
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
