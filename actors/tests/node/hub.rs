//! A fake Hugging Face hub on loopback that can misbehave.

use axum::Router;
use axum::body::{Body, Bytes};
use axum::extract::{Path, State};
use axum::http::header::{AUTHORIZATION, CONTENT_LENGTH, CONTENT_RANGE, ETAG, RANGE};
use axum::http::{HeaderMap, HeaderName, HeaderValue, StatusCode};
use axum::response::Response;
use axum::routing::get;
use parking_lot::Mutex;
use sha2::{Digest, Sha256};
use std::collections::BTreeMap;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

/// The bytes of one range request of the client.
const CHUNK_BYTES: usize = 10_000_000;

/// The time before a broken answer fails: by then the client has stored the previous chunk.
const BREAKS_AFTER: Duration = Duration::from_millis(700);

/// The hub's files, its behaviour, and the requests that it received.
#[derive(Debug, Default)]
pub(crate) struct HubState {
    /// Contents by file name; the repository is `owner/model`.
    pub(crate) files: BTreeMap<String, Vec<u8>>,
    /// The token that a client must send; `None`: every client is served.
    pub(crate) token: Option<String>,
    /// How many more answers for the second chunk break off halfway.
    pub(crate) broken_off: u32,
    /// Whether all bytes of content are served wrong, with right digests.
    pub(crate) is_corrupt: bool,
    /// The first byte of each requested range, without metadata requests.
    pub(crate) ranges: Vec<u64>,
}

#[derive(Debug)]
pub(crate) struct Hub {
    pub(crate) address: String,
    pub(crate) state: Arc<Mutex<HubState>>,
}

impl Hub {
    pub(crate) async fn new(state: HubState) -> Self {
        let state = Arc::new(Mutex::new(state));
        let router = Router::new()
            .route("/api/models/owner/model/revision/main", get(info))
            .route("/owner/model/resolve/main/{file}", get(file))
            .with_state(Arc::clone(&state));
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.expect("a free port");
        let address = format!("http://{}", listener.local_addr().expect("an address"));
        tokio::spawn(async move { axum::serve(listener, router).await });
        Self { address, state }
    }
}

pub(crate) fn sha256(bytes: &[u8]) -> String {
    Sha256::digest(bytes).iter().map(|byte| format!("{byte:02x}")).collect()
}

fn answer(status: StatusCode, body: Body) -> Response {
    let mut response = Response::new(body);
    *response.status_mut() = status;
    response
}

fn is_welcome(state: &HubState, headers: &HeaderMap) -> bool {
    let shown = headers.get(AUTHORIZATION).and_then(|value| value.to_str().ok());
    state.token.as_ref().is_none_or(|token| shown == Some(&format!("Bearer {token}")))
}

async fn info(State(state): State<Arc<Mutex<HubState>>>, headers: HeaderMap) -> Response {
    let state = state.lock();
    if !is_welcome(&state, &headers) {
        return answer(StatusCode::UNAUTHORIZED, Body::empty());
    }
    let files = state.files.keys().map(|name| serde_json::json!({"rfilename": name}));
    let info = serde_json::json!({"sha": "c0ffee", "siblings": files.collect::<Vec<_>>()});
    answer(StatusCode::OK, Body::from(info.to_string()))
}

async fn file(State(state): State<Arc<Mutex<HubState>>>, Path(name): Path<String>, headers: HeaderMap) -> Response {
    let mut state = state.lock();
    if !is_welcome(&state, &headers) {
        return answer(StatusCode::UNAUTHORIZED, Body::empty());
    }
    let Some(content) = state.files.get(&name).cloned() else {
        return answer(StatusCode::NOT_FOUND, Body::empty());
    };
    let range = headers.get(RANGE).and_then(|value| value.to_str().ok()?.strip_prefix("bytes=")?.split_once('-'));
    let (first, last) = range.expect("the client asks for ranges");
    let (first, last): (usize, usize) = (first.parse().expect("a number"), last.parse().expect("a number"));
    let last = last.min(content.len() - 1);
    let mut part = content[first..=last].to_vec();
    let mut breaks_off = false;
    if (first, last) != (0, 0) {
        state.ranges.push(first as u64);
        if state.is_corrupt {
            part.iter_mut().for_each(|byte| *byte ^= 0x55);
        }
        // Only the second chunk breaks off: the first must be kept, and the client may request the last at any time.
        breaks_off = state.broken_off > 0 && first == CHUNK_BYTES;
        state.broken_off -= u32::from(breaks_off);
    }
    let length = part.len();
    let body = if breaks_off { broken(&part) } else { Body::from(part) };
    let mut response = answer(StatusCode::PARTIAL_CONTENT, body);
    let mut head = |name: HeaderName, value: String| {
        response.headers_mut().insert(name, HeaderValue::from_str(&value).expect("a header"));
    };
    head(CONTENT_RANGE, format!("bytes {first}-{last}/{}", content.len()));
    head(CONTENT_LENGTH, length.to_string());
    head(ETAG, format!("\"{}\"", sha256(&content)));
    head(HeaderName::from_static("x-repo-commit"), "c0ffee".to_owned());
    response
}

/// A body that sends half of `part`, waits for [`BREAKS_AFTER`], and fails.
fn broken(part: &[u8]) -> Body {
    let half = Bytes::copy_from_slice(&part[..part.len() / 2]);
    let wait = Box::pin(tokio::time::sleep(BREAKS_AFTER));
    Body::from_stream(Broken { half: Some(half), wait })
}

struct Broken {
    half: Option<Bytes>,
    wait: Pin<Box<tokio::time::Sleep>>,
}

impl futures_core::Stream for Broken {
    type Item = std::io::Result<Bytes>;

    fn poll_next(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        if let Some(half) = self.half.take() {
            return Poll::Ready(Some(Ok(half)));
        }
        self.wait.as_mut().poll(context).map(|()| Some(Err(std::io::Error::other("planned"))))
    }
}
