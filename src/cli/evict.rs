//! `exo-node evict`: removes a member from the cluster.

use super::client::NodeClient;
use super::outcome::Outcome;
use crate::config::data_folder;
use crate::{NodeId, NodeStatus};
use clap::Args;
use std::path::PathBuf;

#[derive(Debug, Args)]
#[command(
    after_help = "A machine that keeps the secret can come back under a new identity. To exclude it for good, make a new
secret (`exo-node token --renew`), and join the other machines again."
)]
pub(super) struct EvictArguments {
    /// Name of the member, its id, or the first four or more digits of its id
    member: String,
    /// Folder of this node's identity and settings
    #[arg(long, value_name = "FOLDER")]
    data_dir: Option<PathBuf>,
}

pub(super) async fn run(arguments: EvictArguments) -> anyhow::Result<Outcome> {
    let data_dir = data_folder(arguments.data_dir.as_deref())?;
    let Some(node) = NodeClient::find(&data_dir).await? else {
        anyhow::bail!("no node is running on {}", data_dir.display());
    };
    let member = find(&node.status().await?, &arguments.member)?;
    node.evict(member).await?;
    eprintln!("{member} is evicted: no member admits it any more");
    Ok(Outcome::Done)
}

/// Finds a connected member by name or by a prefix of its id. A whole id may also name a node that is not connected.
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
        _ => anyhow::bail!("`{wanted}` matches {} members: give a whole id", meant.len()),
    }
}
