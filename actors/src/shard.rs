//! Shard: one engine with layers [a, b) of one instance.
//!
//! - owns: the engine's thread;
//! - receives: what the thread reports;
//! - emits: progress as facts; itself to its instance, once it is loaded;
//! - dies when: its engine fails (with the engine's error), or it is stopped;
//! - supervised by: its device.

use crate::core::view::{Fact, InstanceId};
use crate::host::{self, EnginePort, HostEvent, HostTask};
use crate::outlet::{Facts, Outlet};
use exo_engines::EngineError;
use ractor::{Actor, ActorProcessingErr, ActorRef};

/// Which shard, of what, for whom.
#[derive(Debug, Clone)]
pub(crate) struct ShardTask {
    pub instance: InstanceId,
    pub stage: usize,
    pub host: HostTask,
    pub owner: Outlet<ShardReport>,
}

/// A loaded shard, as its instance gets it.
#[derive(Debug, Clone)]
pub(crate) struct LoadedShard {
    pub stage: usize,
    pub port: EnginePort,
}

/// What an instance hears of its shards.
#[derive(Debug)]
pub(crate) enum ShardReport {
    Up(LoadedShard),
    /// It failed; its device is at work on it.
    Down {
        stage: usize,
        error: EngineError,
    },
    /// It failed, and will not come back.
    Lost(EngineError),
}

#[derive(Debug)]
pub(crate) enum ShardMsg {
    Host(HostEvent),
}

#[derive(Debug)]
pub(crate) struct ShardArgs {
    pub task: ShardTask,
    pub facts: Facts,
}

#[derive(Debug)]
pub(crate) struct ShardState {
    args: ShardArgs,
    port: EnginePort,
}

/// Why a shard died.
#[derive(Debug, Clone, thiserror::Error)]
#[error("shard of layers {layers:?}: {error}")]
pub(crate) struct ShardFailure {
    pub layers: std::ops::Range<usize>,
    pub error: EngineError,
}

#[derive(Debug)]
pub(crate) struct Shard;

impl Actor for Shard {
    type Msg = ShardMsg;
    type State = ShardState;
    type Arguments = ShardArgs;

    async fn pre_start(&self, myself: ActorRef<ShardMsg>, args: ShardArgs) -> Result<ShardState, ActorProcessingErr> {
        let port = host::start(args.task.host.clone(), move |event| {
            // A shard that is gone needs no news of its thread.
            let _ = myself.send_message(ShardMsg::Host(event));
        })?;
        Ok(ShardState { args, port })
    }

    async fn post_stop(&self, _: ActorRef<ShardMsg>, state: &mut ShardState) -> Result<(), ActorProcessingErr> {
        state.port.stop();
        Ok(())
    }

    async fn handle(
        &self,
        _: ActorRef<ShardMsg>,
        message: ShardMsg,
        state: &mut ShardState,
    ) -> Result<(), ActorProcessingErr> {
        let ShardMsg::Host(event) = message;
        state.on_event(event)
    }
}

impl ShardState {
    fn on_event(&self, event: HostEvent) -> Result<(), ActorProcessingErr> {
        let ShardTask { instance, stage, host, owner } = &self.args.task;
        match event {
            HostEvent::Progress(progress) => self.args.facts.tell(Fact::ShardLoading {
                instance: *instance,
                stage: *stage,
                loaded_bytes: progress.loaded_bytes,
                total_bytes: progress.total_bytes,
            }),
            HostEvent::Loaded { report, warm_up } => {
                tracing::info!(
                    %instance, stage, layers = ?host.spec.layers, device = %host.device, fingerprint = report.fingerprint,
                    weight_bytes = report.weight_bytes, load_ms = report.elapsed.as_millis(), row_us = warm_up.row.as_micros(),
                    "shard loaded"
                );
                let shard = LoadedShard { stage: *stage, port: self.port.clone() };
                owner.tell(ShardReport::Up(shard));
            }
            HostEvent::Failed(error) => {
                let layers = host.spec.layers.clone();
                return Err(Box::new(ShardFailure { layers, error }));
            }
        }
        Ok(())
    }
}
