//! Who plans together: members of whom each reaches each.
//!
//! ```text
//! reports (whom each sees) ─► pairs that do not meet ─► circles, from the lowest id up ─► who parts, who joins
//! ```
//! Firewalls and routes make pairs that never meet, while others reach both. Were they planned together, the one would lead
//! some and the other the rest, each would take the other for gone, and both would write one list. So the cluster falls
//! into circles, the same ones wherever it is looked from: the first is made of the lowest id and of each next one that
//! reaches all before it; those who are left make the next one. Whoever is too far away to see it all may be of another mind:
//! two are together where both say so. Who is apart is heard, for pairs do meet some day, and nothing else of it is.

use super::members::{MemberReport, Members};
use exo_net::NodeId;
use serde::{Deserialize, Serialize};
use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

/// A pair that has not met for so long does not. Two of one network meet within seconds of hearing of each other.
const APART_AFTER: Duration = Duration::from_secs(10);
/// Nodes that one member sees and this one does not: more are not believed.
const UNSEEN_MAX: usize = 16;

/// A pair that do not reach each other, the lower id first.
pub type Pair = (NodeId, NodeId);

/// A peer that is not of this node's circle.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Apart {
    /// As its user calls it.
    pub name: String,
    /// Why: of the two one is of its circle, and one of this node's. `None`: only the peer knows.
    pub between: Option<Pair>,
}

/// What changed.
#[derive(Debug, Default, PartialEq)]
pub struct Change {
    pub parted: Vec<(NodeId, Apart)>,
    pub joined: Vec<NodeId>,
}

/// The state machine. Time is an argument, since any fixed start.
#[derive(Debug, Default)]
pub struct Circle {
    /// What those say who are here and apart.
    apart: BTreeMap<NodeId, MemberReport>,
    /// Pairs of which neither sees the other, since when.
    unmet: BTreeMap<Pair, Duration>,
    /// Peers that are of another circle, as this node sees it.
    declared: BTreeSet<NodeId>,
}

fn pair(one: NodeId, other: NodeId) -> Pair {
    (one.min(other), one.max(other))
}

impl Circle {
    /// Whether a peer is here, and not of this circle.
    pub fn is_apart(&self, node: NodeId) -> bool {
        self.apart.contains_key(&node)
    }

    /// Peers that are of another circle as this node sees it: what it tells them, beside whom it sees.
    pub fn declared(&self) -> Vec<NodeId> {
        self.declared.iter().copied().collect()
    }

    /// A peer tells of itself.
    pub fn handle_report(&mut self, members: &mut Members, from: NodeId, report: MemberReport) {
        let of = if self.is_apart(from) { &mut self.apart } else { &mut members.0 };
        of.insert(from, report);
    }

    /// A peer is gone; whether it was apart, and is no loss.
    pub fn handle_loss(&mut self, members: &mut Members, node: NodeId) -> bool {
        members.0.remove(&node);
        self.apart.remove(&node).is_some()
    }

    /// Looks who is together now, by what members say, `own` included. Those who part are no members any more, those who
    /// join are.
    pub fn look(&mut self, own: NodeId, members: &mut Members, now: Duration) -> Change {
        let nodes = self.note_unmet(members, now);
        let circles = self.circles(&nodes, now);
        let Some(ours) = circles.iter().find(|circle| circle.contains(&own)) else { return Change::default() };
        let peers: Vec<NodeId> = members.0.keys().chain(self.apart.keys()).copied().filter(|&id| id != own).collect();
        self.declared = peers.iter().copied().filter(|peer| !ours.contains(peer)).collect();
        let mut change = Change::default();
        for node in peers {
            let report = members.0.get(&node).or_else(|| self.apart.get(&node));
            let is_ours = ours.contains(&node) && !report.is_some_and(|report| report.apart.contains(&own));
            if !is_ours && let Some(report) = members.0.remove(&node) {
                let theirs = circles.iter().find(|circle| circle.contains(&node) && *circle != ours);
                let between = theirs.and_then(|theirs| self.between(theirs, ours, now));
                change.parted.push((node, Apart { name: report.name.clone(), between }));
                self.apart.insert(node, report);
            } else if is_ours && let Some(report) = self.apart.remove(&node) {
                members.0.insert(node, report);
                change.joined.push(node);
            }
        }
        change
    }

    /// All nodes that are seen from here, by whomever; pairs of them that do not meet are remembered.
    fn note_unmet(&mut self, members: &Members, now: Duration) -> BTreeSet<NodeId> {
        let peers: BTreeMap<NodeId, &MemberReport> =
            members.0.iter().chain(&self.apart).map(|(&id, report)| (id, report)).collect();
        let mut nodes: BTreeSet<NodeId> = peers.keys().copied().collect();
        for report in peers.values() {
            nodes.extend(report.links.keys().filter(|node| !peers.contains_key(node)).take(UNSEEN_MAX));
        }
        // This node's own report is one of them: a peer that says nothing of itself is seen all the same.
        let sees = |one: NodeId, other: NodeId| peers.get(&one).is_some_and(|report| report.links.contains_key(&other));
        let mut unmet = BTreeMap::new();
        for &one in peers.keys() {
            for &other in nodes.iter().filter(|&&other| other != one) {
                if !sees(one, other) && !sees(other, one) {
                    let since = self.unmet.get(&pair(one, other)).copied().unwrap_or(now);
                    unmet.insert(pair(one, other), since);
                }
            }
        }
        self.unmet = unmet;
        nodes
    }

    fn is_cut(&self, one: NodeId, other: NodeId, now: Duration) -> bool {
        self.unmet.get(&pair(one, other)).is_some_and(|&since| now.saturating_sub(since) >= APART_AFTER)
    }

    fn circles(&self, nodes: &BTreeSet<NodeId>, now: Duration) -> Vec<BTreeSet<NodeId>> {
        let mut circles: Vec<BTreeSet<NodeId>> = Vec::new();
        let mut left: Vec<NodeId> = nodes.iter().copied().collect();
        while !left.is_empty() {
            let mut circle = BTreeSet::new();
            left.retain(|&node| {
                let reaches_all = circle.iter().all(|&other| !self.is_cut(node, other, now));
                if reaches_all {
                    circle.insert(node);
                }
                !reaches_all
            });
            circles.push(circle);
        }
        circles
    }

    fn between(&self, theirs: &BTreeSet<NodeId>, ours: &BTreeSet<NodeId>, now: Duration) -> Option<Pair> {
        let mut pairs = theirs.iter().flat_map(|&one| ours.iter().map(move |&other| pair(one, other)));
        pairs.find(|&(one, other)| self.is_cut(one, other, now))
    }
}

#[cfg(test)]
mod tests;
