//! `/health` and `/state`.

use super::context::ApiContext;
use super::error::ApiError;
use axum::Json;
use axum::extract::State;
use serde_json::{Value, json};

/// Returns the node's id and version, if the node answers.
pub(super) async fn health(State(api): State<ApiContext>) -> Result<Json<Value>, ApiError> {
    let status = api.node.status().await?;
    Ok(Json(json!({ "status": "ok", "node": status.node, "version": env!("CARGO_PKG_VERSION") })))
}

/// Returns the status of the node and its cluster.
pub(super) async fn status(
    State(api): State<ApiContext>,
) -> Result<Json<exo_actors::core::node_status::NodeStatus>, ApiError> {
    Ok(Json(api.node.status().await?))
}
