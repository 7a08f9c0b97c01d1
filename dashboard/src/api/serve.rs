//! Serves the API over TCP and over a Unix socket.

use super::connections::serve_connections;
use super::context::{ApiContext, Caller, NamedModels};
use super::guard::{ANY_ORIGIN, Guard, guard};
use super::paths::lenient_paths;
use super::places::Places;
use super::router::router;
use super::socket::SocketPlace;
use axum::http::HeaderValue;
use axum::middleware::from_fn_with_state;
use exo_actors::NodeHandle;
use std::collections::BTreeSet;
use std::net::{IpAddr, SocketAddr};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use tokio::net::{TcpListener, UnixListener, UnixStream};
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;
use tower_http::cors::{AllowHeaders, AllowMethods, AllowOrigin, CorsLayer};

/// Where the API listens, and which callers are admitted.
#[derive(Clone)]
pub struct ApiConfig {
    /// The TCP address to listen on; `None`: no TCP.
    pub listen: Option<SocketAddr>,
    /// The data folder in which the Unix socket is made; `None`: no Unix socket.
    pub socket_folder: Option<PathBuf>,
    /// The key that callers over TCP must send. Without a key only loopback is served.
    pub api_key: Option<String>,
    /// The models that clients over TCP may name by path, as the user wrote them.
    pub named_models: BTreeSet<String>,
    /// Origins of pages on other hosts that may use the API over TCP, such as `app://obsidian.md`; `*`: all origins.
    pub allowed_origins: BTreeSet<String>,
    /// Connections over TCP at once. Each takes a descriptor of the process.
    pub connections_max: usize,
    /// Addresses of reverse proxies. One address may have 64 connections, a proxy or loopback as many as there are.
    pub proxies: BTreeSet<IpAddr>,
}

/// Connections over TCP at once, unless another number is configured: few enough for a process with 1,024 descriptors.
const CONNECTIONS_DEFAULT: usize = 512;
/// Connections of one address.
const CLIENT_CONNECTIONS_MAX: usize = 64;
/// Connections over the owner's socket.
const OWNER_CONNECTIONS_MAX: usize = 128;

impl Default for ApiConfig {
    fn default() -> Self {
        Self {
            listen: None,
            socket_folder: None,
            api_key: None,
            named_models: BTreeSet::new(),
            allowed_origins: BTreeSet::new(),
            connections_max: CONNECTIONS_DEFAULT,
            proxies: BTreeSet::new(),
        }
    }
}

impl std::fmt::Debug for ApiConfig {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("ApiConfig")
            .field("listen", &self.listen)
            .field("socket_folder", &self.socket_folder)
            .finish_non_exhaustive()
    }
}

/// Why the API is not served.
#[derive(Debug, thiserror::Error)]
pub enum ServeError {
    /// The TCP address is not loopback, and no API key is set.
    #[error("{address} can be reached from other machines, which needs an API key")]
    NeedsKey {
        /// The TCP address.
        address: SocketAddr,
    },
    /// The API key is empty, or has characters other than visible ASCII.
    #[error("the API key is empty, or has characters that a header cannot carry")]
    BadKey,
    /// The TCP address cannot be listened on.
    #[error("cannot listen on {address}: {reason}")]
    Listen {
        /// The TCP address.
        address: SocketAddr,
        /// The system's error.
        reason: String,
    },
    /// Another node answers on the Unix socket.
    #[error("{path}: another node is running on this data folder")]
    AlreadyRunning {
        /// The socket's path.
        path: PathBuf,
    },
    /// The Unix socket cannot be created.
    #[error("cannot create a socket in {path}: {reason}")]
    Socket {
        /// The data folder.
        path: PathBuf,
        /// The system's error.
        reason: String,
    },
}

/// The sockets of an API that does not serve yet. A node takes them before it tells others of itself.
pub struct ApiListeners {
    config: ApiConfig,
    key: Option<Arc<str>>,
    tcp: Option<(TcpListener, SocketAddr)>,
    socket: Option<(UnixListener, BoundSocket)>,
    socket_error: Option<ServeError>,
}

impl std::fmt::Debug for ApiListeners {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("ApiListeners").field("config", &self.config).finish_non_exhaustive()
    }
}

/// A running API server. Dropping it stops the server.
#[derive(Debug)]
pub struct Served {
    /// The TCP address, with the port that the system chose where port 0 was configured; `None`: no TCP.
    pub address: Option<SocketAddr>,
    /// Why there is no Unix socket, where one was configured and TCP is served.
    pub socket_error: Option<ServeError>,
    socket: Option<BoundSocket>,
    stop: CancellationToken,
    tasks: Vec<JoinHandle<()>>,
}

/// Takes the addresses of an API. Clients can connect from now on, and wait for [`ApiListeners::serve`].
///
/// # Errors
/// [`ServeError`] where the configuration is not allowed, or the API cannot listen.
pub async fn listen(config: ApiConfig) -> Result<ApiListeners, ServeError> {
    let key = match &config.api_key {
        Some(key) if key.trim().is_empty() || !key.bytes().all(|b| b.is_ascii_graphic()) => {
            return Err(ServeError::BadKey);
        }
        key => key.as_deref().map(Arc::<str>::from),
    };
    if let Some(address) = config.listen.filter(|address| !address.ip().is_loopback() && key.is_none()) {
        return Err(ServeError::NeedsKey { address });
    }
    let mut listeners = ApiListeners { config, key, tcp: None, socket: None, socket_error: None };
    if let Some(folder) = &listeners.config.socket_folder {
        match bind_socket(folder).await {
            Ok(socket) => listeners.socket = Some(socket),
            // Without the socket, TCP still serves.
            Err(error @ ServeError::Socket { .. }) if listeners.config.listen.is_some() => {
                listeners.socket_error = Some(error);
            }
            Err(error) => return Err(error),
        }
    }
    if let Some(address) = listeners.config.listen {
        let failed = |error: std::io::Error| ServeError::Listen { address, reason: error.to_string() };
        let listener = TcpListener::bind(address).await.map_err(failed)?;
        let address = listener.local_addr().map_err(failed)?;
        listeners.tcp = Some((listener, address));
    }
    Ok(listeners)
}

impl ApiListeners {
    /// Serves the API of `node` until [`Served::stop`].
    pub fn serve(self, node: &NodeHandle) -> Served {
        let Self { config, key, tcp, socket, socket_error } = self;
        let named = Arc::new(NamedModels::new(config.named_models));
        let api = |caller| ApiContext { node: node.clone(), caller, named: Arc::clone(&named) };
        let stop = CancellationToken::new();
        let mut served = Served { address: None, socket_error, socket: None, stop: stop.clone(), tasks: Vec::new() };
        if let Some((listener, bound)) = socket {
            served.socket = Some(bound);
            let service = lenient_paths(router(api(Caller::Owner)));
            let places = Places::new(OWNER_CONNECTIONS_MAX, OWNER_CONNECTIONS_MAX, BTreeSet::new());
            served.run(serve_connections(listener, places, service, stop.clone()));
        }
        if let Some((listener, address)) = tcp {
            served.address = Some(address);
            let guarded = Guard { key, origins: Arc::new(config.allowed_origins) };
            // CORS is outside the guard, so that refusals have its headers, too: a page cannot read an answer without
            // them.
            let cors = cors(&guarded.origins);
            let routes = router(api(Caller::Network)).layer(from_fn_with_state(guarded, guard)).layer(cors);
            let places = Places::new(config.connections_max, CLIENT_CONNECTIONS_MAX, config.proxies);
            served.run(serve_connections(listener, places, lenient_paths(routes), stop));
        }
        served
    }
}

/// Tells browsers that pages of these origins may use the API.
fn cors(origins: &BTreeSet<String>) -> CorsLayer {
    let listed = origins.iter().filter(|origin| *origin != ANY_ORIGIN);
    let listed = AllowOrigin::list(listed.filter_map(|origin| HeaderValue::from_str(origin).ok()));
    CorsLayer::new()
        .allow_origin(if origins.contains(ANY_ORIGIN) { AllowOrigin::mirror_request() } else { listed })
        .allow_methods(AllowMethods::mirror_request())
        .allow_headers(AllowHeaders::mirror_request())
}

impl Served {
    fn run(&mut self, serving: impl Future<Output = ()> + Send + 'static) {
        self.tasks.push(tokio::spawn(serving));
    }

    /// Stops accepting requests, and removes the socket. Running requests end with the node.
    pub fn stop(&self) {
        self.stop.cancel();
        if let Some(socket) = &self.socket {
            socket.remove();
        }
    }
}

impl Drop for Served {
    fn drop(&mut self) {
        self.stop();
        self.tasks.iter().for_each(JoinHandle::abort);
    }
}

/// A socket whose file goes with it.
#[derive(Debug)]
struct BoundSocket(SocketPlace);

impl BoundSocket {
    fn remove(&self) {
        // It may have been removed already.
        let _ = std::fs::remove_file(self.0.path());
    }
}

impl Drop for BoundSocket {
    fn drop(&mut self) {
        self.remove();
    }
}

/// Binds a socket that only its owner can open. Replaces a stale socket, but not one on which a node answers.
async fn bind_socket(folder: &Path) -> Result<(UnixListener, BoundSocket), ServeError> {
    use std::os::unix::fs::{DirBuilderExt, PermissionsExt};
    let failed = |error: std::io::Error| ServeError::Socket { path: folder.to_owned(), reason: error.to_string() };
    std::fs::DirBuilder::new().recursive(true).mode(0o700).create(folder).map_err(failed)?;
    let place = SocketPlace::of(folder).map_err(failed)?;
    let address = place.address();
    if UnixStream::connect(address).await.is_ok() {
        return Err(ServeError::AlreadyRunning { path: place.path().to_owned() });
    }
    if address.exists() {
        std::fs::remove_file(address).map_err(failed)?;
    }
    let listener = UnixListener::bind(address).map_err(failed)?;
    std::fs::set_permissions(address, std::fs::Permissions::from_mode(0o600)).map_err(failed)?;
    Ok((listener, BoundSocket(place)))
}
