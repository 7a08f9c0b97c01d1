//! The arguments that choose a model and how it runs, and the node that runs it.

use super::client::NodeClient;
use super::engine_args::EngineArguments;
use super::progress::Display;
use crate::config::data_folder;
use crate::{
    ActivationBits, DeviceId, KvElement, ModelSpec, Node, NodeBuilder, NodeHandle, Policy, Recipe, Speculation, Split,
};
use clap::Args;
use exo_actors::models::{ModelName, ResolvedModel, absolute_path};
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// The model, and how it runs.
#[derive(Debug, Clone, Args)]
pub(super) struct ModelArguments {
    /// Catalogue name, path of a .gguf file or safetensors folder, or hub name (owner/name, owner/name:file.gguf)
    pub(super) model: String,
    /// Split the model over this many shards
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    pub(super) shards: Option<u32>,
    /// Split the model by hand: a node's name or id and its layers, from the first layers to the last
    #[arg(long, value_name = "NODE:FIRST-LAST,…", conflicts_with = "shards")]
    pub(super) split: Option<Split>,
    /// What the placement optimises: latency, throughput or fewest-nodes
    #[arg(long, value_name = "POLICY", default_value = "latency")]
    pub(super) policy: Policy,
    #[command(flatten)]
    pub(super) engines: EngineArguments,
    /// Device to run on, such as cpu or candle:cpu [default: the best one]
    #[arg(long, value_name = "DEVICE")]
    pub(super) device: Option<String>,
    /// Context length: tokens of prompt and answer together [default: the model's, as far as memory allows]
    #[arg(long, value_name = "TOKENS", value_parser = clap::value_parser!(u32).range(1..))]
    pub(super) context: Option<u32>,
    /// Quantise dense weights while they are loaded: q4_0, q4_k or q8_0
    #[arg(long, value_name = "TYPE")]
    pub(super) quantize: Option<Recipe>,
    /// Type of the cached keys and values: f16, f32, or q8_0 for half the memory and a little less accuracy [default:
    /// f16]
    #[arg(long, value_name = "TYPE")]
    pub(super) kv_cache: Option<KvElement>,
    /// Bits of activations in matrix products: 8 computes prompts and batches 1.5 to 1.8 times as fast as 16, a little
    /// less accurately [default: 16]
    #[arg(long, value_name = "BITS")]
    pub(super) activations: Option<ActivationBits>,
    /// How to guess tokens ahead, which are checked together: lookup repeats what followed the same tokens earlier in
    /// the text, none is off. The answers are the same [default: lookup, but none in bench]
    #[arg(long, value_name = "METHOD")]
    pub(super) speculate: Option<Speculation>,
    /// Smaller model with the same tokens that guesses tokens ahead where the text does not repeat; it runs beside the
    /// model, and the answers are the same
    #[arg(long, value_name = "MODEL")]
    pub(super) draft: Option<String>,
    /// Folder of this node's identity and settings; models are in the shared cache
    #[arg(long, value_name = "FOLDER")]
    pub(super) data_dir: Option<PathBuf>,
    /// Load the model in this process, even where a node is running on the data folder
    #[arg(long)]
    pub(super) standalone: bool,
}

impl ModelArguments {
    pub(super) fn spec(&self) -> ModelSpec {
        let named = ModelSpec::new(&self.model);
        ModelSpec {
            shards: self.shards.map(|shards| shards as usize),
            device: self.device.clone().map(DeviceId),
            context_tokens: self.context,
            quantize: self.quantize.or(named.quantize),
            kv_cache: self.kv_cache,
            activations: self.activations,
            speculation: self.speculate.unwrap_or_default(),
            draft: self.draft.as_deref().map(absolute_with_recipe),
            split: self.split.clone(),
            policy: self.policy,
            model: absolute(&named.model),
        }
    }

    /// A client of the node that runs on the data folder; `None` where no node runs, or with `--standalone`.
    pub(super) async fn running_node(&self) -> anyhow::Result<Option<NodeClient>> {
        note_path(&self.model);
        if self.standalone {
            return Ok(None);
        }
        let running = NodeClient::find(&data_folder(self.data_dir.as_deref())?).await?;
        if running.is_some() && self.engines.is_given() {
            anyhow::bail!(
                "--threads, --isolate and --no-isolate have no effect on the running node: stop that node, or add \
                 --standalone"
            );
        }
        Ok(running)
    }

    /// Starts a node in this process.
    pub(super) async fn start_node(&self, display: &Arc<Display>) -> anyhow::Result<NodeHandle> {
        let builder = builder(self.data_dir.as_deref(), display);
        Ok(self.engines.apply(builder).start().await?)
    }
}

/// The name of a model with a path made absolute, since a running node has a working directory of its own. A bare file
/// name that is not in this working directory stays as it is: it may be in a models folder.
fn absolute(model: &str) -> String {
    let model = expand_home(model);
    let is_bare = !model.contains('/');
    let path = match ModelName::parse(&model) {
        ModelName::Path(path) if !is_bare || path.exists() => absolute_path(&path).ok(),
        _ => None,
    };
    path.map_or(model, |path| path.display().to_string())
}

/// [`absolute`], of a name that may end with a recipe.
pub(super) fn absolute_with_recipe(model: &str) -> String {
    let named = ModelSpec::new(model);
    ModelSpec { model: absolute(&named.model), ..named }.to_string()
}

/// The name of a model with the home folder for a leading `~/`, which a shell leaves in place within quotes.
pub(super) fn expand_home(model: &str) -> String {
    match (model.strip_prefix("~/"), directories::BaseDirs::new()) {
        (Some(rest), Some(folders)) => folders.home_dir().join(rest).display().to_string(),
        _ => model.to_owned(),
    }
}

/// Warns if the working directory has a file or folder with the name of a model outside the catalogue: the name does
/// not mean that path.
pub(super) fn note_path(model: &str) {
    let model = &ModelSpec::new(model).model;
    let is_other = matches!(ModelName::parse(model), ModelName::Plain(_) | ModelName::Hub(_));
    if is_other && Path::new(model).exists() {
        eprintln!("note: `{model}` is a name, not a path: for the path in this folder write ./{model}");
    }
}

/// A builder of a node on `data_dir` that shows downloads on `display`.
fn builder(data_dir: Option<&Path>, display: &Arc<Display>) -> NodeBuilder {
    let display = Arc::clone(display);
    let builder = Node::builder().on_fetch(move |progress| display.fetch(progress));
    match data_dir {
        Some(folder) => builder.data_dir(folder),
        None => builder,
    }
}

/// Fetches a model's files to this machine; returns `None` after Ctrl-C.
pub(super) async fn pull(
    model: &str,
    data_dir: Option<&Path>,
    display: &Arc<Display>,
) -> anyhow::Result<Option<Arc<ResolvedModel>>> {
    note_path(model);
    let node = builder(data_dir, display).start().await?;
    let pulled = tokio::select! {
        pulled = node.pull(absolute(&ModelSpec::new(model).model)) => Some(pulled?),
        _ = tokio::signal::ctrl_c() => None,
    };
    display.clear();
    node.shutdown().await;
    Ok(pulled)
}
