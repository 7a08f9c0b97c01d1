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
//! only see a pause. A new placement is loaded beside the one that serves, and takes over at a token's boundary.

mod pump;

use crate::core::desired::{Stamp, Wanted};
use crate::core::line::{Line, StageNews, Step as LineStep};
use crate::core::schedule::{Limits, Request, Schedule};
use crate::core::view::{Fact, InstanceId, Load, Totals};
use crate::host::StepResult;
use crate::links::{Expected, Sink, Switchboard};
use crate::outlet::{Facts, Outlet};
use crate::post::Post;
use crate::protocol::{ControlMessage, End, HeadEvent, HeadRequest, StageOrder};
use crate::request::RequestError;
use exo_engines::engine::SeqId;
use exo_net::{NodeId, WireType};
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
/// A step that takes longer than this has hung: the slowest machine that is of use decodes a token in seconds.
const STEP_DEADLINE: Duration = Duration::from_secs(120);
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

#[derive(Debug, RactorMessage)]
pub(crate) enum InstanceMsg {
    Submit(Submission),
    Cancel(SeqId),
    StepDone(StepResult),
    News {
        from: NodeId,
        stamp: Stamp,
        news: StageNews,
    },
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
    /// A stage has no place where it is.
    Broken { instance: InstanceId, stamp: Stamp, stage: usize, error: RequestError },
}

/// What a placed model needs to be run.
#[derive(Debug)]
pub(crate) struct InstanceArgs {
    pub id: InstanceId,
    pub stamp: Stamp,
    pub wanted: Arc<Wanted>,
    pub wire_type: WireType,
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
    /// When the pipeline last gave something, or was given something after being idle.
    last_sign: Instant,
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
            pages: args.wanted.kv_pages,
            context_tokens: args.wanted.model.context_tokens,
            steps_in_flight: args.wanted.placement.stages.len(),
            running: RUNNING_MAX,
            rows_alone: ROWS_ALONE,
            rows_shared: ROWS_SHARED,
        };
        let state = InstanceState {
            schedule: Schedule::new(limits),
            requests: HashMap::new(),
            line,
            coming: None,
            started: Instant::now(),
            next_step: 0,
            last_sign: Instant::now(),
            totals: Totals::default(),
            reported: None,
            ending: RequestError::ShuttingDown,
            args,
        };
        state.order(&state.line);
        Ok(state)
    }

    async fn post_stop(&self, _: InstanceRef, state: &mut InstanceState) -> Result<(), ActorProcessingErr> {
        state.fail_all();
        state.args.board.forget(state.args.id, End::Head);
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
            InstanceMsg::News { from, stamp, news } => state.on_news(&myself, from, stamp, news),
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

    /// Orders the shards of a placement to be loaded.
    fn order(&self, line: &Line) {
        for (node, task) in line.tasks(self.args.id) {
            self.args.post.tell(node, ControlMessage::Stage(StageOrder::Start(Box::new(task))));
        }
    }

    /// Orders what is still to come from a node once more: a shard that is there stays as it is, and one of an earlier
    /// placement goes.
    fn order_again(&self, met: NodeId) {
        if self.line.is_running() {
            let clear = StageOrder::Clear { instance: self.args.id, below: self.line.stamp() };
            self.args.post.tell(met, ControlMessage::Stage(clear));
        }
        for line in [Some(&self.line), self.coming.as_ref()].into_iter().flatten().filter(|line| !line.is_loaded()) {
            for (node, task) in line.tasks(self.args.id).into_iter().filter(|(node, _)| *node == met) {
                self.args.post.tell(node, ControlMessage::Stage(StageOrder::Start(Box::new(task))));
            }
        }
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
        self.last_sign = Instant::now();
        self.schedule.handle_step_done(result.tokens);
    }

    fn on_news(&mut self, myself: &InstanceRef, from: NodeId, stamp: Stamp, news: StageNews) {
        let (instance, now) = (self.args.id, self.now());
        match news {
            StageNews::Fetching { stage, fetched_bytes, total_bytes } => {
                return self.args.facts.tell(Fact::ShardFetching { instance, stage, fetched_bytes, total_bytes });
            }
            StageNews::Loading { stage, loaded_bytes, total_bytes } => {
                return self.args.facts.tell(Fact::ShardLoading { instance, stage, loaded_bytes, total_bytes });
            }
            _ => {}
        }
        if let Some(coming) = self.coming.as_mut().filter(|coming| coming.stamp() == stamp) {
            let shared = coming.shares_stage(&self.line, &news);
            let step = coming.on_news(from, &news, now);
            if matches!(step, LineStep::Lost(..)) {
                self.report_broken(stamp, &step);
            }
            if self.coming.as_ref().is_some_and(Line::is_loaded) {
                return self.switch(myself);
            }
            // A shard that both placements have is of the later stamp, and serves the earlier one.
            if !shared {
                return;
            }
        } else if self.line.stamp() != stamp {
            return;
        }
        let step = self.line.on_news(from, &news, now);
        self.take(myself, step);
    }

    /// What news of the serving placement lead to.
    fn take(&mut self, myself: &InstanceRef, step: LineStep) {
        match step {
            LineStep::Nothing => {}
            LineStep::Loaded => self.begin_life(myself),
            LineStep::Running => self.on_running(),
            LineStep::Down(stage, ref error) => {
                tracing::warn!(instance = %self.args.id, stage, error, "a shard is down: requests wait for it");
                self.pause(stage, error);
            }
            LineStep::Lost(stage, ref error) => {
                tracing::warn!(instance = %self.args.id, stage, %error, "a shard is lost: requests wait for another place");
                self.pause(stage, &error.to_string());
                self.report_broken(self.line.stamp(), &step);
            }
            LineStep::Cut(stage, ref what, wait) => {
                tracing::warn!(instance = %self.args.id, stage, what, "rows do not get through: connecting anew");
                self.pause(stage, what);
                myself.send_after(wait, || InstanceMsg::Rewire);
            }
        }
    }

    fn on_node_lost(&mut self, node: NodeId) {
        if let Some(coming) = &mut self.coming {
            coming.on_node_lost(node);
        }
        if let Some(stage) = self.line.on_node_lost(node) {
            let what = format!("node {} is gone", node.short());
            tracing::warn!(instance = %self.args.id, stage, what, "requests wait for another place of its shards");
            self.pause(stage, &what);
            self.report_all_lost();
        }
    }

    /// The pipeline does not work: what is in flight is void.
    fn pause(&mut self, stage: usize, error: &str) {
        self.args.board.forget(self.args.id, End::Head);
        self.schedule.handle_pipeline_lost();
        let (instance, error) = (self.args.id, error.to_owned());
        self.args.facts.tell(Fact::ShardFailed { instance, stage, error });
        self.args.planner.tell(InstanceReport::Waiting { instance });
    }

    fn report_broken(&self, stamp: Stamp, step: &LineStep) {
        if let LineStep::Lost(stage, error) = step {
            let (instance, stage, error) = (self.args.id, *stage, error.clone());
            self.args.planner.tell(InstanceReport::Broken { instance, stamp, stage, error });
        }
    }

    fn report_all_lost(&self) {
        for (stage, error) in self.line.lost() {
            self.report_broken(self.line.stamp(), &LineStep::Lost(stage, error));
        }
    }

    fn replan(&mut self, myself: &InstanceRef, stamp: Stamp, wanted: Arc<Wanted>) {
        if stamp <= self.line.stamp() || self.coming.as_ref().is_some_and(|coming| stamp <= coming.stamp()) {
            return;
        }
        let (instance, placement) = (self.args.id, wanted.placement.clone());
        self.args.facts.tell(Fact::InstancePlaced { instance, model: wanted.model.clone(), placement });
        let line = Line::new(stamp, wanted, self.now());
        self.order(&line);
        self.coming = Some(line);
        if !self.line.is_running() {
            self.switch(myself);
        }
    }

    /// The coming placement takes over.
    fn switch(&mut self, myself: &InstanceRef) {
        let Some(coming) = self.coming.take() else { return };
        self.line = coming;
        self.schedule.handle_pipeline_lost();
        self.schedule.set_steps_in_flight(self.line.wanted().placement.stages.len());
        if self.line.is_loaded() {
            self.begin_life(myself);
        } else {
            self.args.planner.tell(InstanceReport::Waiting { instance: self.args.id });
        }
    }

    /// Has all shards wired, if all are loaded.
    fn begin_life(&mut self, myself: &InstanceRef) {
        if !self.line.is_loaded() || self.line.is_running() {
            return;
        }
        let own = self.args.post.own();
        let incarnation = self.line.next_life(own, self.now());
        let head = myself.clone();
        let sink = Sink::Head(Arc::new(move |result| {
            // A head that is gone wants no results.
            let _ = head.send_message(InstanceMsg::StepDone(result));
        }));
        let stages = &self.line.wanted().placement.stages;
        let Some(last) = stages.last() else { return };
        self.args.board.expect(self.args.id, End::Head, Expected { incarnation, from: last.node, sink });
        for (stage, placed) in stages.iter().enumerate() {
            let (next, to) = match stages.get(stage + 1) {
                Some(next) => (next.node, End::Stage(stage + 1)),
                None => (own, End::Head),
            };
            let from = stage.checked_sub(1).map_or(own, |before| stages[before].node);
            let (instance, wire_type) = (self.args.id, self.args.wire_type);
            let order = StageOrder::Wire { instance, stage, incarnation, from, next, to, wire_type };
            self.args.post.tell(placed.node, ControlMessage::Stage(order));
        }
    }

    fn on_running(&mut self) {
        self.last_sign = Instant::now();
        let (instance, stamp, epoch) = (self.args.id, self.line.stamp(), self.line.incarnation().epoch);
        tracing::info!(%instance, epoch, stages = self.line.wanted().placement.stages.len(), "instance ready");
        self.args.facts.tell(Fact::InstanceReady { instance, epoch });
        self.args.planner.tell(InstanceReport::Ready { instance });
        // Shards of earlier placements have served their time; one that is coming has a later stamp.
        let clear = StageOrder::Clear { instance, below: stamp };
        self.args.post.tell(self.args.post.own(), ControlMessage::Stage(clear.clone()));
        self.args.post.tell_others(&ControlMessage::Stage(clear));
    }

    fn fail_all(&mut self) {
        self.schedule.handle_stop();
        for (_, (events, _lease)) in self.requests.drain() {
            // There is room for it; whoever asked may have gone.
            let _ = events.try_send(HeadEvent::Failed(self.ending.clone()));
        }
    }

    /// A step that does not come back is a failure of the pipeline; what nobody has acted on is said again.
    fn watch(&mut self, myself: &InstanceRef) {
        let now = self.now();
        for line in [Some(&mut self.line), self.coming.as_mut()].into_iter().flatten() {
            for (node, task) in line.silent(self.args.id, now) {
                self.args.post.tell(node, ControlMessage::Stage(StageOrder::Start(Box::new(task))));
            }
        }
        if self.line.is_running() {
            if self.schedule.steps_in_flight() > 0 && self.last_sign.elapsed() > STEP_DEADLINE {
                let what = format!("no step came back for {} s", STEP_DEADLINE.as_secs());
                let remedy = "the device hangs: see the log, and start the node again".into();
                let error = RequestError::Engine { what, remedy };
                self.report_broken(self.line.stamp(), &LineStep::Lost(0, error));
                self.last_sign = Instant::now();
            }
            return;
        }
        let post = self.args.post.clone();
        for node in self.line.out_of_reach(now, |node| post.is_here(node)) {
            self.on_node_lost(node);
        }
        self.report_all_lost();
        if let Some(stage) = self.line.is_overdue(self.now()) {
            let step = self.line.cut(stage, "a stage did not answer in time".to_owned(), self.now());
            self.take(myself, step);
        }
    }
}
