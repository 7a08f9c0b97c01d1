//! Gateway: requests from the API, the command line and embedders.
//!
//! - owns: the admission permits;
//! - receives: requests;
//! - emits: encoded requests to instances, cancellations when a stream is dropped;
//! - dies when: the node stops;
//! - supervised by: the node.
//!
//! Each request is a task of its own from admission to end; the actor never waits.

use crate::generation::Generation;
use crate::instance::{InstanceMsg, Lease, Submission};
use crate::planner::{PlannerMsg, PlannerRef, RunningModel};
use crate::request::{GenerateRequest, Generated, ModelSpec, RequestError};
use crate::tokenizer::TokenizerMsg;
use exo_engines::engine::SeqId;
use exo_engines::sampler::SamplerSpec;
use ractor::rpc::CallResult;
use ractor::{Actor, ActorProcessingErr, ActorRef};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc};
use tokio_util::sync::CancellationToken;

/// Requests that may be on their way at once: running, waiting for their turn, or for their model.
const REQUESTS_MAX: usize = 256;
/// `Started`, `Finished`, and an error.
const EVENTS_BESIDE_TOKENS: usize = 3;
/// Encoding the longest text that is taken needs seconds.
const ENCODE_TIMEOUT: Duration = Duration::from_secs(60);

#[derive(Debug)]
pub(crate) enum GatewayMsg {
    Generate(Box<Admitted>),
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
    pub(crate) fn new(gateway: ActorRef<GatewayMsg>) -> Self {
        Self { gateway, permits: Arc::new(Semaphore::new(REQUESTS_MAX)) }
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

#[derive(Debug)]
pub(crate) struct GatewayArgs {
    pub planner: PlannerRef,
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
        let GatewayMsg::Generate(admitted) = message;
        let seq = SeqId(state.next_seq.fetch_add(1, Ordering::Relaxed));
        let planner = state.args.planner.clone();
        tokio::spawn(run(*admitted, seq, planner));
        Ok(())
    }
}

/// One request, from its admission to its end.
async fn run(admitted: Admitted, seq: SeqId, planner: PlannerRef) {
    let Admitted { request, events, cancelled, permit } = admitted;
    let over = CancellationToken::new();
    let lease = Lease { _permit: permit, _over: over.clone().drop_guard(), in_use: None };
    let prepared = tokio::select! {
        () = cancelled.cancelled() => return,
        prepared = prepare(&planner, request, seq, &events, lease) => prepared,
    };
    match prepared {
        Err(error) => drop(events.try_send(Err(error))),
        Ok((instance, submission)) => {
            if instance.send_message(InstanceMsg::Submit(submission)).is_err() {
                let _ = events.try_send(Err(RequestError::ShuttingDown));
                return;
            }
            drop(events);
            tokio::select! {
                () = cancelled.cancelled() => drop(instance.send_message(InstanceMsg::Cancel(seq))),
                () = over.cancelled() => {}
            }
        }
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

async fn prepare(
    planner: &PlannerRef,
    request: GenerateRequest,
    seq: SeqId,
    events: &mpsc::Sender<Result<Generated, RequestError>>,
    mut lease: Lease,
) -> Result<(ActorRef<InstanceMsg>, Submission), RequestError> {
    let running = ensure(planner, request.model).await?;
    lease.in_use = Some(Arc::clone(&running.in_use));
    let prompt = request.prompt;
    let called = running.tokenizer_ref.call(|reply| TokenizerMsg::Encode { prompt, reply }, Some(ENCODE_TIMEOUT)).await;
    let prompt = match called {
        Ok(CallResult::Success(ids)) => ids?,
        _ => return Err(RequestError::ShuttingDown),
    };
    let sampler = SamplerSpec { params: request.params, prompt, generated: Vec::new() };
    let max_tokens = request.max_tokens.unwrap_or(u32::MAX).min(running.context_tokens);
    let submission = Submission { seq, sampler, max_tokens, stop: request.stop, events: events.clone(), lease };
    Ok((running.instance, submission))
}
