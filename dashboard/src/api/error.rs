//! Errors in OpenAI's format: `{"error": {message, type, param, code}}`, with the matching HTTP status.

use axum::Json;
use axum::http::{HeaderValue, Method, StatusCode, Uri, header};
use axum::response::{IntoResponse, Response};
use exo_actors::RequestError;
use exo_actors::core::plan::PlanError;
use exo_actors::core::scheduler::AdmitError;
use exo_actors::models::ModelError;
use serde::{Deserialize, Serialize};

/// Seconds after which a client of a full node may try again: about as long as an answer takes.
const RETRY_AFTER_S: u64 = 2;

/// The body of every error response.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ErrorBody {
    /// The description of the error.
    pub error: ErrorDetail,
}

/// The description of an error.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ErrorDetail {
    /// What is wrong, and what the client can do about it.
    pub message: String,
    /// `invalid_request_error`, `rate_limit_error`, `server_error`, …
    #[serde(rename = "type")]
    pub kind: String,
    /// The request's field that is wrong, where there is one.
    pub param: Option<String>,
    /// An identifier for programs: `model_not_found`, `context_length_exceeded`, …
    pub code: Option<String>,
}

/// A failed request's HTTP response.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ApiError {
    /// The HTTP status.
    pub status: StatusCode,
    /// The description in the body.
    pub detail: ErrorDetail,
}

impl ApiError {
    pub(super) fn new(status: StatusCode, code: &str, message: impl Into<String>) -> Self {
        let kind = match status {
            StatusCode::UNAUTHORIZED => "authentication_error",
            StatusCode::FORBIDDEN => "permission_error",
            StatusCode::TOO_MANY_REQUESTS => "rate_limit_error",
            status if status.is_client_error() => "invalid_request_error",
            _ => "server_error",
        };
        let detail =
            ErrorDetail { message: message.into(), kind: kind.to_owned(), param: None, code: Some(code.to_owned()) };
        Self { status, detail }
    }

    /// 400: the value of `param` is invalid; `what` continues the message after the field's name.
    pub(super) fn bad_value(param: &str, what: impl std::fmt::Display) -> Self {
        Self::new(StatusCode::BAD_REQUEST, "invalid_value", format!("`{param}` {what}")).about(param)
    }

    /// 404: no model has this name.
    pub(super) fn unknown_model(model: &str) -> Self {
        let message = format!("no model is called `{model}`: GET /v1/models lists the known models");
        Self::new(StatusCode::NOT_FOUND, "model_not_found", message).about("model")
    }

    /// 403: only the node's owner may send this request, over the Unix socket.
    pub(super) fn owner_only() -> Self {
        Self::new(StatusCode::FORBIDDEN, "owner_only", "only the node's owner may do that, over the Unix socket")
    }

    fn about(mut self, param: &str) -> Self {
        self.detail.param = Some(param.to_owned());
        self
    }

    pub(super) fn body(&self) -> ErrorBody {
        ErrorBody { error: self.detail.clone() }
    }
}

impl From<RequestError> for ApiError {
    fn from(error: RequestError) -> Self {
        let message = format!("{error} ({})", error.remedy());
        let with = |status, code| Self::new(status, code, message.clone());
        match &error {
            RequestError::Model(error) => model_error(error, &message),
            RequestError::Plan(
                PlanError::TooManyShards { .. }
                | PlanError::BadSplit { .. }
                | PlanError::NoSuchNode { .. }
                | PlanError::Leaving { .. },
            ) => with(StatusCode::BAD_REQUEST, "invalid_value"),
            RequestError::Plan(_) => with(StatusCode::SERVICE_UNAVAILABLE, "insufficient_memory"),
            RequestError::NoDevice { .. } => with(StatusCode::BAD_REQUEST, "no_such_device"),
            RequestError::ContextTooLong { .. } => with(StatusCode::BAD_REQUEST, "invalid_value"),
            RequestError::BadDraft { .. } => with(StatusCode::BAD_REQUEST, "invalid_value").about("draft"),
            RequestError::Params(error) => with(StatusCode::BAD_REQUEST, "invalid_value").about(error.field),
            RequestError::BadPrompt { .. }
            | RequestError::Admit(AdmitError::EmptyPrompt | AdmitError::NoSuchToken { .. }) => {
                with(StatusCode::BAD_REQUEST, "invalid_prompt")
            }
            RequestError::Admit(AdmitError::TooLong { .. }) => {
                with(StatusCode::BAD_REQUEST, "context_length_exceeded").about("messages")
            }
            RequestError::Overloaded { .. } => with(StatusCode::TOO_MANY_REQUESTS, "overloaded"),
            RequestError::NotClustered => with(StatusCode::CONFLICT, "no_cluster"),
            RequestError::DeviceMemory { .. } => with(StatusCode::SERVICE_UNAVAILABLE, "device_out_of_memory"),
            RequestError::MemoryBusy { .. } => with(StatusCode::SERVICE_UNAVAILABLE, "model_crowded_out"),
            RequestError::NotReady | RequestError::ShuttingDown | RequestError::Moved => {
                with(StatusCode::SERVICE_UNAVAILABLE, "not_ready")
            }
            _ => with(StatusCode::INTERNAL_SERVER_ERROR, "engine_failed"),
        }
    }
}

fn model_error(error: &ModelError, message: &str) -> ApiError {
    let (status, code) = match error {
        ModelError::NotGiven { otherwise, .. } => return model_error(otherwise, message),
        ModelError::Unknown { .. } | ModelError::NoFile { .. } | ModelError::NotOnHub { .. } => {
            (StatusCode::NOT_FOUND, "model_not_found")
        }
        ModelError::Forbidden { .. } => (StatusCode::FORBIDDEN, "model_forbidden"),
        ModelError::Format(_) => (StatusCode::UNPROCESSABLE_ENTITY, "model_unusable"),
        _ => (StatusCode::SERVICE_UNAVAILABLE, "model_unavailable"),
    };
    ApiError::new(status, code, message).about("model")
}

impl IntoResponse for ApiError {
    fn into_response(self) -> Response {
        let waits = matches!(self.status, StatusCode::TOO_MANY_REQUESTS | StatusCode::SERVICE_UNAVAILABLE);
        let mut response = (self.status, Json(self.body())).into_response();
        if waits {
            response.headers_mut().insert(header::RETRY_AFTER, HeaderValue::from(RETRY_AFTER_S));
        }
        response
    }
}

pub(super) async fn no_route(uri: Uri) -> ApiError {
    ApiError::new(StatusCode::NOT_FOUND, "not_found", format!("the path {} does not exist", uri.path()))
}

pub(super) async fn no_method(method: Method, uri: Uri) -> ApiError {
    let what = format!("{} does not accept {method}", uri.path());
    ApiError::new(StatusCode::METHOD_NOT_ALLOWED, "method_not_allowed", what)
}
