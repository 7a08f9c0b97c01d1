//! Shard: one engine with layers [a, b) of one instance.
//!
//! - owns: the engine's thread;
//! - receives: the thread's events; ticks, at which it checks the thread's heartbeat;
//! - emits: load progress, the engine's handle once it is loaded, alarms about its speed and memory, to the worker;
//! - dies when: its engine fails (with the engine's error) or hangs, or it is stopped;
//! - supervised by: its device.

use super::engine_thread::{self, EngineEvent, EngineHandle, EngineTask, ThreadEnd};
use super::heartbeat::{EngineActivity, Pulse};
use super::machine::held_bytes;
use crate::core::failover::EngineNumber;
use crate::core::memory_watch::{MemoryGrowth, MemoryWatch};
use crate::core::spec::InstanceId;
use crate::core::step_times::SlowDown;
use crate::core::watchdog::{HangTimeouts, Watchdog};
use crate::transport::callback::EventCallback;
use exo_engines::EngineError;
use exo_engines::engine::{DeviceKind, LoadProgress};
use ractor::{Actor, ActorProcessingErr, ActorRef};
use ractor_cluster::RactorMessage;
use std::time::{Duration, Instant};

/// The unexplained memory of a process that is no leak, in bytes, or as a share of the explained memory: scratch memory
/// of large steps.
const MEMORY_SLACK: (u64, u64) = (256 << 20, 4);
/// How often the engine's heartbeat is checked.
const TICK_EVERY: Duration = Duration::from_secs(1);

/// An engine to start for a shard.
#[derive(Debug, Clone)]
pub(crate) struct ShardTask {
    pub number: EngineNumber,
    pub instance: InstanceId,
    pub stage: usize,
    pub engine: EngineTask,
    /// The length of a hidden row, in numbers.
    pub hidden: usize,
    /// Receives reports, with the engine that they are about.
    pub reports: EventCallback<(EngineNumber, ShardReport)>,
}

impl ShardTask {
    /// Reports about the engine of this task.
    pub(super) fn report(&self, report: ShardReport) {
        self.reports.tell((self.number, report));
    }
}

/// A report of a shard or its device to the worker.
#[derive(Debug)]
pub(crate) enum ShardReport {
    Loading(LoadProgress),
    /// The shard is loaded.
    Up {
        engine: EngineHandle,
        /// The time of one row, which the warm-up measured.
        row: Duration,
        /// The length of a hidden row, in numbers.
        hidden: usize,
        /// The size of the model's vocabulary, in tokens.
        vocabulary: u32,
    },
    /// The engine has ended.
    Failed(EngineError),
    /// The shard has become slow, or is as fast as before again.
    Speed(Option<SlowDown>),
    /// The shard's process holds memory that nothing explains; `None`: it has given it back.
    Leaks(Option<MemoryGrowth>),
}

#[derive(Debug, RactorMessage)]
pub(crate) enum ShardMsg {
    Engine(EngineEvent),
    Tick,
    /// The memory that the engine's process holds, in bytes.
    Measured(u64),
}

#[derive(Debug)]
pub(crate) struct ShardArgs {
    pub task: ShardTask,
    pub hang_timeouts: HangTimeouts,
    pub kind: DeviceKind,
}

#[derive(Debug)]
pub(crate) struct ShardState {
    args: ShardArgs,
    engine: EngineHandle,
    started: Instant,
    watchdog: Watchdog,
    /// Whether the shard was reported as slow.
    is_slow: bool,
    memory: MemoryWatch,
}

/// The error with which a shard's actor ends.
#[derive(Debug, Clone, thiserror::Error)]
#[error("shard of layers {layers:?}: {error}")]
pub(crate) struct ShardFailure {
    pub layers: std::ops::Range<usize>,
    pub error: EngineError,
    /// Shows whether the engine's thread has ended; a hung thread may never end.
    pub end: ThreadEnd,
}

#[derive(Debug)]
pub(crate) struct Shard;

impl Actor for Shard {
    type Msg = ShardMsg;
    type State = ShardState;
    type Arguments = ShardArgs;

    async fn pre_start(&self, myself: ActorRef<ShardMsg>, args: ShardArgs) -> Result<ShardState, ActorProcessingErr> {
        myself.send_interval(TICK_EVERY, || ShardMsg::Tick);
        let engine = engine_thread::start(args.task.engine.clone(), move |event| {
            // Sending fails only if the shard has stopped; it needs no events then.
            let _ = myself.send_message(ShardMsg::Engine(event));
        })?;
        Ok(ShardState {
            args,
            engine,
            started: Instant::now(),
            watchdog: Watchdog::default(),
            is_slow: false,
            memory: MemoryWatch::default(),
        })
    }

    async fn handle(
        &self,
        myself: ActorRef<ShardMsg>,
        message: ShardMsg,
        state: &mut ShardState,
    ) -> Result<(), ActorProcessingErr> {
        match message {
            ShardMsg::Engine(event) => state.on_event(event),
            ShardMsg::Tick => state.tick(&myself),
            ShardMsg::Measured(bytes) => {
                state.check_memory(bytes);
                Ok(())
            }
        }
    }
}

/// Stops the engine however the actor ends, even if the actor is killed with its device.
impl Drop for ShardState {
    fn drop(&mut self) {
        self.engine.stop();
    }
}

impl ShardState {
    fn on_event(&mut self, event: EngineEvent) -> Result<(), ActorProcessingErr> {
        let ShardTask { instance, stage, engine: task, hidden, .. } = &self.args.task;
        match event {
            EngineEvent::Progress(progress) => self.args.task.report(ShardReport::Loading(progress)),
            EngineEvent::Loaded { report, warm_up, held_bytes } => {
                tracing::info!(
                    %instance, stage, layers = ?task.spec.layers, device = %task.device, fingerprint = report.fingerprint,
                    weight_bytes = report.weight_bytes, load_ms = report.elapsed.as_millis(), row_us = warm_up.row.as_micros(),
                    "shard loaded"
                );
                let vocabulary = u32::try_from(task.spec.architecture.vocabulary).unwrap_or(u32::MAX);
                let (engine, row) = (self.engine.clone(), warm_up.row);
                self.args.task.report(ShardReport::Up { engine, row, hidden: *hidden, vocabulary });
                if let Some(bytes) = held_bytes {
                    self.check_memory(bytes);
                }
            }
            EngineEvent::Failed(error) => return self.fail(error),
        }
        Ok(())
    }

    fn tick(&mut self, myself: &ActorRef<ShardMsg>) -> Result<(), ActorProcessingErr> {
        if let Some(process) = self.engine.process_id() {
            let shard = myself.clone();
            tokio::task::spawn_blocking(move || {
                let measured = held_bytes(process).map(ShardMsg::Measured);
                // Sending fails only if the shard has stopped.
                measured.map(|measured| shard.send_message(measured))
            });
        }
        self.check()
    }

    /// Reports memory of the engine's process that the engine does not account for, if it grows.
    fn check_memory(&mut self, held_bytes: u64) {
        let explained = self.engine.heartbeat().read().memory_max_bytes;
        // A measurement during the load comes too early.
        if explained == 0 {
            return;
        }
        let (least, share) = MEMORY_SLACK;
        // Mapped files and the memory of a device of its own are explained, and not held: the difference may be
        // negative.
        let unexplained = held_bytes.cast_signed() - explained.cast_signed();
        if let Some(change) = self.memory.check(unexplained, least.max(explained / share), self.started.elapsed()) {
            self.args.task.report(ShardReport::Leaks(change.growth()));
        }
    }

    /// Reports a change of speed. Ends the shard if its engine hangs, and kills the engine's process, if it has one.
    fn check(&mut self) -> Result<(), ActorProcessingErr> {
        let Pulse { beats, activity, times, .. } = self.engine.heartbeat().read();
        let slow_down = times.slow_down();
        if slow_down.is_some() != self.is_slow {
            self.is_slow = slow_down.is_some();
            self.args.task.report(ShardReport::Speed(slow_down));
        }
        let silence = self.watchdog.check(beats, self.started.elapsed());
        let timeouts = &self.args.hang_timeouts;
        let (from, timeout) = match activity {
            EngineActivity::Waiting => return Ok(()),
            EngineActivity::Loading => ("loading".to_owned(), timeouts.load),
            EngineActivity::Step { rows } => {
                (format!("a step of {rows} rows"), timeouts.for_step_on(self.args.kind, rows, &times))
            }
        };
        if silence <= timeout {
            return Ok(());
        }
        let seconds = silence.as_secs();
        self.fail(match self.engine.kill() {
            true => EngineError::Killed { from, seconds },
            false => EngineError::Hung { from, seconds },
        })
    }

    fn fail(&self, error: EngineError) -> Result<(), ActorProcessingErr> {
        let layers = self.args.task.engine.spec.layers.clone();
        Err(Box::new(ShardFailure { layers, error, end: self.engine.end() }))
    }
}
