//! Links: streams that carry activations and tokens from one node to the next.
//!
//! ```text
//! engine thread ─► LinkQueue ─► task ─LinkMessage─► … QUIC … ─► task ─► LinkTarget in the registry: engine thread, or
//! head
//! ```
//! A link lasts for one incarnation of an instance. Its receiver registers first, with the incarnation, the sender and
//! the shape that it expects ([`LinkRegistry::expect`]); any other link is refused.

use super::engine_thread::{EngineHandle, EngineOutput, Frame, LinkQueue, StepResult};
use crate::core::scheduler::SamplerOperation;
use crate::core::spec::InstanceId;
use crate::transport::callback::EventCallback;
use crate::transport::protocol::{DataHello, LinkEnd, LinkHello};
use exo_engines::engine::{Incarnation, Input, Step};
use exo_net::{
    Announced, CREDITS, DataConnection, DataStream, FrameError, LinkReceiver, NodeId, Payload, Received, WireType,
};
use parking_lot::Mutex;
use serde::{Deserialize, Serialize};
use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::{Notify, mpsc};

/// How long a new link waits for its receiver to register, because it may arrive before the receiver knows the
/// incarnation.
const EXPECTED_WITHIN: Duration = Duration::from_secs(5);
/// The most rows of one step. The head sends far fewer.
const ROWS_MAX: usize = 4096;

/// The header of a frame on a link. The hidden rows of a step are the frame's payload.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
enum LinkMessage {
    Step { step: Step, samplers: Vec<SamplerOperation> },
    Result(StepResult),
}

/// Opens a link. Calls `cut` if the link breaks, or if its queue is full.
pub(crate) async fn open(
    data: &DataConnection,
    hello: LinkHello,
    wire_type: WireType,
    cut: EventCallback<String>,
) -> Result<LinkQueue, FrameError> {
    let mut link = data.open_link(&DataHello::Link(hello)).await?;
    let (queue, mut outputs) = mpsc::channel(CREDITS);
    let broken = cut.clone();
    data.spawn(async move {
        loop {
            let next = tokio::select! {
                next = outputs.recv() => next,
                // The rows in flight are lost, and the head sends no more rows until this report arrives.
                () = link.closed() => return broken.tell("the link broke".to_owned()),
            };
            let Some(next) = next else { return };
            let sent = match next {
                EngineOutput::Result(result) => link.send(&LinkMessage::Result(result), Payload::Nothing).await,
                EngineOutput::Frame(Frame { step, input: Input::Hidden(hidden), samplers }) => {
                    link.send(&LinkMessage::Step { step, samplers }, Payload::Numbers(&hidden, wire_type)).await
                }
                // The first shard is on the head's node, so input tokens cross no link.
                EngineOutput::Frame(_) => Ok(()),
            };
            if let Err(error) = sent {
                broken.tell(error.to_string());
                return;
            }
        }
    });
    Ok(LinkQueue::new(queue, cut))
}

/// The receiver of a link's frames.
#[derive(Clone)]
pub(crate) enum LinkTarget {
    Shard {
        engine: EngineHandle,
        /// The length of a hidden row, in numbers.
        hidden: usize,
        /// The size of the model's vocabulary, in tokens.
        vocabulary: u32,
    },
    Head(Arc<dyn Fn(StepResult) + Send + Sync>),
}

/// A link that a receiver expects.
#[derive(Clone)]
pub(crate) struct ExpectedLink {
    pub(crate) incarnation: Incarnation,
    pub(crate) from: NodeId,
    pub(crate) target: LinkTarget,
}

/// The links that shards and heads of this node expect, and the shards that a head of this node sends frames to
/// directly.
#[derive(Clone, Default)]
pub(crate) struct LinkRegistry {
    inner: Arc<Inner>,
}

#[derive(Default)]
struct Inner {
    /// One link for each shard and head of this node, whose count bounds the map.
    expected: Mutex<HashMap<(InstanceId, LinkEnd), ExpectedLink>>,
    changed: Notify,
}

impl std::fmt::Debug for LinkRegistry {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("LinkRegistry")
    }
}

/// The reason why a link is refused.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(crate) enum LinkRefused {
    #[error("no shard or head expects the link")]
    NotExpected,
    #[error("the link is expected from node {expected}")]
    FromElsewhere { expected: NodeId },
}

impl LinkRegistry {
    /// Registers the link that `to` expects, in place of an earlier one.
    pub(crate) fn expect(&self, instance: InstanceId, to: LinkEnd, expected: ExpectedLink) {
        self.inner.expected.lock().insert((instance, to), expected);
        self.inner.changed.notify_waiters();
    }

    /// Removes the link to `to` that is expected for this incarnation. A link of another incarnation stays.
    pub(crate) fn remove(&self, instance: InstanceId, to: LinkEnd, incarnation: Option<Incarnation>) {
        let mut expected = self.inner.expected.lock();
        if expected.get(&(instance, to)).is_some_and(|expected| Some(expected.incarnation) == incarnation) {
            expected.remove(&(instance, to));
        }
    }

    /// The link to `to` that is expected for this incarnation.
    pub(crate) fn find(&self, instance: InstanceId, to: LinkEnd, incarnation: Incarnation) -> Option<ExpectedLink> {
        let expected = self.inner.expected.lock();
        expected.get(&(instance, to)).filter(|expected| expected.incarnation == incarnation).cloned()
    }

    /// Waits up to [`EXPECTED_WITHIN`] until the receiver that `hello` names expects the link, and checks its sender.
    async fn wait_for(&self, from: NodeId, hello: &LinkHello) -> Result<ExpectedLink, LinkRefused> {
        let deadline = tokio::time::Instant::now() + EXPECTED_WITHIN;
        loop {
            let changed = self.inner.changed.notified();
            if let Some(expected) = self.find(hello.instance, hello.to, hello.incarnation) {
                return match expected.from == from {
                    true => Ok(expected),
                    false => Err(LinkRefused::FromElsewhere { expected: expected.from }),
                };
            }
            if tokio::time::timeout_at(deadline, changed).await.is_err() {
                return Err(LinkRefused::NotExpected);
            }
        }
    }
}

/// Passes the frames of a link that a peer has opened to the link's receiver, until the link ends.
pub(crate) async fn serve(link_registry: LinkRegistry, from: NodeId, hello: LinkHello, stream: DataStream) {
    let expected = match link_registry.wait_for(from, &hello).await {
        Ok(expected) => expected,
        Err(error) => {
            tracing::info!(peer = %from, instance = %hello.instance, epoch = hello.incarnation.epoch, %error, "refused a link");
            return stream.give_up();
        }
    };
    let mut link = LinkReceiver::new(stream);
    loop {
        let received = link.receive(|message, announced| check(message, announced, &expected)).await;
        let (message, payload) = match received {
            Ok(Some(received)) => received,
            Ok(None) => return,
            Err(error @ (FrameError::Io(_) | FrameError::Refused { .. })) => {
                tracing::debug!(peer = %from, instance = %hello.instance, %error, "a link ended");
                return;
            }
            Err(error) => {
                tracing::warn!(peer = %from, instance = %hello.instance, %error, "a link's frame is invalid");
                return;
            }
        };
        match (message, payload, &expected.target) {
            (LinkMessage::Step { step, samplers }, Received::Numbers(hidden), LinkTarget::Shard { engine, .. }) => {
                // If the shard has stopped, its device reports that.
                let _ = engine.send(Frame { step, input: Input::Hidden(hidden), samplers });
            }
            // A step that only changes sequences has no rows, and so no payload.
            (LinkMessage::Step { step, samplers }, Received::Nothing, LinkTarget::Shard { engine, .. }) => {
                let _ = engine.send(Frame { step, input: Input::Hidden(Vec::new()), samplers });
            }
            (LinkMessage::Result(result), _, LinkTarget::Head(head)) => head(result),
            // `check` has refused any other combination.
            _ => return,
        }
        if link.taken().await.is_err() {
            return;
        }
    }
}

/// Checks that a frame belongs to the link's incarnation, and that its payload has the shape of its rows.
fn check(message: &LinkMessage, announced: Announced, expected: &ExpectedLink) -> Result<(), String> {
    let incarnation = match message {
        LinkMessage::Step { step, .. } => step.incarnation,
        LinkMessage::Result(result) => result.incarnation,
    };
    if incarnation != expected.incarnation {
        return Err(format!(
            "a frame of epoch {} on a link of epoch {}",
            incarnation.epoch, expected.incarnation.epoch
        ));
    }
    match (message, &expected.target) {
        (LinkMessage::Step { step, .. }, LinkTarget::Shard { hidden, .. }) => {
            let rows = step.rows.len();
            let count = match announced {
                Announced::Numbers { count } => count,
                Announced::Nothing => 0,
                Announced::Bytes { .. } => return Err("a step has bytes instead of hidden rows".to_owned()),
            };
            match rows <= ROWS_MAX && count == rows * hidden {
                true => Ok(()),
                false => Err(format!("{count} numbers for {rows} rows of {hidden} numbers each")),
            }
        }
        (LinkMessage::Result(_), LinkTarget::Head(_)) if announced == Announced::Nothing => Ok(()),
        _ => Err("the frame is for another kind of receiver".to_owned()),
    }
}
