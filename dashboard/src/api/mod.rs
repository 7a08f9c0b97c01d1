//! The HTTP API: one router, on TCP and on a Unix socket.
//!
//! ```text
//! TCP ─► guard (host, origin, key) ─┐
//! Unix socket (its folder's owner) ─┴► router ─► openai/, native, state ─► NodeHandle
//! ```
//! Whoever may open the socket owns the node's data, and needs no key. Everything that comes in is bounded; what is
//! refused is told in OpenAI's shape of errors.

mod body;
mod error;
mod guard;
mod metrics;
mod native;
mod openai;
mod reasoning;
mod serve;
mod state;

pub use error::{ApiError, ErrorBody, ErrorDetail};
pub use native::{Eviction, Line, SOCKET_NAME};
pub use serve::{ApiConfig, ServeError, Served, serve};

use axum::Router;
use axum::routing::{get, post};
use exo_actors::{ModelSpec, NodeHandle};
use std::collections::BTreeSet;
use std::sync::Arc;

/// Who is at the other end.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Reach {
    /// The owner of the node's data, over the Unix socket.
    Owner,
    /// Anyone who got past the guard, over TCP.
    Network,
}

/// What handlers share.
#[derive(Debug, Clone)]
struct Api {
    node: NodeHandle,
    reach: Reach,
    /// Models that may be named by path over the network, too: those that the node was started with.
    named: Arc<BTreeSet<String>>,
}

impl Api {
    /// The model of this name, if whoever asks may have it: a path tells what is on the disk, and is the owner's.
    fn spec(&self, model: &str) -> Result<ModelSpec, ApiError> {
        let is_path = model.starts_with(['/', '.', '~', '\\'])
            || model.contains("..")
            || model.contains(':') && {
                let (drive, _) = model.split_once(':').unwrap_or_default();
                drive.len() == 1
            };
        if is_path && self.reach == Reach::Network && !self.named.contains(model) {
            return Err(ApiError::unknown_model(model));
        }
        match model.is_empty() {
            true => Err(ApiError::bad_value("model", "names no model")),
            false => Ok(ModelSpec::new(model)),
        }
    }
}

/// All routes.
fn router(api: Api) -> Router {
    Router::new()
        .route("/v1/chat/completions", post(openai::chat))
        .route("/v1/completions", post(openai::completions))
        .route("/v1/models", get(openai::models))
        .route("/v1/models/{*model}", get(openai::model))
        .route("/generate", post(native::generate))
        .route("/drain", post(native::drain))
        .route("/evict", post(native::evict))
        .route("/plan", post(native::plan))
        .route("/health", get(state::health))
        .route("/state", get(state::state))
        .route("/metrics", get(metrics::metrics))
        .fallback(error::no_route)
        .method_not_allowed_fallback(error::no_method)
        .with_state(api)
}
