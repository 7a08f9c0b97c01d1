//! Instance: the pipeline head of one model.
//!
//! - owns: the schedule, the clients' streams, the wiring of its shards;
//! - receives: requests, tokens that the last shard drew, shards that came and went;
//! - emits: frames to the first shard, events to clients, facts;
//! - dies when: it is stopped, or a shard is lost for good; its requests then fail with the reason;
//! - supervised by: the planner.
//!
//! A life (incarnation) begins when all shards are up. When one goes down the epoch rises, all that is in flight is
//! void, and when all are up again sequences are replayed from their tokens: clients only see a pause.

mod client;

use crate::core::plan::Placement;
use crate::core::schedule::{Event, Limits, Request, Schedule};
use crate::core::view::{Fact, InstanceId, Load, Totals};
use crate::device::{DeviceMsg, DeviceRef};
use crate::host::{Frame, HostTask, Next, StepResult};
use crate::models::ModelError;
use crate::outlet::{Facts, Outlet};
use crate::request::{Generated, RequestError};
use crate::room::Room;
use crate::shard::{LoadedShard, ShardReport, ShardTask};
use crate::tokenizer::{Opened, TokenizerActor, TokenizerArgs, TokenizerRef};
use client::Client;
use exo_engines::EngineError;
use exo_engines::engine::{EngineFactory, Incarnation, Input, KvElement, SeqId, ShardSpec, Step, StepId, TensorRank};
use exo_engines::model::ModelFiles;
use exo_engines::sampler::SamplerSpec;
use exo_engines::tokenizer::Tokenizer;
use exo_net::NodeId;
use ractor::{Actor, ActorProcessingErr, ActorRef, SupervisionEvent};
use std::collections::HashMap;
use std::sync::Arc;
use std::time::{Duration, Instant};
use tokio::sync::{OwnedSemaphorePermit, mpsc};
use tokio_util::sync::DropGuard;

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
/// How often the watchdog looks.
const WATCH_EVERY: Duration = Duration::from_secs(5);

/// A request, encoded and checked.
#[derive(Debug)]
pub(crate) struct Submission {
    pub seq: SeqId,
    pub sampler: SamplerSpec,
    pub max_tokens: u32,
    pub stop: Vec<String>,
    /// Has room for every event that the request can give.
    pub events: mpsc::Sender<Result<Generated, RequestError>>,
    pub lease: Lease,
}

/// A request's admission. Whoever works on the request holds it; to drop it is to say that the request is over.
#[derive(Debug)]
pub(crate) struct Lease {
    pub _permit: OwnedSemaphorePermit,
    /// Wakes the request's own task.
    pub _over: DropGuard,
    /// Keeps the model in memory.
    pub in_use: Option<Arc<()>>,
}

#[derive(Debug)]
pub(crate) enum InstanceMsg {
    Submit(Submission),
    Cancel(SeqId),
    StepDone(StepResult),
    Shard(ShardReport),
    Tokenizer(Opened),
    Watch,
}

/// What the planner hears of its instances.
#[derive(Debug)]
pub(crate) enum InstanceReport {
    /// A life has begun.
    Ready { instance: InstanceId, tokenizer_ref: TokenizerRef, tokenizer: Arc<Tokenizer> },
    /// It stops.
    Failed { instance: InstanceId, error: RequestError },
}

/// What a placed model needs to be run.
#[derive(Debug)]
pub(crate) struct InstanceArgs {
    pub id: InstanceId,
    pub node: NodeId,
    pub files: Arc<ModelFiles>,
    pub placement: Placement,
    /// By stage.
    pub devices: Vec<(DeviceRef, Arc<dyn EngineFactory>)>,
    pub context_tokens: u32,
    pub kv_pages: u32,
    pub room: Arc<Room>,
    pub planner: Outlet<InstanceReport>,
    pub facts: Facts,
}

#[derive(Debug)]
pub(crate) struct InstanceState {
    args: InstanceArgs,
    schedule: Schedule,
    clients: HashMap<SeqId, Client>,
    shards: Vec<Option<LoadedShard>>,
    tokenizer_ref: TokenizerRef,
    tokenizer: Option<Arc<Tokenizer>>,
    incarnation: Incarnation,
    /// Whether this life has begun.
    is_wired: bool,
    next_step: u64,
    /// When the pipeline last gave something, or was given something after being idle.
    last_sign: Instant,
    totals: Totals,
    reported: Option<Load>,
}

#[derive(Debug)]
pub(crate) struct Instance;

impl Actor for Instance {
    type Msg = InstanceMsg;
    type State = InstanceState;
    type Arguments = InstanceArgs;

    async fn pre_start(&self, myself: InstanceRef, args: InstanceArgs) -> Result<InstanceState, ActorProcessingErr> {
        let tokenizer_args =
            TokenizerArgs { files: Arc::clone(&args.files), owner: Outlet::to(&myself, InstanceMsg::Tokenizer) };
        let (tokenizer_ref, _) =
            TokenizerActor::spawn_linked(None, TokenizerActor, tokenizer_args, myself.get_cell()).await?;
        myself.send_interval(WATCH_EVERY, || InstanceMsg::Watch);
        let stages = args.placement.stages.len();
        let limits = Limits {
            pages: args.kv_pages,
            context_tokens: args.context_tokens,
            steps_in_flight: stages,
            running: RUNNING_MAX,
            rows_alone: ROWS_ALONE,
            rows_shared: ROWS_SHARED,
        };
        let state = InstanceState {
            schedule: Schedule::new(limits),
            clients: HashMap::new(),
            shards: vec![None; stages],
            tokenizer_ref,
            tokenizer: None,
            incarnation: Incarnation { epoch: 1, owner: *args.node.as_bytes() },
            is_wired: false,
            next_step: 0,
            last_sign: Instant::now(),
            totals: Totals::default(),
            reported: None,
            args,
        };
        state.start_shards(&myself);
        Ok(state)
    }

    async fn post_stop(&self, _: InstanceRef, state: &mut InstanceState) -> Result<(), ActorProcessingErr> {
        state.fail_all(&RequestError::ShuttingDown);
        for (device, _) in &state.args.devices {
            // A device that is gone has no shards.
            let _ = device.send_message(DeviceMsg::StopInstance(state.args.id));
        }
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
            InstanceMsg::Shard(ShardReport::Up(shard)) => state.on_shard_up(shard, &myself),
            InstanceMsg::Shard(ShardReport::Down { stage, error }) => state.on_shard_down(stage, &error),
            InstanceMsg::Shard(ShardReport::Lost(error)) => {
                let (what, remedy) = (error.to_string(), error.remedy());
                state.give_up(&myself, RequestError::Engine { what, remedy });
            }
            InstanceMsg::Tokenizer(Ok(tokenizer)) => state.on_tokenizer(tokenizer, &myself),
            InstanceMsg::Tokenizer(Err(error)) => state.give_up(&myself, ModelError::from(error).into()),
            InstanceMsg::Watch => state.watch(&myself),
        }
        state.pump();
        Ok(())
    }

    async fn handle_supervisor_evt(
        &self,
        myself: InstanceRef,
        event: SupervisionEvent,
        state: &mut InstanceState,
    ) -> Result<(), ActorProcessingErr> {
        if let SupervisionEvent::ActorFailed(_, error) = event {
            let what = format!("the tokenizer failed: {error}");
            state.give_up(&myself, RequestError::Engine { what, remedy: "report it, with the prompt" });
        }
        Ok(())
    }
}

impl InstanceState {
    fn start_shards(&self, myself: &InstanceRef) {
        let weights = Arc::new(self.args.files.weights.clone());
        let owner = Outlet::to(myself, InstanceMsg::Shard);
        for (stage, (placed, (device, factory))) in
            self.args.placement.stages.iter().zip(&self.args.devices).enumerate()
        {
            let spec = ShardSpec {
                architecture: self.args.files.architecture.for_context(self.args.context_tokens as usize),
                layers: placed.layers.clone(),
                tensor: TensorRank::WHOLE,
                kv_element: KvElement::F16,
                kv_pages: self.args.kv_pages,
            };
            let host = HostTask {
                factory: Arc::clone(factory),
                device: placed.device.clone(),
                spec,
                weights: Arc::clone(&weights),
                _room: Arc::clone(&self.args.room),
            };
            let task = ShardTask { instance: self.args.id, stage, host, owner: owner.clone() };
            // A device that is gone is noticed by the node, which stops.
            let _ = device.send_message(DeviceMsg::Start(Box::new(task)));
        }
    }

    fn submit(&mut self, submission: Submission) {
        let Some(tokenizer) = &self.tokenizer else {
            // There is room for an event; whoever asked may have gone.
            let _ = submission.events.try_send(Err(RequestError::NotReady));
            return;
        };
        let Submission { seq, sampler, max_tokens, stop, events, lease } = submission;
        let prompt_tokens = sampler.prompt.len() as u64;
        let started = Generated::Started { prompt_tokens: sampler.prompt.clone() };
        let request = Request { seq, sampler, max_tokens, ends: tokenizer.ends().clone() };
        let mut client = Client::new(Arc::clone(tokenizer), &stop, events, lease);
        match self.schedule.handle_request(request) {
            Err(error) => client.fail(RequestError::Admit(error)),
            Ok(()) => {
                self.totals.prompt_tokens += prompt_tokens;
                client.send(started);
                self.clients.insert(seq, client);
            }
        }
    }

    fn cancel(&mut self, seq: SeqId) {
        if self.clients.remove(&seq).is_some() {
            self.totals.requests += 1;
        }
        self.schedule.handle_cancel(seq);
    }

    fn on_step_done(&mut self, result: StepResult) {
        if result.incarnation != self.incarnation || !self.is_wired {
            return;
        }
        self.last_sign = Instant::now();
        self.schedule.handle_step_done(result.tokens);
    }

    fn on_shard_up(&mut self, shard: LoadedShard, myself: &InstanceRef) {
        let stage = shard.stage;
        if let Some(slot) = self.shards.get_mut(stage) {
            *slot = Some(shard);
        }
        self.begin_life(myself);
    }

    fn on_tokenizer(&mut self, tokenizer: Arc<Tokenizer>, myself: &InstanceRef) {
        self.tokenizer = Some(tokenizer);
        self.begin_life(myself);
    }

    /// Wires the shards, if all are there.
    fn begin_life(&mut self, myself: &InstanceRef) {
        let Some(tokenizer) = self.tokenizer.clone() else { return };
        let shards: Option<Vec<&LoadedShard>> = self.shards.iter().map(Option::as_ref).collect();
        let Some(shards) = shards.filter(|_| !self.is_wired) else { return };
        for (stage, shard) in shards.iter().enumerate() {
            let next = match shards.get(stage + 1) {
                Some(next) => Next::Shard(next.port.clone()),
                None => {
                    let head = myself.clone();
                    Next::Head(Arc::new(move |result| {
                        // A head that is gone wants no results.
                        let _ = head.send_message(InstanceMsg::StepDone(result));
                    }))
                }
            };
            if shard.port.wire(self.incarnation, next).is_err() {
                // Its thread has ended since: the report of that is on its way.
                return;
            }
        }
        self.is_wired = true;
        self.last_sign = Instant::now();
        let (instance, epoch) = (self.args.id, self.incarnation.epoch);
        tracing::info!(%instance, epoch, "instance ready");
        self.args.facts.tell(Fact::InstanceReady { instance, epoch });
        let tokenizer_ref = self.tokenizer_ref.clone();
        self.args.planner.tell(InstanceReport::Ready { instance, tokenizer_ref, tokenizer });
    }

    fn on_shard_down(&mut self, stage: usize, error: &EngineError) {
        tracing::warn!(instance = %self.args.id, stage, %error, "a shard is down: requests wait for it");
        if let Some(slot) = self.shards.get_mut(stage) {
            *slot = None;
        }
        self.incarnation.epoch += 1;
        self.is_wired = false;
        self.schedule.handle_pipeline_lost();
    }

    fn give_up(&mut self, myself: &InstanceRef, error: RequestError) {
        tracing::error!(instance = %self.args.id, %error, remedy = error.remedy(), "the instance stops");
        // The planner first: whoever tries again because of the failure finds that it knows.
        self.args.planner.tell(InstanceReport::Failed { instance: self.args.id, error: error.clone() });
        self.fail_all(&error);
        myself.stop(None);
    }

    fn fail_all(&mut self, error: &RequestError) {
        self.schedule.handle_stop();
        for (_, mut client) in self.clients.drain() {
            client.fail(error.clone());
        }
    }

    /// A step that does not come back is a failure of the pipeline.
    fn watch(&mut self, myself: &InstanceRef) {
        if self.is_wired && self.schedule.steps_in_flight() > 0 && self.last_sign.elapsed() > STEP_DEADLINE {
            let what = format!("no step came back for {} s", STEP_DEADLINE.as_secs());
            let remedy = "the device hangs: see the log, and start the node again";
            self.give_up(myself, RequestError::Engine { what, remedy });
        }
    }

    /// Tells clients what happened, and sends what may be sent.
    fn pump(&mut self) {
        self.tell_clients();
        while self.is_wired {
            let was_idle = self.schedule.steps_in_flight() == 0;
            let Some(plan) = self.schedule.poll_step() else { break };
            if was_idle {
                self.last_sign = Instant::now();
            }
            self.next_step += 1;
            let step = Step {
                incarnation: self.incarnation,
                id: StepId(self.next_step),
                operations: plan.operations,
                rows: plan.rows,
            };
            let frame = Frame { step, input: Input::Tokens(plan.tokens), samplers: plan.samplers };
            // A first shard that is gone reports that itself.
            let first = self.shards.first().and_then(Option::as_ref);
            if let Some(Err(error)) = first.map(|shard| shard.port.send(frame)) {
                tracing::warn!(instance = %self.args.id, %error, "a step could not be sent");
                break;
            }
        }
        self.report();
    }

    fn tell_clients(&mut self) {
        while let Some(event) = self.schedule.poll_event() {
            let seq = event.seq();
            let Some(client) = self.clients.get_mut(&seq) else { continue };
            match event {
                Event::TakenUp { reused_tokens, .. } => self.totals.reused_tokens += reused_tokens as u64,
                Event::Token { .. } => self.totals.generated_tokens += 1,
                Event::Finished { .. } | Event::Failed { .. } => {}
            }
            if client.tell(event).is_over() {
                self.cancel(seq);
            }
        }
    }

    fn report(&mut self) {
        let load = Load {
            running: self.schedule.running(),
            waiting: self.schedule.waiting(),
            pages_used: self.schedule.pages_used(),
            pages_total: self.args.kv_pages,
        };
        if self.reported != Some(load) {
            self.reported = Some(load);
            self.args.facts.tell(Fact::RequestsChanged { instance: self.args.id, load, totals: self.totals });
        }
    }
}
