//! The node that is running on this data folder, over its socket.

use crate::api::{ErrorBody, Eviction, Line, SOCKET_NAME};
use crate::{GenerateRequest, Generated, ModelSpec, NodeId, Preview, State};
use anyhow::{Context, bail};
use http_body_util::{BodyExt, Full};
use hyper::body::{Bytes, Incoming};
use hyper::{Request, Response};
use hyper_util::rt::TokioIo;
use std::path::{Path, PathBuf};
use tokio::net::UnixStream;

/// A running node.
#[derive(Debug)]
pub(super) struct Remote {
    socket: PathBuf,
}

impl Remote {
    /// The node that runs on `data_dir`, if one does.
    pub(super) async fn find(data_dir: &Path) -> Option<Self> {
        let socket = data_dir.join(SOCKET_NAME);
        UnixStream::connect(&socket).await.ok().map(|_| Self { socket })
    }

    /// What the node knows of itself.
    pub(super) async fn state(&self) -> anyhow::Result<State> {
        let body = self.send("GET", "/state", Bytes::new()).await?.into_body().collect().await?.to_bytes();
        Ok(serde_json::from_slice(&body)?)
    }

    /// Takes the node out of its cluster; returns when nothing runs on it any more.
    pub(super) async fn drain(&self) -> anyhow::Result<()> {
        self.send("POST", "/drain", Bytes::new()).await.map(drop)
    }

    /// Closes all members' doors to one of them.
    pub(super) async fn evict(&self, node: NodeId) -> anyhow::Result<()> {
        let body = Bytes::from(serde_json::to_vec(&Eviction { node })?);
        self.send("POST", "/evict", body).await.map(drop)
    }

    /// Where a model would go, by each policy, and why.
    pub(super) async fn plan(&self, spec: &ModelSpec) -> anyhow::Result<Vec<Preview>> {
        let response = self.send("POST", "/plan", Bytes::from(serde_json::to_vec(spec)?)).await?;
        Ok(serde_json::from_slice(&response.into_body().collect().await?.to_bytes())?)
    }

    /// Asks for an answer. Dropping it cancels the work.
    pub(super) async fn generate(&self, request: &GenerateRequest) -> anyhow::Result<RemoteAnswer> {
        let body = serde_json::to_vec(request)?;
        let response = self.send("POST", "/generate", Bytes::from(body)).await?;
        Ok(RemoteAnswer { body: response.into_body(), held: Vec::new() })
    }

    async fn send(&self, method: &str, path: &str, body: Bytes) -> anyhow::Result<Response<Incoming>> {
        let stream = UnixStream::connect(&self.socket).await;
        let stream = stream.with_context(|| format!("{}: the node has stopped", self.socket.display()))?;
        let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream)).await?;
        // It ends with the response's body, or when that is dropped.
        tokio::spawn(connection);
        let request = Request::builder().method(method).uri(path).header("host", "localhost").body(Full::new(body))?;
        let response = sender.send_request(request).await?;
        if response.status().is_success() {
            return Ok(response);
        }
        let status = response.status();
        let body = response.into_body().collect().await?.to_bytes();
        match serde_json::from_slice::<ErrorBody>(&body) {
            Ok(body) => bail!("{}", body.error.message),
            Err(_) => bail!("the node answers {status}"),
        }
    }
}

/// An answer of a running node.
#[derive(Debug)]
pub(super) struct RemoteAnswer {
    body: Incoming,
    /// Bytes of lines that are not whole yet.
    held: Vec<u8>,
}

impl RemoteAnswer {
    /// The next event; `None` behind the last.
    pub(super) async fn next(&mut self) -> Option<anyhow::Result<Generated>> {
        loop {
            if let Some(at) = self.held.iter().position(|&byte| byte == b'\n') {
                let line: Vec<u8> = self.held.drain(..=at).collect();
                return Some(match serde_json::from_slice(&line) {
                    Ok(Line::Event(event)) => Ok(event),
                    Ok(Line::Error(error)) => Err(anyhow::anyhow!(error.message)),
                    Err(error) => Err(anyhow::anyhow!("the node's answer cannot be read: {error}")),
                });
            }
            match self.body.frame().await? {
                Ok(frame) => self.held.extend(frame.into_data().unwrap_or_default()),
                Err(error) => return Some(Err(anyhow::anyhow!("the node has stopped: {error}"))),
            }
        }
    }
}
