//! Evicted members: nodes that this cluster no longer admits.
//!
//! Each node has a revision: an odd number means that it is evicted, an even one that its eviction was undone. The
//! higher number counts, in whatever order members hear of them.

use crate::transport::protocol::{Revision, Revisions};
use exo_net::NodeId;
use parking_lot::Mutex;
use std::collections::BTreeMap;
use std::sync::Arc;

/// The number of listed nodes from which on other members can add none: more are the work of a defect or an attack, and
/// the cluster needs a new secret anyway to exclude so many.
const LISTED_MAX: usize = 4096;
/// How far a revision of another member may be ahead: a single hostile one must not exhaust the numbers.
const LEAP_MAX: u64 = 64;

/// The evicted nodes, and the function that stores them.
#[derive(Clone)]
pub struct Evicted {
    /// The name of this node, which other members see beside its decisions.
    name: String,
    revisions: Revisions,
    keep: Keep,
    /// The revisions to store. Locked while they are stored, so that the last of concurrent stores writes all of them.
    latest: Arc<Mutex<Revisions>>,
}

type Keep = Arc<dyn Fn(&Revisions) -> std::io::Result<()> + Send + Sync>;

/// What became of a node.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum EvictionChange {
    Evicted { node: NodeId, by: String },
    Readmitted(NodeId),
}

impl std::fmt::Debug for Evicted {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_tuple("Evicted").field(&self.revisions).finish()
    }
}

impl Evicted {
    /// The list with these revisions, on a node with this name. When they change, `keep` is called with all of them, to
    /// store them, on a thread for blocking work.
    pub fn new(
        name: String,
        revisions: Revisions,
        keep: impl Fn(&Revisions) -> std::io::Result<()> + Send + Sync + 'static,
    ) -> Self {
        Self { name: exo_net::shown_name(&name), revisions, keep: Arc::new(keep), latest: Arc::default() }
    }

    /// The evicted nodes, and the name of the member whose user evicted each.
    pub fn nodes(&self) -> BTreeMap<NodeId, String> {
        let evicted = self.revisions.iter().filter(|(_, revision)| revision.is_evicted());
        evicted.map(|(&node, revision)| (node, revision.by.clone())).collect()
    }

    /// The revision of each node that was ever evicted.
    pub(super) fn revisions(&self) -> &Revisions {
        &self.revisions
    }

    /// Evicts nodes, as this node's user wants. Returns what has changed.
    pub(super) fn evict(&mut self, nodes: impl IntoIterator<Item = NodeId>) -> Vec<EvictionChange> {
        let wanted = nodes.into_iter().filter_map(|node| match self.revisions.get(&node) {
            Some(revision) if revision.is_evicted() => None,
            revision => Some((node, self.decision(revision.map_or(0, |revision| revision.number) + 1))),
        });
        let wanted = wanted.collect();
        self.set(wanted)
    }

    /// Undoes an eviction, as this node's user wants. Returns what has changed.
    pub(super) fn readmit(&mut self, node: NodeId) -> Vec<EvictionChange> {
        let revision = self.revisions.get(&node).filter(|revision| revision.is_evicted());
        let admitted = revision.map(|revision| (node, self.decision(revision.number + 1)));
        self.set(admitted.into_iter().collect())
    }

    /// A decision of this node's user.
    fn decision(&self, number: u64) -> Revision {
        Revision { number, by: self.name.clone() }
    }

    /// Takes over the later revisions of another member, of up to [`LISTED_MAX`] nodes in all. Returns what has
    /// changed.
    pub(super) fn merge(&mut self, heard: &Revisions) -> Vec<EvictionChange> {
        let mut room = LISTED_MAX.saturating_sub(self.revisions.len());
        let mut later = Revisions::new();
        for (&node, Revision { number, by }) in heard {
            let known = self.revisions.get(&node).map(|revision| revision.number);
            let leap = number.saturating_sub(known.unwrap_or(0));
            if !(1..=LEAP_MAX).contains(&leap) || known.is_none() && room == 0 {
                continue;
            }
            room -= usize::from(known.is_none());
            later.insert(node, Revision { number: *number, by: exo_net::shown_name(by) });
        }
        self.set(later)
    }

    fn set(&mut self, revisions: Revisions) -> Vec<EvictionChange> {
        let mut changes = Vec::new();
        for (&node, revision) in &revisions {
            let was_evicted = self.revisions.insert(node, revision.clone()).is_some_and(|before| before.is_evicted());
            match (was_evicted, revision.is_evicted()) {
                (false, true) => changes.push(EvictionChange::Evicted { node, by: revision.by.clone() }),
                (true, false) => changes.push(EvictionChange::Readmitted(node)),
                _ => {}
            }
        }
        if !revisions.is_empty() {
            let (revisions, keep, latest) = (self.revisions.clone(), Arc::clone(&self.keep), Arc::clone(&self.latest));
            tokio::task::spawn_blocking(move || {
                let mut latest = latest.lock();
                for (node, revision) in revisions {
                    let known = latest.entry(node).or_insert_with(|| revision.clone());
                    if revision.number > known.number {
                        *known = revision;
                    }
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
        let mut evicted = Evicted::new("a".to_owned(), Revisions::new(), move |revisions| {
            *file.lock() = revisions.clone();
            Ok(())
        });
        let first = || Revision { number: 1, by: "b".to_owned() };
        assert_eq!(evicted.merge(&ids(LISTED_MAX + 7).map(|node| (node, first())).collect()).len(), LISTED_MAX);
        assert_eq!(evicted.merge(&ids(1).map(|node| (node, first())).collect()), []);
        let by_hand: Vec<NodeId> = ids(2).collect();
        for &node in &by_hand {
            assert_eq!(evicted.evict([node]), [EvictionChange::Evicted { node, by: "a".to_owned() }]);
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
        let list = |name: &str| Evicted::new(name.to_owned(), Revisions::new(), |_| Ok(()));
        let (mut one, mut other) = (list("one"), list("other"));
        let node = ids(1).next().expect("an id");
        let evicted_on = |name: &str| [EvictionChange::Evicted { node, by: name.to_owned() }];
        assert_eq!(one.evict([node]), evicted_on("one"));
        assert_eq!(one.evict([node]), []);
        assert_eq!(other.merge(one.revisions()), evicted_on("one"));
        assert_eq!(one.readmit(node), [EvictionChange::Readmitted(node)]);
        assert_eq!(one.merge(other.revisions()), [], "the other has not heard of it");
        assert_eq!(other.merge(one.revisions()), [EvictionChange::Readmitted(node)]);
        assert_eq!(other.evict([node]), evicted_on("other"));
        assert_eq!(one.merge(other.revisions()), evicted_on("other"));
        assert_eq!(one.merge(&[(node, Revision { number: u64::MAX, by: String::new() })].into()), []);
        assert_eq!(one.nodes(), [(node, "other".to_owned())].into());
    }
}
