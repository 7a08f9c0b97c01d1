//! What the command line asks of a running node. `/generate`: requests and answers as the node itself has them, a JSON
//! line for each event: token ids and log-probabilities come with nothing left out.

use super::body::{Body, FromBody, read_json};
use super::{Api, ApiError, ErrorDetail, Reach};
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

/// What a node's socket is called in its data folder.
pub const SOCKET_NAME: &str = "api.sock";

/// One line of an answer.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Line {
    Event(Generated),
    /// The last line, where the answer broke off.
    Error(ErrorDetail),
}

/// Takes the node out of its cluster; answers when nothing runs on it any more. Its owner's to ask.
pub(super) async fn drain(State(api): State<Api>) -> Result<Json<Value>, ApiError> {
    if api.reach == Reach::Network {
        return Err(ApiError::owner_only());
    }
    api.node.drain().await?;
    Ok(Json(json!({ "status": "drained" })))
}

/// Which member is to go.
#[derive(Debug, Clone, Copy, Serialize, Deserialize)]
pub struct Eviction {
    pub node: NodeId,
}

impl FromBody for Eviction {
    fn read(bytes: &[u8]) -> Result<Self, ApiError> {
        read_json(bytes)
    }
}

/// Closes all members' doors to one of them. Its owner's to ask.
pub(super) async fn evict(State(api): State<Api>, Body(eviction): Body<Eviction>) -> Result<Json<Value>, ApiError> {
    if api.reach == Reach::Network {
        return Err(ApiError::owner_only());
    }
    api.node.evict(eviction.node)?;
    Ok(Json(json!({ "status": "evicted" })))
}

impl FromBody for ModelSpec {
    fn read(bytes: &[u8]) -> Result<Self, ApiError> {
        read_json(bytes)
    }
}

/// Where a model would go, by each policy, and why.
pub(super) async fn plan(State(api): State<Api>, Body(spec): Body<ModelSpec>) -> Result<Json<Vec<Preview>>, ApiError> {
    if api.reach == Reach::Network {
        api.spec(&spec.model)?;
    }
    Ok(Json(api.node.preview(spec).await?))
}

impl FromBody for GenerateRequest {
    fn read(bytes: &[u8]) -> Result<Self, ApiError> {
        read_json(bytes)
    }
}

pub(super) async fn generate(
    State(api): State<Api>,
    Body(request): Body<GenerateRequest>,
) -> Result<Response, ApiError> {
    if api.reach == Reach::Network {
        api.spec(&request.model.model)?;
    }
    let mut generation = api.node.generate(request)?;
    // What fails before it begins has a status of its own.
    let first = match generation.next().await {
        Some(event) => event?,
        None => return Err(exo_actors::RequestError::ShuttingDown.into()),
    };
    let rest = generation.map(|event| match event {
        Ok(event) => Line::Event(event),
        Err(error) => Line::Error(ApiError::from(error).detail),
    });
    let lines = futures_util::stream::once(async { Line::Event(first) }).chain(rest);
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
