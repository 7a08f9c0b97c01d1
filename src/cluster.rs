//! A node's membership of its user's cluster: the secret, known members' addresses, and evicted nodes.

use crate::error::StartError;
use exo_actors::{ClusterConfig, Evicted, Revision, WireType};
use exo_net::{ClusterSecret, Discover, Identity, JoinToken, Network, NetworkConfig, NodeId, SecretError, reachable};
use std::io::Write;
use std::net::{Ipv6Addr, SocketAddr};
use std::path::Path;
use std::sync::Arc;
use tempfile::NamedTempFile;

/// The file with the members' addresses from the last join token, one a line.
const MEMBERS_FILE: &str = "cluster.members";
/// The file with the fingerprints of renewed secrets, one a line.
const RENOUNCED_FILE: &str = "cluster.renounced";
/// The file with the ids of evicted members, one a line, each with its revision: a number, and a member's name.
const EVICTED_FILE: &str = "cluster.evicted";
/// The default UDP port of the cluster's network; the API's default port is 52415.
pub const PORT_DEFAULT: u16 = 52416;

/// The settings of a cluster's member.
#[derive(Debug, Clone)]
pub struct ClusterSettings {
    /// The UDP address to listen on; with port 0 the system chooses a port. `::` means IPv4, too.
    pub listen: SocketAddr,
    /// The token of the cluster to change to. It is stored: later starts need none.
    pub join: Option<JoinToken>,
    /// Addresses of members; discovery finds others.
    pub peers: Vec<SocketAddr>,
    /// Whether the node looks for members on the local network.
    pub discover: Discover,
    /// The number type in which activations are sent: exact, or half the bytes at the price of accuracy.
    pub wire_type: WireType,
}

impl Default for ClusterSettings {
    fn default() -> Self {
        Self {
            listen: SocketAddr::from((Ipv6Addr::UNSPECIFIED, PORT_DEFAULT)),
            join: None,
            peers: Vec::new(),
            discover: Discover::Multicast,
            wire_type: WireType::F32,
        }
    }
}

/// Opens the network of the cluster in `data_dir`, after a change to the cluster of `settings.join`.
pub(crate) fn join(
    data_dir: &Path,
    identity: Arc<Identity>,
    name: String,
    settings: ClusterSettings,
) -> Result<ClusterConfig, StartError> {
    match settings.join {
        // A service that always starts with its first token must not undo a renewal of the secret.
        Some(token) if is_renounced(data_dir, &token.secret) => tracing::warn!(
            "ignored the join token: its secret was renewed here; `exo-node token` on a member prints the new one"
        ),
        Some(token) => {
            change_to(data_dir, &token.secret)?;
            remember(data_dir, &token.addresses)?;
        }
        None => {}
    }
    let (peers, token_peers) = (settings.peers, remembered(data_dir));
    let secret = ClusterSecret::load_or_create(data_dir)?;
    let cookie = secret.cookie();
    let (listen, discover) = (settings.listen, settings.discover);
    let evicted = evicted(data_dir, name.clone())?;
    let not_let_in = evicted.nodes();
    let config = NetworkConfig { identity, secret, name, listen, peers, token_peers, discover, evicted: not_let_in };
    let (network, events) = Network::start(config)?;
    let addresses = network.address().map(reachable).unwrap_or_default();
    Ok(ClusterConfig { network, events, cookie, addresses, evicted })
}

/// Stores `secret` in `data_dir`, and removes the old cluster's lists. Does nothing where `secret` is stored already.
fn change_to(data_dir: &Path, secret: &ClusterSecret) -> Result<(), SecretError> {
    let is_another = ClusterSecret::load_or_create(data_dir)?.fingerprint() != secret.fingerprint();
    if is_another {
        secret.keep(data_dir)?;
        // The lists belong to the old cluster. A file that does not exist is fine.
        for file in [MEMBERS_FILE, EVICTED_FILE] {
            let _ = std::fs::remove_file(data_dir.join(file));
        }
    }
    Ok(())
}

/// Creates a new secret for `data_dir`. From its next start on, the node no longer admits nodes with the old secret.
/// Evicted nodes stay evicted, even if they get the new secret.
#[cfg(feature = "cli")]
pub(crate) fn renew_secret(data_dir: &Path) -> Result<(), StartError> {
    let path = data_dir.join(RENOUNCED_FILE);
    let old = ClusterSecret::load_or_create(data_dir)?.fingerprint();
    let renounced = std::fs::OpenOptions::new().create(true).append(true).open(&path);
    let written = renounced.and_then(|mut file| writeln!(file, "{old}"));
    written.map_err(|source| StartError::Members { path, source })?;
    Ok(ClusterSecret::random()?.keep(data_dir)?)
}

/// Whether `secret` was renewed on this node. Without a readable file, no secret was.
fn is_renounced(data_dir: &Path, secret: &ClusterSecret) -> bool {
    let lines = std::fs::read_to_string(data_dir.join(RENOUNCED_FILE)).unwrap_or_default();
    lines.lines().any(|line| line == secret.fingerprint())
}

/// Loads the evicted nodes. A list that exists but cannot be read stops the start: without it, evicted nodes would be
/// admitted.
fn evicted(data_dir: &Path, name: String) -> Result<Evicted, StartError> {
    let path = data_dir.join(EVICTED_FILE);
    let lines = match std::fs::read_to_string(&path) {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => String::new(),
        read => read.map_err(|source| StartError::Members { path: path.clone(), source })?,
    };
    // Lines that are not ids are ignored. An id alone is one of a node that was evicted once.
    let revision = |line: &str| {
        let mut words = line.splitn(3, ' ');
        let node = words.next()?.parse().ok()?;
        let number = words.next().map_or(Some(1), |number| number.parse().ok())?;
        Some((node, Revision { number, by: words.next().unwrap_or_default().to_owned() }))
    };
    Ok(Evicted::new(name, lines.lines().filter_map(revision).collect(), move |revisions| {
        let line = |(node, Revision { number, by }): (&NodeId, &Revision)| format!("{node} {number} {by}\n");
        let lines: String = revisions.iter().map(line).collect();
        let mut draft = NamedTempFile::new_in(path.parent().unwrap_or(Path::new(".")))?;
        draft.write_all(lines.as_bytes())?;
        draft.persist(&path).map(drop).map_err(|error| error.error)
    }))
}

/// Stores the members' addresses of a join token.
fn remember(data_dir: &Path, addresses: &[SocketAddr]) -> Result<(), StartError> {
    let path = data_dir.join(MEMBERS_FILE);
    let lines: String = addresses.iter().map(|address| format!("{address}\n")).collect();
    std::fs::write(&path, lines).map_err(|source| StartError::Members { path, source })
}

/// The stored members' addresses. Lines that are not addresses are ignored.
fn remembered(data_dir: &Path) -> Vec<SocketAddr> {
    let lines = std::fs::read_to_string(data_dir.join(MEMBERS_FILE)).unwrap_or_default();
    lines.lines().filter_map(|line| line.parse().ok()).collect()
}
