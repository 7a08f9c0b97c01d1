//! Reads JSON request bodies up to a size limit. Errors name the field or the line that is wrong.

use super::error::ApiError;
use axum::extract::{FromRequest, Request};
use axum::http::StatusCode;
use futures_util::StreamExt;
use serde::de::DeserializeOwned;
use std::time::Duration;
use tokio::sync::Semaphore;

/// The longest body, in bytes. A longer one holds more text than the longest context.
const BODY_BYTES_MAX: usize = 32 << 20;
/// How many bytes of an oversized body are read and discarded: most clients read no response before they have sent all.
const DRAINED_BYTES_MAX: usize = 4 * BODY_BYTES_MAX;
/// The most bodies that are read at once: with the limit above, this bounds the memory that callers can use.
const BODIES_MAX: usize = 64;
/// The time that a body may take. A slower one holds up others.
const BODY_TIMEOUT: Duration = Duration::from_secs(30);

static READING: Semaphore = Semaphore::const_new(BODIES_MAX);

/// The decoded JSON body of a request. Its content type is ignored.
#[derive(Debug)]
pub(super) struct Body<T>(pub(super) T);

/// A type that can be decoded from a body.
pub(super) trait FromBody: Sized {
    fn read(bytes: &[u8]) -> Result<Self, ApiError>;
}

/// Decodes JSON; unknown fields are ignored.
///
/// # Errors
/// 400 with the field that is wrong, or the line where the JSON is malformed.
pub(super) fn read_json<T: DeserializeOwned>(bytes: &[u8]) -> Result<T, ApiError> {
    let mut reader = serde_json::Deserializer::from_slice(bytes);
    let malformed = |error: &serde_json::Error| {
        ApiError::new(StatusCode::BAD_REQUEST, "invalid_json", format!("the body is not valid JSON: {error}"))
    };
    let value = serde_path_to_error::deserialize(&mut reader).map_err(|error| {
        let field = error.path().to_string();
        match error.inner().is_data() && field != "." {
            true => ApiError::bad_value(&field, format!("cannot be decoded: {}", error.inner())),
            false => malformed(error.inner()),
        }
    })?;
    reader.end().map_err(|error| malformed(&error))?;
    Ok(value)
}

impl<T: FromBody, S: Send + Sync> FromRequest<S> for Body<T> {
    type Rejection = ApiError;

    async fn from_request(request: Request, _: &S) -> Result<Self, ApiError> {
        // The semaphore is never closed.
        let _permit = READING.acquire().await.ok();
        let bytes = tokio::time::timeout(BODY_TIMEOUT, bytes_of(request)).await.map_err(|_| {
            let message = format!("the body did not arrive within {} s", BODY_TIMEOUT.as_secs());
            ApiError::new(StatusCode::REQUEST_TIMEOUT, "body_too_slow", message)
        })??;
        T::read(&bytes).map(Self)
    }
}

async fn bytes_of(request: Request) -> Result<Vec<u8>, ApiError> {
    let mut parts = request.into_body().into_data_stream();
    let (mut bytes, mut length) = (Vec::new(), 0);
    while let Some(part) = parts.next().await {
        let part = part.map_err(|error| {
            ApiError::new(StatusCode::BAD_REQUEST, "body_broken", format!("the body was cut off: {error}"))
        })?;
        length += part.len();
        if length > BODY_BYTES_MAX {
            bytes = Vec::new();
        } else {
            bytes.extend_from_slice(&part);
        }
        if length > DRAINED_BYTES_MAX {
            break;
        }
    }
    match length > BODY_BYTES_MAX {
        true => {
            let message = format!("the body is longer than the limit of {BODY_BYTES_MAX} bytes");
            Err(ApiError::new(StatusCode::PAYLOAD_TOO_LARGE, "body_too_large", message))
        }
        false => Ok(bytes),
    }
}
