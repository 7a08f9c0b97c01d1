//! Serves HTTP on the connections of a listener, within bounds.
//!
//! ```text
//! accept ─► bound reached? ─► 503, and closed
//!        └► a place ─► hyper ─► service         a client without headers for HEADER_TIMEOUT is closed
//! ```
//! Each listener has places of its own, so that clients over TCP, however many, leave room for the owner's socket.

use super::error::ApiError;
use super::places::{Place, Places};
use axum::body::Body;
use axum::extract::Request;
use axum::http::{Response, StatusCode};
use hyper::body::Incoming;
use hyper::server::conn::http1;
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::service::TowerToHyperService;
use std::convert::Infallible;
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream, UnixListener, UnixStream};
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;
use tower::Service;

/// The time for a request's headers, counted from the end of the request before. Long enough for a page's next request,
/// short enough to free unused connections.
const HEADER_TIMEOUT: Duration = Duration::from_secs(30);
/// The wait after an accept failed: mostly for lack of descriptors, which others give back.
const ACCEPT_WAIT: Duration = Duration::from_millis(100);
/// Refused clients whose connections stay open until they have read the answer. Those of further ones close at once.
const LINGERING_MAX: usize = 32;
/// Refused clients that are being answered. While there are so many, further clients wait to be accepted.
const REFUSED_MAX: usize = 64;
/// The time for a refused client to read its answer.
const LINGER_TIMEOUT: Duration = Duration::from_secs(1);

/// What accepts connections.
pub(super) trait Listener: Send + 'static {
    type Stream: AsyncRead + AsyncWrite + Unpin + Send + 'static;

    /// The next connection, and the address of its client.
    fn accept(&self) -> impl Future<Output = io::Result<(Self::Stream, Option<IpAddr>)>> + Send;
}

impl Listener for TcpListener {
    type Stream = TcpStream;

    async fn accept(&self) -> io::Result<(TcpStream, Option<IpAddr>)> {
        let (stream, client) = Self::accept(self).await?;
        // Tokens are small packets that must not wait for each other.
        let _ = stream.set_nodelay(true);
        Ok((stream, Some(SocketAddr::ip(&client).to_canonical())))
    }
}

impl Listener for UnixListener {
    type Stream = UnixStream;

    async fn accept(&self) -> io::Result<(UnixStream, Option<IpAddr>)> {
        Ok((Self::accept(self).await?.0, None))
    }
}

/// Serves a service on each connection of a listener, in `places`, until `stop`. Connections end when the returned
/// future is dropped.
pub(super) async fn serve_connections<S>(
    listener: impl Listener,
    places: Arc<Places>,
    service: S,
    stop: CancellationToken,
) where
    S: Service<Request, Response = Response<Body>, Error = Infallible> + Clone + Send + 'static,
    S::Future: Send,
{
    let (mut served, mut refused) = (JoinSet::new(), JoinSet::new());
    let (mut has_failed, refusal) = (false, Arc::<str>::from(refusal()));
    loop {
        let accepted = tokio::select! {
            accepted = listener.accept(), if refused.len() < REFUSED_MAX => accepted,
            Some(_) = served.join_next(), if !served.is_empty() => continue,
            Some(_) = refused.join_next(), if !refused.is_empty() => continue,
            () = stop.cancelled() => break,
        };
        match accepted {
            Ok((stream, client)) => {
                has_failed = false;
                match places.take(client) {
                    Some(place) => drop(served.spawn(serve(stream, place, service.clone(), stop.clone()))),
                    None if refused.len() < LINGERING_MAX => {
                        drop(refused.spawn(refuse(stream, refusal.clone(), Close::WhenRead)));
                    }
                    None => drop(refused.spawn(refuse(stream, refusal.clone(), Close::AtOnce))),
                }
            }
            Err(error) => {
                if !std::mem::replace(&mut has_failed, true) {
                    tracing::error!(%error, "the API cannot accept connections");
                }
                tokio::time::sleep(ACCEPT_WAIT).await;
            }
        }
    }
    while served.join_next().await.is_some() {}
}

async fn serve<S>(
    stream: impl AsyncRead + AsyncWrite + Unpin + Send + 'static,
    place: Place,
    service: S,
    stop: CancellationToken,
) where
    S: Service<Request, Response = Response<Body>, Error = Infallible> + Clone + Send + 'static,
    S::Future: Send,
{
    let service =
        tower::util::MapRequest::new(service, |request: axum::http::Request<Incoming>| request.map(Body::new));
    let connection = http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(HEADER_TIMEOUT)
        .serve_connection(TokioIo::new(stream), TowerToHyperService::new(service))
        .with_upgrades();
    tokio::pin!(connection);
    let ended = tokio::select! {
        ended = &mut connection => ended,
        () = stop.cancelled() => {
            connection.as_mut().graceful_shutdown();
            connection.await
        }
    };
    if let Err(error) = ended {
        tracing::debug!(%error, "a connection to the API ended");
    }
    drop(place);
}

/// When the connection of a refused client closes.
enum Close {
    /// When the client has read the answer: one that still sends its request loses the answer otherwise.
    WhenRead,
    AtOnce,
}

async fn refuse(mut stream: impl AsyncRead + AsyncWrite + Unpin, refusal: Arc<str>, close: Close) {
    let answer = async {
        stream.write_all(refusal.as_bytes()).await?;
        stream.shutdown().await?;
        let mut rest = [0; 1024];
        while matches!(close, Close::WhenRead) && stream.read(&mut rest).await? > 0 {}
        Ok::<_, io::Error>(())
    };
    // A client that does not read its answer gets none.
    let _ = tokio::time::timeout(LINGER_TIMEOUT, answer).await;
}

/// The answer to clients beyond the bound.
fn refusal() -> String {
    let what = "this node has too many connections: close some, or try again in a moment";
    let error = ApiError::new(StatusCode::SERVICE_UNAVAILABLE, "too_many_connections", what);
    let body = serde_json::to_string(&error.body()).unwrap_or_default();
    format!(
        "HTTP/1.1 503 Service Unavailable\r\ncontent-type: application/json\r\nretry-after: 1\r\n\
         connection: close\r\ncontent-length: {}\r\n\r\n{body}",
        body.len()
    )
}
