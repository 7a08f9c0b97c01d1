//! `exo-node drain`: moves the running node's work to other members, so that the node can be stopped.

use super::client::NodeClient;
use super::outcome::Outcome;
use crate::NodeStatus;
use crate::config::data_folder;
use clap::Args;
use std::path::PathBuf;
use std::time::Duration;

/// The interval between progress messages. Most moves take less: just one load of the model.
const PRINT_EVERY: Duration = Duration::from_secs(3);

#[derive(Debug, Args)]
#[command(after_help = "Running requests lose nothing. The node gets no new work until it is started again.")]
pub(super) struct DrainArguments {
    /// Folder of the node's identity and settings
    #[arg(long, value_name = "FOLDER")]
    data_dir: Option<PathBuf>,
}

pub(super) async fn run(arguments: DrainArguments) -> anyhow::Result<Outcome> {
    let data_dir = data_folder(arguments.data_dir.as_deref())?;
    let Some(node) = NodeClient::find(&data_dir).await? else {
        anyhow::bail!("no node is running on {}", data_dir.display());
    };
    tokio::select! {
        drained = node.drain() => drained?,
        printed = print_remaining(&node) => printed?,
        _ = tokio::signal::ctrl_c() => return Ok(Outcome::Interrupted),
    }
    eprintln!("no work is left on this node: it can be stopped");
    Ok(Outcome::Done)
}

/// Prints what is still on this node, whenever that changes. Returns only on an error.
async fn print_remaining(node: &NodeClient) -> anyhow::Result<()> {
    let mut printed = Vec::new();
    loop {
        tokio::time::sleep(PRINT_EVERY).await;
        let mut here = remaining_work(&node.status().await?);
        if here.is_empty() {
            here.push("models that move to other machines are served here until they are loaded there".to_owned());
        }
        if here != printed {
            here.iter().for_each(|line| eprintln!("{line}"));
            printed = here;
        }
    }
}

fn remaining_work(status: &NodeStatus) -> Vec<String> {
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
