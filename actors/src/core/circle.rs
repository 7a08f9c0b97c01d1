//! Who plans together: members of whom each reaches each.
//!
//! ```text
//! reports (whom each sees) ─► pairs that do not meet ─► circles, from the lowest id up ─► who parts, who joins
//! ```
//! Firewalls and routes make pairs that never meet, while others reach both. Were they planned together, the one would lead
//! some and the other the rest, each would take the other for gone, and both would write one list. So the cluster falls
//! into circles, the same ones wherever it is looked from: the first is made of the lowest id and of each next one that
//! reaches all before it; those who are left make the next one. Whoever is too far away to see it all may be of another mind
//! at first: so each says whom it takes for apart by what it sees itself, and the circles that count are made of that, too: a
//! pair of which one takes the other for apart is as good as cut. Who is apart is heard, for pairs do meet some day, and
//! nothing else of it is. Nor is it trusted when it has gone and comes anew: its own cut is the likeliest thing not to have changed.

use super::members::{LISTED_MAX, MemberReport, Members};
use exo_net::NodeId;
use serde::{Deserialize, Serialize};
use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

/// A pair that has not met for so long does not. Two of one network meet within seconds of hearing of each other.
pub const APART_AFTER: Duration = Duration::from_secs(10);
/// Cuts of nodes that have gone, and who was apart then, are remembered for so long: a connection that breaks comes back
/// within the longest wait between two dials.
const REMEMBERED_FOR: Duration = Duration::from_secs(60);
/// Cuts of nodes that have gone: more are not remembered.
const REMEMBERED_MAX: usize = 4096;
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
    /// Who went so long ago that it is apart no more.
    pub forgotten: Vec<NodeId>,
}

/// A peer that is of another circle.
#[derive(Debug)]
struct Other {
    report: MemberReport,
    why: Apart,
}

/// A pair of which neither sees the other.
#[derive(Debug, Clone, Copy)]
struct Unmet {
    since: Duration,
    /// When it was last seen to be so.
    until: Duration,
    /// Whether someone who has been here for longer says that they never do.
    is_told: bool,
}

impl Unmet {
    fn is_cut(&self) -> bool {
        self.is_told || self.until.saturating_sub(self.since) >= APART_AFTER
    }
}

/// The state machine. Time is an argument, since any fixed start.
#[derive(Debug, Default)]
pub struct Circle {
    /// Who is here and apart.
    apart: BTreeMap<NodeId, Other>,
    /// Who was, when it went, and when that was.
    gone: BTreeMap<NodeId, (Other, Duration)>,
    unmet: BTreeMap<Pair, Unmet>,
    /// Peers that are of another circle, as this node sees it by itself.
    declared: BTreeSet<NodeId>,
}

fn pair(one: NodeId, other: NodeId) -> Pair {
    (one.min(other), one.max(other))
}

impl Circle {
    /// Whether a peer is not of this circle.
    pub fn is_apart(&self, node: NodeId) -> bool {
        self.apart.contains_key(&node) || self.gone.contains_key(&node)
    }

    /// Peers that are of another circle as this node sees it: what it tells them, beside whom it sees.
    pub fn declared(&self) -> Vec<NodeId> {
        self.declared.iter().copied().collect()
    }

    /// Pairs that do not reach each other: what it tells those, too, who have just come and would have to wait to find out.
    pub fn cuts(&self) -> Vec<Pair> {
        let cut = self.unmet.iter().filter(|(_, unmet)| unmet.is_cut());
        cut.map(|(&pair, _)| pair).take(LISTED_MAX).collect()
    }

    /// A peer tells of itself.
    pub fn handle_report(&mut self, members: &mut Members, from: NodeId, report: MemberReport) {
        let other = self.apart.get_mut(&from).or_else(|| self.gone.get_mut(&from).map(|(other, _)| other));
        match other {
            Some(other) => other.report = report,
            None => drop(members.0.insert(from, report)),
        }
    }

    /// A peer is gone; whether it was apart, and is no loss.
    pub fn handle_loss(&mut self, members: &mut Members, node: NodeId, now: Duration) -> bool {
        members.0.remove(&node);
        let Some(other) = self.apart.remove(&node) else { return self.gone.contains_key(&node) };
        self.gone.insert(node, (other, now));
        true
    }

    /// A peer is here. `Some` where it was apart when it went: so it is until it is found to meet all.
    pub fn handle_return(&mut self, node: NodeId) -> Option<Apart> {
        let (other, _) = self.gone.remove(&node)?;
        self.declared.insert(node);
        let why = other.why.clone();
        self.apart.insert(node, other);
        Some(why)
    }

    /// Looks who is together now, by what members say, `own` included. Those who part are no members any more, those who
    /// join are.
    pub fn look(&mut self, own: NodeId, members: &mut Members, now: Duration) -> Change {
        let is_past = |_: &NodeId, (_, since): &mut (Other, Duration)| now.saturating_sub(*since) >= REMEMBERED_FOR;
        let forgotten = self.gone.extract_if(.., is_past).map(|(node, _)| node).collect();
        let mut change = Change { forgotten, ..Change::default() };
        let nodes = self.note_unmet(members, now);
        let peers: Vec<NodeId> = members.0.keys().chain(self.apart.keys()).copied().filter(|&id| id != own).collect();
        let seen = circles(&nodes, |one, other| self.is_cut(one, other));
        let Some(ours) = seen.iter().find(|circle| circle.contains(&own)) else { return change };
        self.declared = peers.iter().copied().filter(|peer| !ours.contains(peer)).collect();
        let declared = self.declared_by_all(own, members);
        let circles = circles(&nodes, |one, other| self.is_cut(one, other) || declared.contains(&pair(one, other)));
        let Some(ours) = circles.iter().find(|circle| circle.contains(&own)) else { return change };
        for node in peers {
            if ours.contains(&node) {
                if let Some(other) = self.apart.remove(&node) {
                    members.0.insert(node, other.report);
                    change.joined.push(node);
                }
            } else if let Some(report) = members.0.remove(&node) {
                let theirs = circles.iter().find(|circle| circle.contains(&node));
                let between = theirs.and_then(|theirs| self.between(theirs, ours));
                let why = Apart { name: report.name.clone(), between };
                change.parted.push((node, why.clone()));
                self.apart.insert(node, Other { report, why });
            }
        }
        change
    }

    fn peers<'a>(&'a self, members: &'a Members) -> BTreeMap<NodeId, &'a MemberReport> {
        let apart = self.apart.iter().map(|(&id, other)| (id, &other.report));
        members.0.iter().map(|(&id, report)| (id, report)).chain(apart).collect()
    }

    /// Pairs of which one takes the other for apart.
    fn declared_by_all(&self, own: NodeId, members: &Members) -> BTreeSet<Pair> {
        let peers = self.peers(members);
        let by_peers = peers.iter().filter(|(peer, _)| **peer != own);
        let theirs = by_peers.flat_map(|(&peer, report)| report.apart.iter().map(move |&other| pair(peer, other)));
        theirs.chain(self.declared.iter().map(|&peer| pair(own, peer))).collect()
    }

    /// All nodes that are seen from here, by whomever; pairs of them that do not meet are remembered.
    fn note_unmet(&mut self, members: &Members, now: Duration) -> BTreeSet<NodeId> {
        let peers = self.peers(members);
        let mut nodes: BTreeSet<NodeId> = peers.keys().copied().collect();
        for report in peers.values() {
            nodes.extend(report.links.keys().filter(|node| !peers.contains_key(node)).take(UNSEEN_MAX));
        }
        // This node's own report is one of them: a peer that says nothing of itself is seen all the same.
        let sees = |one: NodeId, other: NodeId| peers.get(&one).is_some_and(|report| report.links.contains_key(&other));
        let can_tell = |one: &NodeId, other: &NodeId| peers.contains_key(one) && nodes.contains(other);
        let is_past = |(one, other): &Pair| !can_tell(one, other) && !can_tell(other, one);
        let is_remembered = |(pair, unmet): &(&Pair, &Unmet)| {
            is_past(pair) && unmet.is_cut() && now.saturating_sub(unmet.until) < REMEMBERED_FOR
        };
        let told: BTreeSet<Pair> = peers.values().flat_map(|report| report.cuts.iter().copied()).collect();
        let past = self.unmet.iter().filter(is_remembered).take(REMEMBERED_MAX);
        let mut unmet: BTreeMap<Pair, Unmet> = past.map(|(&pair, &unmet)| (pair, unmet)).collect();
        for &one in peers.keys() {
            for &other in nodes.iter().filter(|&&other| other != one) {
                if !sees(one, other) && !sees(other, one) {
                    let pair = pair(one, other);
                    let known = self.unmet.get(&pair);
                    let is_told = told.contains(&pair) || known.is_some_and(|known| known.is_told);
                    unmet.insert(pair, Unmet { since: known.map_or(now, |known| known.since), until: now, is_told });
                }
            }
        }
        self.unmet = unmet;
        nodes
    }

    fn is_cut(&self, one: NodeId, other: NodeId) -> bool {
        self.unmet.get(&pair(one, other)).is_some_and(Unmet::is_cut)
    }

    fn between(&self, theirs: &BTreeSet<NodeId>, ours: &BTreeSet<NodeId>) -> Option<Pair> {
        let mut pairs = theirs.iter().flat_map(|&one| ours.iter().map(move |&other| pair(one, other)));
        pairs.find(|&(one, other)| self.is_cut(one, other))
    }
}

/// From the lowest id up, of nodes of whom no two are cut from each other.
fn circles(nodes: &BTreeSet<NodeId>, is_cut: impl Fn(NodeId, NodeId) -> bool) -> Vec<BTreeSet<NodeId>> {
    let mut circles: Vec<BTreeSet<NodeId>> = Vec::new();
    let mut left: Vec<NodeId> = nodes.iter().copied().collect();
    while !left.is_empty() {
        let mut circle = BTreeSet::new();
        left.retain(|&node| {
            let reaches_all = circle.iter().all(|&other| !is_cut(node, other));
            if reaches_all {
                circle.insert(node);
            }
            !reaches_all
        });
        circles.push(circle);
    }
    circles
}

#[cfg(test)]
mod tests;
