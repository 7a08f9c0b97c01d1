//! Device: one compute device of this node.
//!
//! - owns: the shards on the device, its health, and the engine threads that have not ended;
//! - receives: shards to start, to retire and to stop; results of probes; ticks, at which probes start;
//! - emits: failures and losses of shards, to the worker; the device's description and health, as facts;
//! - dies when: the node stops;
//! - supervised by: the node.
//!
//! A shard that cannot run here runs on the fallback device until this one has passed a probe; then it loads here
//! beside what serves, and the worker lets it take over.

mod probing;

use super::engine_thread::ThreadEnd;
use super::machine::available_bytes;
use super::probe::Probe;
use super::shard::{Shard, ShardArgs, ShardFailure, ShardReport, ShardTask};
use crate::core::device_policy::{Decision, DevicePolicy, Health, ShardNumber, Start};
use crate::core::node_status::{DeviceTrouble, Fact};
use crate::core::restart_policy::{Fallback, Verdict};
use crate::core::watchdog::HangTimeouts;
use crate::transport::callback::Facts;
use exo_engines::engine::{DeviceReport, EngineFactory, SelfTestReport};
use exo_engines::{DeviceFault, EngineError, ErrorClass};
use ractor::{Actor, ActorCell, ActorId, ActorProcessingErr, ActorRef, SupervisionEvent};
use ractor_cluster::RactorMessage;
use std::collections::HashMap;
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

pub(crate) type DeviceRef = ActorRef<DeviceMsg>;

/// How often the device looks for a probe that is due.
const TICK_EVERY: Duration = Duration::from_secs(1);
/// How often a start looks whether the engine before it has ended.
const END_CHECKED_EVERY: Duration = Duration::from_millis(20);
/// How long a start waits for the end of the engine before it. A killed process that takes longer hangs in its driver.
const ENDS_WITHIN: Duration = Duration::from_secs(5);

/// The least time between two replacements of a leaking process.
const RENEWED_EVERY: Duration = Duration::from_secs(600);
/// How long a retired engine is remembered: longer than any wait for a restart.
const RETIRED_FOR: Duration = Duration::from_secs(60);

#[derive(Debug, RactorMessage)]
pub(crate) enum DeviceMsg {
    /// Starts a shard on this device, even if the task names another device.
    Start(Box<ShardTask>),
    /// Starts a shard of this device again.
    Restart(Box<ShardTask>),
    /// A shard that this device has loaded beside another device's serves now.
    Promoted(ShardNumber),
    /// A shard that was promoted has failed before this device knew of the promotion: it serves nowhere.
    Unserved(ShardNumber),
    /// Loads a shard into another engine, beside the one that serves, because that one leaks memory.
    Renew(ShardNumber),
    /// Stops an engine of a shard, because another one serves now.
    Retire {
        shard: ShardNumber,
        run: u64,
    },
    /// Stops the shards whose tasks are cancelled.
    Sweep,
    Probed(Result<SelfTestReport, EngineError>),
    Tick,
}

#[derive(Debug)]
pub(crate) struct DeviceArgs {
    pub report: DeviceReport,
    pub factory: Arc<dyn EngineFactory>,
    /// The device that receives the shards which cannot run on this one.
    pub fallback: Option<DeviceRef>,
    pub hang_timeouts: HangTimeouts,
    /// The first pause before a probe of the device.
    pub probe_after: Duration,
    pub facts: Facts,
}

#[derive(Debug)]
pub(crate) struct DeviceState {
    args: DeviceArgs,
    started: Instant,
    policy: DevicePolicy,
    running: HashMap<ActorId, (ActorCell, ShardTask)>,
    /// The shards that were ordered from this device, wherever they run.
    tasks: HashMap<ShardNumber, ShardTask>,
    /// Engines that have failed, whose threads have not ended yet.
    ending: Vec<Ending>,
    probe: Option<Probe>,
    /// The shards that are loaded into another engine beside the one that serves here, with that engine's run.
    renewing: HashMap<ShardNumber, u64>,
    /// When shards were last loaded into another engine because of a leak.
    renewed: HashMap<ShardNumber, Instant>,
    /// The number of engines that were started here.
    runs: u64,
    /// Engines that were retired when they had ended already, and when: they may wait for a restart.
    retired: HashMap<(ShardNumber, u64), Instant>,
}

#[derive(Debug)]
struct Ending {
    end: ThreadEnd,
    since: Instant,
    /// Whether the engine hangs in this process: no shard starts until it returns, because it would hang, too.
    is_hung: bool,
}

#[derive(Debug)]
pub(crate) struct Device;

impl Actor for Device {
    type Msg = DeviceMsg;
    type State = DeviceState;
    type Arguments = DeviceArgs;

    async fn pre_start(&self, myself: DeviceRef, args: DeviceArgs) -> Result<DeviceState, ActorProcessingErr> {
        args.facts.tell(Fact::DeviceFound(args.report.clone()));
        let fallback = if args.fallback.is_some() { Fallback::Available } else { Fallback::None };
        let policy = DevicePolicy::new(fallback, args.probe_after);
        myself.send_interval(TICK_EVERY, || DeviceMsg::Tick);
        Ok(DeviceState {
            args,
            started: Instant::now(),
            policy,
            running: HashMap::new(),
            tasks: HashMap::new(),
            ending: Vec::new(),
            probe: None,
            renewing: HashMap::new(),
            renewed: HashMap::new(),
            runs: 0,
            retired: HashMap::new(),
        })
    }

    async fn handle(
        &self,
        myself: DeviceRef,
        message: DeviceMsg,
        state: &mut DeviceState,
    ) -> Result<(), ActorProcessingErr> {
        match message {
            DeviceMsg::Start(task) => state.start(&myself, *task).await,
            DeviceMsg::Restart(task) => state.restart(&myself, *task).await,
            DeviceMsg::Promoted(shard) => state.on_promoted(shard),
            DeviceMsg::Unserved(shard) => state.on_unserved(&myself, shard).await,
            DeviceMsg::Renew(shard) => state.renew(&myself, shard).await,
            DeviceMsg::Retire { shard, run } => state.retire(shard, run),
            DeviceMsg::Sweep => state.sweep(),
            DeviceMsg::Probed(outcome) => state.on_probed(&myself, outcome),
            DeviceMsg::Tick => state.tick(&myself),
        }
        Ok(())
    }

    async fn handle_supervisor_evt(
        &self,
        myself: DeviceRef,
        event: SupervisionEvent,
        state: &mut DeviceState,
    ) -> Result<(), ActorProcessingErr> {
        match event {
            SupervisionEvent::ActorFailed(who, error) => {
                let error = match error.downcast_ref::<ShardFailure>() {
                    Some(failure) => {
                        state.note_end(failure);
                        failure.error.clone()
                    }
                    None => EngineError::Panicked { what: error.to_string() },
                };
                if let Some((_, task)) = state.running.remove(&who.get_id()) {
                    state.on_failure(&myself, task, error);
                }
            }
            SupervisionEvent::ActorTerminated(who, _, _) => drop(state.running.remove(&who.get_id())),
            _ => {}
        }
        Ok(())
    }
}

impl DeviceState {
    async fn start(&mut self, myself: &DeviceRef, task: ShardTask) {
        // The task may have been cancelled while it waited for a restart or moved here from another device.
        if task.is_over.is_cancelled() {
            return self.forget(task.number);
        }
        self.tasks.insert(task.number, task.clone());
        match self.policy.handle_start(task.number) {
            Start::OnFallback => self.fall_back(task),
            Start::Here => self.launch(myself, task).await,
        }
    }

    /// Starts a shard again, unless the engine that failed has been retired meanwhile.
    async fn restart(&mut self, myself: &DeviceRef, task: ShardTask) {
        match self.retired.remove(&(task.number, task.run)) {
            Some(_) => self.forget_unless_used(task.number, task.run),
            None => self.start(myself, task).await,
        }
    }

    /// Starts a shard as soon as the engines that failed before it have ended.
    async fn launch(&mut self, myself: &DeviceRef, mut task: ShardTask) {
        self.ending.retain(|ending| !ending.end.has_ended());
        if self.ending.iter().any(|ending| ending.is_hung || ending.since.elapsed() > ENDS_WITHIN) {
            let error = EngineError::StillHung { device: self.args.report.id.to_string() };
            return self.on_failure(myself, task, error);
        }
        if !self.ending.is_empty() {
            return drop(myself.send_after(END_CHECKED_EVERY, move || DeviceMsg::Restart(Box::new(task))));
        }
        task.engine.device = self.args.report.id.clone();
        task.engine.factory = Arc::clone(&self.args.factory);
        self.runs += 1;
        task.run = self.runs;
        let (hang_timeouts, kind) = (self.args.hang_timeouts, self.args.report.kind);
        let args = ShardArgs { task: task.clone(), hang_timeouts, kind };
        match Shard::spawn_linked(None, Shard, args, myself.get_cell()).await {
            Ok((shard, _)) => drop(self.running.insert(shard.get_id(), (shard.get_cell(), task))),
            Err(error) => {
                let error = self.system_error(&error);
                self.on_failure(myself, task, error);
            }
        }
    }

    /// The error of the operating system or the runtime, which starts nothing for this device.
    fn system_error(&self, error: &impl std::fmt::Display) -> EngineError {
        let device = self.args.report.id.to_string();
        EngineError::Device { device, fault: DeviceFault::System, what: error.to_string() }
    }

    fn note_end(&mut self, failure: &ShardFailure) {
        let is_hung = failure.error.class() == ErrorClass::Hung;
        self.ending.push(Ending { end: failure.end.clone(), since: Instant::now(), is_hung });
    }

    fn forget(&mut self, shard: ShardNumber) {
        self.policy.handle_over(shard);
        self.tasks.remove(&shard);
        self.renewing.remove(&shard);
        self.renewed.remove(&shard);
    }

    /// Forgets a shard whose engine `ended` has ended, unless it has another engine here, or is to come back.
    fn forget_unless_used(&mut self, shard: ShardNumber, ended: u64) {
        if self.runs_of(shard).all(|(_, task)| task.run == ended) && !self.policy.has_fallen(shard) {
            self.forget(shard);
        }
    }

    fn runs_of(&self, shard: ShardNumber) -> impl Iterator<Item = &(ActorCell, ShardTask)> {
        self.running.values().filter(move |(_, task)| task.number == shard)
    }

    fn on_promoted(&mut self, shard: ShardNumber) {
        self.renewing.remove(&shard);
        let task = self.tasks.get(&shard).filter(|_| self.policy.handle_promoted(shard));
        if let Some(task) = task {
            let (instance, stage, device) = (task.instance, task.stage, &self.args.report.id);
            tracing::info!(%instance, stage, %device, "a shard runs on its device again");
        }
    }

    async fn on_unserved(&mut self, myself: &DeviceRef, shard: ShardNumber) {
        if let Some(task) = self.tasks.get(&shard).cloned() {
            self.start(myself, task).await;
        }
    }

    /// Loads a shard into another engine, unless memory does not suffice for both, or that was done lately.
    async fn renew(&mut self, myself: &DeviceRef, shard: ShardNumber) {
        let running = self.runs_of(shard).map(|(_, task)| task.clone()).collect::<Vec<_>>();
        let [task] = running.as_slice() else { return };
        self.ending.retain(|ending| !ending.end.has_ended());
        let needed_bytes = task.engine.memory.bytes;
        let is_recent = self.renewed.get(&shard).is_some_and(|since| since.elapsed() < RENEWED_EVERY);
        let has_memory = available_bytes().is_none_or(|available| available > needed_bytes);
        if is_recent || !has_memory || !self.ending.is_empty() {
            let (instance, stage) = (task.instance, task.stage);
            return tracing::warn!(%instance, stage, needed_bytes, "a leaking process is not replaced for now");
        }
        self.renewed.insert(shard, Instant::now());
        self.renewing.insert(shard, self.runs + 1);
        self.launch(myself, task.clone()).await;
    }

    fn retire(&mut self, shard: ShardNumber, run: u64) {
        let retired: Vec<ActorCell> =
            self.runs_of(shard).filter(|(_, task)| task.run == run).map(|(cell, _)| cell.clone()).collect();
        if retired.is_empty() {
            self.retired.insert((shard, run), Instant::now());
        }
        retired.iter().for_each(|cell| cell.stop(None));
        if self.renewing.get(&shard) == Some(&run) {
            self.renewing.remove(&shard);
        }
        self.forget_unless_used(shard, run);
    }

    fn sweep(&mut self) {
        let running = self.running.values().filter(|(_, task)| task.is_over.is_cancelled());
        let mut over: Vec<ShardNumber> = Vec::new();
        for (cell, task) in running {
            cell.stop(None);
            over.push(task.number);
        }
        over.extend(self.tasks.values().filter(|task| task.is_over.is_cancelled()).map(|task| task.number));
        over.into_iter().for_each(|shard| self.forget(shard));
    }

    fn on_failure(&mut self, myself: &DeviceRef, task: ShardTask, error: EngineError) {
        if self.renewing.get(&task.number) == Some(&task.run) {
            tracing::warn!(instance = %task.instance, stage = task.stage, %error, "a shard could not be renewed");
            self.renewing.remove(&task.number);
            return task.report(ShardReport::NotPromoted(error));
        }
        let decision = self.policy.handle_failure(task.number, error.class(), self.started.elapsed());
        tracing::info!(
            instance = %task.instance, stage = task.stage, device = %self.args.report.id, class = ?error.class(),
            %error, remedy = error.remedy(), ?decision, "a shard failed"
        );
        self.tell_trouble(&error);
        let verdict = match decision {
            Decision::Serve(verdict) => verdict,
            Decision::StayFallen => return task.report(ShardReport::NotPromoted(error)),
        };
        if let Verdict::Replan | Verdict::Stop = verdict {
            self.tasks.remove(&task.number);
            return task.report(ShardReport::Lost(error));
        }
        task.report(ShardReport::Down(error));
        match verdict {
            Verdict::Restart { after } => drop(myself.send_after(after, move || DeviceMsg::Restart(Box::new(task)))),
            _ => self.fall_back(task),
        }
    }

    fn fall_back(&mut self, task: ShardTask) {
        if let Some(fallback) = &self.args.fallback {
            // Sending fails only if the device has stopped; the node stops, too.
            let _ = fallback.send_message(DeviceMsg::Start(Box::new(task)));
        }
    }

    fn tell_trouble(&self, error: &EngineError) {
        let Health::Resting { until } = self.policy.health() else { return };
        let now_s = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs();
        let probe_at_s = now_s + until.saturating_sub(self.started.elapsed()).as_secs();
        let (error, remedy) = (error.to_string(), error.remedy().to_owned());
        let trouble = DeviceTrouble { error, remedy, probe_at_s };
        self.args.facts.tell(Fact::DeviceFailed { device: self.args.report.id.clone(), trouble });
    }
}
