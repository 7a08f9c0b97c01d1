//! The thread of an engine, and the frames that shards pass on.
//!
//! ```text
//! head ─Frame─► thread of stage 0 ─Frame─► … ─► thread of the last stage, with the sampler ─StepResult─► head
//! ```
//! Frames for another node leave over a link (`links.rs`). The engine is created, used and dropped on its thread. A
//! step passes no actor: each thread hands its output to the next. An engine's error or panic ends its thread, and is
//! reported once. An engine in a process of its own can be killed from any thread; its own thread then waits until the
//! process is gone, and holds its memory until then.

use super::draws::Draws;
use super::heartbeat::{EngineActivity, Heartbeat};
use super::killer::Killer;
use super::machine::held_bytes;
use super::memory_guard::MemoryGuard;
use crate::core::scheduler::SamplerOperation;
use crate::core::spec::InstanceId;
use crate::transport::callback::EventCallback;
use exo_engines::engine::{
    DeviceId, EngineFactory, Incarnation, Input, LoadProgress, LoadReport, Output, OutputRows, SeqId, ShardSpec, Step,
    StepId, WarmUpReport,
};
use exo_engines::model::WeightSource;
use exo_engines::sampler::{SampleError, Sampled, Sampler, TokenSampler};
use exo_engines::{Engine, EngineError};
use serde::{Deserialize, Serialize};
use std::ops::ControlFlow;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, SyncSender, TrySendError, sync_channel};
use std::sync::{Arc, Weak};
use std::time::{Duration, Instant};
use tokio::sync::mpsc;

/// The most commands that wait for a thread. The head keeps at most one frame per stage in flight, and connects the
/// shards once per incarnation, so the queue is never full while the thread works.
const COMMANDS_MAX: usize = 64;
/// How often a load reports its progress to users.
const PROGRESS_EVERY: Duration = Duration::from_millis(50);

/// A step with its input, on its way through the pipeline.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Frame {
    pub step: Step,
    pub input: Input,
    /// Operations of the sampler, which runs beside the last shard.
    pub samplers: Vec<SamplerOperation>,
}

/// The sampled tokens of a step.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(crate) struct StepResult {
    pub incarnation: Incarnation,
    pub id: StepId,
    /// A token or an error for each row that wants logits, but for the rejected rows of drafts.
    pub tokens: Vec<(SeqId, Result<Sampled, SampleError>)>,
}

/// The receiver of a shard's output.
#[derive(Clone)]
pub(crate) enum Next {
    Shard(EngineHandle),
    /// The head. The callback never blocks.
    Head(Arc<dyn Fn(StepResult) + Send + Sync>),
    /// A link to a shard or the head on another node.
    Link(LinkQueue),
}

/// The output that an engine's thread sends over a link.
#[derive(Debug)]
pub(crate) enum EngineOutput {
    Frame(Frame),
    Result(StepResult),
}

/// The queue of a link to another node. Sending never blocks.
#[derive(Debug, Clone)]
pub(crate) struct LinkQueue {
    queue: mpsc::Sender<EngineOutput>,
    cut: EventCallback<String>,
}

impl LinkQueue {
    /// Creates a handle that sends into `queue`, and calls `cut` if the queue is full.
    pub(crate) fn new(queue: mpsc::Sender<EngineOutput>, cut: EventCallback<String>) -> Self {
        Self { queue, cut }
    }

    fn send(&self, output: EngineOutput) {
        // If the channel is closed, the link's task has ended and has reported why.
        if let Err(mpsc::error::TrySendError::Full(_)) = self.queue.try_send(output) {
            self.cut.tell("the link's queue is full: more steps are in flight than the pipeline has stages".to_owned());
        }
    }
}

impl std::fmt::Debug for Next {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Shard(_) => "Shard",
            Self::Head(_) => "Head",
            Self::Link(_) => "Link",
        })
    }
}

enum Command {
    Wire { incarnation: Incarnation, next: Next },
    Frame(Box<Frame>),
    Stop,
}

/// Shows whether an engine's thread has ended, for the device that has given up the thread.
#[derive(Debug, Clone)]
pub(crate) struct ThreadEnd(Weak<()>);

impl ThreadEnd {
    pub(crate) fn has_ended(&self) -> bool {
        self.0.strong_count() == 0
    }
}

/// The handle of an engine's thread.
#[derive(Clone)]
pub(crate) struct EngineHandle {
    commands: SyncSender<Command>,
    /// Checked between two tensors of a load, during which the thread reads no commands.
    is_stopped: Arc<AtomicBool>,
    heartbeat: Heartbeat,
    end: ThreadEnd,
    killer: Killer,
}

impl std::fmt::Debug for EngineHandle {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("EngineHandle")
    }
}

/// The error of a thread that accepts no commands, because it has ended, or hangs with a full queue.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("the engine's thread accepts no commands")]
pub(crate) struct EngineUnresponsive;

impl EngineHandle {
    /// Begins an incarnation. The thread drops frames of other incarnations from now on.
    pub(crate) fn wire(&self, incarnation: Incarnation, next: Next) -> Result<(), EngineUnresponsive> {
        self.command(Command::Wire { incarnation, next })
    }

    /// Sends a frame. Never blocks.
    pub(crate) fn send(&self, frame: Frame) -> Result<(), EngineUnresponsive> {
        self.command(Command::Frame(Box::new(frame)))
    }

    pub(crate) fn heartbeat(&self) -> &Heartbeat {
        &self.heartbeat
    }

    /// The number of the engine's process, if it has one of its own.
    pub(crate) fn process_id(&self) -> Option<u32> {
        self.killer.process_id()
    }

    pub(crate) fn end(&self) -> ThreadEnd {
        self.end.clone()
    }

    /// Kills the engine's process. Returns false if the engine runs in this process, where it cannot be killed.
    pub(crate) fn kill(&self) -> bool {
        self.killer.kill()
    }

    /// Ends the thread after its current step; a load is interrupted. The process of a busy engine is killed: nobody
    /// waits for its work.
    pub(crate) fn stop(&self) {
        self.is_stopped.store(true, Ordering::Relaxed);
        if self.heartbeat.activity() != EngineActivity::Waiting {
            self.kill();
        }
        // A thread that accepts no commands has ended, or hangs for good.
        let _ = self.command(Command::Stop);
    }

    fn command(&self, command: Command) -> Result<(), EngineUnresponsive> {
        self.commands.try_send(command).map_err(|error| match error {
            TrySendError::Full(_) | TrySendError::Disconnected(_) => EngineUnresponsive,
        })
    }
}

/// A report of an engine's thread to its shard.
#[derive(Debug, Clone)]
pub(crate) enum EngineEvent {
    Progress(LoadProgress),
    Loaded {
        report: LoadReport,
        warm_up: WarmUpReport,
        /// The memory that the engine's process holds; `None` for an engine in this process.
        held_bytes: Option<u64>,
    },
    /// The thread has ended.
    Failed(EngineError),
}

/// The shard that a thread loads and serves.
#[derive(Debug, Clone)]
pub(crate) struct EngineTask {
    /// The instance and the stage, for the log.
    pub instance: InstanceId,
    pub stage: usize,
    pub factory: Arc<dyn EngineFactory>,
    pub device: DeviceId,
    pub spec: ShardSpec,
    pub weights: Arc<WeightSource>,
    /// Held until the engine is dropped.
    pub memory: Arc<MemoryGuard>,
}

/// Starts a thread that loads a shard and then serves it.
///
/// # Errors
/// The operating system's error if it cannot start a thread.
pub(crate) fn start(task: EngineTask, on: impl Fn(EngineEvent) + Send + 'static) -> std::io::Result<EngineHandle> {
    let (commands, receiver) = sync_channel(COMMANDS_MAX);
    let is_stopped = Arc::new(AtomicBool::new(false));
    let heartbeat = Heartbeat::default();
    let alive = Arc::new(());
    let end = ThreadEnd(Arc::downgrade(&alive));
    let killer = Killer::default();
    let engine = EngineHandle {
        commands,
        is_stopped: Arc::clone(&is_stopped),
        heartbeat: heartbeat.clone(),
        end,
        killer: killer.clone(),
    };
    let span = tracing::info_span!("shard", instance = %task.instance, stage = task.stage, layers = ?task.spec.layers);
    let name = format!("shard-{}-{}", task.spec.layers.start, task.spec.layers.end);
    std::thread::Builder::new().name(name).spawn(move || {
        let _alive = alive;
        let _entered = span.entered();
        let outcome = catch_unwind(AssertUnwindSafe(|| {
            let engine = task.factory.open(&task.device)?;
            killer.opened(engine.process());
            serve(engine, &task, &receiver, &is_stopped, &heartbeat, &on)
        }));
        let error = match outcome {
            Ok(Ok(()) | Err(EngineError::Interrupted)) => return,
            Ok(Err(error)) => error,
            Err(panic) => EngineError::of_panic(&*panic),
        };
        on(EngineEvent::Failed(error));
    })?;
    Ok(engine)
}

fn serve(
    mut engine: Box<dyn Engine>,
    task: &EngineTask,
    commands: &Receiver<Command>,
    is_stopped: &AtomicBool,
    heartbeat: &Heartbeat,
    on: &impl Fn(EngineEvent),
) -> Result<(), EngineError> {
    let tested = engine.self_test()?;
    tracing::debug!(step_us = tested.step.as_micros(), "the self-test has passed");
    let mut told: Option<Instant> = None;
    let report = engine.load(&task.spec, &task.weights, &mut |progress| {
        heartbeat.beat(EngineActivity::Loading);
        let is_last = progress.loaded_bytes >= progress.total_bytes;
        if is_last || told.is_none_or(|at| at.elapsed() >= PROGRESS_EVERY) {
            told = Some(Instant::now());
            on(EngineEvent::Progress(progress));
        }
        if is_stopped.load(Ordering::Relaxed) { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
    })?;
    let warm_up = engine.warm_up()?;
    heartbeat.beat(EngineActivity::Waiting);
    heartbeat.note_memory(report.weight_bytes);
    let held_bytes = engine.process().and_then(|process| held_bytes(process.id()));
    on(EngineEvent::Loaded { report, warm_up, held_bytes });
    let mut wired: Option<(Incarnation, Next)> = None;
    let mut sampler = TokenSampler::default();
    while let Ok(command) = commands.recv() {
        match command {
            Command::Stop => break,
            Command::Wire { incarnation, .. } if wired.as_ref().is_some_and(|(known, _)| *known > incarnation) => {
                tracing::debug!(epoch = incarnation.epoch, "ignored an order to connect for an earlier incarnation");
            }
            Command::Wire { incarnation, next } => {
                sampler = TokenSampler::default();
                wired = Some((incarnation, next));
            }
            Command::Frame(frame) => match &wired {
                Some((incarnation, next)) if *incarnation == frame.step.incarnation => {
                    heartbeat.beat(EngineActivity::Step { rows: frame.step.rows.len() });
                    // A stop from now on sees the step, and kills the engine's process.
                    if is_stopped.load(Ordering::Relaxed) {
                        break;
                    }
                    let bytes = run_step(&mut *engine, &mut sampler, &task.spec, *frame, next)?;
                    heartbeat.note_memory(bytes);
                    heartbeat.beat(EngineActivity::Waiting);
                }
                _ => tracing::debug!(epoch = frame.step.incarnation.epoch, "dropped a frame of another incarnation"),
            },
        }
    }
    Ok(())
}

/// Computes a frame, and sends the output to `next`. Returns the memory in use.
fn run_step(
    engine: &mut dyn Engine,
    sampler: &mut dyn Sampler,
    spec: &ShardSpec,
    frame: Frame,
    next: &Next,
) -> Result<u64, EngineError> {
    let Frame { step, input, samplers } = frame;
    if !spec.is_last() {
        let Output { rows: OutputRows::Hidden(hidden), memory_bytes, .. } = engine.forward(&step, input, &[])? else {
            return Err(EngineError::BadStep { what: "an inner shard gave scores".to_owned() });
        };
        let frame = Frame { step, input: Input::Hidden(hidden), samplers };
        match next {
            // If the next shard has stopped, its own device reports that.
            Next::Shard(engine) => drop(engine.send(frame)),
            Next::Link(link) => link.send(EngineOutput::Frame(frame)),
            Next::Head(_) => return Err(EngineError::BadStep { what: "the head got hidden rows".to_owned() }),
        }
        return Ok(memory_bytes);
    }
    let draws = Draws::prepare(sampler, samplers, &step.rows, spec.architecture.vocabulary);
    let output = engine.forward(&step, input, draws.queries())?;
    let Output { rows: OutputRows::Scores(scores), memory_bytes, .. } = output else {
        return Err(EngineError::BadStep { what: "the last shard gave hidden rows".to_owned() });
    };
    let tokens = draws.draw(sampler, engine, &scores)?;
    let result = StepResult { incarnation: step.incarnation, id: step.id, tokens };
    match next {
        Next::Head(head) => head(result),
        Next::Link(link) => link.send(EngineOutput::Result(result)),
        Next::Shard(_) => return Err(EngineError::BadStep { what: "a shard got sampled tokens".to_owned() }),
    }
    Ok(memory_bytes)
}
