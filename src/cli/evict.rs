//! `exo-node evict`: a member that is one no more.

use super::outcome::Outcome;
use super::client::NodeClient;
use crate::config::data_folder;
use crate::{NodeId, NodeStatus};
use clap::Args;
use std::path::PathBuf;

#[derive(Debug, Args)]
#[command(
    after_help = "A machine that keeps the secret can come back under a new identity. To be rid of it for good, make a new
secret (`exo-node token --renew`) and join the others again."
)]
pub(super) struct EvictArguments {
    /// Name of the member, its id, or the beginning of its id
    member: String,
    /// Folder of this node's identity and settings
    #[arg(long, value_name = "FOLDER")]
    data_dir: Option<PathBuf>,
}

pub(super) async fn run(arguments: EvictArguments) -> anyhow::Result<Outcome> {
    let data_dir = data_folder(arguments.data_dir.as_deref())?;
    let Some(node) = NodeClient::find(&data_dir).await else {
        anyhow::bail!("no node is running on {}", data_dir.display());
    };
    let member = find(&node.status().await?, &arguments.member)?;
    node.evict(member).await?;
    eprintln!("{member} is not let in any more");
    Ok(Outcome::Done)
}

/// The member that is meant; one that is away is named by its whole id.
fn find(status: &NodeStatus, wanted: &str) -> anyhow::Result<NodeId> {
    if let Ok(id) = wanted.parse() {
        return Ok(id);
    }
    let is_meant =
        |(id, name): &(NodeId, &str)| *name == wanted || wanted.len() >= 4 && id.to_string().starts_with(wanted);
    let members = status.members.iter().map(|(id, member)| (*id, member.name.as_str()));
    let meant: Vec<NodeId> = members.filter(is_meant).map(|(id, _)| id).collect();
    match meant[..] {
        [one] => Ok(one),
        [] => anyhow::bail!("no member is called `{wanted}`: `exo-node status` lists them"),
        _ => anyhow::bail!("`{wanted}` is the name of {} members: give an id", meant.len()),
    }
}
