//! A client of a running node, over the Unix socket in its data folder.

use crate::api::{ErrorBody, Eviction, GenerateLine, SocketPlace};
use crate::{GenerateRequest, Generated, ModelSpec, NodeId, NodeStatus, Preview};
use anyhow::{Context, anyhow, bail};
use futures_util::{Stream, StreamExt, TryStreamExt};
use reqwest::{Client, Method, RequestBuilder, Response};
use std::io::ErrorKind;
use std::path::Path;
use std::pin::Pin;
use tokio::net::UnixStream;
use tokio_util::codec::{FramedRead, LinesCodec, LinesCodecError};
use tokio_util::io::StreamReader;

/// The most bytes of one line of an answer: an event with the log-probabilities of 20 tokens has a few thousand, and
/// the first event has the whole prompt.
const LINE_BYTES_MAX: usize = 256 << 20;

/// A connection to a running node.
#[derive(Debug)]
pub(super) struct NodeClient {
    client: Client,
    socket: SocketPlace,
}

impl NodeClient {
    /// Returns a client of the node that runs on `data_dir`, if there is one.
    pub(super) async fn find(data_dir: &Path) -> anyhow::Result<Option<Self>> {
        let socket = match SocketPlace::of(data_dir) {
            Ok(socket) => socket,
            Err(error) if error.kind() == ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(error).with_context(|| data_dir.display().to_string()),
        };
        match UnixStream::connect(socket.address()).await {
            Ok(_) => {}
            // A node that was killed leaves its socket behind.
            Err(error) if matches!(error.kind(), ErrorKind::NotFound | ErrorKind::ConnectionRefused) => {
                return Ok(None);
            }
            Err(error) => return Err(error).with_context(|| format!("cannot connect to {}", socket.path().display())),
        }
        let client = Client::builder().no_proxy().unix_socket(socket.address()).build()?;
        Ok(Some(Self { client, socket }))
    }

    /// Returns the status of the node and its cluster.
    pub(super) async fn status(&self) -> anyhow::Result<NodeStatus> {
        Ok(self.send(self.request(Method::GET, "/state")).await?.json().await?)
    }

    /// Takes the node out of its cluster. Returns when no instance runs on the node any more.
    pub(super) async fn drain(&self) -> anyhow::Result<()> {
        self.send(self.request(Method::POST, "/drain")).await.map(drop)
    }

    /// Evicts a member.
    pub(super) async fn evict(&self, node: NodeId) -> anyhow::Result<()> {
        self.send(self.request(Method::POST, "/evict").json(&Eviction { node })).await.map(drop)
    }

    /// Undoes the eviction of a node.
    pub(super) async fn readmit(&self, node: NodeId) -> anyhow::Result<()> {
        self.send(self.request(Method::POST, "/readmit").json(&Eviction { node })).await.map(drop)
    }

    /// Returns where each policy would place a model, and why.
    pub(super) async fn plan(&self, spec: &ModelSpec) -> anyhow::Result<Vec<Preview>> {
        Ok(self.send(self.request(Method::POST, "/plan").json(spec)).await?.json().await?)
    }

    /// Starts an answer. Dropping the answer cancels the request.
    pub(super) async fn generate(&self, request: &GenerateRequest) -> anyhow::Result<ClientAnswer> {
        let response = self.send(self.request(Method::POST, "/generate").json(request)).await?;
        let bytes = StreamReader::new(response.bytes_stream().map_err(std::io::Error::other));
        let lines = FramedRead::new(bytes, LinesCodec::new_with_max_length(LINE_BYTES_MAX));
        Ok(ClientAnswer { lines: lines.boxed() })
    }

    fn request(&self, method: Method, path: &str) -> RequestBuilder {
        self.client.request(method, format!("http://localhost{path}"))
    }

    async fn send(&self, request: RequestBuilder) -> anyhow::Result<Response> {
        let response = request.send().await;
        let response =
            response.with_context(|| format!("{}: the node does not answer", self.socket.path().display()))?;
        let status = response.status();
        if status.is_success() {
            return Ok(response);
        }
        match response.json::<ErrorBody>().await {
            Ok(body) => bail!("{}", body.error.message),
            Err(_) => bail!("the node answers with status {status}"),
        }
    }
}

/// An answer of a running node.
pub(super) struct ClientAnswer {
    lines: Pin<Box<dyn Stream<Item = Result<String, LinesCodecError>> + Send>>,
}

impl ClientAnswer {
    /// The next event; `None` after the last.
    pub(super) async fn next(&mut self) -> Option<anyhow::Result<Generated>> {
        let line = match self.lines.next().await? {
            Ok(line) => line,
            Err(LinesCodecError::MaxLineLengthExceeded) => {
                return Some(Err(anyhow!("the node sent a line of more than {} MiB", LINE_BYTES_MAX >> 20)));
            }
            Err(LinesCodecError::Io(error)) => {
                return Some(Err(anyhow!(error).context("the node stopped during the answer")));
            }
        };
        Some(match serde_json::from_str(&line) {
            Ok(GenerateLine::Event(event)) => Ok(event),
            Ok(GenerateLine::Error(error)) => Err(anyhow!(error.message)),
            Err(error) => Err(anyhow!("the node's answer cannot be decoded: {error}")),
        })
    }
}
