//! `exo-node status`: what the running node is at.

use super::Outcome;
use super::remote::Remote;
use crate::config::data_folder;
use crate::{InstanceState, Phase, State};
use clap::Args;
use std::fmt::Write as _;
use std::path::PathBuf;

#[derive(Debug, Args)]
#[command(after_help = "Examples:
  exo-node status
  exo-node status --json | jq '.instances[].model.name'")]
pub(super) struct StatusArguments {
    /// Print the state as one JSON object on stdout
    #[arg(long)]
    json: bool,
    /// Folder of the node's identity and settings
    #[arg(long, value_name = "FOLDER")]
    data_dir: Option<PathBuf>,
}

pub(super) async fn run(arguments: StatusArguments) -> anyhow::Result<Outcome> {
    let data_dir = data_folder(arguments.data_dir.as_deref())?;
    let Some(node) = Remote::find(&data_dir).await else {
        anyhow::bail!("no node is running on {}: `exo-node up` starts one", data_dir.display());
    };
    let state = node.state().await?;
    match arguments.json {
        true => println!("{}", serde_json::to_string(&state)?),
        false => print!("{}", draw(&state)),
    }
    Ok(Outcome::Done)
}

fn draw(state: &State) -> String {
    let mut out = String::new();
    let gigabytes = |bytes: Option<u64>| bytes.map_or("?".to_owned(), |bytes| format!("{:.1}", bytes as f64 / 1e9));
    let machine = &state.machine;
    let busy = machine.cpu_utilisation.map_or("?".to_owned(), |busy| format!("{:.0} %", busy * 100.0));
    let (free, total) = (gigabytes(machine.memory_free_bytes), gigabytes(machine.memory_total_bytes));
    // Writing to a string does not fail.
    let _ = writeln!(out, "node     {}", state.node);
    let _ = writeln!(out, "memory   {free} of {total} GB free, {} used by this node", gigabytes(machine.process_bytes));
    let _ = writeln!(out, "cores    {busy} busy");
    for device in &state.devices {
        let _ = writeln!(out, "device   {:12} {} {}, {}", device.id, device.engine, device.tier, device.name);
    }
    let mut live = state.live().peekable();
    if live.peek().is_none() {
        let _ = writeln!(out, "models   none in memory");
    }
    for (id, instance) in live {
        let _ = writeln!(
            out,
            "model    {} ({})  instance {id}, {}",
            instance.model.name,
            instance.model.quantization,
            phase(instance)
        );
        for stage in &instance.placement.stages {
            let bytes = gigabytes(Some(stage.memory_bytes));
            let _ = writeln!(
                out,
                "         layers {}–{} on {}, {bytes} GB",
                stage.layers.start,
                stage.layers.end - 1,
                stage.device
            );
        }
        let totals = &instance.totals;
        let _ = writeln!(
            out,
            "         {} running, {} waiting, {} of {} pages; {} answered, {} + {} tokens, {} not computed again",
            instance.requests_running,
            instance.requests_waiting,
            instance.pages_used,
            instance.pages_total,
            totals.requests,
            totals.prompt_tokens,
            totals.generated_tokens,
            totals.reused_tokens,
        );
    }
    out
}

fn phase(instance: &InstanceState) -> String {
    match &instance.phase {
        Phase::Loading { total_bytes: 0, .. } => "loading".to_owned(),
        Phase::Loading { loaded_bytes, total_bytes } => format!("loading, {} %", loaded_bytes * 100 / total_bytes),
        Phase::Ready => "ready".to_owned(),
        Phase::Recovering { error } => format!("recovering from: {error}"),
        Phase::Stopped { .. } => "stopped".to_owned(),
    }
}
