//! Gateway: runs requests of the API, the command line and embedders, and other nodes' requests for heads of this node.
//!
//! - owns: the admission permits;
//! - receives: other nodes' requests for heads of this node; questions of these heads for draft models;
//! - emits: encoded requests to heads, on this node or another; cancellations when a stream is dropped;
//! - dies when: the node stops;
//! - supervised by: the node.
//!
//! ```text
//! GatewayHandle::generate ─permit─► RequestTask: planner (which head?) ─► tokenizer ─► head ─events─► Answer ─►
//! Generation
//! ```
//! Each request is a task of its own from its admission to its end. The task keeps a journal of the tokens that were
//! sent to the client: when a head is lost or moves, the task continues from the journal with the next head.

mod answer;
mod draft;
mod generation;
mod serve;

pub(crate) use draft::{DraftOrders, draft_orders};
pub use generation::Generation;
pub(crate) use serve::RemoteRequest;

use crate::core::request::{GenerateRequest, Generated, ModelSpec, Prompt, RequestError};
use crate::core::spec::InstanceId;
use crate::head::{HeadMsg, HeadRef, Lease, Submission};
use crate::planner::{HeadLocation, PlannerMsg, PlannerRef, RunningModel, TokenizerMsg};
use crate::transport::protocol::{DataHello, HeadEvent, HeadRequest};
use crate::transport::router::Router;
use answer::{Answer, StreamState};
use exo_engines::engine::SeqId;
use exo_engines::sampler::SamplerSpec;
use exo_net::{DataStream, NodeId, Payload, Priority};
use ractor::rpc::CallResult;
use ractor::{Actor, ActorProcessingErr, ActorRef};
use ractor_cluster::RactorMessage;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;
use tokio::runtime::Handle;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc};
use tokio_util::sync::CancellationToken;

/// Requests that this node admits at once, other nodes' requests for its heads included: those that run, and those that
/// wait for their turn or their model.
const REQUESTS_MAX: usize = 256;
/// The events of a request beside its tokens: `Started`, `Admitted`, `Finished`, and an error.
const EVENTS_BESIDE_TOKENS: usize = 4;
/// The time limit for encoding a prompt: the longest text that is accepted takes seconds.
const ENCODE_TIMEOUT: Duration = Duration::from_secs(60);
/// Heads that a request tries in a row without receiving a token: more than a cluster loses while it recovers.
const HEADS_MAX: u32 = 100;
/// The wait before the next head. It grows with each head, up to tenfold.
const HEAD_WAIT: Duration = Duration::from_millis(50);
/// An upper bound for the context of every model, in tokens.
const CONTEXT_TOKENS_MAX: u32 = 1 << 24;

type Events = mpsc::Sender<Result<Generated, RequestError>>;

#[derive(Debug, RactorMessage)]
pub(crate) enum GatewayMsg {
    /// Another node's request for a head of this node.
    Serve { request: RemoteRequest, stream: DataStream },
}

/// The state that all request tasks share.
#[derive(Debug, Clone)]
pub(crate) struct GatewayHandle {
    planner: PlannerRef,
    router: Router,
    permits: Arc<Semaphore>,
    next_seq: Arc<AtomicU64>,
    /// The node's runtime: callers may be on a thread without one.
    runtime: Handle,
}

impl GatewayHandle {
    /// The gateway of a node. Must be called on the node's runtime.
    pub(crate) fn new(planner: PlannerRef, router: Router) -> Self {
        let permits = Arc::new(Semaphore::new(REQUESTS_MAX));
        Self { planner, router, permits, next_seq: Arc::new(AtomicU64::new(1)), runtime: Handle::current() }
    }

    /// Starts a request. `running`: the request's model, if the caller has loaded it already.
    ///
    /// # Errors
    /// [`RequestError::Params`] and [`RequestError::Overloaded`] at once; other errors come with the stream.
    pub(crate) fn generate(
        &self,
        request: GenerateRequest,
        running: Option<RunningModel>,
    ) -> Result<Generation, RequestError> {
        request.params.check()?;
        let permit = Arc::clone(&self.permits).try_acquire_owned();
        let permit = permit.map_err(|_| RequestError::Overloaded { requests: REQUESTS_MAX })?;
        // The context bounds the tokens; the channel takes memory only as it fills.
        let limit = request.max_tokens.unwrap_or(u32::MAX).min(CONTEXT_TOKENS_MAX) as usize;
        let (events, receiver) = mpsc::channel(limit + EVENTS_BESIDE_TOKENS);
        let cancelled = CancellationToken::new();
        let generation = Generation::new(receiver, cancelled.clone().drop_guard());
        let task = RequestTask { gateway: self.clone(), cancelled, permit: Arc::new(permit) };
        self.runtime.spawn(task.run(request, running, events));
        Ok(generation)
    }

    /// Loads the model of `spec` if it does not run, after its draft model if it has one, and waits until both run.
    pub(crate) async fn ensure(&self, spec: ModelSpec) -> Result<RunningModel, RequestError> {
        let draft = self.ensure_draft(&spec).await?;
        self.ensure_alone(spec, draft).await
    }

    /// Loads the model of `spec` if it does not run, and waits until it runs. `draft`: its draft model.
    async fn ensure_alone(&self, spec: ModelSpec, draft: Option<RunningModel>) -> Result<RunningModel, RequestError> {
        // No timeout: a download may take hours, and the caller sees its progress and can cancel.
        match self.planner.call(|reply| PlannerMsg::Ensure { spec, draft, reply }, None).await {
            Ok(CallResult::Success(outcome)) => outcome,
            _ => Err(RequestError::ShuttingDown),
        }
    }

    fn next_seq(&self) -> SeqId {
        SeqId(self.next_seq.fetch_add(1, Ordering::Relaxed))
    }
}

#[derive(Debug)]
pub(crate) struct GatewayArgs {
    pub gateway: GatewayHandle,
    pub drafts: DraftOrders,
}

#[derive(Debug)]
pub(crate) struct Gateway;

impl Actor for Gateway {
    type Msg = GatewayMsg;
    type State = GatewayHandle;
    type Arguments = GatewayArgs;

    async fn pre_start(
        &self,
        _: ActorRef<GatewayMsg>,
        GatewayArgs { gateway, drafts }: GatewayArgs,
    ) -> Result<GatewayHandle, ActorProcessingErr> {
        tokio::spawn(gateway.clone().answer_drafts(drafts));
        Ok(gateway)
    }

    async fn handle(
        &self,
        _: ActorRef<GatewayMsg>,
        message: GatewayMsg,
        gateway: &mut GatewayHandle,
    ) -> Result<(), ActorProcessingErr> {
        match message {
            GatewayMsg::Serve { request, stream } => gateway.serve(request, stream),
        }
        Ok(())
    }
}

/// One request, from its admission to its end.
struct RequestTask {
    gateway: GatewayHandle,
    cancelled: CancellationToken,
    permit: Arc<OwnedSemaphorePermit>,
}

/// The outcome of a request at one head.
enum HeadOutcome {
    /// The client has the whole answer, or has dropped the stream.
    Done,
    /// The request continues at the next head.
    Moved,
    Failed(RequestError),
}

impl RequestTask {
    async fn run(self, request: GenerateRequest, running: Option<RunningModel>, events: Events) {
        let cancelled = self.cancelled.clone();
        tokio::select! {
            () = cancelled.cancelled() => {}
            outcome = self.answer(request, running, &events) => {
                if let Err(error) = outcome {
                    // The client may have dropped the stream.
                    let _ = events.try_send(Err(error));
                }
            }
        }
    }

    /// Generates the answer, with further heads where a head is lost or moves.
    async fn answer(
        &self,
        request: GenerateRequest,
        running: Option<RunningModel>,
        events: &Events,
    ) -> Result<(), RequestError> {
        let GenerateRequest { model: spec, prompt, params, max_tokens, stop } = request;
        let mut running = match running {
            Some(running) => running,
            None => self.gateway.ensure(spec.clone()).await?,
        };
        let prompt = match encode(&running, prompt.clone()).await {
            Err(RequestError::ShuttingDown) => {
                // A tokenizer ends with its instance, which may have failed since the caller loaded the model.
                running = self.gateway.ensure(spec.clone()).await?;
                encode(&running, prompt).await?
            }
            encoded => encoded?,
        };
        let mut answer = Answer::new(&running, &stop, prompt, events.clone());
        let mut heads = 0;
        loop {
            let given = answer.journal().len();
            answer.ask(&running);
            let sampler = SamplerSpec {
                params: params.clone(),
                prompt: answer.prompt().to_vec(),
                generated: answer.journal().to_vec(),
            };
            let max_tokens = max_tokens.unwrap_or(u32::MAX).min(running.context.tokens);
            let request = HeadRequest { sampler, max_tokens, ends: running.tokenizer.ends().clone() };
            let outcome = match &running.head {
                HeadLocation::Local(head) => self.ask_local(head, &running, request, &mut answer).await,
                HeadLocation::Remote(node) => self.ask_remote(*node, running.id, request, &mut answer).await,
            };
            match outcome {
                HeadOutcome::Done => return Ok(()),
                // Requests of a lost head overload this node for a while: permits become free as answers end.
                HeadOutcome::Failed(RequestError::Overloaded { .. }) if given > 0 => {}
                HeadOutcome::Failed(error) => return Err(error),
                HeadOutcome::Moved => {}
            }
            heads = if answer.journal().len() > given { 1 } else { heads + 1 };
            if heads > HEADS_MAX {
                let what = format!("{HEADS_MAX} heads in a row were lost before they sent a token");
                return Err(RequestError::Engine { what, remedy: "see the logs of the cluster's machines".into() });
            }
            tokio::time::sleep(HEAD_WAIT * heads.min(10)).await;
            // The answer goes on even where the draft model is lost.
            running = self.gateway.ensure_alone(spec.clone(), None).await?;
        }
    }

    async fn ask_local(
        &self,
        head: &HeadRef,
        running: &RunningModel,
        request: HeadRequest,
        answer: &mut Answer,
    ) -> HeadOutcome {
        let seq = self.gateway.next_seq();
        let capacity = request.max_tokens.min(CONTEXT_TOKENS_MAX) as usize + EVENTS_BESIDE_TOKENS;
        let (events, mut receiver) = mpsc::channel(capacity);
        let lease = Lease { _permit: Arc::clone(&self.permit), _in_use: Arc::clone(&running.in_use) };
        let _cancel = CancelOnDrop { head: head.clone(), seq };
        if head.send_message(HeadMsg::Submit(Submission { seq, request, events, lease })).is_err() {
            return HeadOutcome::Moved;
        }
        loop {
            match receiver.recv().await {
                // A head that ends without a last event is replaced by another one.
                None | Some(HeadEvent::Failed(RequestError::Moved)) => return HeadOutcome::Moved,
                Some(HeadEvent::Failed(error)) => return HeadOutcome::Failed(error),
                Some(event) => {
                    if answer.on_head_event(event) == StreamState::Closed {
                        return HeadOutcome::Done;
                    }
                }
            }
        }
    }

    async fn ask_remote(
        &self,
        node: NodeId,
        instance: InstanceId,
        request: HeadRequest,
        answer: &mut Answer,
    ) -> HeadOutcome {
        let router = &self.gateway.router;
        let Some(data) = router.data(node) else { return HeadOutcome::Moved };
        let Ok(mut stream) = data.open(Priority::Normal).await else { return HeadOutcome::Moved };
        let hello = DataHello::Request { instance, request: Box::new(request) };
        if stream.writer.send(&hello, Payload::Nothing).await.is_err() {
            return HeadOutcome::Moved;
        }
        loop {
            let received = stream.reader.receive::<HeadEvent>(|_, _| Ok(())).await;
            match received {
                Err(error) => {
                    tracing::debug!(peer = %node, %instance, %error, "the stream of an answer broke");
                    return HeadOutcome::Moved;
                }
                Ok(None) => return HeadOutcome::Moved,
                Ok(Some((HeadEvent::Failed(RequestError::Moved | RequestError::ShuttingDown), _))) => {
                    return HeadOutcome::Moved;
                }
                // A node outside this clique may lack the memory that this clique has.
                Ok(Some((HeadEvent::Failed(_), _))) if !router.is_reachable(node) => return HeadOutcome::Moved,
                Ok(Some((HeadEvent::Failed(error), _))) => return HeadOutcome::Failed(error),
                Ok(Some((event, _))) => {
                    if answer.on_head_event(event) == StreamState::Closed {
                        stream.give_up();
                        return HeadOutcome::Done;
                    }
                }
            }
        }
    }
}

/// Encodes a prompt by the tokenizer of its model.
///
/// # Errors
/// [`RequestError::ShuttingDown`] if the tokenizer has ended.
async fn encode(running: &RunningModel, prompt: Prompt) -> Result<Vec<u32>, RequestError> {
    let encoding = |reply| TokenizerMsg::Encode { prompt, reply };
    match running.tokenizer_ref.call(encoding, Some(ENCODE_TIMEOUT)).await {
        Ok(CallResult::Success(encoded)) => encoded,
        Ok(CallResult::Timeout) => {
            let what = format!("the prompt takes more than {} s to encode", ENCODE_TIMEOUT.as_secs());
            Err(RequestError::BadPrompt { what })
        }
        _ => Err(RequestError::ShuttingDown),
    }
}

/// Cancels a request at its head when it is dropped.
struct CancelOnDrop {
    head: HeadRef,
    seq: SeqId,
}

impl Drop for CancelOnDrop {
    fn drop(&mut self) {
        // The head may have stopped, or have ended the request.
        let _ = self.head.send_message(HeadMsg::Cancel(self.seq));
    }
}
