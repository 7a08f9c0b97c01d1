//! Folders and settings from the environment. No other module or crate reads the environment for them.

#[cfg(feature = "cli")]
use std::path::Path;
use std::path::PathBuf;

/// The user's folders and settings on this machine.
#[derive(Debug, Clone)]
pub struct Directories {
    /// The folder of the identity and settings (`EXO_DATA_DIR`, else XDG's data home).
    pub data: PathBuf,
    /// The models folders; downloads go to the first (`EXO_MODELS_DIR`, separated by `:`, else XDG's cache home).
    pub models: Vec<PathBuf>,
    /// The Hugging Face client's cache (`HF_HUB_CACHE`, `HF_HOME`, else its own default).
    pub hub_cache: PathBuf,
    /// The Hugging Face hub's address (`HF_ENDPOINT`).
    pub hub_endpoint: Option<String>,
    /// The hub's access token (`HF_TOKEN`, else the token that the hub's own tools have stored).
    pub hub_token: Option<String>,
    /// Whether the hub must not be contacted (`HF_HUB_OFFLINE`).
    pub is_offline: bool,
    /// Devices that are not used, by id, engine or PCI address (`EXO_DISABLE_DEVICES`, separated by commas).
    pub disabled_devices: Vec<String>,
}

/// The environment names neither the folders nor a home folder.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("no home folder is known: set HOME, or EXO_DATA_DIR and EXO_MODELS_DIR")]
pub struct ConfigError;

/// The variable that makes this program the process of an engine. Its value is the number of the engine's threads.
pub(crate) const WORKER_VARIABLE: &str = "EXO_ENGINE_WORKER";

/// Returns the engine's threads if this process is to serve an engine.
pub(crate) fn worker_threads() -> Option<usize> {
    std::env::var(WORKER_VARIABLE).ok()?.parse().ok()
}

/// Returns `given`, or the environment's folder of the identity and settings.
///
/// # Errors
/// [`ConfigError`] where neither is known.
#[cfg(feature = "cli")]
pub(crate) fn data_folder(given: Option<&Path>) -> Result<PathBuf, ConfigError> {
    match given {
        Some(folder) => Ok(folder.to_owned()),
        None => Ok(Directories::from_environment()?.data),
    }
}

impl Directories {
    /// Reads the folders and settings from the environment.
    ///
    /// # Errors
    /// [`ConfigError`] where a folder has neither a variable nor a home folder.
    pub fn from_environment() -> Result<Self, ConfigError> {
        let variable = |name: &str| std::env::var(name).ok().filter(|value| !value.is_empty());
        let project = directories::ProjectDirs::from("", "", "exo");
        let data = variable("EXO_DATA_DIR").map(PathBuf::from);
        let data = data.or_else(|| project.as_ref().map(|dirs| dirs.data_dir().to_owned()));
        let models = variable("EXO_MODELS_DIR").map(|paths| std::env::split_paths(&paths).collect());
        let models = models.or_else(|| project.as_ref().map(|dirs| vec![dirs.cache_dir().join("models")]));
        let home = directories::BaseDirs::new().map(|dirs| dirs.cache_dir().join("huggingface"));
        let hub_home = variable("HF_HOME").map(PathBuf::from).or(home);
        let hub_cache = variable("HF_HUB_CACHE").map(PathBuf::from);
        let hub_cache = hub_cache.or_else(|| hub_home.as_ref().map(|home| home.join("hub")));
        let kept_token = || {
            let kept = std::fs::read_to_string(hub_home.as_ref()?.join("token")).ok()?;
            Some(kept.trim().to_owned()).filter(|token| !token.is_empty())
        };
        let is_set = |value: String| !matches!(value.to_ascii_lowercase().as_str(), "0" | "false" | "no" | "off");
        Ok(Self {
            data: data.ok_or(ConfigError)?,
            models: models.ok_or(ConfigError)?,
            hub_cache: hub_cache.ok_or(ConfigError)?,
            hub_endpoint: variable("HF_ENDPOINT"),
            hub_token: variable("HF_TOKEN").or_else(kept_token),
            is_offline: variable("HF_HUB_OFFLINE").is_some_and(is_set),
            disabled_devices: listed(&variable("EXO_DISABLE_DEVICES").unwrap_or_default()),
        })
    }
}

/// The parts of a list that commas separate.
fn listed(text: &str) -> Vec<String> {
    text.split(',').map(str::trim).filter(|part| !part.is_empty()).map(str::to_owned).collect()
}
