//! `exo-node token`: what another machine needs to join.

use super::outcome::Outcome;
use super::client::NodeClient;
use crate::config::data_folder;
use crate::{ClusterSecret, JoinToken};
use clap::Args;
use std::io::IsTerminal;
use std::path::PathBuf;

#[derive(Debug, Args)]
#[command(after_help = "Whoever has the token can join, and use every machine of the cluster: it is a secret.

Examples:
  exo-node token
  exo-node up --join \"$(ssh desktop exo-node token)\"")]
pub(super) struct TokenArguments {
    /// Make a new secret first: from its next start on, this node lets in only who has the new token
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
        eprintln!("Start this node anew, and then the others with `exo-node up --join` and this token:");
    }
    let secret = ClusterSecret::load_or_create(&data_dir)?;
    // Where no node runs, whoever joins has to find it by discovery.
    let addresses = match NodeClient::find(&data_dir).await {
        Some(node) => node.status().await?.addresses,
        None => Vec::new(),
    };
    if std::io::stdout().is_terminal() && !arguments.renew {
        eprintln!("On another machine: exo-node up --join");
    }
    println!("{}", JoinToken { secret, addresses });
    Ok(Outcome::Done)
}
