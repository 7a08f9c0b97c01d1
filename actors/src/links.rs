//! Links: rows of activations, and tokens, from one node to the next.
//!
//! ```text
//! engine thread ─Crossing─► queue ─► task ─frame─► … QUIC … ─► task ─► Switchboard's entry ─► engine thread, or head
//! ```
//! A link lives as long as one life of an instance. Whoever is to receive says so first, with the life, the sender and
//! the shape that it expects ([`Switchboard::expect`]); a link that nobody expects is refused.

use crate::core::schedule::SamplerOperation;
use crate::core::spec::InstanceId;
use crate::host::{EnginePort, Frame, Leaving, Outgoing, StepResult};
use crate::outlet::Outlet;
use crate::protocol::{DataHello, End, LinkHello};
use exo_engines::engine::{Incarnation, Input, Step};
use exo_net::{
    Announced, CREDITS, DataConnection, DataStream, FrameError, LinkReceiver, NodeId, Payload, Received, WireType,
};
use serde::{Deserialize, Serialize};
use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;
use tokio::sync::{Notify, mpsc};

/// A link may come before its receiver has heard of the life that it is for.
const EXPECTED_WITHIN: Duration = Duration::from_secs(5);
/// Rows of one step at most; the head sends far fewer.
const ROWS_MAX: usize = 4096;

/// What crosses a link. The hidden rows of a step are the frame's payload.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
enum Crossing {
    Step { step: Step, samplers: Vec<SamplerOperation> },
    Result(StepResult),
}

/// Opens a link; `cut` hears once if it breaks.
pub(crate) async fn open(
    data: &DataConnection,
    hello: LinkHello,
    wire_type: WireType,
    cut: Outlet<String>,
) -> Result<Outgoing, FrameError> {
    let mut link = data.open_link(&DataHello::Link(hello)).await?;
    let (queue, mut leaving) = mpsc::channel(CREDITS);
    let told = cut.clone();
    data.spawn(async move {
        loop {
            let next = tokio::select! {
                next = leaving.recv() => next,
                // The rows on their way are lost, and whoever waits for what comes of them sends no more.
                () = link.closed() => return told.tell("the link broke".to_owned()),
            };
            let Some(next) = next else { return };
            let sent = match next {
                Leaving::Result(result) => link.send(&Crossing::Result(result), Payload::Nothing).await,
                Leaving::Frame(Frame { step, input: Input::Hidden(hidden), samplers }) => {
                    link.send(&Crossing::Step { step, samplers }, Payload::Numbers(&hidden, wire_type)).await
                }
                // The first shard is where the head is.
                Leaving::Frame(_) => Ok(()),
            };
            if let Err(error) = sent {
                told.tell(error.to_string());
                return;
            }
        }
    });
    Ok(Outgoing::new(queue, cut))
}

/// Where what comes goes.
#[derive(Clone)]
pub(crate) enum Sink {
    /// Rows of so many numbers, or, where it is the first, tokens below a number.
    Shard {
        port: EnginePort,
        hidden: usize,
        vocabulary: u32,
    },
    Head(Arc<dyn Fn(StepResult) + Send + Sync>),
}

/// A link that is expected.
#[derive(Clone)]
pub(crate) struct Expected {
    pub(crate) incarnation: Incarnation,
    pub(crate) from: NodeId,
    pub(crate) sink: Sink,
}

/// Who expects links, and the engines of this node that a head or another engine can hand rows to.
#[derive(Clone, Default)]
pub(crate) struct Switchboard {
    inner: Arc<Inner>,
}

#[derive(Default)]
struct Inner {
    /// One for each stage and head of this node: bounded by what runs.
    expected: Mutex<HashMap<(InstanceId, End), Expected>>,
    changed: Notify,
}

impl std::fmt::Debug for Switchboard {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Switchboard")
    }
}

/// Why a link was not taken.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(crate) enum LinkRefused {
    #[error("nobody expects it")]
    NotExpected,
    #[error("it is expected from {expected}")]
    FromElsewhere { expected: NodeId },
}

impl Switchboard {
    fn expected(&self) -> MutexGuard<'_, HashMap<(InstanceId, End), Expected>> {
        // A map is whole between two statements, whatever panicked.
        self.inner.expected.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// From now on a link to `to` is taken.
    pub(crate) fn expect(&self, instance: InstanceId, to: End, expected: Expected) {
        self.expected().insert((instance, to), expected);
        self.inner.changed.notify_waiters();
    }

    /// Nobody expects links to `to` of this life any more; those of another one, if there is one, stay.
    pub(crate) fn forget(&self, instance: InstanceId, to: End, incarnation: Option<Incarnation>) {
        let mut expected = self.expected();
        if expected.get(&(instance, to)).is_some_and(|expected| Some(expected.incarnation) == incarnation) {
            expected.remove(&(instance, to));
        }
    }

    /// What is expected at `to` for this life.
    pub(crate) fn find(&self, instance: InstanceId, to: End, incarnation: Incarnation) -> Option<Expected> {
        self.expected().get(&(instance, to)).filter(|expected| expected.incarnation == incarnation).cloned()
    }

    /// What `hello` from `from` is to be connected with, as soon as it is expected.
    async fn take(&self, from: NodeId, hello: &LinkHello) -> Result<Expected, LinkRefused> {
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

/// Serves a link that a peer has opened, to its end.
pub(crate) async fn serve(board: Switchboard, from: NodeId, hello: LinkHello, stream: DataStream) {
    let expected = match board.take(from, &hello).await {
        Ok(expected) => expected,
        Err(error) => {
            tracing::info!(peer = %from, instance = %hello.instance, epoch = hello.incarnation.epoch, %error, "refused a link");
            return stream.give_up();
        }
    };
    let mut link = LinkReceiver::new(stream);
    loop {
        let received = link.receive(|crossing, announced| check(crossing, announced, &expected)).await;
        let (crossing, payload) = match received {
            Ok(Some(received)) => received,
            Ok(None) => return,
            Err(error @ (FrameError::Io(_) | FrameError::Refused { .. })) => {
                tracing::debug!(peer = %from, instance = %hello.instance, %error, "a link ended");
                return;
            }
            Err(error) => {
                tracing::warn!(peer = %from, instance = %hello.instance, %error, "a link sent what no member sends");
                return;
            }
        };
        match (crossing, payload, &expected.sink) {
            (Crossing::Step { step, samplers }, Received::Numbers(hidden), Sink::Shard { port, .. }) => {
                // A shard that is gone reports that itself.
                let _ = port.send(Frame { step, input: Input::Hidden(hidden), samplers });
            }
            // A step that changes sequences and computes no row has no payload.
            (Crossing::Step { step, samplers }, Received::Nothing, Sink::Shard { port, .. }) => {
                let _ = port.send(Frame { step, input: Input::Hidden(Vec::new()), samplers });
            }
            (Crossing::Result(result), _, Sink::Head(head)) => head(result),
            // Refused before.
            _ => return,
        }
        if link.taken().await.is_err() {
            return;
        }
    }
}

/// Whether a frame is of this life, and as large as it says.
fn check(crossing: &Crossing, announced: Announced, expected: &Expected) -> Result<(), String> {
    let incarnation = match crossing {
        Crossing::Step { step, .. } => step.incarnation,
        Crossing::Result(result) => result.incarnation,
    };
    if incarnation != expected.incarnation {
        return Err(format!(
            "a frame of epoch {}, and this link is of {}",
            incarnation.epoch, expected.incarnation.epoch
        ));
    }
    match (crossing, &expected.sink) {
        (Crossing::Step { step, .. }, Sink::Shard { hidden, .. }) => {
            let rows = step.rows.len();
            let count = match announced {
                Announced::Numbers { count } => count,
                Announced::Nothing => 0,
                Announced::Bytes { .. } => return Err("bytes where rows should be".to_owned()),
            };
            match rows <= ROWS_MAX && count == rows * hidden {
                true => Ok(()),
                false => Err(format!("{count} numbers for {rows} rows of {hidden}")),
            }
        }
        (Crossing::Result(_), Sink::Head(_)) if announced == Announced::Nothing => Ok(()),
        _ => Err("a frame that this end does not take".to_owned()),
    }
}
