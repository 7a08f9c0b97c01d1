//! What the commands that run a model share: choosing it, starting a node, showing how it loads.

use super::progress::Display;
use super::remote::{Remote, RemoteAnswer};
use crate::config::data_folder;
use crate::{
    DeviceId, Fact, GenerateRequest, Generated, Generation, ModelSpec, Node, NodeBuilder, NodeHandle, Phase, Policy,
    Recipe, Split, State,
};
use clap::Args;
use exo_actors::RunningModel;
use exo_actors::core::plan::Placement;
use exo_actors::models::ResolvedModel;
use serde::Serialize;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

/// Which model, and on what.
#[derive(Debug, Clone, Args)]
pub(super) struct ModelArguments {
    /// Name, path to a .gguf file or to a folder with safetensors, or hub name (owner/name, owner/name:file.gguf)
    pub(super) model: String,
    /// Split the model over this many shards
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    pub(super) shards: Option<u32>,
    /// Split the model by hand: nodes' names or ids, and the layers of each, first to last
    #[arg(long, value_name = "NODE:FIRST-LAST,…", conflicts_with = "shards")]
    pub(super) split: Option<Split>,
    /// What the placement is to be good at: latency, throughput or fewest-nodes
    #[arg(long, value_name = "POLICY", default_value = "latency")]
    pub(super) policy: Policy,
    /// Threads of each engine of this process [default: all cores]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=1024))]
    pub(super) threads: Option<u32>,
    /// Device to run on, such as cpu or candle:cpu [default: the best there is]
    #[arg(long, value_name = "DEVICE")]
    pub(super) device: Option<String>,
    /// Tokens of prompt and answer together [default: the model's, at most 4096]
    #[arg(long, value_name = "TOKENS", value_parser = clap::value_parser!(u32).range(1..))]
    pub(super) context: Option<u32>,
    /// Quantise dense weights while they are loaded: q4_0, q4_k or q8_0
    #[arg(long, value_name = "TYPE")]
    pub(super) quantize: Option<Recipe>,
    /// Folder of this node's identity and settings; models lie in the shared cache
    #[arg(long, value_name = "FOLDER")]
    pub(super) data_dir: Option<PathBuf>,
    /// Load the model in this process, even where a node is running on the data folder
    #[arg(long)]
    pub(super) standalone: bool,
}

impl ModelArguments {
    pub(super) fn spec(&self) -> ModelSpec {
        let named = ModelSpec::new(self.model.clone());
        ModelSpec {
            shards: self.shards.map(|shards| shards as usize),
            device: self.device.clone().map(DeviceId),
            context_tokens: self.context,
            quantize: self.quantize.or(named.quantize),
            split: self.split.clone(),
            policy: self.policy,
            model: named.model,
        }
    }

    /// The node that is running on the data folder, where there is one and it is to be used.
    pub(super) async fn running_node(&self) -> anyhow::Result<Option<Remote>> {
        if self.standalone {
            return Ok(None);
        }
        let running = Remote::find(&data_folder(self.data_dir.as_deref())?).await;
        if running.is_some() && self.threads.is_some() {
            anyhow::bail!("--threads is the running node's to choose: stop it, or add --standalone");
        }
        Ok(running)
    }

    /// A node for this command.
    pub(super) async fn start_node(&self, display: &Arc<Display>) -> anyhow::Result<NodeHandle> {
        let mut builder = builder(self.data_dir.as_deref(), display);
        if let Some(threads) = self.threads {
            builder = builder.threads(threads as usize);
        }
        Ok(builder.start().await?)
    }
}

/// A node in `data_dir`, whose downloads are shown.
fn builder(data_dir: Option<&Path>, display: &Arc<Display>) -> NodeBuilder {
    let display = Arc::clone(display);
    let builder = Node::builder().on_fetch(move |progress| display.fetch(progress));
    match data_dir {
        Some(folder) => builder.data_dir(folder),
        None => builder,
    }
}

/// Brings a model's files onto this machine; `None` where Ctrl-C came first.
pub(super) async fn pull(
    model: &str,
    data_dir: Option<&Path>,
    display: &Arc<Display>,
) -> anyhow::Result<Option<Arc<ResolvedModel>>> {
    let node = builder(data_dir, display).start().await?;
    let pulled = tokio::select! {
        pulled = node.pull(model) => Some(pulled?),
        _ = tokio::signal::ctrl_c() => None,
    };
    display.clear();
    node.shutdown().await;
    Ok(pulled)
}

/// A model that is loaded, and how long that took.
pub(super) struct Loaded {
    pub(super) model: RunningModel,
    pub(super) load: Duration,
}

/// Loads the model, and shows how far it is.
pub(super) async fn load(node: &NodeHandle, arguments: &ModelArguments, display: &Display) -> anyhow::Result<Loaded> {
    let mut facts = node.subscribe().await?;
    let loading = node.load(arguments.spec());
    tokio::pin!(loading);
    // Measured from the placement: a download is no part of a load.
    let mut placed = Instant::now();
    let model = loop {
        tokio::select! {
            model = &mut loading => break model?,
            fact = facts.next() => {
                if let Ok(Some(Fact::InstancePlaced { .. })) = fact {
                    placed = Instant::now();
                }
                if let Some(Phase::Loading { loaded_bytes, total_bytes }) =
                    facts.state().instances.values().next_back().map(|instance| instance.phase.clone())
                {
                    display.load(loaded_bytes, total_bytes);
                }
            }
        }
    };
    display.clear();
    Ok(Loaded { model, load: placed.elapsed() })
}

/// A shard of the pipeline, as scripts see it.
#[derive(Debug, Serialize)]
pub(super) struct StageReport {
    node: String,
    pub(super) device: String,
    engine: String,
    /// First, and the one behind the last.
    layers: [usize; 2],
}

/// The shards of `placement`.
pub(super) fn stages(state: &State, placement: &Placement) -> Vec<StageReport> {
    let engine_of = |device: &DeviceId| {
        let report = state.devices.iter().find(|report| report.id == *device);
        report.map(|report| report.engine.clone()).unwrap_or_default()
    };
    let stages = placement.stages.iter().map(|stage| StageReport {
        node: stage.node.to_string(),
        device: stage.device.to_string(),
        engine: engine_of(&stage.device),
        layers: [stage.layers.start, stage.layers.end],
    });
    stages.collect()
}

/// Who answers: a node of this process, or the one that is running.
pub(super) enum Session {
    Own { node: NodeHandle, loaded: Box<Loaded> },
    Running(Remote),
}

/// An answer on its way. Dropping it cancels the work.
pub(super) enum Answering {
    Own(Generation),
    Running(RemoteAnswer),
}

/// What has answered.
pub(super) struct Answered {
    pub(super) model: String,
    /// `None`: the model has left meanwhile.
    pub(super) quantization: Option<String>,
    pub(super) stages: Vec<StageReport>,
    /// `None` where the running node had it.
    pub(super) load: Option<Duration>,
}

impl Session {
    /// The running node, or one that is started for `arguments`; `None` where Ctrl-C came first.
    pub(super) async fn open(arguments: &ModelArguments, display: &Arc<Display>) -> anyhow::Result<Option<Self>> {
        if let Some(remote) = arguments.running_node().await? {
            return Ok(Some(Self::Running(remote)));
        }
        let node = arguments.start_node(display).await?;
        tokio::select! {
            loaded = load(&node, arguments, display) => {
                let loaded = Box::new(loaded?);
                Ok(Some(Self::Own { node, loaded }))
            }
            _ = tokio::signal::ctrl_c() => {
                display.clear();
                Ok(None)
            }
        }
    }

    /// Whether the model is known to continue texts only.
    pub(super) fn is_base_model(&self) -> bool {
        match self {
            Self::Own { loaded, .. } => loaded.model.tokenizer.template().is_none(),
            Self::Running(_) => false,
        }
    }

    pub(super) async fn generate(&self, request: GenerateRequest) -> anyhow::Result<Answering> {
        match self {
            Self::Own { node, .. } => Ok(Answering::Own(node.generate(request)?)),
            Self::Running(remote) => Ok(Answering::Running(remote.generate(&request).await?)),
        }
    }

    /// What has answered a request for `spec`.
    pub(super) async fn answered(&self, spec: &ModelSpec) -> anyhow::Result<Answered> {
        match self {
            Self::Own { node, loaded } => {
                let Loaded { model, load } = &**loaded;
                Ok(Answered {
                    model: model.model.name.clone(),
                    quantization: Some(model.model.files.quantization.clone()),
                    stages: stages(&node.state().await?, &model.placement),
                    load: Some(*load),
                })
            }
            Self::Running(remote) => {
                let state = remote.state().await?;
                let name = spec.to_string();
                // The newest of them, where the model runs in several ways. It may have left by now: the answer is there.
                let found = state.everywhere().map(|(_, instance)| instance);
                let found = found.filter(|instance| instance.model.name == name);
                let instance = found.max_by_key(|instance| (instance.phase == Phase::Ready, instance.epoch));
                Ok(Answered {
                    model: name,
                    quantization: instance.map(|instance| instance.model.quantization.clone()),
                    stages: instance.map(|instance| stages(&state, &instance.placement)).unwrap_or_default(),
                    load: None,
                })
            }
        }
    }

    pub(super) async fn close(self) {
        if let Self::Own { node, loaded } = self {
            drop(loaded);
            node.shutdown().await;
        }
    }
}

impl Answering {
    /// The next event; `None` behind the last.
    pub(super) async fn next(&mut self) -> Option<anyhow::Result<Generated>> {
        match self {
            Self::Own(generation) => generation.next().await.map(|event| event.map_err(Into::into)),
            Self::Running(answer) => answer.next().await,
        }
    }
}

pub(super) fn milliseconds(duration: Duration) -> f64 {
    duration.as_secs_f64() * 1e3
}

/// Things per second; 0 where no time passed.
pub(super) fn rate(count: usize, duration: Duration) -> f64 {
    let seconds = duration.as_secs_f64();
    if seconds > 0.0 { count as f64 / seconds } else { 0.0 }
}
