//! A session with a model, on a node in this process or on the running node.

use super::client::{ClientAnswer, NodeClient};
use super::model_args::ModelArguments;
use super::progress::Display;
use super::report::{StageReport, stages};
use crate::{Answerer, Fact, GenerateRequest, Generated, Generation, ModelSpec, NodeHandle, Phase, RunningModel};
use std::sync::Arc;
use std::time::{Duration, Instant};

/// A loaded model, and the time that the load took.
pub(super) struct Loaded {
    pub(super) model: RunningModel,
    pub(super) load: Duration,
}

/// Loads a model, and shows the progress.
pub(super) async fn load(node: &NodeHandle, arguments: &ModelArguments, display: &Display) -> anyhow::Result<Loaded> {
    let mut facts = node.subscribe().await?;
    let loading = node.load(arguments.spec());
    tokio::pin!(loading);
    // The load is measured from the placement, so that it does not include a download.
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

/// A session with a node in this process, or with the running node.
pub(super) enum Session {
    Own { node: NodeHandle, loaded: Box<Loaded> },
    Running(NodeClient),
}

/// A running answer. Dropping it cancels the request.
pub(super) enum Answering {
    Own(Generation),
    Running(ClientAnswer),
}

/// The model and placement that answered a request.
pub(super) struct Answered {
    pub(super) model: String,
    /// The type of the weights; `None` where the answer did not begin.
    pub(super) quantization: Option<String>,
    pub(super) stages: Vec<StageReport>,
    /// The time that the load took; `None` where the running node answered.
    pub(super) load: Option<Duration>,
}

impl Session {
    /// Opens a session with the running node, or with a new node in this process; `None` after Ctrl-C.
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

    /// Reports what answered a request for `spec`: `by`, where the answer has started.
    pub(super) async fn answered(&self, spec: &ModelSpec, by: Option<&Answerer>) -> anyhow::Result<Answered> {
        let (status, load) = match self {
            Self::Own { node, loaded } => (node.status().await?, Some(loaded.load)),
            Self::Running(client) => (client.status().await?, None),
        };
        Ok(Answered {
            model: by.map_or_else(|| spec.to_string(), |by| by.model.clone()),
            quantization: by.map(|by| by.quantization.clone()),
            stages: by.map(|by| stages(&status, &by.placement)).unwrap_or_default(),
            load,
        })
    }

    pub(super) async fn close(self) {
        if let Self::Own { node, loaded } = self {
            drop(loaded);
            node.shutdown().await;
        }
    }
}

impl Answering {
    /// The next event; `None` after the last.
    pub(super) async fn next(&mut self) -> Option<anyhow::Result<Generated>> {
        match self {
            Self::Own(generation) => generation.next().await.map(|event| event.map_err(Into::into)),
            Self::Running(answer) => answer.next().await,
        }
    }
}
