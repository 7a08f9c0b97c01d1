//! Members that are not let in any more.

use exo_net::NodeId;
use parking_lot::Mutex;
use std::collections::BTreeSet;
use std::sync::Arc;

/// More is damage, or malice: it takes a new secret anyway to be rid of so many.
const EVICTED_MAX: usize = 4096;

/// Who is not let in, and where that is written down.
#[derive(Clone)]
pub struct Evicted {
    nodes: BTreeSet<NodeId>,
    keep: Keep,
    /// As they are now, for whoever writes them down; held while that is done, so that the last one writes all.
    latest: Arc<Mutex<BTreeSet<NodeId>>>,
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
        Self { nodes, keep: Arc::new(keep), latest: Arc::default() }
    }

    pub fn nodes(&self) -> &BTreeSet<NodeId> {
        &self.nodes
    }

    /// Takes those of this node's user; gives those that are new.
    pub(super) fn add(&mut self, nodes: impl IntoIterator<Item = NodeId>) -> Vec<NodeId> {
        let new: Vec<NodeId> = nodes.into_iter().filter(|node| !self.nodes.contains(node)).collect();
        self.nodes.extend(&new);
        if !new.is_empty() {
            let (nodes, keep, latest) = (self.nodes.clone(), Arc::clone(&self.keep), Arc::clone(&self.latest));
            tokio::task::spawn_blocking(move || {
                // It only grows, whatever panicked.
                let mut latest = latest.lock();
                latest.extend(nodes);
                if let Err(error) = keep(&latest) {
                    tracing::error!(%error, "who is evicted could not be written down: it holds until the node stops");
                }
            });
        }
        new
    }

    /// Takes those of another member, as long as there is room; gives those that are new.
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

    /// However many another member tells of, this node's user can evict; and all of them are written down.
    #[tokio::test]
    async fn nobody_can_fill_the_list_against_its_user() {
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
            assert!(begun.elapsed() < Duration::from_secs(10), "they are not written down");
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    }
}
