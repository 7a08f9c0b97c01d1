//! An engine on a thread of its own, and the frames that pass from shard to shard.
//!
//! ```text
//! head ─Frame─► thread of stage 0 ─Frame─► … ─► thread of the last stage, with the sampler ─StepResult─► head
//! ```
//! What goes to another node leaves by a link (`links.rs`).
//! The engine is made, used and dropped on its thread. A step crosses no actor on its way: each thread hands its
//! output to the next. What an engine does wrong, a panic included, ends its thread and is reported once.

use crate::core::schedule::SamplerOperation;
use crate::outlet::Outlet;
use crate::room::Room;
use exo_engines::engine::{
    DeviceId, EngineFactory, Incarnation, Input, LoadProgress, LoadReport, OutputRows, Row, SeqId, ShardSpec, Step,
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
use std::sync::{Arc, Mutex, PoisonError, Weak};
use std::time::{Duration, Instant};
use tokio::sync::mpsc;

/// Commands that a thread may have waiting. The head keeps at most one frame per stage in flight, and a rewiring
/// comes once per life, so this is never full while the thread is well.
const COMMANDS_MAX: usize = 64;
/// Progress is for people: more often than this is of no use to them.
const PROGRESS_EVERY: Duration = Duration::from_millis(50);

/// A step on its way through the shards.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Frame {
    pub step: Step,
    pub input: Input,
    /// For the sampler beside the last shard.
    pub samplers: Vec<SamplerOperation>,
}

/// What a step came to.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(crate) struct StepResult {
    pub incarnation: Incarnation,
    pub id: StepId,
    /// For each row that wanted a token.
    pub tokens: Vec<(SeqId, Result<Sampled, SampleError>)>,
}

/// Where a shard's output goes.
#[derive(Clone)]
pub(crate) enum Next {
    Shard(EnginePort),
    /// To the head. Never blocks.
    Head(Arc<dyn Fn(StepResult) + Send + Sync>),
    /// To a shard, or the head, on another node.
    Link(Outgoing),
}

/// What an engine's thread gives to a link.
#[derive(Debug)]
pub(crate) enum Leaving {
    Frame(Frame),
    Result(StepResult),
}

/// An engine's way out of this node. Never blocks.
#[derive(Debug, Clone)]
pub(crate) struct Outgoing {
    queue: mpsc::Sender<Leaving>,
    cut: Outlet<String>,
}

impl Outgoing {
    /// Into `queue`; `cut` hears where it does not take what a pipeline can have on its way.
    pub(crate) fn new(queue: mpsc::Sender<Leaving>, cut: Outlet<String>) -> Self {
        Self { queue, cut }
    }

    fn send(&self, leaving: Leaving) {
        // Whoever takes from the queue has told why it ended, if it has.
        if let Err(mpsc::error::TrySendError::Full(_)) = self.queue.try_send(leaving) {
            self.cut.tell("more steps are on their way than a pipeline has".to_owned());
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

/// What an engine's thread is at.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(crate) enum Work {
    #[default]
    Loading,
    Waiting,
    Step {
        rows: usize,
    },
}

/// What an engine's thread is at, and how many signs of life it has given. For whoever looks from outside.
#[derive(Debug, Clone, Default)]
pub(crate) struct Pulse(Arc<Mutex<(u64, Work)>>);

impl Pulse {
    fn beat(&self, work: Work) {
        // Two numbers are whole between two statements, whatever panicked.
        let mut pulse = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        *pulse = (pulse.0 + 1, work);
    }

    pub(crate) fn look(&self) -> (u64, Work) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Whether an engine's thread has ended. For whoever has given it up.
#[derive(Debug, Clone)]
pub(crate) struct ThreadEnd(Weak<()>);

impl ThreadEnd {
    pub(crate) fn is_reached(&self) -> bool {
        self.0.strong_count() == 0
    }
}

/// A handle on an engine's thread.
#[derive(Clone)]
pub(crate) struct EnginePort {
    commands: SyncSender<Command>,
    /// Seen between two tensors, while commands wait for the shard to be loaded.
    is_stopped: Arc<AtomicBool>,
    pulse: Pulse,
    end: ThreadEnd,
}

impl std::fmt::Debug for EnginePort {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("EnginePort")
    }
}

/// The thread does not take commands: it has ended, or hangs with a full queue.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("the engine's thread does not answer")]
pub(crate) struct PortClosed;

impl EnginePort {
    /// Begins a life: frames of another are dropped from now on.
    pub(crate) fn wire(&self, incarnation: Incarnation, next: Next) -> Result<(), PortClosed> {
        self.command(Command::Wire { incarnation, next })
    }

    /// Sends a frame. Never blocks.
    pub(crate) fn send(&self, frame: Frame) -> Result<(), PortClosed> {
        self.command(Command::Frame(Box::new(frame)))
    }

    pub(crate) fn pulse(&self) -> &Pulse {
        &self.pulse
    }

    pub(crate) fn end(&self) -> ThreadEnd {
        self.end.clone()
    }

    /// Ends the thread when it has done what it is at; a load breaks off.
    pub(crate) fn stop(&self) {
        self.is_stopped.store(true, Ordering::Relaxed);
        // A thread that takes no more commands has ended, or will never.
        let _ = self.command(Command::Stop);
    }

    fn command(&self, command: Command) -> Result<(), PortClosed> {
        self.commands.try_send(command).map_err(|error| match error {
            TrySendError::Full(_) | TrySendError::Disconnected(_) => PortClosed,
        })
    }
}

/// What an engine's thread reports to its shard.
#[derive(Debug, Clone)]
pub(crate) enum HostEvent {
    Progress(LoadProgress),
    Loaded {
        report: LoadReport,
        warm_up: WarmUpReport,
    },
    /// The thread has ended.
    Failed(EngineError),
}

/// What a thread is to do.
#[derive(Debug, Clone)]
pub(crate) struct HostTask {
    pub factory: Arc<dyn EngineFactory>,
    pub device: DeviceId,
    pub spec: ShardSpec,
    pub weights: Arc<WeightSource>,
    /// Held until the engine is gone.
    pub _room: Arc<Room>,
}

/// Starts a thread that loads and then serves.
///
/// # Errors
/// The operating system's, where it gives no thread.
pub(crate) fn start(task: HostTask, on: impl Fn(HostEvent) + Send + 'static) -> std::io::Result<EnginePort> {
    let (commands, receiver) = sync_channel(COMMANDS_MAX);
    let is_stopped = Arc::new(AtomicBool::new(false));
    let pulse = Pulse::default();
    let lives = Arc::new(());
    let end = ThreadEnd(Arc::downgrade(&lives));
    let port = EnginePort { commands, is_stopped: Arc::clone(&is_stopped), pulse: pulse.clone(), end };
    let name = format!("shard-{}-{}", task.spec.layers.start, task.spec.layers.end);
    std::thread::Builder::new().name(name).spawn(move || {
        let _lives = lives;
        let outcome = catch_unwind(AssertUnwindSafe(|| serve(&task, &receiver, &is_stopped, &pulse, &on)));
        let error = match outcome {
            Ok(Ok(()) | Err(EngineError::Interrupted)) => return,
            Ok(Err(error)) => error,
            Err(panic) => EngineError::Panicked { what: panic_text(&*panic) },
        };
        on(HostEvent::Failed(error));
    })?;
    Ok(port)
}

fn panic_text(panic: &(dyn std::any::Any + Send)) -> String {
    let text = panic.downcast_ref::<&str>().map(|text| (*text).to_owned());
    text.or_else(|| panic.downcast_ref::<String>().cloned()).unwrap_or_else(|| "no message".to_owned())
}

fn serve(
    task: &HostTask,
    commands: &Receiver<Command>,
    is_stopped: &AtomicBool,
    pulse: &Pulse,
    on: &impl Fn(HostEvent),
) -> Result<(), EngineError> {
    let mut engine = task.factory.open(&task.device)?;
    let mut told: Option<Instant> = None;
    let report = engine.load(&task.spec, &task.weights, &mut |progress| {
        pulse.beat(Work::Loading);
        let is_last = progress.loaded_bytes >= progress.total_bytes;
        if is_last || told.is_none_or(|at| at.elapsed() >= PROGRESS_EVERY) {
            told = Some(Instant::now());
            on(HostEvent::Progress(progress));
        }
        if is_stopped.load(Ordering::Relaxed) { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
    })?;
    let warm_up = engine.warm_up()?;
    pulse.beat(Work::Waiting);
    on(HostEvent::Loaded { report, warm_up });
    let mut life: Option<(Incarnation, Next)> = None;
    let mut sampler = TokenSampler::default();
    let vocabulary = task.spec.architecture.vocabulary;
    while let Ok(command) = commands.recv() {
        match command {
            Command::Stop => break,
            Command::Wire { incarnation, .. } if life.as_ref().is_some_and(|(known, _)| *known > incarnation) => {
                tracing::debug!(epoch = incarnation.epoch, "not wired for a life that is over");
            }
            Command::Wire { incarnation, next } => {
                sampler = TokenSampler::default();
                life = Some((incarnation, next));
            }
            Command::Frame(frame) => match &life {
                Some((incarnation, next)) if *incarnation == frame.step.incarnation => {
                    pulse.beat(Work::Step { rows: frame.step.rows.len() });
                    pass(&mut *engine, &mut sampler, vocabulary, *frame, next)?;
                    pulse.beat(Work::Waiting);
                }
                _ => tracing::debug!(epoch = frame.step.incarnation.epoch, "dropped a frame of another life"),
            },
        }
    }
    Ok(())
}

/// One frame through the engine, and on to the next.
fn pass(
    engine: &mut dyn Engine,
    sampler: &mut dyn Sampler,
    vocabulary: usize,
    frame: Frame,
    next: &Next,
) -> Result<(), EngineError> {
    let Frame { step, input, samplers } = frame;
    let output = engine.forward(&step, input)?;
    match output.rows {
        OutputRows::Hidden(hidden) => {
            let frame = Frame { step, input: Input::Hidden(hidden), samplers };
            match next {
                // A next shard that is gone reports that itself.
                Next::Shard(port) => drop(port.send(frame)),
                Next::Link(link) => link.send(Leaving::Frame(frame)),
                Next::Head(_) => return Err(EngineError::BadStep { what: "the head takes no hidden rows".to_owned() }),
            }
        }
        OutputRows::Logits(logits) => {
            for operation in samplers {
                match operation {
                    SamplerOperation::Open { seq, spec } => sampler.open(seq, spec),
                    SamplerOperation::Close { seq } => sampler.close(seq),
                }
            }
            let tokens = draw(sampler, &step.rows, &logits, vocabulary);
            let result = StepResult { incarnation: step.incarnation, id: step.id, tokens };
            match next {
                Next::Head(head) => head(result),
                Next::Link(link) => link.send(Leaving::Result(result)),
                Next::Shard(_) => return Err(EngineError::BadStep { what: "a shard takes no tokens".to_owned() }),
            }
        }
    }
    Ok(())
}

fn draw(
    sampler: &mut dyn Sampler,
    rows: &[Row],
    logits: &[f32],
    vocabulary: usize,
) -> Vec<(SeqId, Result<Sampled, SampleError>)> {
    let wanting = rows.iter().filter(|row| row.wants_logits);
    let draws = wanting.zip(logits.chunks_exact(vocabulary));
    draws.map(|(row, logits)| (row.seq, sampler.sample(row.seq, row.position, logits))).collect()
}
