//! Evicted members: nodes that this cluster no longer admits.

use exo_net::NodeId;
use parking_lot::Mutex;
use std::collections::BTreeSet;
use std::sync::Arc;

/// The number of evicted nodes from which on other members can add none: more are the work of a defect or an attack,
/// and the cluster needs a new secret anyway to exclude so many.
const EVICTED_MAX: usize = 4096;

/// The evicted nodes, and the function that stores them.
#[derive(Clone)]
pub struct Evicted {
    nodes: BTreeSet<NodeId>,
    keep: Keep,
    /// The nodes to store. Locked while they are stored, so that the last of concurrent stores writes all of them.
    latest: Arc<Mutex<BTreeSet<NodeId>>>,
}

type Keep = Arc<dyn Fn(&BTreeSet<NodeId>) -> std::io::Result<()> + Send + Sync>;

impl std::fmt::Debug for Evicted {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_tuple("Evicted").field(&self.nodes).finish()
    }
}

impl Evicted {
    /// The list with the evicted nodes `nodes`. When nodes are added, `keep` is called with all evicted nodes, to store
    /// them, on a thread for blocking work.
    pub fn new(
        nodes: BTreeSet<NodeId>,
        keep: impl Fn(&BTreeSet<NodeId>) -> std::io::Result<()> + Send + Sync + 'static,
    ) -> Self {
        Self { nodes, keep: Arc::new(keep), latest: Arc::default() }
    }

    /// The evicted nodes.
    pub fn nodes(&self) -> &BTreeSet<NodeId> {
        &self.nodes
    }

    /// Adds the nodes that this node's user evicts. Returns the new ones.
    pub(super) fn add(&mut self, nodes: impl IntoIterator<Item = NodeId>) -> Vec<NodeId> {
        let new: Vec<NodeId> = nodes.into_iter().filter(|node| !self.nodes.contains(node)).collect();
        self.nodes.extend(&new);
        if !new.is_empty() {
            let (nodes, keep, latest) = (self.nodes.clone(), Arc::clone(&self.keep), Arc::clone(&self.latest));
            tokio::task::spawn_blocking(move || {
                // A panic of an earlier store does no harm: the set only grows.
                let mut latest = latest.lock();
                latest.extend(nodes);
                if let Err(error) = keep(&latest) {
                    tracing::error!(%error, "the evictions could not be stored: they hold until the node stops");
                }
            });
        }
        new
    }

    /// Adds the nodes that another member reports as evicted, up to [`EVICTED_MAX`] in all. Returns the new ones.
    pub(super) fn add_heard(&mut self, nodes: impl IntoIterator<Item = NodeId>) -> Vec<NodeId> {
        let room = EVICTED_MAX.saturating_sub(self.nodes.len());
        let new: Vec<NodeId> = nodes.into_iter().filter(|node| !self.nodes.contains(node)).take(room).collect();
        self.add(new)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::{Duration, Instant};

    fn ids(count: usize) -> impl Iterator<Item = NodeId> {
        (0..count).map(|_| exo_net::Identity::ephemeral().expect("random bytes").node_id())
    }

    /// However many evictions another member reports, this node's user can still evict, and these evictions are stored.
    #[tokio::test]
    async fn a_list_filled_by_a_member_still_takes_the_user_s_evictions() {
        let written = Arc::new(Mutex::new(BTreeSet::new()));
        let file = Arc::clone(&written);
        let mut evicted = Evicted::new(BTreeSet::new(), move |nodes| {
            *file.lock() = nodes.clone();
            Ok(())
        });
        assert_eq!(evicted.add_heard(ids(EVICTED_MAX + 7)).len(), EVICTED_MAX);
        assert_eq!(evicted.add_heard(ids(1)), []);
        let by_hand: Vec<NodeId> = ids(2).collect();
        for node in &by_hand {
            assert_eq!(evicted.add([*node]), [*node]);
        }
        let begun = Instant::now();
        while !by_hand.iter().all(|node| written.lock().contains(node)) {
            assert!(begun.elapsed() < Duration::from_secs(10), "the user's evictions are not stored");
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    }
}
