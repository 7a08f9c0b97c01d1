//! `exo-node drain`: moves the running node's work to other members, so that the node can be stopped.

use super::client::NodeClient;
use super::outcome::Outcome;
use crate::NodeStatus;
use crate::config::data_folder;
use clap::Args;
use std::path::PathBuf;
use std::time::Duration;

/// The interval between progress messages. Most moves take less: just one load of the model.
const TELL_EVERY: Duration = Duration::from_secs(3);

#[derive(Debug, Args)]
#[command(after_help = "Running requests lose nothing. The node gets no new work until it is started again.")]
pub(super) struct DrainArguments {
    /// Folder of the node's identity and settings
    #[arg(long, value_name = "FOLDER")]
    data_dir: Option<PathBuf>,
}

pub(super) async fn run(arguments: DrainArguments) -> anyhow::Result<Outcome> {
    let data_dir = data_folder(arguments.data_dir.as_deref())?;
    let Some(node) = NodeClient::find(&data_dir).await else {
        anyhow::bail!("no node is running on {}", data_dir.display());
    };
    tokio::select! {
        drained = node.drain() => drained?,
        told = tell_what_is_here(&node) => told?,
        _ = tokio::signal::ctrl_c() => return Ok(Outcome::Interrupted),
    }
    eprintln!("no work is left on this node: it can be stopped");
    Ok(Outcome::Done)
}

/// Prints what is still on this node, whenever that changes. Returns only on an error.
async fn tell_what_is_here(node: &NodeClient) -> anyhow::Result<()> {
    let mut told = Vec::new();
    loop {
        tokio::time::sleep(TELL_EVERY).await;
        let mut here = what_is_here(&node.status().await?);
        if here.is_empty() {
            here.push("models that move to other machines are served here until they are loaded there".to_owned());
        }
        if here != told {
            here.iter().for_each(|line| eprintln!("{line}"));
            told = here;
        }
    }
}

fn what_is_here(status: &NodeStatus) -> Vec<String> {
    let stages = status.everywhere().flat_map(|(_, instance)| {
        let here = instance.placement.stages.iter().filter(|stage| stage.node == status.node);
        here.map(|stage| {
            let (first, last) = (stage.layers.start, stage.layers.end - 1);
            format!(
                "{}: layers {first}–{last} are still here until another machine has loaded them; if no machine has \
                 {:.1} GB free for them, free memory there, or stop this node anyway",
                instance.model.name,
                stage.memory_bytes as f64 / 1e9
            )
        })
    });
    stages.collect()
}
