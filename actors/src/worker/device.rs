//! Device: one compute device of this node.
//!
//! - owns: the shards' actors on the device, the starts that wait, the engine threads that have not ended, a probe;
//! - receives: engines to start and to stop, and probes, from the worker;
//! - emits: failures of engines and results of probes, to the worker; the device's description, as a fact;
//! - dies when: the node stops;
//! - supervised by: the node.
//!
//! The worker decides which engines run, by `core/failover.rs`. The device delays starts and probes until failed
//! engines have ended, and ends probes that take too long.

use super::engine_thread::ThreadEnd;
use super::probe::{self, Probe, ProbeOutcome};
use super::shard::{Shard, ShardArgs, ShardFailure, ShardReport, ShardTask};
use crate::core::failover::EngineNumber;
use crate::core::node_status::Fact;
use crate::core::watchdog::HangTimeouts;
use crate::transport::callback::{EventCallback, Facts};
use exo_engines::engine::{DeviceReport, EngineFactory};
use exo_engines::{DeviceFault, EngineError, ErrorClass};
use ractor::{Actor, ActorCell, ActorId, ActorProcessingErr, ActorRef, SupervisionEvent};
use ractor_cluster::RactorMessage;
use std::collections::HashMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

pub(crate) type DeviceRef = ActorRef<DeviceMsg>;

/// How often a start or a probe looks whether the engines that have failed before it have ended.
const END_CHECKED_EVERY: Duration = Duration::from_millis(20);
/// How long it waits for failed engines to end. The system takes some seconds to free the memory of a large process; a
/// process that takes longer than this hangs in its driver.
const ENDS_WITHIN: Duration = Duration::from_secs(20);

#[derive(Debug, RactorMessage)]
pub(crate) enum DeviceMsg {
    /// Starts an engine after a wait.
    Start {
        task: Box<ShardTask>,
        after: Duration,
    },
    /// Starts an engine that has waited, unless it was stopped.
    Due(EngineNumber),
    /// Ends an engine, or a start that waits.
    Stop(EngineNumber),
    /// Tests the device in a fresh engine.
    Probe(EventCallback<ProbeOutcome>),
    Probed {
        probe: u64,
        outcome: ProbeOutcome,
    },
    /// The time of a probe is over.
    ProbeOverdue {
        probe: u64,
    },
}

#[derive(Debug)]
pub(crate) struct DeviceArgs {
    pub report: DeviceReport,
    pub factory: Arc<dyn EngineFactory>,
    pub hang_timeouts: HangTimeouts,
    pub facts: Facts,
}

#[derive(Debug)]
pub(crate) struct DeviceState {
    args: DeviceArgs,
    waiting: HashMap<EngineNumber, ShardTask>,
    running: HashMap<ActorId, (ActorCell, ShardTask)>,
    /// Engines that have failed, whose threads have not ended yet.
    ending: Vec<Ending>,
    probe: Option<Probe>,
    /// The number of probes so far.
    probes: u64,
}

#[derive(Debug)]
struct Ending {
    end: ThreadEnd,
    since: Instant,
    /// Whether the engine hangs in this process: no shard starts until it returns, because it would hang, too.
    is_hung: bool,
}

/// Whether the device has room for an engine beside those that have failed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Room {
    Free,
    /// A failed engine ends soon.
    Soon,
    /// A failed engine does not end.
    Blocked,
}

#[derive(Debug)]
pub(crate) struct Device;

impl Actor for Device {
    type Msg = DeviceMsg;
    type State = DeviceState;
    type Arguments = DeviceArgs;

    async fn pre_start(&self, _: DeviceRef, args: DeviceArgs) -> Result<DeviceState, ActorProcessingErr> {
        args.facts.tell(Fact::DeviceFound(args.report.clone()));
        let (waiting, running) = (HashMap::new(), HashMap::new());
        Ok(DeviceState { args, waiting, running, ending: Vec::new(), probe: None, probes: 0 })
    }

    async fn handle(
        &self,
        myself: DeviceRef,
        message: DeviceMsg,
        state: &mut DeviceState,
    ) -> Result<(), ActorProcessingErr> {
        match message {
            DeviceMsg::Start { task, after } => state.start(&myself, *task, after).await,
            DeviceMsg::Due(engine) => state.launch(&myself, engine).await,
            DeviceMsg::Stop(engine) => state.stop(engine),
            DeviceMsg::Probe(report) => state.start_probe(&myself, report),
            DeviceMsg::Probed { probe, outcome } => state.on_probed(probe, outcome),
            DeviceMsg::ProbeOverdue { probe } => state.on_probe_overdue(&myself, probe),
        }
        Ok(())
    }

    async fn handle_supervisor_evt(
        &self,
        _: DeviceRef,
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
                    task.report(ShardReport::Failed(error));
                }
            }
            SupervisionEvent::ActorTerminated(who, _, _) => drop(state.running.remove(&who.get_id())),
            _ => {}
        }
        Ok(())
    }
}

impl DeviceState {
    async fn start(&mut self, myself: &DeviceRef, task: ShardTask, after: Duration) {
        let engine = task.number;
        self.waiting.insert(engine, task);
        match after {
            Duration::ZERO => self.launch(myself, engine).await,
            after => drop(myself.send_after(after, move || DeviceMsg::Due(engine))),
        }
    }

    /// Starts an engine as soon as those that failed before it have ended.
    async fn launch(&mut self, myself: &DeviceRef, engine: EngineNumber) {
        let Some(task) = self.waiting.get(&engine).cloned() else { return };
        let room = self.room();
        if room == Room::Soon {
            return drop(myself.send_after(END_CHECKED_EVERY, move || DeviceMsg::Due(engine)));
        }
        self.waiting.remove(&engine);
        if room == Room::Blocked {
            return task.report(ShardReport::Failed(self.still_hung()));
        }
        let (hang_timeouts, kind) = (self.args.hang_timeouts, self.args.report.kind);
        let args = ShardArgs { task: task.clone(), hang_timeouts, kind };
        match Shard::spawn_linked(None, Shard, args, myself.get_cell()).await {
            Ok((shard, _)) => drop(self.running.insert(shard.get_id(), (shard.get_cell(), task))),
            Err(error) => task.report(ShardReport::Failed(self.system_error(&error))),
        }
    }

    fn stop(&mut self, engine: EngineNumber) {
        self.waiting.remove(&engine);
        let running = self.running.values().find(|(_, task)| task.number == engine);
        if let Some((shard, _)) = running {
            shard.stop(None);
        }
    }

    /// Whether an engine can start now.
    fn room(&mut self) -> Room {
        self.ending.retain(|ending| !ending.end.has_ended());
        match self.ending.iter().any(|ending| ending.is_hung || ending.since.elapsed() > ENDS_WITHIN) {
            true => Room::Blocked,
            false if self.ending.is_empty() => Room::Free,
            false => Room::Soon,
        }
    }

    fn note_end(&mut self, failure: &ShardFailure) {
        let is_hung = failure.error.class() == ErrorClass::Hung;
        self.ending.push(Ending { end: failure.end.clone(), since: Instant::now(), is_hung });
    }

    fn start_probe(&mut self, myself: &DeviceRef, report: EventCallback<ProbeOutcome>) {
        match self.room() {
            Room::Soon => return drop(myself.send_after(END_CHECKED_EVERY, move || DeviceMsg::Probe(report.clone()))),
            Room::Blocked => return report.tell(Err(self.still_hung())),
            Room::Free => {}
        }
        // A probe on a thread, which was given up, still runs: its result is that of the next one.
        if let Some(probe) = &mut self.probe {
            (probe.report, probe.is_given_up) = (report, false);
            return;
        }
        self.probes += 1;
        let (number, to) = (self.probes, myself.clone());
        let (factory, device) = (Arc::clone(&self.args.factory), self.args.report.id.clone());
        let started = probe::start(factory, device, number, report.clone(), move |outcome| {
            // Sending fails only if the device has stopped; the node stops, too.
            let _ = to.send_message(DeviceMsg::Probed { probe: number, outcome });
        });
        match started {
            Ok(probe) => {
                self.probe = Some(probe);
                myself.send_after(self.args.hang_timeouts.load, move || DeviceMsg::ProbeOverdue { probe: number });
            }
            Err(error) => report.tell(Err(self.system_error(&error))),
        }
    }

    fn on_probed(&mut self, number: u64, outcome: ProbeOutcome) {
        let probe = self.probe.take_if(|probe| probe.number == number);
        // The result of a probe that was given up comes too late.
        if let Some(probe) = probe.filter(|probe| !probe.is_given_up) {
            probe.report.tell(outcome);
        }
    }

    /// Kills the probe's process, whose end is the result. A probe on a thread cannot be killed: it fails at once.
    fn on_probe_overdue(&mut self, myself: &DeviceRef, number: u64) {
        let limit = self.args.hang_timeouts.load;
        let Some(probe) = self.probe.as_mut().filter(|probe| probe.number == number) else { return };
        if probe.killer.kill() {
            // An engine that was not open yet may turn out to run on a thread.
            myself.send_after(limit, move || DeviceMsg::ProbeOverdue { probe: number });
        } else if !probe.is_given_up {
            probe.is_given_up = true;
            let error = EngineError::Hung { from: "a self-test".to_owned(), seconds: limit.as_secs() };
            probe.report.tell(Err(error));
        }
    }

    fn still_hung(&self) -> EngineError {
        EngineError::StillHung { device: self.args.report.id.to_string() }
    }

    /// The error of the operating system or the runtime, which starts nothing for this device.
    fn system_error(&self, error: &impl std::fmt::Display) -> EngineError {
        let device = self.args.report.id.to_string();
        EngineError::Device { device, fault: DeviceFault::System, what: error.to_string() }
    }
}
