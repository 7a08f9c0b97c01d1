//! `exo-node evict`: removes a member from the cluster.

use super::client::NodeClient;
use super::events::printable;
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
    #[arg(required_unless_present = "list")]
    member: Option<String>,
    /// List the evicted nodes
    #[arg(long, conflicts_with_all = ["member", "undo"])]
    list: bool,
    /// Admit the evicted node MEMBER again: its id, the first four or more digits of it, or its former name
    #[arg(long)]
    undo: bool,
    /// Folder of this node's identity and settings
    #[arg(long, value_name = "FOLDER")]
    data_dir: Option<PathBuf>,
}

pub(super) async fn run(arguments: EvictArguments) -> anyhow::Result<Outcome> {
    let data_dir = data_folder(arguments.data_dir.as_deref())?;
    let Some(node) = NodeClient::find(&data_dir).await? else {
        anyhow::bail!("no node is running on {}", data_dir.display());
    };
    let status = node.status().await?;
    if arguments.list {
        for (id, by) in &status.evicted {
            let name = status.gone.get(id).map_or("", |gone| &gone.name);
            println!("{id}  {}  evicted on {}", printable(name), printable(by));
        }
        return Ok(Outcome::Done);
    }
    let wanted = arguments.member.unwrap_or_default();
    if arguments.undo {
        let evicted = find_evicted(&status, &wanted)?;
        node.readmit(evicted).await?;
        eprintln!("{evicted} may be a member again: it connects within a minute, if it has the cluster's secret");
        return Ok(Outcome::Done);
    }
    let member = find(&status, &wanted)?;
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

/// Finds an evicted node by its id, a prefix of it, or the name that it had.
fn find_evicted(status: &NodeStatus, wanted: &str) -> anyhow::Result<NodeId> {
    let had_name = |id: &NodeId| status.gone.get(id).is_some_and(|gone| gone.name == wanted);
    let is_meant = |id: &&NodeId| had_name(id) || wanted.len() >= 4 && id.to_string().starts_with(wanted);
    let meant: Vec<NodeId> = status.evicted.keys().filter(is_meant).copied().collect();
    match meant[..] {
        [one] => Ok(one),
        [] => anyhow::bail!("no evicted node is called `{wanted}`: `exo-node evict --list` lists them"),
        _ => anyhow::bail!("`{wanted}` matches {} evicted nodes: give a whole id", meant.len()),
    }
}
