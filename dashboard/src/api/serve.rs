//! Serves the API over TCP and over a Unix socket.

use super::context::{ApiContext, Caller, NamedModels};
use super::guard::{ANY_ORIGIN, Guard, guard};
use super::paths::lenient_paths;
use super::router::router;
use super::socket::SocketPlace;
use axum::ServiceExt;
use axum::extract::Request;
use axum::http::HeaderValue;
use axum::middleware::from_fn_with_state;
use exo_actors::NodeHandle;
use std::collections::BTreeSet;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use tokio::net::{TcpListener, UnixListener, UnixStream};
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;
use tower_http::cors::{AllowHeaders, AllowMethods, AllowOrigin, CorsLayer};

/// Where the API listens, and which callers are admitted.
#[derive(Clone, Default)]
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

/// A running API server. Dropping it stops the server.
#[derive(Debug)]
pub struct Served {
    /// The TCP address, with the port that the system chose where port 0 was configured; `None`: no TCP.
    pub address: Option<SocketAddr>,
    /// Why there is no Unix socket, where one was configured and TCP is served.
    pub socket_error: Option<ServeError>,
    socket: Option<SocketPlace>,
    stop: CancellationToken,
    tasks: Vec<JoinHandle<()>>,
}

/// Serves the API of `node` until [`Served::stop`].
///
/// # Errors
/// [`ServeError`] where the configuration is not allowed, or the API cannot listen.
pub async fn serve(node: NodeHandle, config: ApiConfig) -> Result<Served, ServeError> {
    let key = match &config.api_key {
        Some(key) if key.trim().is_empty() || !key.bytes().all(|b| b.is_ascii_graphic()) => {
            return Err(ServeError::BadKey);
        }
        key => key.as_deref().map(Arc::<str>::from),
    };
    if let Some(address) = config.listen.filter(|address| !address.ip().is_loopback() && key.is_none()) {
        return Err(ServeError::NeedsKey { address });
    }
    let named = Arc::new(NamedModels::new(config.named_models));
    let api = |caller| ApiContext { node: node.clone(), caller, named: Arc::clone(&named) };
    let stop = CancellationToken::new();
    let mut served = Served { address: None, socket_error: None, socket: None, stop: stop.clone(), tasks: Vec::new() };
    if let Some(folder) = config.socket_folder {
        match bind_socket(&folder).await {
            Ok((listener, place)) => {
                served.socket = Some(place);
                let service = ServiceExt::<Request>::into_make_service(lenient_paths(router(api(Caller::Owner))));
                let serving = axum::serve(listener, service).with_graceful_shutdown(stop.clone().cancelled_owned());
                served.run(serving.into_future());
            }
            // Without the socket, TCP still serves.
            Err(error @ ServeError::Socket { .. }) if config.listen.is_some() => served.socket_error = Some(error),
            Err(error) => return Err(error),
        }
    }
    if let Some(address) = config.listen {
        let failed = |error: std::io::Error| ServeError::Listen { address, reason: error.to_string() };
        let listener = TcpListener::bind(address).await.map_err(failed)?;
        served.address = Some(listener.local_addr().map_err(failed)?);
        let guarded = Guard { key, origins: Arc::new(config.allowed_origins) };
        // CORS is outside the guard, so that refusals have its headers, too: a page cannot read an answer without them.
        let cors = cors(&guarded.origins);
        let routes = router(api(Caller::Network)).layer(from_fn_with_state(guarded, guard)).layer(cors);
        let service = ServiceExt::<Request>::into_make_service(lenient_paths(routes));
        served.run(axum::serve(listener, service).with_graceful_shutdown(stop.cancelled_owned()).into_future());
    }
    Ok(served)
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
    fn run(&mut self, serving: impl Future<Output = std::io::Result<()>> + Send + 'static) {
        self.tasks.push(tokio::spawn(async move {
            if let Err(error) = serving.await {
                tracing::error!(%error, "the API server failed");
            }
        }));
    }

    /// Stops accepting requests, and removes the socket. Running requests end with the node.
    pub fn stop(&self) {
        self.stop.cancel();
        if let Some(place) = &self.socket {
            // The socket may have been removed already.
            let _ = std::fs::remove_file(place.path());
        }
    }
}

impl Drop for Served {
    fn drop(&mut self) {
        self.stop();
        self.tasks.iter().for_each(JoinHandle::abort);
    }
}

/// Binds a socket that only its owner can open. Replaces a stale socket, but not one on which a node answers.
async fn bind_socket(folder: &Path) -> Result<(UnixListener, SocketPlace), ServeError> {
    use std::os::unix::fs::PermissionsExt;
    let failed = |error: std::io::Error| ServeError::Socket { path: folder.to_owned(), reason: error.to_string() };
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
    Ok((listener, place))
}
