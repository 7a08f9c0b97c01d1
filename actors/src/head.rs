//! Head: the pipeline head of one instance.
//!
//! - owns: the scheduler, the event streams of its requests, the placements of its shards;
//! - receives: requests, sampled tokens, drafts, events of its stages from any node, new placements;
//! - emits: frames to the first shard, orders to the stages' nodes, questions for the draft model, events to the
//!   requests' callers, facts;
//! - dies when: it is retired; its requests then fail with the given reason;
//! - supervised by: the planner.
//!
//! An incarnation begins when all shards are loaded and connected. When a shard, a link or a node fails, the epoch
//! rises and the steps in flight are void. When all shards are connected again, the head replays the sequences from
//! their tokens, so a client sees only a pause. A new placement loads beside the serving one, and takes over between
//! two tokens. If memory does not suffice for both, the old shards stop first.

mod draft;
mod pipeline;
mod pump;

pub(crate) use draft::{DraftOrder, Drafted};

use crate::core::desired::{Deployment, MoveStrategy, Stamp};
use crate::core::pipeline::Pipeline;
use crate::core::plan::Stage;
use crate::core::request::RequestError;
use crate::core::scheduler::{DraftCounts, Limits, Request, Scheduler};
use crate::core::spec::{InstanceId, Speculation};
use crate::core::stage::StageEvent;
use crate::core::status::{Load, Totals};
use crate::core::watchdog::{HangTimeouts, Watchdog};
use crate::transport::callback::{EventCallback, Facts};
use crate::transport::protocol::{HeadEvent, HeadRequest, LinkEnd};
use crate::transport::router::Router;
use crate::worker::engine_thread::StepResult;
use crate::worker::links::LinkRegistry;
use exo_engines::engine::SeqId;
use exo_net::{InboxSlot, NodeId, WireType};
use ractor::{Actor, ActorProcessingErr, ActorRef};
use ractor_cluster::RactorMessage;
use std::collections::HashMap;
use std::sync::Arc;
use std::time::{Duration, Instant};
use tokio::sync::{OwnedSemaphorePermit, mpsc};

pub(crate) type HeadRef = ActorRef<HeadMsg>;

/// The most sequences that run at once. Further ones wait in the queue.
const RUNNING_MAX: usize = 64;
/// The most rows of a step while no sequence decodes: enough to use each weight many times, few enough that the step
/// ends soon and other requests can join.
const ROWS_ALONE: usize = 256;
/// The most rows of a step while sequences decode. The limit bounds the delay that a long prompt adds to each token.
const ROWS_SHARED: usize = 64;
/// The most rows of decoding sequences, drafts included, in a step with drafts: so many take little longer than one
/// where the weights are read from memory.
const DRAFT_ROWS: usize = 16;
/// How the ids of candle's devices begin.
const CANDLE_DEVICES: &str = "candle:";
/// How often the head checks its shards and steps, and repeats orders that had no effect.
const WATCH_EVERY: Duration = Duration::from_secs(1);

/// A request for this head.
#[derive(Debug)]
pub(crate) struct Submission {
    pub seq: SeqId,
    pub request: HeadRequest,
    /// The channel to the caller, with capacity for every event of the request.
    pub events: mpsc::Sender<HeadEvent>,
    pub lease: Lease,
}

/// The admission of a request. Dropping it ends the admission.
#[derive(Debug)]
pub(crate) struct Lease {
    pub _permit: Arc<OwnedSemaphorePermit>,
    /// Marks the model as in use, so that it stays in memory.
    pub _in_use: Arc<()>,
}

/// An event of a stage, from the node that hosts it.
#[derive(Debug)]
pub(crate) struct StageUpdate {
    pub from: NodeId,
    pub stamp: Stamp,
    pub event: StageEvent,
    /// The inbox slot of the message that carried the event.
    pub slot: Option<InboxSlot>,
}

#[derive(Debug, RactorMessage)]
pub(crate) enum HeadMsg {
    Submit(Submission),
    Cancel(SeqId),
    StepDone(StepResult),
    StageUpdate(StageUpdate),
    Drafted(Drafted),
    /// Gives the instance a new placement.
    Replan {
        stamp: Stamp,
        deployment: Arc<Deployment>,
    },
    NodeLost(NodeId),
    /// A node has joined: earlier orders may not have reached it.
    NodeJoined(NodeId),
    Rewire,
    Watch,
    /// Ends the head; its requests fail with this error.
    Retire(RequestError),
}

/// A report of a head to the planner.
#[derive(Debug)]
pub(crate) enum HeadReport {
    /// An incarnation has begun.
    Ready { instance: InstanceId },
    /// A shard is not loaded or not connected, so requests wait.
    Waiting { instance: InstanceId },
    /// A stage needs another device. `has_run`: whether its placement has ever served.
    Broken { instance: InstanceId, stamp: Stamp, stage: usize, has_run: bool, error: RequestError },
}

#[derive(Debug)]
pub(crate) struct HeadArgs {
    pub id: InstanceId,
    pub stamp: Stamp,
    pub deployment: Arc<Deployment>,
    pub wire_type: WireType,
    pub hang_timeouts: HangTimeouts,
    pub router: Router,
    pub link_registry: LinkRegistry,
    pub planner: EventCallback<HeadReport>,
    /// Asks draft models.
    pub drafter: EventCallback<DraftOrder>,
    pub facts: Facts,
}

#[derive(Debug)]
pub(crate) struct HeadState {
    args: HeadArgs,
    scheduler: Scheduler,
    requests: HashMap<SeqId, (mpsc::Sender<HeadEvent>, Lease)>,
    /// The placement that serves or starts.
    pipeline: Pipeline,
    /// The placement that takes over when all its shards are loaded.
    incoming: Option<Pipeline>,
    /// Brings the answers of the draft model back.
    drafted: EventCallback<Drafted>,
    started: Instant,
    next_step: u64,
    /// When shards of earlier placements were last ordered to stop, counted from `started`.
    cleared: Duration,
    /// The progress that the watchdog compares. Counts incarnations, results, and steps sent to an idle pipeline.
    progress: u64,
    watchdog: Watchdog,
    totals: Totals,
    reported: Option<Load>,
    ending: RequestError,
}

#[derive(Debug)]
pub(crate) struct Head;

impl Actor for Head {
    type Msg = HeadMsg;
    type State = HeadState;
    type Arguments = HeadArgs;

    async fn pre_start(&self, myself: HeadRef, args: HeadArgs) -> Result<HeadState, ActorProcessingErr> {
        myself.send_interval(WATCH_EVERY, || HeadMsg::Watch);
        let pipeline = Pipeline::new(args.stamp, Arc::clone(&args.deployment), Duration::ZERO);
        let mut state = HeadState {
            scheduler: Scheduler::new(limits(&args.deployment)),
            requests: HashMap::new(),
            pipeline,
            incoming: None,
            drafted: EventCallback::to(&myself, HeadMsg::Drafted),
            started: Instant::now(),
            next_step: 0,
            cleared: Duration::ZERO,
            progress: 0,
            watchdog: Watchdog::default(),
            totals: Totals::default(),
            reported: None,
            ending: RequestError::ShuttingDown,
            args,
        };
        state.order(state.pipeline.tasks(state.args.id));
        if state.args.deployment.strategy == MoveStrategy::InPlace {
            state.clear_below(state.args.stamp);
        }
        Ok(state)
    }

    async fn post_stop(&self, _: HeadRef, state: &mut HeadState) -> Result<(), ActorProcessingErr> {
        state.fail_all();
        state.args.link_registry.remove(state.args.id, LinkEnd::Head, Some(state.pipeline.incarnation()));
        Ok(())
    }

    async fn handle(&self, myself: HeadRef, message: HeadMsg, state: &mut HeadState) -> Result<(), ActorProcessingErr> {
        match message {
            HeadMsg::Submit(submission) => state.submit(submission),
            HeadMsg::Cancel(seq) => state.cancel(seq),
            HeadMsg::StepDone(result) => state.on_step_done(result),
            HeadMsg::StageUpdate(update) => state.on_stage_update(&myself, update),
            HeadMsg::Drafted(drafted) => state.on_drafted(drafted),
            HeadMsg::Replan { stamp, deployment } => state.replan(&myself, stamp, deployment),
            HeadMsg::NodeLost(node) => state.on_node_lost(node),
            HeadMsg::NodeJoined(node) => state.order_again(node),
            HeadMsg::Rewire => state.begin_incarnation(&myself),
            HeadMsg::Watch => state.watch(&myself),
            HeadMsg::Retire(error) => {
                state.ending = error;
                // The requests fail at once, so that their callers find the next head without delay.
                state.fail_all();
                myself.stop(None);
            }
        }
        state.pump();
        Ok(())
    }
}

/// The limits of a deployment's pipeline.
fn limits(deployment: &Deployment) -> Limits {
    // candle computes a row differently in other batches, so drafts could change its answers.
    let is_exact = |stage: &Stage| !stage.device.0.starts_with(CANDLE_DEVICES);
    let may_draft = deployment.placement.stages.iter().all(is_exact);
    let spec = &deployment.spec;
    Limits {
        pages: deployment.demand.kv_pages,
        context: deployment.model.context,
        vocabulary: deployment.model.vocabulary,
        steps_in_flight: deployment.placement.stages.len(),
        running: RUNNING_MAX,
        rows_alone: ROWS_ALONE,
        rows_shared: ROWS_SHARED,
        draft_rows: if may_draft { DRAFT_ROWS } else { 0 },
        has_lookup: spec.speculation == Speculation::Lookup,
        has_draft_model: spec.draft.is_some(),
    }
}

impl HeadState {
    /// The time since the head started.
    fn now(&self) -> Duration {
        self.started.elapsed()
    }

    fn submit(&mut self, submission: Submission) {
        let Submission { seq, request, events, lease } = submission;
        let HeadRequest { sampler, max_tokens, ends } = request;
        let prompt_tokens = sampler.prompt.len() as u64;
        match self.scheduler.handle_request(Request { seq, sampler, max_tokens, ends }) {
            // The channel has capacity, so sending fails only if the caller has closed it.
            Err(error) => drop(events.try_send(HeadEvent::Failed(RequestError::Admit(error)))),
            Ok(()) => {
                self.totals.prompt_tokens += prompt_tokens;
                let _ = events.try_send(HeadEvent::Accepted);
                self.requests.insert(seq, (events, lease));
            }
        }
    }

    fn cancel(&mut self, seq: SeqId) {
        if self.requests.remove(&seq).is_some() {
            self.totals.requests += 1;
        }
        self.scheduler.handle_cancel(seq);
    }

    fn on_step_done(&mut self, result: StepResult) {
        if !self.pipeline.is_running() || result.incarnation != self.pipeline.incarnation() {
            return;
        }
        self.progress += 1;
        self.scheduler.handle_step_done(result.tokens);
        let DraftCounts { drafted, accepted } = self.scheduler.draft_counts();
        (self.totals.drafted_tokens, self.totals.accepted_tokens) = (drafted, accepted);
    }

    fn fail_all(&mut self) {
        self.scheduler.handle_stop();
        for (_, (events, _lease)) in self.requests.drain() {
            // The channel has capacity, so sending fails only if the caller has closed it.
            let _ = events.try_send(HeadEvent::Failed(self.ending.clone()));
        }
    }
}
