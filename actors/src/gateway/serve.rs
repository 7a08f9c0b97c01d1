//! Other nodes' requests for heads of this node.

use super::{EVENTS_BESIDE_TOKENS, GatewayHandle, REQUESTS_MAX};
use crate::core::request::RequestError;
use crate::core::spec::InstanceId;
use crate::head::{HeadMsg, Lease, Submission};
use crate::planner::PlannerMsg;
use crate::transport::protocol::{HeadEvent, HeadRequest};
use exo_net::{DataStream, FrameError, NodeId, Payload};
use ractor::rpc::CallResult;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::{OwnedSemaphorePermit, mpsc};

/// The time limit for the planner to find a head, which it does from memory.
const HEAD_TIMEOUT: Duration = Duration::from_secs(5);
/// The most tokens of a peer's answer for which a channel has capacity: the context of the largest models.
const TOKENS_MAX: u32 = 1 << 20;

/// Another node's request for a head of this node.
#[derive(Debug)]
pub(crate) struct RemoteRequest {
    pub(crate) from: NodeId,
    pub(crate) instance: InstanceId,
    pub(crate) request: Box<HeadRequest>,
}

impl GatewayHandle {
    /// Serves another node's request in a task of its own.
    pub(super) fn serve(&self, request: RemoteRequest, mut stream: DataStream) {
        let permit = Arc::clone(&self.permits).try_acquire_owned();
        let gateway = self.clone();
        tokio::spawn(async move {
            let instance = request.instance;
            let served = match permit {
                Ok(permit) => gateway.forward(request, Arc::new(permit), &mut stream).await,
                Err(_) => fail(&mut stream, RequestError::Overloaded { requests: REQUESTS_MAX }).await,
            };
            if let Err(error) = served {
                tracing::debug!(%instance, %error, "the stream of a peer's request broke");
            }
        });
    }

    /// Submits a request to its head, and sends the head's events to the peer.
    async fn forward(
        &self,
        RemoteRequest { from, instance, request }: RemoteRequest,
        permit: Arc<OwnedSemaphorePermit>,
        stream: &mut DataStream,
    ) -> Result<(), FrameError> {
        if let Err(error) = request.sampler.params.check() {
            return fail(stream, RequestError::BadPrompt { what: error.to_string() }).await;
        }
        let called = self.planner.call(|reply| PlannerMsg::FindHead { instance, reply }, Some(HEAD_TIMEOUT)).await;
        let Ok(CallResult::Success(Some((head, in_use)))) = called else {
            return fail(stream, RequestError::Moved).await;
        };
        let seq = self.next_seq();
        let capacity = request.max_tokens.min(TOKENS_MAX) as usize + EVENTS_BESIDE_TOKENS;
        let (events, mut receiver) = mpsc::channel(capacity);
        let lease = Lease { _permit: permit, _in_use: in_use };
        if head.send_message(HeadMsg::Submit(Submission { seq, request: *request, events, lease })).is_err() {
            return fail(stream, RequestError::Moved).await;
        }
        // The peer keeps its half of the stream open until it needs no more events.
        let (writer, reader) = (&mut stream.writer, &mut stream.reader);
        let closed = reader.receive::<()>(|(), _| Err("a frame behind the request".to_owned()));
        let sending = async {
            loop {
                let event = match receiver.recv().await {
                    // A head that ends without a last event is replaced by another one.
                    None => HeadEvent::Failed(RequestError::Moved),
                    // The peer's clique may have the memory that this one lacks.
                    Some(HeadEvent::Failed(_)) if !self.router.is_reachable(from) => {
                        HeadEvent::Failed(RequestError::Moved)
                    }
                    Some(event) => event,
                };
                let is_last = matches!(event, HeadEvent::Finished(_) | HeadEvent::Failed(_));
                writer.send(&event, Payload::Nothing).await?;
                if is_last {
                    return Ok(());
                }
            }
        };
        let sent = tokio::select! {
            sent = sending => sent,
            _ = closed => Ok(()),
        };
        // The head may have stopped, or have ended the request.
        let _ = head.send_message(HeadMsg::Cancel(seq));
        sent
    }
}

async fn fail(stream: &mut DataStream, error: RequestError) -> Result<(), FrameError> {
    stream.writer.send(&HeadEvent::Failed(error), Payload::Nothing).await
}
