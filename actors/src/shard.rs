//! Shard: one engine with layers [a, b) of one instance.
//!
//! - owns: the engine's thread;
//! - receives: what the thread reports; looks whether it still gives signs of life;
//! - emits: progress, and itself once it is loaded, to whoever started it;
//! - dies when: its engine fails (with the engine's error) or hangs, or it is stopped;
//! - supervised by: its device.

use crate::core::patience::{Patience, Watchdog};
use crate::core::spec::InstanceId;
use crate::host::{self, EnginePort, HostEvent, HostTask, ThreadEnd, Work};
use crate::outlet::Outlet;
use exo_engines::EngineError;
use exo_engines::engine::{DeviceId, LoadProgress};
use ractor::{Actor, ActorProcessingErr, ActorRef};
use ractor_cluster::RactorMessage;
use std::time::{Duration, Instant};
use tokio_util::sync::CancellationToken;

/// How often it is looked whether the engine hangs.
const LOOK_EVERY: Duration = Duration::from_secs(1);

/// Which shard, of what, for whom.
#[derive(Debug, Clone)]
pub(crate) struct ShardTask {
    pub instance: InstanceId,
    pub stage: usize,
    pub host: HostTask,
    /// Numbers of a row between shards.
    pub hidden: usize,
    pub owner: Outlet<ShardReport>,
    /// Cancelled when nobody wants it any more.
    pub is_over: CancellationToken,
}

/// What whoever started a shard hears of it.
#[derive(Debug)]
pub(crate) enum ShardReport {
    Loading(LoadProgress),
    /// It is loaded, on this device, and takes so long for a row.
    Up {
        port: EnginePort,
        device: DeviceId,
        row: Duration,
        hidden: usize,
        /// Of its model.
        vocabulary: u32,
    },
    /// It failed; its device is at work on it.
    Down(EngineError),
    /// It failed, and will not come back.
    Lost(EngineError),
}

#[derive(Debug, RactorMessage)]
pub(crate) enum ShardMsg {
    Host(HostEvent),
    Look,
}

#[derive(Debug)]
pub(crate) struct ShardArgs {
    pub task: ShardTask,
    pub patience: Patience,
}

#[derive(Debug)]
pub(crate) struct ShardState {
    args: ShardArgs,
    port: EnginePort,
    started: Instant,
    watchdog: Watchdog,
}

/// Why a shard died.
#[derive(Debug, Clone, thiserror::Error)]
#[error("shard of layers {layers:?}: {error}")]
pub(crate) struct ShardFailure {
    pub layers: std::ops::Range<usize>,
    pub error: EngineError,
    /// Of the engine, which may hang on in its thread.
    pub end: ThreadEnd,
}

#[derive(Debug)]
pub(crate) struct Shard;

impl Actor for Shard {
    type Msg = ShardMsg;
    type State = ShardState;
    type Arguments = ShardArgs;

    async fn pre_start(&self, myself: ActorRef<ShardMsg>, args: ShardArgs) -> Result<ShardState, ActorProcessingErr> {
        myself.send_interval(LOOK_EVERY, || ShardMsg::Look);
        let port = host::start(args.task.host.clone(), move |event| {
            // A shard that is gone needs no news of its thread.
            let _ = myself.send_message(ShardMsg::Host(event));
        })?;
        Ok(ShardState { args, port, started: Instant::now(), watchdog: Watchdog::default() })
    }

    async fn handle(
        &self,
        _: ActorRef<ShardMsg>,
        message: ShardMsg,
        state: &mut ShardState,
    ) -> Result<(), ActorProcessingErr> {
        match message {
            ShardMsg::Host(event) => state.on_event(event),
            ShardMsg::Look => state.look(),
        }
    }
}

/// However the actor ends, be it killed with its device.
impl Drop for ShardState {
    fn drop(&mut self) {
        self.port.stop();
    }
}

impl ShardState {
    fn on_event(&self, event: HostEvent) -> Result<(), ActorProcessingErr> {
        let ShardTask { instance, stage, host, hidden, owner, .. } = &self.args.task;
        match event {
            HostEvent::Progress(progress) => owner.tell(ShardReport::Loading(progress)),
            HostEvent::Loaded { report, warm_up } => {
                tracing::info!(
                    %instance, stage, layers = ?host.spec.layers, device = %host.device, fingerprint = report.fingerprint,
                    weight_bytes = report.weight_bytes, load_ms = report.elapsed.as_millis(), row_us = warm_up.row.as_micros(),
                    "shard loaded"
                );
                let (port, device) = (self.port.clone(), host.device.clone());
                let vocabulary = u32::try_from(host.spec.architecture.vocabulary).unwrap_or(u32::MAX);
                owner.tell(ShardReport::Up { port, device, row: warm_up.row, hidden: *hidden, vocabulary });
            }
            HostEvent::Failed(error) => return self.fail(error),
        }
        Ok(())
    }

    /// Whoever waits for an engine that hangs would wait for ever.
    fn look(&mut self) -> Result<(), ActorProcessingErr> {
        let (signs, work) = self.port.pulse().look();
        let silence = self.watchdog.look(signs, self.started.elapsed());
        let patience = &self.args.patience;
        let (from, within) = match work {
            Work::Waiting => return Ok(()),
            Work::Loading => ("loading".to_owned(), patience.load),
            Work::Step { rows } => (format!("a step of {rows} rows"), patience.with_step(rows)),
        };
        if silence <= within {
            return Ok(());
        }
        self.fail(EngineError::Hung { from, seconds: silence.as_secs() })
    }

    fn fail(&self, error: EngineError) -> Result<(), ActorProcessingErr> {
        let layers = self.args.task.host.spec.layers.clone();
        Err(Box::new(ShardFailure { layers, error, end: self.port.end() }))
    }
}
