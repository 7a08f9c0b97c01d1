//! Gateway: requests from the API, the command line and embedders.
//!
//! - owns: the admission permits;
//! - receives: requests of this node's users, and of other nodes for heads that are here;
//! - emits: encoded requests to heads, here or elsewhere; cancellations when a stream is dropped;
//! - dies when: the node stops;
//! - supervised by: the node.
//!
//! Each request is a task of its own from admission to end; the actor never waits. The task writes down what its client
//! has been given: when a head dies or moves, it goes on from there with the next one.

mod answer;
mod serve;

pub(crate) use serve::Asking;

use crate::core::spec::InstanceId;
use crate::generation::Generation;
use crate::instance::{InstanceMsg, InstanceRef, Lease, Submission};
use crate::planner::{Home, PlannerMsg, PlannerRef, RunningModel};
use crate::post::Post;
use crate::protocol::{DataHello, HeadEvent, HeadRequest};
use crate::request::{GenerateRequest, Generated, ModelSpec, RequestError};
use crate::tokenizer::TokenizerMsg;
use answer::{Answer, Stream};
use exo_engines::engine::SeqId;
use exo_engines::sampler::SamplerSpec;
use exo_net::{DataStream, NodeId, Payload, Priority};
use ractor::rpc::CallResult;
use ractor::{Actor, ActorProcessingErr, ActorRef};
use ractor_cluster::RactorMessage;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc};
use tokio_util::sync::CancellationToken;

/// Requests that may be on their way at once: running, waiting for their turn, or for their model.
const REQUESTS_MAX: usize = 256;
/// `Started`, `TakenUp`, `Finished`, and an error.
const EVENTS_BESIDE_TOKENS: usize = 4;
/// Encoding the longest text that is taken needs seconds.
const ENCODE_TIMEOUT: Duration = Duration::from_secs(60);
/// Heads that a request tries in a row without getting a token: more than a cluster loses while it finds itself again.
const HEADS_MAX: u32 = 100;
/// The wait before the next; it grows with each, up to ten times.
const HEAD_WAIT: Duration = Duration::from_millis(50);

#[derive(Debug, RactorMessage)]
pub(crate) enum GatewayMsg {
    Generate(Box<Admitted>),
    /// A request of another node.
    Serve {
        asking: Asking,
        stream: DataStream,
    },
}

/// A request with its permit.
#[derive(Debug)]
pub(crate) struct Admitted {
    request: GenerateRequest,
    events: mpsc::Sender<Result<Generated, RequestError>>,
    cancelled: CancellationToken,
    permit: OwnedSemaphorePermit,
}

/// The way in, for handles.
#[derive(Debug, Clone)]
pub(crate) struct GatewayHandle {
    gateway: ActorRef<GatewayMsg>,
    permits: Arc<Semaphore>,
}

impl GatewayHandle {
    pub(crate) fn new(gateway: ActorRef<GatewayMsg>, permits: Arc<Semaphore>) -> Self {
        Self { gateway, permits }
    }

    /// Admits a request.
    ///
    /// # Errors
    /// [`RequestError::Params`] and [`RequestError::Overloaded`] at once; everything else comes with the stream.
    pub(crate) fn generate(&self, request: GenerateRequest) -> Result<Generation, RequestError> {
        request.params.check()?;
        let permit = Arc::clone(&self.permits).try_acquire_owned();
        let permit = permit.map_err(|_| RequestError::Overloaded { requests: REQUESTS_MAX })?;
        // Tokens are bounded by the context; the channel takes memory as it fills.
        let limit = request.max_tokens.unwrap_or(u32::MAX).min(CONTEXT_TOKENS_MAX) as usize;
        let (events, receiver) = mpsc::channel(limit + EVENTS_BESIDE_TOKENS);
        let cancelled = CancellationToken::new();
        let generation = Generation::new(receiver, cancelled.clone().drop_guard());
        let admitted = Admitted { request, events, cancelled, permit };
        let sent = self.gateway.send_message(GatewayMsg::Generate(Box::new(admitted)));
        sent.map_err(|_| RequestError::ShuttingDown)?;
        Ok(generation)
    }
}

/// No model here has a longer context.
const CONTEXT_TOKENS_MAX: u32 = 1 << 24;

/// Permits of a node's requests.
pub(crate) fn permits() -> Arc<Semaphore> {
    Arc::new(Semaphore::new(REQUESTS_MAX))
}

#[derive(Debug)]
pub(crate) struct GatewayArgs {
    pub planner: PlannerRef,
    pub post: Post,
    pub permits: Arc<Semaphore>,
}

#[derive(Debug)]
pub(crate) struct GatewayState {
    args: GatewayArgs,
    next_seq: Arc<AtomicU64>,
}

#[derive(Debug)]
pub(crate) struct Gateway;

impl Actor for Gateway {
    type Msg = GatewayMsg;
    type State = GatewayState;
    type Arguments = GatewayArgs;

    async fn pre_start(&self, _: ActorRef<GatewayMsg>, args: GatewayArgs) -> Result<GatewayState, ActorProcessingErr> {
        Ok(GatewayState { args, next_seq: Arc::new(AtomicU64::new(1)) })
    }

    async fn handle(
        &self,
        _: ActorRef<GatewayMsg>,
        message: GatewayMsg,
        state: &mut GatewayState,
    ) -> Result<(), ActorProcessingErr> {
        match message {
            GatewayMsg::Generate(admitted) => {
                let Admitted { request, events, cancelled, permit } = *admitted;
                let (planner, post) = (state.args.planner.clone(), state.args.post.clone());
                let next_seq = Arc::clone(&state.next_seq);
                let task = Task { planner, post, next_seq, cancelled, permit: Arc::new(permit) };
                tokio::spawn(task.run(request, events));
            }
            GatewayMsg::Serve { asking, stream } => state.serve(asking, stream),
        }
        Ok(())
    }
}

/// One request, from its admission to its end.
struct Task {
    planner: PlannerRef,
    post: Post,
    next_seq: Arc<AtomicU64>,
    cancelled: CancellationToken,
    permit: Arc<OwnedSemaphorePermit>,
}

/// What became of a request at one head.
enum Outcome {
    /// The client has all, or has gone.
    Over,
    /// It goes on at the next head.
    Moved,
    Failed(RequestError),
}

impl Task {
    async fn run(self, request: GenerateRequest, events: mpsc::Sender<Result<Generated, RequestError>>) {
        let cancelled = self.cancelled.clone();
        tokio::select! {
            () = cancelled.cancelled() => {}
            outcome = self.answer(request, &events) => {
                if let Err(error) = outcome {
                    // A client that has gone needs no reason.
                    let _ = events.try_send(Err(error));
                }
            }
        }
    }

    /// Answers, at as many heads as it takes.
    async fn answer(
        &self,
        request: GenerateRequest,
        events: &mpsc::Sender<Result<Generated, RequestError>>,
    ) -> Result<(), RequestError> {
        let GenerateRequest { model: spec, prompt, params, max_tokens, stop } = request;
        let mut running = ensure(&self.planner, spec.clone()).await?;
        let encoding = |reply| TokenizerMsg::Encode { prompt, reply };
        let prompt = match running.tokenizer_ref.call(encoding, Some(ENCODE_TIMEOUT)).await {
            Ok(CallResult::Success(ids)) => ids?,
            _ => return Err(RequestError::ShuttingDown),
        };
        let mut answer = Answer::new(Arc::clone(&running.tokenizer), &stop, prompt, events.clone());
        let mut heads = 0;
        loop {
            let given = answer.journal().len();
            let sampler = SamplerSpec {
                params: params.clone(),
                prompt: answer.prompt().to_vec(),
                generated: answer.journal().to_vec(),
            };
            let max_tokens = max_tokens.unwrap_or(u32::MAX).min(running.context_tokens);
            let request = HeadRequest { sampler, max_tokens, ends: running.tokenizer.ends().clone() };
            let outcome = match &running.home {
                Home::Here(instance) => self.here(instance, &running, request, &mut answer).await,
                Home::There(node) => self.there(*node, running.id, request, &mut answer).await,
            };
            match outcome {
                Outcome::Over => return Ok(()),
                // Of a head that many meet at, since another one died: it has room again as answers end.
                Outcome::Failed(RequestError::Overloaded { .. }) if given > 0 => {}
                Outcome::Failed(error) => return Err(error),
                Outcome::Moved => {}
            }
            heads = if answer.journal().len() > given { 1 } else { heads + 1 };
            if heads > HEADS_MAX {
                let what = "the model changes its place and does not come to rest".to_owned();
                return Err(RequestError::Engine { what, remedy: "see the logs of its machines".into() });
            }
            tokio::time::sleep(HEAD_WAIT * heads.min(10)).await;
            running = ensure(&self.planner, spec.clone()).await?;
        }
    }

    async fn here(
        &self,
        instance: &InstanceRef,
        running: &RunningModel,
        request: HeadRequest,
        answer: &mut Answer,
    ) -> Outcome {
        let seq = SeqId(self.next_seq.fetch_add(1, Ordering::Relaxed));
        let room = request.max_tokens.min(CONTEXT_TOKENS_MAX) as usize + EVENTS_BESIDE_TOKENS;
        let (events, mut receiver) = mpsc::channel(room);
        let lease = Lease { _permit: Arc::clone(&self.permit), _in_use: Arc::clone(&running.in_use) };
        // Whatever ends this, the head forgets the request.
        let _cancels = Cancels { instance: instance.clone(), seq };
        if instance.send_message(InstanceMsg::Submit(Submission { seq, request, events, lease })).is_err() {
            return Outcome::Moved;
        }
        loop {
            match receiver.recv().await {
                // A head that is gone without a word has moved.
                None | Some(HeadEvent::Failed(RequestError::Moved)) => return Outcome::Moved,
                Some(HeadEvent::Failed(error)) => return Outcome::Failed(error),
                Some(event) => {
                    if answer.tell(event) == Stream::Over {
                        return Outcome::Over;
                    }
                }
            }
        }
    }

    async fn there(&self, node: NodeId, instance: InstanceId, request: HeadRequest, answer: &mut Answer) -> Outcome {
        let Some(data) = self.post.data(node) else { return Outcome::Moved };
        let Ok(mut stream) = data.open(Priority::Normal).await else { return Outcome::Moved };
        let hello = DataHello::Request { instance, request: Box::new(request) };
        if stream.writer.send(&hello, Payload::Nothing).await.is_err() {
            return Outcome::Moved;
        }
        loop {
            let received = stream.reader.receive::<HeadEvent>(|_, _| Ok(())).await;
            match received {
                Err(error) => {
                    tracing::debug!(peer = %node, %instance, %error, "an answer broke off");
                    return Outcome::Moved;
                }
                Ok(None) => return Outcome::Moved,
                Ok(Some((HeadEvent::Failed(RequestError::Moved | RequestError::ShuttingDown), _))) => {
                    return Outcome::Moved;
                }
                // What another circle has no room for, this one may have.
                Ok(Some((HeadEvent::Failed(_), _))) if !self.post.is_here(node) => return Outcome::Moved,
                Ok(Some((HeadEvent::Failed(error), _))) => return Outcome::Failed(error),
                Ok(Some((event, _))) => {
                    if answer.tell(event) == Stream::Over {
                        stream.give_up();
                        return Outcome::Over;
                    }
                }
            }
        }
    }
}

/// Cancels a request when it is dropped.
struct Cancels {
    instance: InstanceRef,
    seq: SeqId,
}

impl Drop for Cancels {
    fn drop(&mut self) {
        // A head that is gone, or has ended the request, has forgotten it.
        let _ = self.instance.send_message(InstanceMsg::Cancel(self.seq));
    }
}

/// The running model of `spec`.
pub(crate) async fn ensure(planner: &PlannerRef, spec: ModelSpec) -> Result<RunningModel, RequestError> {
    // No deadline: a download takes what it takes, and whoever waits sees its progress and can leave.
    let called = planner.call(|reply| PlannerMsg::Ensure { spec, reply }, None).await;
    match called {
        Ok(CallResult::Success(outcome)) => outcome,
        _ => Err(RequestError::ShuttingDown),
    }
}
