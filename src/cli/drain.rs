//! `exo-node drain`: the running node's work moves to others, so that it can be stopped.

use super::Outcome;
use super::remote::Remote;
use crate::config::data_folder;
use clap::Args;
use std::path::PathBuf;

#[derive(Debug, Args)]
#[command(after_help = "Requests that run lose nothing. Nothing new is put on the node until it is started anew.")]
pub(super) struct DrainArguments {
    /// Folder of the node's identity and settings
    #[arg(long, value_name = "FOLDER")]
    data_dir: Option<PathBuf>,
}

pub(super) async fn run(arguments: DrainArguments) -> anyhow::Result<Outcome> {
    let data_dir = data_folder(arguments.data_dir.as_deref())?;
    let Some(node) = Remote::find(&data_dir).await else {
        anyhow::bail!("no node is running on {}", data_dir.display());
    };
    tokio::select! {
        drained = node.drain() => drained?,
        _ = tokio::signal::ctrl_c() => return Ok(Outcome::Interrupted),
    }
    eprintln!("nothing runs on this node any more: it can be stopped");
    Ok(Outcome::Done)
}
