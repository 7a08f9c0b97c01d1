//! `/health` and `/state`.

use super::{Api, ApiError};
use axum::Json;
use axum::extract::State;
use serde_json::{Value, json};

/// Whether the node answers.
pub(super) async fn health(State(api): State<Api>) -> Result<Json<Value>, ApiError> {
    let state = api.node.state().await?;
    Ok(Json(json!({ "status": "ok", "node": state.node, "version": env!("CARGO_PKG_VERSION") })))
}

/// All that is known of the node.
pub(super) async fn state(State(api): State<Api>) -> Result<Json<exo_actors::core::view::State>, ApiError> {
    Ok(Json(api.node.state().await?))
}
