//! A node's place in its user's cluster: the secret, the members it knows, and where it listens.

use crate::error::StartError;
use exo_actors::{Evicted, ClusterConfig, WireType};
use exo_net::{ClusterSecret, Discover, Identity, JoinToken, Network, NetworkConfig, NodeId, SecretError, reachable};
use std::collections::BTreeSet;
use std::net::SocketAddr;
use std::path::Path;
use std::sync::Arc;

/// Addresses of members that were named once, a line each.
const MEMBERS_FILE: &str = "cluster.members";
/// Fingerprints of secrets that were renewed, a line each.
const RENOUNCED_FILE: &str = "cluster.renounced";
/// Ids of members that are not let in any more, a line each.
const EVICTED_FILE: &str = "cluster.evicted";
/// The port of exo's own network, beside that of its API.
pub const PORT_DEFAULT: u16 = 52416;

/// How a node is a member of a cluster.
#[derive(Debug, Clone)]
pub struct ClusterSettings {
    /// Where it listens (UDP); port 0 takes any.
    pub listen: SocketAddr,
    /// The cluster to change to; kept, so that it is said once.
    pub join: Option<JoinToken>,
    /// Addresses of members; discovery finds others.
    pub peers: Vec<SocketAddr>,
    pub discover: Discover,
    /// How activations travel: as they are, or halved at the price of accuracy.
    pub wire_type: WireType,
}

impl Default for ClusterSettings {
    fn default() -> Self {
        Self {
            listen: SocketAddr::from(([0, 0, 0, 0], PORT_DEFAULT)),
            join: None,
            peers: Vec::new(),
            discover: Discover::Multicast,
            wire_type: WireType::F32,
        }
    }
}

/// Opens the network of the cluster that `data_dir` belongs to.
pub(crate) fn join(
    data_dir: &Path,
    identity: Arc<Identity>,
    name: String,
    settings: ClusterSettings,
) -> Result<ClusterConfig, StartError> {
    let mut peers = settings.peers;
    match settings.join {
        // A service that is started with its first token for ever would undo a renewal.
        Some(token) if is_renounced(data_dir, &token.secret) => tracing::warn!(
            "the token is not used: its secret was renewed here; `exo-node token` on a member prints the new one"
        ),
        Some(token) => {
            change_to(data_dir, &token.secret)?;
            remember(data_dir, &token.addresses)?;
        }
        None => {}
    }
    peers.extend(remembered(data_dir));
    let secret = ClusterSecret::load_or_create(data_dir)?;
    let cookie = secret.cookie();
    let (listen, discover) = (settings.listen, settings.discover);
    let evicted = evicted(data_dir)?;
    let not_let_in = evicted.nodes().clone();
    let config = NetworkConfig { identity, secret, name, listen, peers, discover, evicted: not_let_in };
    let (network, events) = Network::start(config)?;
    let addresses = network.address().map(reachable).unwrap_or_default();
    Ok(ClusterConfig { network, events, cookie, addresses, evicted })
}

/// The node of `data_dir` belongs to the cluster of `secret` from its next start on.
fn change_to(data_dir: &Path, secret: &ClusterSecret) -> Result<(), SecretError> {
    let is_another = ClusterSecret::load_or_create(data_dir)?.fingerprint() != secret.fingerprint();
    if is_another {
        secret.keep(data_dir)?;
        // Those of the cluster that is left; where there are none, there is no file.
        for file in [MEMBERS_FILE, EVICTED_FILE] {
            let _ = std::fs::remove_file(data_dir.join(file));
        }
    }
    Ok(())
}

/// Makes a new secret for `data_dir`: whoever has only the old one is not let in from the next start on. Who was evicted stays
/// outside, should the new secret reach it.
#[cfg(feature = "cli")]
pub(crate) fn renew_secret(data_dir: &Path) -> Result<(), StartError> {
    use std::io::Write;
    let path = data_dir.join(RENOUNCED_FILE);
    let old = ClusterSecret::load_or_create(data_dir)?.fingerprint();
    let renounced = std::fs::OpenOptions::new().create(true).append(true).open(&path);
    let written = renounced.and_then(|mut file| writeln!(file, "{old}"));
    written.map_err(|source| StartError::Members { path, source })?;
    Ok(ClusterSecret::random()?.keep(data_dir)?)
}

/// Where there is no file, nothing was renewed.
fn is_renounced(data_dir: &Path, secret: &ClusterSecret) -> bool {
    let lines = std::fs::read_to_string(data_dir.join(RENOUNCED_FILE)).unwrap_or_default();
    lines.lines().any(|line| line == secret.fingerprint())
}

/// A list that is there and cannot be read lets nobody in.
fn evicted(data_dir: &Path) -> Result<Evicted, StartError> {
    let path = data_dir.join(EVICTED_FILE);
    let lines = match std::fs::read_to_string(&path) {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => String::new(),
        read => read.map_err(|source| StartError::Members { path: path.clone(), source })?,
    };
    // Lines that are no ids are nobody's.
    let nodes: BTreeSet<NodeId> = lines.lines().filter_map(|line| line.parse().ok()).collect();
    Ok(Evicted::new(nodes, move |nodes| {
        let lines: String = nodes.iter().map(|node| format!("{node}\n")).collect();
        let draft = path.with_extension("draft");
        std::fs::write(&draft, lines)?;
        std::fs::rename(&draft, &path)
    }))
}

fn remember(data_dir: &Path, addresses: &[SocketAddr]) -> Result<(), StartError> {
    let path = data_dir.join(MEMBERS_FILE);
    let lines: String = addresses.iter().map(|address| format!("{address}\n")).collect();
    std::fs::write(&path, lines).map_err(|source| StartError::Members { path, source })
}

/// Lines that are no addresses are nobody's.
fn remembered(data_dir: &Path) -> Vec<SocketAddr> {
    let lines = std::fs::read_to_string(data_dir.join(MEMBERS_FILE)).unwrap_or_default();
    lines.lines().filter_map(|line| line.parse().ok()).collect()
}
