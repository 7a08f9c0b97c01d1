//! Device: one compute device of this node.
//!
//! - owns: the shards on the device, the recent failures of each, and the engine threads that hang;
//! - receives: shards to start and to stop;
//! - emits: failures and losses of shards, to the worker; the device's description, as a fact;
//! - dies when: the node stops;
//! - supervised by: the node.

use super::engine_thread::ThreadEnd;
use super::shard::{Shard, ShardArgs, ShardFailure, ShardReport, ShardTask};
use crate::core::node_status::Fact;
use crate::core::restart_policy::{FailureHistory, Fallback, Verdict};
use crate::core::spec::InstanceId;
use crate::core::watchdog::HangTimeouts;
use crate::transport::callback::Facts;
use exo_engines::engine::{DeviceReport, EngineFactory};
use exo_engines::{EngineError, ErrorClass};
use ractor::{Actor, ActorCell, ActorId, ActorProcessingErr, ActorRef, SupervisionEvent};
use ractor_cluster::RactorMessage;
use std::collections::HashMap;
use std::sync::Arc;
use std::time::Instant;

pub(crate) type DeviceRef = ActorRef<DeviceMsg>;

#[derive(Debug, RactorMessage)]
pub(crate) enum DeviceMsg {
    /// Starts a shard on this device, even if the task names another device.
    Start(Box<ShardTask>),
    /// Stops the shards whose tasks are cancelled.
    Sweep,
}

#[derive(Debug)]
pub(crate) struct DeviceArgs {
    pub report: DeviceReport,
    pub factory: Arc<dyn EngineFactory>,
    /// The device that receives the shards which cannot run on this one.
    pub fallback: Option<DeviceRef>,
    pub hang_timeouts: HangTimeouts,
    pub facts: Facts,
}

#[derive(Debug)]
pub(crate) struct DeviceState {
    args: DeviceArgs,
    started: Instant,
    shards: HashMap<ActorId, (ActorCell, ShardTask)>,
    histories: HashMap<(InstanceId, usize), FailureHistory>,
    /// Threads of hung engines. No shard starts until they end, because it would hang, too.
    hung: Vec<ThreadEnd>,
}

#[derive(Debug)]
pub(crate) struct Device;

impl Actor for Device {
    type Msg = DeviceMsg;
    type State = DeviceState;
    type Arguments = DeviceArgs;

    async fn pre_start(&self, _: DeviceRef, args: DeviceArgs) -> Result<DeviceState, ActorProcessingErr> {
        args.facts.tell(Fact::DeviceFound(args.report.clone()));
        let (shards, histories) = (HashMap::new(), HashMap::new());
        Ok(DeviceState { args, started: Instant::now(), shards, histories, hung: Vec::new() })
    }

    async fn handle(
        &self,
        myself: DeviceRef,
        message: DeviceMsg,
        state: &mut DeviceState,
    ) -> Result<(), ActorProcessingErr> {
        match message {
            DeviceMsg::Start(task) => state.start(&myself, *task).await,
            DeviceMsg::Sweep => state.sweep(),
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
                        state.note_hang(failure);
                        failure.error.clone()
                    }
                    None => EngineError::Panicked { what: error.to_string() },
                };
                state.on_failure(&myself, who.get_id(), error);
            }
            SupervisionEvent::ActorTerminated(who, _, _) => drop(state.shards.remove(&who.get_id())),
            _ => {}
        }
        Ok(())
    }
}

impl DeviceState {
    async fn start(&mut self, myself: &DeviceRef, mut task: ShardTask) {
        // The task may have been cancelled while it waited for a restart or moved here from another device.
        if task.is_over.is_cancelled() {
            self.histories.remove(&(task.instance, task.stage));
            return;
        }
        self.hung.retain(|thread| !thread.has_ended());
        if !self.hung.is_empty() {
            let error = EngineError::StillHung { device: self.args.report.id.to_string() };
            return self.decide(myself, task, error);
        }
        task.engine.device = self.args.report.id.clone();
        task.engine.factory = Arc::clone(&self.args.factory);
        let args = ShardArgs { task: task.clone(), hang_timeouts: self.args.hang_timeouts };
        match Shard::spawn_linked(None, Shard, args, myself.get_cell()).await {
            Ok((shard, _)) => drop(self.shards.insert(shard.get_id(), (shard.get_cell(), task))),
            Err(error) => {
                let error = EngineError::Device { device: self.args.report.id.to_string(), what: error.to_string() };
                self.decide(myself, task, error);
            }
        }
    }

    fn note_hang(&mut self, failure: &ShardFailure) {
        if failure.error.class() == ErrorClass::Hung {
            self.hung.push(failure.end.clone());
        }
    }

    fn sweep(&mut self) {
        for (cell, task) in self.shards.values().filter(|(_, task)| task.is_over.is_cancelled()) {
            self.histories.remove(&(task.instance, task.stage));
            cell.stop(None);
        }
    }

    fn on_failure(&mut self, myself: &DeviceRef, who: ActorId, error: EngineError) {
        let Some((_, task)) = self.shards.remove(&who) else { return };
        task.reports.tell(ShardReport::Down(error.clone()));
        self.decide(myself, task, error);
    }

    fn decide(&mut self, myself: &DeviceRef, task: ShardTask, error: EngineError) {
        let fallback = if self.args.fallback.is_some() { Fallback::Available } else { Fallback::None };
        let history = self.histories.entry((task.instance, task.stage)).or_default();
        let verdict = history.decide(self.started.elapsed(), error.class(), fallback);
        if !matches!(verdict, Verdict::Restart { .. }) {
            self.histories.remove(&(task.instance, task.stage));
        }
        tracing::info!(
            instance = %task.instance, stage = task.stage, device = %self.args.report.id, class = ?error.class(),
            %error, remedy = error.remedy(), ?verdict, "a shard failed"
        );
        match (verdict, &self.args.fallback) {
            (Verdict::Restart { after }, _) => drop(myself.send_after(after, move || DeviceMsg::Start(Box::new(task)))),
            (Verdict::FallBack, Some(device)) => {
                let _ = device.send_message(DeviceMsg::Start(Box::new(task)));
            }
            (Verdict::FallBack | Verdict::Replan | Verdict::Stop, _) => {
                task.reports.tell(ShardReport::Lost(error));
            }
        }
    }
}
