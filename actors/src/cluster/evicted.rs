//! Members that are not let in any more.

use exo_net::NodeId;
use std::collections::BTreeSet;
use std::sync::Arc;

/// More is damage, or malice: it takes a new secret anyway to be rid of so many.
const EVICTED_MAX: usize = 4096;

/// Who is not let in, and where that is written down.
#[derive(Clone)]
pub struct Evicted {
    nodes: BTreeSet<NodeId>,
    keep: Keep,
}

type Keep = Arc<dyn Fn(&BTreeSet<NodeId>) -> std::io::Result<()> + Send + Sync>;

impl std::fmt::Debug for Evicted {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_tuple("Evicted").field(&self.nodes).finish()
    }
}

impl Evicted {
    /// `keep` is called beside the threads that messages travel on, with all of them.
    pub fn new(
        nodes: BTreeSet<NodeId>,
        keep: impl Fn(&BTreeSet<NodeId>) -> std::io::Result<()> + Send + Sync + 'static,
    ) -> Self {
        Self { nodes, keep: Arc::new(keep) }
    }

    pub fn nodes(&self) -> &BTreeSet<NodeId> {
        &self.nodes
    }

    /// Takes more; gives those that are new.
    pub(super) fn add(&mut self, nodes: impl IntoIterator<Item = NodeId>) -> Vec<NodeId> {
        let room = EVICTED_MAX.saturating_sub(self.nodes.len());
        let new: Vec<NodeId> = nodes.into_iter().filter(|node| !self.nodes.contains(node)).take(room).collect();
        self.nodes.extend(&new);
        if !new.is_empty() {
            let kept = self.clone();
            tokio::task::spawn_blocking(move || {
                if let Err(error) = (kept.keep)(&kept.nodes) {
                    tracing::error!(%error, "who is evicted could not be written down: it holds until the node stops");
                }
            });
        }
        new
    }
}
