//! The HTTP API: one router, served over TCP and over a Unix socket.
//!
//! ```text
//! TCP ─► guard (host, origin, key) ─┐
//! Unix socket (its folder's owner) ─┴► router ─► openai/, native, status, metrics ─► NodeHandle
//! ```
//! Only the owner of the node's data can open the socket, so requests over the socket need no key. All input is
//! bounded; errors have OpenAI's format.

mod body;
mod context;
mod error;
mod guard;
mod metrics;
mod native;
mod openai;
mod reasoning;
mod serve;
mod status;

pub use error::{ApiError, ErrorBody, ErrorDetail};
pub use native::{Eviction, GenerateLine, SOCKET_NAME};
pub use serve::{ApiConfig, ServeError, Served, serve};

use axum::Router;
use axum::routing::{get, post};
use context::ApiContext;

/// All routes.
fn router(api: ApiContext) -> Router {
    Router::new()
        .route("/v1/chat/completions", post(openai::chat))
        .route("/v1/completions", post(openai::completions))
        .route("/v1/models", get(openai::models))
        .route("/v1/models/{*model}", get(openai::model))
        .route("/generate", post(native::generate))
        .route("/drain", post(native::drain))
        .route("/evict", post(native::evict))
        .route("/plan", post(native::plan))
        .route("/health", get(status::health))
        .route("/state", get(status::status))
        .route("/metrics", get(metrics::metrics))
        .fallback(error::no_route)
        .method_not_allowed_fallback(error::no_method)
        .with_state(api)
}
