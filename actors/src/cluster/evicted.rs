//! Evicted members: nodes that this cluster no longer admits.
//!
//! Each node has a revision: an odd one means that it is evicted, an even one that its eviction was undone. The higher
//! revision counts, in whatever order members hear of them.

use exo_net::NodeId;
use parking_lot::Mutex;
use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

/// The number of listed nodes from which on other members can add none: more are the work of a defect or an attack, and
/// the cluster needs a new secret anyway to exclude so many.
const LISTED_MAX: usize = 4096;
/// How far a revision of another member may be ahead: a single hostile one must not exhaust the numbers.
const LEAP_MAX: u64 = 64;

/// The revision of each node that was ever evicted.
pub type Revisions = BTreeMap<NodeId, u64>;

/// The evicted nodes, and the function that stores them.
#[derive(Clone)]
pub struct Evicted {
    revisions: Revisions,
    keep: Keep,
    /// The revisions to store. Locked while they are stored, so that the last of concurrent stores writes all of them.
    latest: Arc<Mutex<Revisions>>,
}

type Keep = Arc<dyn Fn(&Revisions) -> std::io::Result<()> + Send + Sync>;

/// What became of a node.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum EvictionChange {
    Evicted(NodeId),
    Readmitted(NodeId),
}

fn is_evicted(revision: u64) -> bool {
    revision % 2 == 1
}

impl std::fmt::Debug for Evicted {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_tuple("Evicted").field(&self.revisions).finish()
    }
}

impl Evicted {
    /// The list with these revisions. When they change, `keep` is called with all of them, to store them, on a thread
    /// for blocking work.
    pub fn new(revisions: Revisions, keep: impl Fn(&Revisions) -> std::io::Result<()> + Send + Sync + 'static) -> Self {
        Self { revisions, keep: Arc::new(keep), latest: Arc::default() }
    }

    /// The evicted nodes.
    pub fn nodes(&self) -> BTreeSet<NodeId> {
        self.revisions.iter().filter(|(_, revision)| is_evicted(**revision)).map(|(&node, _)| node).collect()
    }

    /// The revision of each node that was ever evicted.
    pub(super) fn revisions(&self) -> &Revisions {
        &self.revisions
    }

    /// Evicts nodes, as this node's user wants. Returns what has changed.
    pub(super) fn evict(&mut self, nodes: impl IntoIterator<Item = NodeId>) -> Vec<EvictionChange> {
        let wanted = nodes.into_iter().filter_map(|node| match self.revisions.get(&node) {
            Some(&revision) if is_evicted(revision) => None,
            revision => Some((node, revision.map_or(1, |revision| revision + 1))),
        });
        let wanted = wanted.collect();
        self.set(wanted)
    }

    /// Undoes an eviction, as this node's user wants. Returns what has changed.
    pub(super) fn readmit(&mut self, node: NodeId) -> Vec<EvictionChange> {
        let revision = self.revisions.get(&node).copied().filter(|&revision| is_evicted(revision));
        self.set(revision.map(|revision| (node, revision + 1)).into_iter().collect())
    }

    /// Takes over the later revisions of another member, of up to [`LISTED_MAX`] nodes in all. Returns what has
    /// changed.
    pub(super) fn merge(&mut self, heard: &Revisions) -> Vec<EvictionChange> {
        let mut room = LISTED_MAX.saturating_sub(self.revisions.len());
        let mut later = Revisions::new();
        for (&node, &revision) in heard {
            let known = self.revisions.get(&node).copied();
            let is_later = revision > known.unwrap_or(0) && revision - known.unwrap_or(0) <= LEAP_MAX;
            if !is_later || known.is_none() && room == 0 {
                continue;
            }
            room -= usize::from(known.is_none());
            later.insert(node, revision);
        }
        self.set(later)
    }

    fn set(&mut self, revisions: Revisions) -> Vec<EvictionChange> {
        let mut changes = Vec::new();
        for (&node, &revision) in &revisions {
            let was_evicted = self.revisions.insert(node, revision).is_some_and(is_evicted);
            match (was_evicted, is_evicted(revision)) {
                (false, true) => changes.push(EvictionChange::Evicted(node)),
                (true, false) => changes.push(EvictionChange::Readmitted(node)),
                _ => {}
            }
        }
        if !revisions.is_empty() {
            let (revisions, keep, latest) = (self.revisions.clone(), Arc::clone(&self.keep), Arc::clone(&self.latest));
            tokio::task::spawn_blocking(move || {
                let mut latest = latest.lock();
                for (node, revision) in revisions {
                    let known = latest.entry(node).or_insert(revision);
                    *known = revision.max(*known);
                }
                if let Err(error) = keep(&latest) {
                    tracing::error!(%error, "the evictions could not be stored: they hold until the node stops");
                }
            });
        }
        changes
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
        let written = Arc::new(Mutex::new(Revisions::new()));
        let file = Arc::clone(&written);
        let mut evicted = Evicted::new(Revisions::new(), move |revisions| {
            *file.lock() = revisions.clone();
            Ok(())
        });
        assert_eq!(evicted.merge(&ids(LISTED_MAX + 7).map(|node| (node, 1)).collect()).len(), LISTED_MAX);
        assert_eq!(evicted.merge(&ids(1).map(|node| (node, 1)).collect()), []);
        let by_hand: Vec<NodeId> = ids(2).collect();
        for &node in &by_hand {
            assert_eq!(evicted.evict([node]), [EvictionChange::Evicted(node)]);
        }
        let begun = Instant::now();
        while !by_hand.iter().all(|node| written.lock().contains_key(node)) {
            assert!(begun.elapsed() < Duration::from_secs(10), "the user's evictions are not stored");
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    }

    /// An undone eviction stays undone when a member that missed it repeats the eviction, and the node can be evicted
    /// again. No revision of a member exhausts the numbers.
    #[tokio::test]
    async fn the_later_decision_counts() {
        let list = || Evicted::new(Revisions::new(), |_| Ok(()));
        let (mut one, mut other) = (list(), list());
        let node = ids(1).next().expect("an id");
        assert_eq!(one.evict([node]), [EvictionChange::Evicted(node)]);
        assert_eq!(one.evict([node]), []);
        assert_eq!(other.merge(one.revisions()), [EvictionChange::Evicted(node)]);
        assert_eq!(one.readmit(node), [EvictionChange::Readmitted(node)]);
        assert_eq!(one.merge(other.revisions()), [], "the other has not heard of it");
        assert_eq!(other.merge(one.revisions()), [EvictionChange::Readmitted(node)]);
        assert_eq!(other.evict([node]), [EvictionChange::Evicted(node)]);
        assert_eq!(one.merge(other.revisions()), [EvictionChange::Evicted(node)]);
        assert_eq!(one.merge(&[(node, u64::MAX)].into()), []);
        assert_eq!(one.nodes(), [node].into());
    }
}
