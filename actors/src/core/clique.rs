//! Cliques: groups of members that all reach each other, and so plan together.
//!
//! ```text
//! reports (which peers each node sees) ─► disconnected pairs ─► cliques, lowest id first ─► nodes that leave or join
//! ```
//! Firewalls and routes can keep two nodes disconnected that both reach a third. If such a pair planned together, each
//! would count the other as lost, and two leaders would write one desired list. So the cluster divides into cliques.
//!
//! Every node computes the same cliques: the first has the lowest id and, in the order of ids, each node that reaches
//! all members before it; the remaining nodes form the next clique in the same way.
//!
//! A distant node may compute different cliques at first, since it sees other reports. So each node announces which
//! peers it excludes, and an announced pair counts as disconnected. Reports of a peer outside the clique are still
//! read, since the pair may connect later; its other messages are ignored. A peer that disconnects while it is outside,
//! and returns, stays outside until it is seen to reach every member: the cause of the disconnected pair has probably
//! not changed.

use crate::core::members::{LISTED_MAX, MemberReport, Members, Pair, pair};
use exo_net::NodeId;
use serde::{Deserialize, Serialize};
use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

/// A pair that has been disconnected for this long counts as unable to connect: two nodes of one network connect within
/// seconds of learning each other's address.
pub const OUTSIDE_AFTER: Duration = Duration::from_secs(10);
/// How long the clique remembers the disconnected pairs of lost nodes, and which lost nodes were outside: longer than
/// the longest wait between two dials.
const REMEMBERED_FOR: Duration = Duration::from_secs(60);
/// The most disconnected pairs of lost nodes that are remembered.
const REMEMBERED_MAX: usize = 4096;
/// The most nodes that one member may report and this node does not see; further ones are ignored.
const UNSEEN_MAX: usize = 16;

/// Why a connected peer is outside this node's clique.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Outside {
    /// The peer's name, as its user chose it.
    pub name: String,
    /// A disconnected pair: one node of the peer's clique, and one of this node's. `None`: only the peer knows one.
    pub between: Option<Pair>,
}

/// How the clique changed.
#[derive(Debug, Default, PartialEq)]
pub struct CliqueChange {
    /// Members that are outside from now on.
    pub left: Vec<(NodeId, Outside)>,
    /// Peers that are members from now on.
    pub joined: Vec<NodeId>,
    /// Lost nodes that are no longer remembered as outside.
    pub forgotten: Vec<NodeId>,
}

/// A peer outside the clique, with its latest report.
#[derive(Debug)]
struct OutsidePeer {
    report: MemberReport,
    why: Outside,
}

/// How long neither node of a pair has seen the other.
#[derive(Debug, Clone, Copy)]
struct Disconnected {
    since: Duration,
    /// When this was last observed.
    until: Duration,
    /// Whether a member reports that the pair cannot connect.
    is_reported: bool,
}

impl Disconnected {
    /// Whether the pair counts as unable to connect.
    fn is_cut(&self) -> bool {
        self.is_reported || self.until.saturating_sub(self.since) >= OUTSIDE_AFTER
    }
}

/// The state machine. Times count from any fixed start.
#[derive(Debug, Default)]
pub struct Clique {
    /// Connected peers that are outside.
    outside: BTreeMap<NodeId, OutsidePeer>,
    /// Peers that were outside when they were lost, with the time of the loss.
    lost: BTreeMap<NodeId, (OutsidePeer, Duration)>,
    disconnected: BTreeMap<Pair, Disconnected>,
    /// Peers that this node excludes by the disconnected pairs that it knows.
    announced: BTreeSet<NodeId>,
}

impl Clique {
    /// Whether a peer is outside this node's clique.
    pub fn is_outside(&self, node: NodeId) -> bool {
        self.outside.contains_key(&node) || self.lost.contains_key(&node)
    }

    /// The peers that this node excludes, for its report.
    pub fn announced(&self) -> Vec<NodeId> {
        self.announced.iter().copied().collect()
    }

    /// The pairs that cannot connect, for this node's report: a node that has just started learns them at once.
    pub fn cuts(&self) -> Vec<Pair> {
        let cut = self.disconnected.iter().filter(|(_, disconnected)| disconnected.is_cut());
        cut.map(|(&pair, _)| pair).take(LISTED_MAX).collect()
    }

    /// Stores the latest report of a peer.
    pub fn handle_report(&mut self, members: &mut Members, from: NodeId, report: MemberReport) {
        let peer = self.outside.get_mut(&from).or_else(|| self.lost.get_mut(&from).map(|(peer, _)| peer));
        match peer {
            Some(peer) => peer.report = report,
            None => drop(members.0.insert(from, report)),
        }
    }

    /// Removes a lost peer. Returns whether the peer was outside, so that no member was lost.
    pub fn handle_lost(&mut self, members: &mut Members, node: NodeId, now: Duration) -> bool {
        members.0.remove(&node);
        let Some(peer) = self.outside.remove(&node) else { return self.lost.contains_key(&node) };
        self.lost.insert(node, (peer, now));
        true
    }

    /// Notes that a peer connected. Returns `Some` if the peer was outside when it was lost: it stays outside until it
    /// is seen to reach every member.
    pub fn handle_return(&mut self, node: NodeId) -> Option<Outside> {
        let (peer, _) = self.lost.remove(&node)?;
        self.announced.insert(node);
        let why = peer.why.clone();
        self.outside.insert(node, peer);
        Some(why)
    }

    /// Computes the clique anew from all reports, that of `own` included. Nodes that leave it are removed from
    /// `members`, nodes that join are added.
    pub fn update(&mut self, own: NodeId, members: &mut Members, now: Duration) -> CliqueChange {
        let is_past =
            |_: &NodeId, (_, since): &mut (OutsidePeer, Duration)| now.saturating_sub(*since) >= REMEMBERED_FOR;
        let forgotten = self.lost.extract_if(.., is_past).map(|(node, _)| node).collect();
        let mut change = CliqueChange { forgotten, ..CliqueChange::default() };
        let nodes = self.note_disconnected(members, now);
        let peers: Vec<NodeId> = members.0.keys().chain(self.outside.keys()).copied().filter(|&id| id != own).collect();
        let seen = cliques(&nodes, |one, other| self.is_cut(one, other));
        let Some(ours) = seen.iter().find(|clique| clique.contains(&own)) else { return change };
        self.announced = peers.iter().copied().filter(|peer| !ours.contains(peer)).collect();
        let announced = self.announced_by_all(own, members);
        let cliques = cliques(&nodes, |one, other| self.is_cut(one, other) || announced.contains(&pair(one, other)));
        let Some(ours) = cliques.iter().find(|clique| clique.contains(&own)) else { return change };
        for node in peers {
            if ours.contains(&node) {
                if let Some(peer) = self.outside.remove(&node) {
                    members.0.insert(node, peer.report);
                    change.joined.push(node);
                }
            } else if let Some(report) = members.0.remove(&node) {
                let theirs = cliques.iter().find(|clique| clique.contains(&node));
                let between = theirs.and_then(|theirs| self.cut_between(theirs, ours));
                let why = Outside { name: report.name.clone(), between };
                change.left.push((node, why.clone()));
                self.outside.insert(node, OutsidePeer { report, why });
            }
        }
        change
    }

    /// The latest reports of members and of peers outside.
    fn reports<'a>(&'a self, members: &'a Members) -> BTreeMap<NodeId, &'a MemberReport> {
        let outside = self.outside.iter().map(|(&id, peer)| (id, &peer.report));
        members.0.iter().map(|(&id, report)| (id, report)).chain(outside).collect()
    }

    /// The pairs in which one node announces that it excludes the other.
    fn announced_by_all(&self, own: NodeId, members: &Members) -> BTreeSet<Pair> {
        let reports = self.reports(members);
        let of_peers = reports.iter().filter(|(peer, _)| **peer != own);
        let theirs = of_peers.flat_map(|(&peer, report)| report.outside.iter().map(move |&other| pair(peer, other)));
        theirs.chain(self.announced.iter().map(|&peer| pair(own, peer))).collect()
    }

    /// Notes which pairs are disconnected now. Returns all nodes that any report names.
    fn note_disconnected(&mut self, members: &Members, now: Duration) -> BTreeSet<NodeId> {
        let reports = self.reports(members);
        let mut nodes: BTreeSet<NodeId> = reports.keys().copied().collect();
        for report in reports.values() {
            nodes.extend(report.links.keys().filter(|node| !reports.contains_key(node)).take(UNSEEN_MAX));
        }
        // This node's own report is among them, so a peer that has sent none yet counts as seen by this node.
        let sees =
            |one: NodeId, other: NodeId| reports.get(&one).is_some_and(|report| report.links.contains_key(&other));
        let can_tell = |one: &NodeId, other: &NodeId| reports.contains_key(one) && nodes.contains(other);
        let is_past = |(one, other): &Pair| !can_tell(one, other) && !can_tell(other, one);
        let is_remembered = |(pair, disconnected): &(&Pair, &Disconnected)| {
            is_past(pair) && disconnected.is_cut() && now.saturating_sub(disconnected.until) < REMEMBERED_FOR
        };
        let reported: BTreeSet<Pair> = reports.values().flat_map(|report| report.cuts.iter().copied()).collect();
        let past = self.disconnected.iter().filter(is_remembered).take(REMEMBERED_MAX);
        let mut disconnected: BTreeMap<Pair, Disconnected> = past.map(|(&pair, &known)| (pair, known)).collect();
        for &one in reports.keys() {
            for &other in nodes.iter().filter(|&&other| other != one) {
                if !sees(one, other) && !sees(other, one) {
                    let pair = pair(one, other);
                    let known = self.disconnected.get(&pair);
                    let is_reported = reported.contains(&pair) || known.is_some_and(|known| known.is_reported);
                    let since = known.map_or(now, |known| known.since);
                    disconnected.insert(pair, Disconnected { since, until: now, is_reported });
                }
            }
        }
        self.disconnected = disconnected;
        nodes
    }

    fn is_cut(&self, one: NodeId, other: NodeId) -> bool {
        self.disconnected.get(&pair(one, other)).is_some_and(Disconnected::is_cut)
    }

    /// A pair of the two cliques that cannot connect.
    fn cut_between(&self, theirs: &BTreeSet<NodeId>, ours: &BTreeSet<NodeId>) -> Option<Pair> {
        let mut pairs = theirs.iter().flat_map(|&one| ours.iter().map(move |&other| pair(one, other)));
        pairs.find(|&(one, other)| self.is_cut(one, other))
    }
}

/// Divides `nodes` into cliques, from the lowest id up.
fn cliques(nodes: &BTreeSet<NodeId>, is_cut: impl Fn(NodeId, NodeId) -> bool) -> Vec<BTreeSet<NodeId>> {
    let mut cliques: Vec<BTreeSet<NodeId>> = Vec::new();
    let mut left: Vec<NodeId> = nodes.iter().copied().collect();
    while !left.is_empty() {
        let mut clique = BTreeSet::new();
        left.retain(|&node| {
            let reaches_all = clique.iter().all(|&other| !is_cut(node, other));
            if reaches_all {
                clique.insert(node);
            }
            !reaches_all
        });
        cliques.push(clique);
    }
    cliques
}

#[cfg(test)]
mod tests;
