//! A session with a model: of a node of this process, or of the running one.

use super::client::{ClientAnswer, NodeClient};
use super::model_args::ModelArguments;
use super::progress::Display;
use super::report::{StageReport, stages};
use crate::{Fact, GenerateRequest, Generated, Generation, ModelSpec, NodeHandle, Phase, RunningModel};
use std::sync::Arc;
use std::time::{Duration, Instant};

/// A loaded model, and how long the load took.
pub(super) struct Loaded {
    pub(super) model: RunningModel,
    pub(super) load: Duration,
}

/// Loads the model, and shows the progress.
pub(super) async fn load(node: &NodeHandle, arguments: &ModelArguments, display: &Display) -> anyhow::Result<Loaded> {
    let mut facts = node.subscribe().await?;
    let loading = node.load(arguments.spec());
    tokio::pin!(loading);
    // Measured from the placement: the load does not include a download.
    let mut placed = Instant::now();
    let model = loop {
        tokio::select! {
            model = &mut loading => break model?,
            fact = facts.next() => {
                if let Ok(Some(Fact::InstancePlaced { .. })) = fact {
                    placed = Instant::now();
                }
                if let Some(Phase::Loading { loaded_bytes, total_bytes }) =
                    facts.status().instances.values().next_back().map(|instance| instance.phase.clone())
                {
                    display.load(loaded_bytes, total_bytes);
                }
            }
        }
    };
    display.clear();
    Ok(Loaded { model, load: placed.elapsed() })
}

/// Answers with a node of this process, or with the running one.
pub(super) enum Session {
    Own { node: NodeHandle, loaded: Box<Loaded> },
    Running(NodeClient),
}

/// An answer on its way. Dropping it cancels the request.
pub(super) enum Answering {
    Own(Generation),
    Running(ClientAnswer),
}

/// What has answered a request.
pub(super) struct Answered {
    pub(super) model: String,
    /// `None`: the model was unloaded meanwhile.
    pub(super) quantization: Option<String>,
    pub(super) stages: Vec<StageReport>,
    /// `None` where the running node had it loaded.
    pub(super) load: Option<Duration>,
}

impl Session {
    /// Opens a session with the running node, or with one that is started for `arguments`; `None` after Ctrl-C.
    pub(super) async fn open(arguments: &ModelArguments, display: &Arc<Display>) -> anyhow::Result<Option<Self>> {
        if let Some(client) = arguments.running_node().await? {
            return Ok(Some(Self::Running(client)));
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

    /// Whether the model is known to have no chat template.
    pub(super) fn is_base_model(&self) -> bool {
        match self {
            Self::Own { loaded, .. } => !loaded.model.has_chat_template(),
            Self::Running(_) => false,
        }
    }

    pub(super) async fn generate(&self, request: GenerateRequest) -> anyhow::Result<Answering> {
        match self {
            Self::Own { node, loaded } => Ok(Answering::Own(node.generate_with(&loaded.model, request)?)),
            Self::Running(client) => Ok(Answering::Running(client.generate(&request).await?)),
        }
    }

    /// What has answered a request for `spec`.
    pub(super) async fn answered(&self, spec: &ModelSpec) -> anyhow::Result<Answered> {
        match self {
            Self::Own { node, loaded } => {
                let Loaded { model, load } = &**loaded;
                Ok(Answered {
                    model: model.name().to_owned(),
                    quantization: Some(model.quantization().to_owned()),
                    stages: stages(&node.status().await?, model.placement()),
                    load: Some(*load),
                })
            }
            Self::Running(client) => {
                let status = client.status().await?;
                let name = spec.to_string();
                // The newest instance, where the model runs with several specs. It may have been unloaded by now.
                let found = status.everywhere().map(|(_, instance)| instance);
                let found = found.filter(|instance| instance.model.name == name);
                let instance = found.max_by_key(|instance| (instance.phase == Phase::Ready, instance.epoch));
                Ok(Answered {
                    model: name,
                    quantization: instance.map(|instance| instance.model.quantization.clone()),
                    stages: instance.map(|instance| stages(&status, &instance.placement)).unwrap_or_default(),
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
