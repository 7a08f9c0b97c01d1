//! The node's own endpoints, which the command line uses. `/generate` accepts a [`GenerateRequest`] and answers with
//! one JSON line per event, with all token ids and log-probabilities.

use super::body::{Body, FromBody, read_json};
use super::context::ApiContext;
use super::error::{ApiError, ErrorDetail};
use axum::Json;
use axum::body::{Body as Stream, Bytes};
use axum::extract::State;
use axum::response::Response;
use exo_actors::core::plan::Preview;
use exo_actors::{GenerateRequest, Generated, ModelSpec, NodeId};
use futures_util::StreamExt;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use std::convert::Infallible;

/// One line of the answer of `/generate`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum GenerateLine {
    /// An event of the answer.
    Event(Generated),
    /// The last line of an answer that failed.
    Error(ErrorDetail),
}

/// Takes the node out of its cluster. Answers when no instance runs on the node any more. For the owner only.
pub(super) async fn drain(State(api): State<ApiContext>) -> Result<Json<Value>, ApiError> {
    api.require_owner()?;
    api.node.drain().await?;
    Ok(Json(json!({ "status": "drained" })))
}

/// The body of `/evict` and `/readmit`: the node that is meant.
#[derive(Debug, Clone, Copy, Serialize, Deserialize)]
pub struct Eviction {
    /// The member's id.
    pub node: NodeId,
}

impl FromBody for Eviction {
    fn read(bytes: &[u8]) -> Result<Self, ApiError> {
        read_json(bytes)
    }
}

/// Evicts a member. For the owner only.
pub(super) async fn evict(
    State(api): State<ApiContext>,
    Body(eviction): Body<Eviction>,
) -> Result<Json<Value>, ApiError> {
    api.require_owner()?;
    api.node.evict(eviction.node)?;
    Ok(Json(json!({ "status": "evicted" })))
}

/// Undoes an eviction. For the owner only.
pub(super) async fn readmit(
    State(api): State<ApiContext>,
    Body(eviction): Body<Eviction>,
) -> Result<Json<Value>, ApiError> {
    api.require_owner()?;
    api.node.readmit(eviction.node)?;
    Ok(Json(json!({ "status": "readmitted" })))
}

impl FromBody for ModelSpec {
    fn read(bytes: &[u8]) -> Result<Self, ApiError> {
        read_json(bytes)
    }
}

/// Returns where each policy would place a model, and why.
pub(super) async fn plan(
    State(api): State<ApiContext>,
    Body(spec): Body<ModelSpec>,
) -> Result<Json<Vec<Preview>>, ApiError> {
    Ok(Json(api.node.preview(api.admit(spec)?).await?))
}

impl FromBody for GenerateRequest {
    fn read(bytes: &[u8]) -> Result<Self, ApiError> {
        read_json(bytes)
    }
}

pub(super) async fn generate(
    State(api): State<ApiContext>,
    Body(request): Body<GenerateRequest>,
) -> Result<Response, ApiError> {
    let model = api.admit(request.model)?;
    let mut generation = api.node.generate(GenerateRequest { model, ..request })?;
    // A request that fails before its first event answers with the error's HTTP status.
    let first = match generation.next().await {
        Some(event) => event?,
        None => return Err(exo_actors::RequestError::ShuttingDown.into()),
    };
    let rest = generation.map(|event| match event {
        Ok(event) => GenerateLine::Event(event),
        Err(error) => GenerateLine::Error(ApiError::from(error).detail),
    });
    let lines = futures_util::stream::once(async { GenerateLine::Event(first) }).chain(rest);
    let bytes = lines.map(|line| {
        let mut text = serde_json::to_vec(&line).unwrap_or_default();
        text.push(b'\n');
        Ok::<_, Infallible>(Bytes::from(text))
    });
    let mut response = Response::new(Stream::from_stream(bytes));
    let kind = axum::http::HeaderValue::from_static("application/x-ndjson");
    response.headers_mut().insert(axum::http::header::CONTENT_TYPE, kind);
    Ok(response)
}
