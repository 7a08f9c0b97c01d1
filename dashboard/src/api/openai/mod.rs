//! OpenAI's API: `/v1/chat/completions`, `/v1/completions`, `/v1/models`.
//!
//! ```text
//! body ─► ChatRequest, CompletionRequest ─plan─► GenerateRequests ─► Answers ─pieces─► Shape ─► JSON or events
//! ```
//! Source of the schemas: OpenAI's published OpenAPI description, and the fields that its Python client reads. Several
//! answers to a prompt are several requests: the scheduler computes the prompt once.

mod answers;
mod chat;
mod completions;
mod sampling;

use super::body::Body;
use super::context::ApiContext;
use super::error::ApiError;
use axum::Json;
use axum::extract::{Path, State};
use axum::response::Response;
use chat::ChatRequest;
use completions::CompletionRequest;
use exo_actors::core::scheduler::FinishReason;
use exo_actors::models::CATALOGUE;
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::time::{SystemTime, UNIX_EPOCH};

pub(super) async fn chat(
    State(api): State<ApiContext>,
    Body(request): Body<ChatRequest>,
) -> Result<Response, ApiError> {
    let (plan, shape) = request.plan(&api)?;
    answers::answer(&api, plan, shape).await
}

pub(super) async fn completions(
    State(api): State<ApiContext>,
    Body(request): Body<CompletionRequest>,
) -> Result<Response, ApiError> {
    let (plan, shape) = request.plan(&api)?;
    answers::answer(&api, plan, shape).await
}

/// Lists the models of the catalogue, and those with an instance on this node.
pub(super) async fn models(State(api): State<ApiContext>) -> Result<Json<Value>, ApiError> {
    let data: Vec<Value> = known(&api).await?.into_values().collect();
    Ok(Json(json!({ "object": "list", "data": data })))
}

pub(super) async fn model(State(api): State<ApiContext>, Path(model): Path<String>) -> Result<Json<Value>, ApiError> {
    let found = known(&api).await?.remove(&model);
    found.map(Json).ok_or_else(|| ApiError::unknown_model(&model))
}

async fn known(api: &ApiContext) -> Result<BTreeMap<String, Value>, ApiError> {
    let entry = |id: &str, is_loaded: bool| json!({ "id": id, "object": "model", "created": 0, "owned_by": "exo", "loaded": is_loaded });
    let catalogue = CATALOGUE.iter().map(|known| (known.name.to_owned(), entry(known.name, false)));
    let mut all: BTreeMap<String, Value> = catalogue.collect();
    let state = api.node.status().await?;
    all.extend(state.live().map(|(_, instance)| (instance.model.name.clone(), entry(&instance.model.name, true))));
    Ok(all)
}

fn finish_name(reason: FinishReason) -> &'static str {
    match reason {
        FinishReason::Stop => "stop",
        FinishReason::Length => "length",
    }
}

/// The Unix time in seconds.
fn now() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs())
}
