//! `exo-node pull`: fetches and checks a model's files.

use super::model_args::pull;
use super::outcome::Outcome;
use super::progress::Display;
use crate::Origin;
use clap::Args;
use serde::Serialize;
use std::path::PathBuf;
use std::sync::Arc;

#[derive(Debug, Args)]
#[command(after_help = "Examples:
  exo-node pull smollm2
  exo-node pull Qwen/Qwen3-0.6B-GGUF:Qwen3-0.6B-Q8_0.gguf
An interrupted pull continues where it stopped. HF_TOKEN, HF_ENDPOINT and HF_HUB_OFFLINE are honoured.")]
pub(super) struct PullArguments {
    /// Catalogue name, path, or hub name (owner/name, owner/name:file.gguf)
    model: String,
    /// Folder of this node's identity and settings
    #[arg(long, value_name = "FOLDER")]
    data_dir: Option<PathBuf>,
    /// Print one JSON object on stdout
    #[arg(long)]
    json: bool,
}

#[derive(Debug, Serialize)]
struct Report {
    model: String,
    path: PathBuf,
    source: String,
    quantization: String,
    family: String,
    weight_bytes: u64,
}

pub(super) async fn run(arguments: PullArguments) -> anyhow::Result<Outcome> {
    let display = Arc::new(if arguments.json { Display::quiet() } else { Display::new() });
    let Some(model) = pull(&arguments.model, arguments.data_dir.as_deref(), &display).await? else {
        return Ok(Outcome::Interrupted);
    };
    let source = match &model.origin {
        Origin::Path => "the path given".to_owned(),
        Origin::Folder => "the models folder".to_owned(),
        Origin::Peers => "other nodes".to_owned(),
        Origin::Fetched { source } => source.clone(),
    };
    let report = Report {
        model: model.name.clone(),
        path: model.files.path.clone(),
        source,
        quantization: model.files.quantization.clone(),
        family: model.files.architecture.family.clone(),
        weight_bytes: model.files.weight_bytes(),
    };
    if arguments.json {
        println!("{}", serde_json::to_string(&report)?);
    } else {
        println!(
            "{} ({}, {}) from {}: {}",
            report.model,
            report.family,
            report.quantization,
            report.source,
            report.path.display()
        );
    }
    Ok(Outcome::Done)
}
