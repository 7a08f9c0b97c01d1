//! Instance: the pipeline head of one model.
//!
//! - owns: the schedule, the streams of its requests, the wiring of its shards;
//! - receives: requests, tokens that the last shard drew, news of shards wherever they are, new placements;
//! - emits: frames to the first shard, orders to the stages' nodes, events to requests, facts;
//! - dies when: it is stopped; its requests are told why;
//! - supervised by: the planner.
//!
//! A life (incarnation) begins when all shards are up and wired. When one goes down, or a link or a node does, the epoch
//! rises, all that is in flight is void, and when all are up again sequences are replayed from their tokens: clients
//! only see a pause. A new placement is loaded beside the one that serves, and takes over at a token's boundary; where there
//! is no room for both, what is there goes first.

mod lives;
mod pump;

use crate::core::desired::{Change, Stamp, Wanted};
use crate::core::line::{Line, StageNews};
use crate::core::patience::{Patience, Watchdog};
use crate::core::schedule::{Limits, Request, Schedule};
use crate::core::spec::InstanceId;
use crate::core::state::{Load, Totals};
use crate::host::StepResult;
use crate::links::Switchboard;
use crate::outlet::{Facts, Outlet};
use crate::post::Post;
use crate::protocol::{End, HeadEvent, HeadRequest};
use crate::request::RequestError;
use exo_engines::engine::SeqId;
use exo_net::{InboxSlot, NodeId, WireType};
use ractor::{Actor, ActorProcessingErr, ActorRef};
use ractor_cluster::RactorMessage;
use std::collections::HashMap;
use std::sync::Arc;
use std::time::{Duration, Instant};
use tokio::sync::{OwnedSemaphorePermit, mpsc};

pub(crate) type InstanceRef = ActorRef<InstanceMsg>;

/// Sequences that decode together; more wait their turn.
const RUNNING_MAX: usize = 64;
/// Rows of a prompt's step when nobody else waits: enough to use every weight many times, short enough to be
/// interrupted.
const ROWS_ALONE: usize = 256;
/// Rows of a step beside running streams: what a long prompt may hold each of their tokens up by.
const ROWS_SHARED: usize = 64;
/// How often the watchdog looks, and says again what nobody has acted on.
const WATCH_EVERY: Duration = Duration::from_secs(1);

/// A request for this head.
#[derive(Debug)]
pub(crate) struct Submission {
    pub seq: SeqId,
    pub request: HeadRequest,
    /// Has room for every event that the request can give.
    pub events: mpsc::Sender<HeadEvent>,
    pub lease: Lease,
}

/// A request's admission. Whoever works on the request holds it.
#[derive(Debug)]
pub(crate) struct Lease {
    pub _permit: Arc<OwnedSemaphorePermit>,
    /// Keeps the model in memory.
    pub _in_use: Arc<()>,
}

/// What a stage's node says of it.
#[derive(Debug)]
pub(crate) struct News {
    pub from: NodeId,
    pub stamp: Stamp,
    pub news: StageNews,
    /// Of the message that it came with.
    pub place: Option<InboxSlot>,
}

#[derive(Debug, RactorMessage)]
pub(crate) enum InstanceMsg {
    Submit(Submission),
    Cancel(SeqId),
    StepDone(StepResult),
    News(News),
    /// It is to run otherwise from now on.
    Replan {
        stamp: Stamp,
        wanted: Arc<Wanted>,
    },
    NodeLost(NodeId),
    /// A node is here: what was ordered of it may not have reached it.
    NodeMet(NodeId),
    Rewire,
    Watch,
    /// It is over; its requests hear this.
    Retire(RequestError),
}

/// What the planner hears of its instances.
#[derive(Debug)]
pub(crate) enum InstanceReport {
    /// A life has begun.
    Ready { instance: InstanceId },
    /// Not all shards are up and connected: requests wait.
    Waiting { instance: InstanceId },
    /// A stage has no place where it is. `has_run`: whether its placement has ever served.
    Broken { instance: InstanceId, stamp: Stamp, stage: usize, has_run: bool, error: RequestError },
}

/// What a placed model needs to be run.
#[derive(Debug)]
pub(crate) struct InstanceArgs {
    pub id: InstanceId,
    pub stamp: Stamp,
    pub wanted: Arc<Wanted>,
    pub wire_type: WireType,
    pub patience: Patience,
    pub post: Post,
    pub board: Switchboard,
    pub planner: Outlet<InstanceReport>,
    pub facts: Facts,
}

#[derive(Debug)]
pub(crate) struct InstanceState {
    args: InstanceArgs,
    schedule: Schedule,
    requests: HashMap<SeqId, (mpsc::Sender<HeadEvent>, Lease)>,
    /// The placement that serves, or is to.
    line: Line,
    /// The one that will take over when it is loaded.
    coming: Option<Line>,
    started: Instant,
    next_step: u64,
    /// When shards of earlier placements were last ordered to go.
    cleared: Duration,
    /// How often the pipeline has given something, or was given something after being idle.
    signs: u64,
    watchdog: Watchdog,
    totals: Totals,
    reported: Option<Load>,
    ending: RequestError,
}

#[derive(Debug)]
pub(crate) struct Instance;

impl Actor for Instance {
    type Msg = InstanceMsg;
    type State = InstanceState;
    type Arguments = InstanceArgs;

    async fn pre_start(&self, myself: InstanceRef, args: InstanceArgs) -> Result<InstanceState, ActorProcessingErr> {
        myself.send_interval(WATCH_EVERY, || InstanceMsg::Watch);
        let line = Line::new(args.stamp, Arc::clone(&args.wanted), Duration::ZERO);
        let limits = Limits {
            pages: args.wanted.demand.kv_pages,
            context_tokens: args.wanted.model.context_tokens,
            vocabulary: args.wanted.model.vocabulary,
            steps_in_flight: args.wanted.placement.stages.len(),
            running: RUNNING_MAX,
            rows_alone: ROWS_ALONE,
            rows_shared: ROWS_SHARED,
        };
        let mut state = InstanceState {
            schedule: Schedule::new(limits),
            requests: HashMap::new(),
            line,
            coming: None,
            started: Instant::now(),
            next_step: 0,
            cleared: Duration::ZERO,
            signs: 0,
            watchdog: Watchdog::default(),
            totals: Totals::default(),
            reported: None,
            ending: RequestError::ShuttingDown,
            args,
        };
        state.order(state.line.tasks(state.args.id));
        if state.args.wanted.change == Change::InPlace {
            state.clear_below(state.args.stamp);
        }
        Ok(state)
    }

    async fn post_stop(&self, _: InstanceRef, state: &mut InstanceState) -> Result<(), ActorProcessingErr> {
        state.fail_all();
        state.args.board.forget(state.args.id, End::Head, Some(state.line.incarnation()));
        Ok(())
    }

    async fn handle(
        &self,
        myself: InstanceRef,
        message: InstanceMsg,
        state: &mut InstanceState,
    ) -> Result<(), ActorProcessingErr> {
        match message {
            InstanceMsg::Submit(submission) => state.submit(submission),
            InstanceMsg::Cancel(seq) => state.cancel(seq),
            InstanceMsg::StepDone(result) => state.on_step_done(result),
            InstanceMsg::News(News { from, stamp, news, place: _handled }) => state.on_news(&myself, from, stamp, news),
            InstanceMsg::Replan { stamp, wanted } => state.replan(&myself, stamp, wanted),
            InstanceMsg::NodeLost(node) => state.on_node_lost(node),
            InstanceMsg::NodeMet(node) => state.order_again(node),
            InstanceMsg::Rewire => state.begin_life(&myself),
            InstanceMsg::Watch => state.watch(&myself),
            InstanceMsg::Retire(error) => {
                state.ending = error;
                // Now, and not behind what else waits in the mailbox: whoever asks again is to find another place.
                state.fail_all();
                myself.stop(None);
            }
        }
        state.pump();
        Ok(())
    }
}

impl InstanceState {
    /// Since it began.
    fn now(&self) -> Duration {
        self.started.elapsed()
    }

    fn submit(&mut self, submission: Submission) {
        let Submission { seq, request, events, lease } = submission;
        let HeadRequest { sampler, max_tokens, ends } = request;
        self.totals.prompt_tokens += sampler.prompt.len() as u64;
        match self.schedule.handle_request(Request { seq, sampler, max_tokens, ends }) {
            // There is room for an event; whoever asked may have gone.
            Err(error) => drop(events.try_send(HeadEvent::Failed(RequestError::Admit(error)))),
            Ok(()) => {
                let _ = events.try_send(HeadEvent::Accepted);
                self.requests.insert(seq, (events, lease));
            }
        }
    }

    fn cancel(&mut self, seq: SeqId) {
        if self.requests.remove(&seq).is_some() {
            self.totals.requests += 1;
        }
        self.schedule.handle_cancel(seq);
    }

    fn on_step_done(&mut self, result: StepResult) {
        if !self.line.is_running() || result.incarnation != self.line.incarnation() {
            return;
        }
        self.signs += 1;
        self.schedule.handle_step_done(result.tokens);
    }

    fn fail_all(&mut self) {
        self.schedule.handle_stop();
        for (_, (events, _lease)) in self.requests.drain() {
            // There is room for it; whoever asked may have gone.
            let _ = events.try_send(HeadEvent::Failed(self.ending.clone()));
        }
    }
}
