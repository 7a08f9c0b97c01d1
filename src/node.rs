//! The builder of a node.

use crate::cluster::{self, ClusterSettings};
use crate::config::Directories;
use crate::error::StartError;
use crate::worker::{self, Isolation};
use exo_actors::core::device_health::PROBE_AFTER;
use exo_actors::core::watchdog::HangTimeouts;
use exo_actors::models::{ModelsConfig, Progress};
use exo_actors::{NodeConfig, NodeHandle, PlannerLimits};
use exo_engines::engine::EngineFactory;
use exo_net::Identity;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

/// The entry point to a node's builder.
#[derive(Debug)]
pub struct Node;

impl Node {
    /// Returns a builder with the defaults of this user and machine.
    pub fn builder() -> NodeBuilder {
        NodeBuilder {
            data_dir: None,
            models_dirs: None,
            threads: None,
            factories: None,
            isolation: Isolation::default(),
            worker_program: None,
            disabled_devices: None,
            limits: PlannerLimits::default(),
            hang_timeouts: HangTimeouts::default(),
            probe_after: PROBE_AFTER,
            name: None,
            cluster: None,
            progress: Arc::new(|_| {}),
        }
    }
}

/// The settings of a node to start. Unset ones come from the environment, or have a default.
#[derive(Clone)]
pub struct NodeBuilder {
    data_dir: Option<PathBuf>,
    models_dirs: Option<Vec<PathBuf>>,
    threads: Option<usize>,
    factories: Option<Vec<Arc<dyn EngineFactory>>>,
    isolation: Isolation,
    worker_program: Option<PathBuf>,
    disabled_devices: Option<Vec<String>>,
    limits: PlannerLimits,
    hang_timeouts: HangTimeouts,
    probe_after: Duration,
    name: Option<String>,
    cluster: Option<ClusterSettings>,
    progress: Arc<dyn Fn(Progress) + Send + Sync>,
}

impl std::fmt::Debug for NodeBuilder {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("NodeBuilder")
            .field("data_dir", &self.data_dir)
            .field("models_dirs", &self.models_dirs)
            .field("threads", &self.threads)
            .finish_non_exhaustive()
    }
}

impl NodeBuilder {
    /// Sets the folder of the node's identity and settings.
    pub fn data_dir(mut self, folder: impl Into<PathBuf>) -> Self {
        self.data_dir = Some(folder.into());
        self
    }

    /// Sets the folders where models are searched for; downloads go to the first.
    pub fn models_dirs(mut self, folders: Vec<PathBuf>) -> Self {
        self.models_dirs = Some(folders);
        self
    }

    /// Sets the threads of each built-in CPU engine; default: the available cores.
    pub fn threads(mut self, threads: usize) -> Self {
        self.threads = Some(threads);
        self
    }

    /// Sets which of the built-in engines run in processes of their own.
    pub fn isolation(mut self, isolation: Isolation) -> Self {
        self.isolation = isolation;
        self
    }

    /// Sets the program that runs as the process of an engine, and calls
    /// [`run_worker_if_asked`](crate::run_worker_if_asked); default: this program, if it does so.
    pub fn worker_program(mut self, program: impl Into<PathBuf>) -> Self {
        self.worker_program = Some(program.into());
        self
    }

    /// Sets the engine factories, best first, in place of the built-in ones.
    pub fn factories(mut self, factories: Vec<Arc<dyn EngineFactory>>) -> Self {
        self.factories = Some(factories);
        self
    }

    /// Sets the devices that are not used, by id (`intel:0`), engine (`intel`) or PCI address (`0000:03:00.0`).
    pub fn disable_devices(mut self, devices: Vec<String>) -> Self {
        self.disabled_devices = Some(devices);
        self
    }

    /// Sets how long a model stays in memory while nobody uses it; default: for ever.
    pub fn unload_after(mut self, idle: Duration) -> Self {
        self.limits.idle = Some(idle);
        self
    }

    /// Sets the most memory that all models together use, in bytes; default: what the machine has.
    pub fn memory_limit_bytes(mut self, bytes: u64) -> Self {
        self.limits.memory_bytes = Some(bytes);
        self
    }

    /// Sets when a device counts as hung, so that its work moves to others.
    pub fn hang_timeouts(mut self, hang_timeouts: HangTimeouts) -> Self {
        self.hang_timeouts = hang_timeouts;
        self
    }

    /// Sets the first pause before a device that has failed is tried again; default: 10 seconds. Each further failure
    /// doubles it.
    pub fn probe_after(mut self, pause: Duration) -> Self {
        self.probe_after = pause;
        self
    }

    /// Sets the name that other members show; default: the machine's name.
    pub fn name(mut self, name: impl Into<String>) -> Self {
        self.name = Some(name.into());
        self
    }

    /// Makes the node a member of its user's cluster; default: the node has no network.
    pub fn cluster(mut self, settings: ClusterSettings) -> Self {
        self.cluster = Some(settings);
        self
    }

    /// Sets the callback that receives the progress of downloads. It is called from any thread, and must not block.
    pub fn on_fetch(mut self, progress: impl Fn(Progress) + Send + Sync + 'static) -> Self {
        self.progress = Arc::new(progress);
        self
    }

    /// Starts the node on the current tokio runtime.
    ///
    /// # Errors
    /// [`StartError`] where the folders are unknown, a file in the data folder cannot be used, or the network or an
    /// actor does not start.
    pub async fn start(self) -> Result<NodeHandle, StartError> {
        let directories = Directories::from_environment()?;
        let data_dir = self.data_dir.unwrap_or(directories.data);
        let identity = Arc::new(Identity::load_or_create(&data_dir)?);
        let name = exo_net::shown_name(&self.name.unwrap_or_else(exo_actors::host_name));
        let wire_type = self.cluster.as_ref().map(|settings| settings.wire_type).unwrap_or_default();
        let cluster = match self.cluster {
            Some(settings) => Some(cluster::join(&data_dir, Arc::clone(&identity), name.clone(), settings)?),
            None => None,
        };
        let threads =
            self.threads.unwrap_or_else(|| std::thread::available_parallelism().map_or(1, std::num::NonZero::get));
        let factories = match self.factories {
            Some(factories) => factories,
            None => built_in(threads, self.isolation, self.worker_program)?,
        };
        let models = ModelsConfig {
            folders: self.models_dirs.unwrap_or(directories.models),
            hub_endpoint: directories.hub_endpoint,
            hub_token: directories.hub_token,
            hub_cache: directories.hub_cache,
            is_offline: directories.is_offline,
            python: "python3".to_owned(),
            progress: self.progress,
        };
        let disabled_devices = self.disabled_devices.unwrap_or(directories.disabled_devices);
        let (id, limits) = (identity.node_id(), self.limits);
        let (hang_timeouts, probe_after) = (self.hang_timeouts, self.probe_after);
        let config = NodeConfig {
            id,
            name,
            factories,
            disabled_devices,
            models,
            limits,
            hang_timeouts,
            probe_after,
            wire_type,
            cluster,
        };
        exo_actors::start(config).await.map_err(|error| StartError::Actor(error.to_string()))
    }
}

/// The built-in factories; those that `isolation` names open their engines in processes of their own.
pub(crate) fn built_in(
    threads: usize,
    isolation: Isolation,
    program: Option<PathBuf>,
) -> Result<Vec<Arc<dyn EngineFactory>>, StartError> {
    let command = match program {
        Some(program) => Some(worker::command(program, threads)),
        None => worker::own_command(threads),
    };
    if isolation == Isolation::All && command.is_none() {
        return Err(StartError::NoWorker);
    }
    Ok(worker::isolate(worker::factories(threads), isolation, command.as_ref()))
}
