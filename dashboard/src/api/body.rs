//! Reads JSON request bodies up to a size limit. Errors name the field or the line that is wrong.

use super::error::ApiError;
use axum::extract::{FromRequest, Request};
use axum::http::StatusCode;
use futures_util::StreamExt;
use serde::de::DeserializeOwned;
use serde_json::Value;
use std::borrow::Cow;
use std::time::Duration;
use tokio::sync::Semaphore;

/// The longest body, in bytes. A longer one holds more text than the longest context.
const BODY_BYTES_MAX: usize = 32 << 20;
/// How many bytes of an oversized body are read and discarded: most clients read no response before they have sent all.
const DRAINED_BYTES_MAX: usize = 4 * BODY_BYTES_MAX;
/// The most bodies that are read at once: with [`BODY_BYTES_MAX`], this bounds the bytes that callers hold here, to 2
/// GiB.
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

/// Decodes JSON; unknown fields are ignored, and of equal fields the last counts.
///
/// # Errors
/// 400 with the field that is wrong, or the line where the JSON is malformed.
pub(super) fn read_json<T: DeserializeOwned>(bytes: &[u8]) -> Result<T, ApiError> {
    decode(&read_value(bytes)?)
}

/// Parses JSON as clients send it.
///
/// # Errors
/// 400 with the line where the JSON is malformed.
pub(super) fn read_value(bytes: &[u8]) -> Result<Value, ApiError> {
    serde_json::from_slice(&with_whole_surrogates(bytes)).map_err(|error| {
        ApiError::new(StatusCode::BAD_REQUEST, "invalid_json", format!("the body is not valid JSON: {error}"))
    })
}

/// Decodes parsed JSON.
///
/// # Errors
/// 400 with the field that is wrong.
pub(super) fn decode<T: DeserializeOwned>(value: &Value) -> Result<T, ApiError> {
    serde_path_to_error::deserialize(value).map_err(|error| {
        let field = error.path().to_string();
        match field.as_str() {
            "." => ApiError::bad_value("body", format!("cannot be decoded: {}", error.inner())),
            field => ApiError::bad_value(field, format!("cannot be decoded: {}", error.inner())),
        }
    })
}

/// JSON whose escapes of half a character (`\\ud83d` alone), which clients make when they cut a text, stand for U+FFFD.
fn with_whole_surrogates(bytes: &[u8]) -> Cow<'_, [u8]> {
    let mut mended = Cow::Borrowed(bytes);
    let mut at = 0;
    while let Some(found) = bytes[at..].iter().position(|&byte| byte == b'\\') {
        at += found;
        match escaped_unit(&bytes[at..]) {
            Some(0xd800..=0xdbff) if matches!(escaped_unit(&bytes[at + 6..]), Some(0xdc00..=0xdfff)) => at += 12,
            Some(0xd800..=0xdfff) => {
                mended.to_mut()[at + 2..at + 6].copy_from_slice(b"fffd");
                at += 6;
            }
            // An escape has at least two characters; the second may be a backslash.
            _ => at = (at + 2).min(bytes.len()),
        }
    }
    mended
}

/// The UTF-16 unit of an escape such as `\\u0041` at the start of `bytes`.
fn escaped_unit(bytes: &[u8]) -> Option<u16> {
    let digits = bytes.strip_prefix(b"\\u")?.get(..4)?;
    u16::from_str_radix(std::str::from_utf8(digits).ok()?, 16).ok()
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn half_characters_become_the_replacement_character() {
        let cases = [
            (r#""\ud83d""#, "\u{fffd}"),
            (r#""a\udc00b""#, "a\u{fffd}b"),
            (r#""\ud83d\ude00""#, "\u{1f600}"),
            (r#""\ud83d\ud83d\ude00""#, "\u{fffd}\u{1f600}"),
            (r#""\\ud83d""#, "\\ud83d"),
            (r#""\n\u00e9\ud83""#, ""),
        ];
        for (json, text) in cases {
            match read_value(json.as_bytes()) {
                Ok(value) => assert_eq!(value, Value::from(text), "{json}"),
                Err(error) => assert!(text.is_empty(), "{json}: {error:?}"),
            }
        }
    }

    #[test]
    fn of_equal_fields_the_last_counts() {
        let read: std::collections::BTreeMap<String, u32> = read_json(br#"{"a": 1, "a": 2}"#).expect("valid");
        assert_eq!(read["a"], 2);
    }
}
