//! Requests of other nodes for heads that are here.

use super::GatewayState;
use crate::core::spec::InstanceId;
use crate::instance::{InstanceMsg, Lease, Submission};
use crate::planner::{PlannerMsg, PlannerRef};
use crate::post::Post;
use crate::protocol::{HeadEvent, HeadRequest};
use crate::request::RequestError;
use exo_engines::engine::SeqId;
use exo_net::{DataStream, FrameError, NodeId, Payload};
use ractor::rpc::CallResult;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;
use tokio::sync::mpsc;

/// The planner answers from memory.
const HEAD_TIMEOUT: Duration = Duration::from_secs(5);
/// A peer's answer may have as many tokens as any model's context.
const TOKENS_MAX: u32 = 1 << 20;

/// A request of another node.
#[derive(Debug)]
pub(crate) struct Asking {
    pub(crate) from: NodeId,
    pub(crate) instance: InstanceId,
    pub(crate) request: Box<HeadRequest>,
}

impl GatewayState {
    /// Serves a request, in a task of its own.
    pub(super) fn serve(&self, asking: Asking, stream: DataStream) {
        let permit = Arc::clone(&self.args.permits).try_acquire_owned();
        let seq = SeqId(self.next_seq.fetch_add(1, Ordering::Relaxed));
        let (planner, post) = (self.args.planner.clone(), self.args.post.clone());
        tokio::spawn(async move {
            let (mut stream, instance) = (stream, asking.instance);
            let served = match permit {
                Ok(permit) => forward(&planner, &post, asking, seq, Arc::new(permit), &mut stream).await,
                Err(_) => {
                    tell(&mut stream, &HeadEvent::Failed(RequestError::Overloaded { requests: super::REQUESTS_MAX }))
                        .await
                }
            };
            if let Err(error) = served {
                tracing::debug!(%instance, %error, "a request of another node ended");
            }
        });
    }
}

async fn tell(stream: &mut DataStream, event: &HeadEvent) -> Result<(), FrameError> {
    stream.writer.send(event, Payload::Nothing).await
}

async fn forward(
    planner: &PlannerRef,
    post: &Post,
    Asking { from, instance, request }: Asking,
    seq: SeqId,
    permit: Arc<tokio::sync::OwnedSemaphorePermit>,
    stream: &mut DataStream,
) -> Result<(), FrameError> {
    if let Err(error) = request.sampler.params.check() {
        return tell(stream, &HeadEvent::Failed(RequestError::BadPrompt { what: error.to_string() })).await;
    }
    let called = planner.call(|reply| PlannerMsg::Head { instance, reply }, Some(HEAD_TIMEOUT)).await;
    let Ok(CallResult::Success(Some((head, in_use)))) = called else {
        return tell(stream, &HeadEvent::Failed(RequestError::Moved)).await;
    };
    let room = request.max_tokens.min(TOKENS_MAX) as usize + super::EVENTS_BESIDE_TOKENS;
    let (events, mut receiver) = mpsc::channel(room);
    let lease = Lease { _permit: permit, _in_use: in_use };
    if head.send_message(InstanceMsg::Submit(Submission { seq, request: *request, events, lease })).is_err() {
        return tell(stream, &HeadEvent::Failed(RequestError::Moved)).await;
    }
    // Whoever asked keeps its half open; that it ends is that it has gone.
    let (writer, reader) = (&mut stream.writer, &mut stream.reader);
    let gone = reader.receive::<()>(|(), _| Err("nothing follows a request".to_owned()));
    let passing = async {
        loop {
            // A head that is gone without a word has moved.
            let event = match receiver.recv().await {
                None => HeadEvent::Failed(RequestError::Moved),
                // What this circle has no room for, another one may have.
                Some(HeadEvent::Failed(_)) if !post.is_here(from) => HeadEvent::Failed(RequestError::Moved),
                Some(event) => event,
            };
            let is_last = matches!(event, HeadEvent::Finished(_) | HeadEvent::Failed(_));
            writer.send(&event, Payload::Nothing).await?;
            if is_last {
                return Ok(());
            }
        }
    };
    let passed = tokio::select! {
        passed = passing => passed,
        _ = gone => Ok(()),
    };
    // A head that has ended the request has forgotten it.
    let _ = head.send_message(InstanceMsg::Cancel(seq));
    passed
}
