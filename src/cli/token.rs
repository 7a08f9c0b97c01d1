//! `exo-node token`: prints the token with which another machine joins the cluster.

use super::client::NodeClient;
use super::outcome::Outcome;
use crate::config::data_folder;
use crate::{ClusterSecret, JoinToken};
use clap::Args;
use std::io::IsTerminal;
use std::path::PathBuf;

#[derive(Debug, Args)]
#[command(after_help = "The token is a secret: anyone who has it can join, and use every machine of the cluster.

Examples:
  exo-node token
  ssh desktop exo-node token | exo-node up --join -")]
pub(super) struct TokenArguments {
    /// Create a new secret first: from its next start on, this node admits only nodes with the new token
    #[arg(long)]
    renew: bool,
    /// Folder of this node's identity and settings
    #[arg(long, value_name = "FOLDER")]
    data_dir: Option<PathBuf>,
}

pub(super) async fn run(arguments: TokenArguments) -> anyhow::Result<Outcome> {
    let data_dir = data_folder(arguments.data_dir.as_deref())?;
    if arguments.renew {
        crate::cluster::renew_secret(&data_dir)?;
        eprintln!("Restart this node, then run `exo-node up --join -` on each other one, and paste this token:");
    }
    let secret = ClusterSecret::load_or_create(&data_dir)?;
    // Without a running node the token has no addresses: a joining node finds members by discovery.
    let addresses = match NodeClient::find(&data_dir).await? {
        Some(node) => node.status().await?.addresses,
        None => Vec::new(),
    };
    if std::io::stdout().is_terminal() && !arguments.renew {
        eprintln!("On another machine, run `exo-node up --join -`, and paste this token:");
    }
    println!("{}", JoinToken { secret, addresses });
    Ok(Outcome::Done)
}
