//! The routes of the API.

use super::context::ApiContext;
use super::{error, metrics, native, openai, status};
use axum::Router;
use axum::routing::{get, post};

/// All routes.
pub(super) fn router(api: ApiContext) -> Router {
    Router::new()
        .route("/v1/chat/completions", post(openai::chat))
        .route("/v1/completions", post(openai::completions))
        .route("/v1/models", get(openai::models))
        .route("/v1/models/{*model}", get(openai::model))
        .route("/generate", post(native::generate))
        .route("/drain", post(native::drain))
        .route("/evict", post(native::evict))
        .route("/readmit", post(native::readmit))
        .route("/plan", post(native::plan))
        .route("/health", get(status::health))
        .route("/state", get(status::status))
        .route("/metrics", get(metrics::metrics))
        .fallback(error::no_route)
        .method_not_allowed_fallback(error::no_method)
        .with_state(api)
}
