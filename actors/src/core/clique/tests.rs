//! Cliques, as each node of a small cluster computes them.

use super::*;
use crate::core::plan::Link;

const SECOND: Duration = Duration::from_secs(1);

fn id(number: u8) -> NodeId {
    format!("{number:02x}{:062x}", 0).parse().expect("an id")
}

/// Nodes, and the pairs of them that cannot connect.
struct World {
    count: u8,
    cut: BTreeSet<(u8, u8)>,
    /// Pairs of a node and a peer to which the node sends no reports.
    silent: BTreeSet<(u8, u8)>,
    views: Vec<(Clique, Members)>,
}

impl World {
    fn of(count: u8, cut: impl IntoIterator<Item = (u8, u8)>) -> Self {
        let views = (0..count).map(|_| (Clique::default(), Members::default())).collect();
        Self { count, cut: cut.into_iter().collect(), silent: BTreeSet::new(), views }
    }

    fn reaches(&self, one: u8, other: u8) -> bool {
        !self.cut.contains(&(one.min(other), one.max(other)))
    }

    fn report(&self, of: u8) -> MemberReport {
        let seen = (0..self.count).filter(|&other| other != of && self.reaches(of, other));
        let links = seen.map(|other| (id(other), Link { rtt_s: 1e-3, bytes_per_s: None, spread: 1.0 })).collect();
        let (outside, cuts) = (self.views[usize::from(of)].0.announced(), self.views[usize::from(of)].0.cuts());
        MemberReport { links, outside, cuts, ..MemberReport::of_cpu(1 << 30, 1e10) }
    }

    /// Every node reports to all that it reaches, then computes its clique.
    fn second(&mut self, now: Duration) -> Vec<CliqueChange> {
        let reports: Vec<MemberReport> = (0..self.count).map(|of| self.report(of)).collect();
        let mut views = std::mem::take(&mut self.views);
        let look = |(own, (clique, members)): (u8, &mut (Clique, Members))| {
            for other in 0..self.count {
                match self.reaches(own, other) {
                    true if self.silent.contains(&(other, own)) => {}
                    true => {
                        let _ = clique.handle_return(id(other));
                        clique.handle_report(members, id(other), reports[usize::from(other)].clone());
                    }
                    false => drop(clique.handle_lost(members, id(other), now)),
                }
            }
            clique.update(id(own), members, now)
        };
        let changes = (0..self.count).zip(&mut views).map(look).collect();
        self.views = views;
        changes
    }

    fn seconds(&mut self, from: u32, to: u32) {
        for second in from..to {
            self.second(second * SECOND);
        }
    }

    fn members(&self, of: u8) -> BTreeSet<NodeId> {
        self.views[usize::from(of)].1.0.keys().copied().collect()
    }
}

fn ids(numbers: impl IntoIterator<Item = u8>) -> BTreeSet<NodeId> {
    numbers.into_iter().map(id).collect()
}

#[test]
fn a_pair_that_cannot_connect_is_in_two_cliques() {
    let mut world = World::of(3, [(0, 1)]);
    world.seconds(0, 10);
    assert_eq!(
        [0, 1, 2].map(|of| world.members(of)),
        [ids([0, 2]), ids([1, 2]), ids([0, 1, 2])],
        "a disconnected pair may still connect"
    );
    let changes = world.second(10 * SECOND);
    assert_eq!([0, 1, 2].map(|of| world.members(of)), [ids([0, 2]), ids([1]), ids([0, 2])]);
    let outside = |node| (id(node), Outside { name: String::new(), between: Some((id(0), id(1))) });
    assert_eq!(changes[1], CliqueChange { left: vec![outside(2)], ..CliqueChange::default() });
    assert_eq!(changes[2], CliqueChange { left: vec![outside(1)], ..CliqueChange::default() });
    // The firewall opens; reports say so a second later.
    world.cut.clear();
    world.seconds(11, 13);
    assert_eq!([0, 1, 2].map(|of| world.members(of)), [(); 3].map(|()| ids([0, 1, 2])));
}

#[test]
fn a_lost_node_divides_no_clique() {
    let mut world = World::of(4, []);
    world.seconds(0, 20);
    for survivor in 0..3 {
        world.cut.insert((survivor, 3));
        world.second((20 + u32::from(survivor)) * SECOND);
    }
    world.seconds(23, 60);
    assert!((0..3).all(|of| world.members(of) == ids([0, 1, 2])));
}

#[test]
fn a_link_that_returns_in_time_divides_no_clique() {
    let mut world = World::of(3, []);
    for round in 0..10_u32 {
        world.cut.insert((0, 1));
        world.seconds(round * 20, round * 20 + 9);
        world.cut.clear();
        world.seconds(round * 20 + 9, round * 20 + 20);
        assert_eq!(world.members(2), ids([0, 1, 2]));
    }
}

#[test]
fn reports_of_nodes_that_do_not_exist_harm_only_their_sender() {
    let mut world = World::of(3, []);
    for second in 0..40 {
        world.second(second * SECOND);
        let lies = (100..200).map(|number| (id(number), Link { rtt_s: 1e-3, bytes_per_s: None, spread: 1.0 }));
        for (clique, members) in &mut world.views[..2] {
            let mut report = members.0[&id(2)].clone();
            report.links.extend(lies.clone());
            clique.handle_report(members, id(2), report);
            assert!(clique.disconnected.len() < 200);
        }
    }
    assert!((0..2).all(|of| world.members(of).is_superset(&ids([0, 1]))));
}

/// A connected node that sends no report to some members does not divide the others.
#[test]
fn a_node_without_reports_divides_no_clique() {
    for silent_to in [vec![1_u8, 2, 3], vec![1], vec![2, 3]] {
        let mut world = World::of(4, []);
        // The silent node has the lowest id, which is always in the first clique.
        world.silent.extend(silent_to.iter().map(|&to| (0, to)));
        world.seconds(0, 40);
        for of in 1..4 {
            assert!(world.members(of).is_superset(&ids([1, 2, 3])), "node {of}; node 0 is silent to {silent_to:?}");
        }
    }
}

/// Nodes 0 and 1 can never connect. Node 1 loses node 2, which is outside its clique, and connects again; or node 2
/// restarts and knows nothing. Neither counts the other as a member meanwhile.
#[test]
fn a_peer_outside_that_reconnects_is_still_outside() {
    for restarts in [false, true] {
        let mut world = World::of(3, [(0, 1)]);
        world.seconds(0, 20);
        let divided = [ids([0, 2]), ids([1]), ids([0, 2])];
        for (round, away) in [(0, 1), (1, 5), (2, 30)] {
            let from = 20 + round * 100;
            world.cut.insert((1, 2));
            if restarts {
                world.cut.insert((0, 2));
                world.views[2] = Default::default();
            }
            world.seconds(from, from + away);
            world.cut = [(0, 1)].into();
            for second in from + away..from + 100 {
                world.second(second * SECOND);
                assert_eq!(world.members(1), divided[1], "at {second} s");
                // A restarted node learns the cuts from reports.
                assert!(restarts && second < from + away + 2 || world.members(2) == divided[2], "at {second} s");
            }
            assert_eq!([0, 1, 2].map(|of| world.members(of)), divided);
        }
        world.cut.clear();
        world.seconds(400, 403);
        assert_eq!([0, 1, 2].map(|of| world.members(of)), [(); 3].map(|()| ids([0, 1, 2])));
    }
}

/// A node that dies and returns is a member at once: a pair is not disconnected because one member notices the loss
/// before another.
#[test]
fn a_node_that_dies_and_returns_is_a_member_at_once() {
    let mut world = World::of(3, []);
    world.seconds(0, 20);
    world.cut.insert((0, 2));
    world.second(20 * SECOND);
    world.cut.insert((1, 2));
    world.seconds(21, 50);
    world.cut.remove(&(1, 2));
    world.second(50 * SECOND);
    world.cut.clear();
    world.second(51 * SECOND);
    assert_eq!([0, 1, 2].map(|of| world.members(of)), [(); 3].map(|()| ids([0, 1, 2])));
}

/// For every graph of up to six nodes: the members of a clique reach each other and compute the same clique, and every
/// node that reaches all of the lowest id's clique is in it.
#[test]
fn all_members_compute_the_same_clique() {
    for count in 1_u8..=6 {
        let pairs: Vec<(u8, u8)> = (0..count).flat_map(|a| (a + 1..count).map(move |b| (a, b))).collect();
        for bits in 0_u32..1 << pairs.len() {
            let cut = pairs.iter().enumerate().filter(|(bit, _)| bits >> bit & 1 == 1).map(|(_, &pair)| pair);
            assert_same_cliques(count, &cut.collect::<Vec<_>>());
        }
    }
}

fn assert_same_cliques(count: u8, cut: &[(u8, u8)]) {
    let mut world = World::of(count, cut.iter().copied());
    for second in [0, 10, 11, 12, 13] {
        world.second(second * SECOND);
    }
    for one in 0..count {
        let clique = world.members(one);
        assert!(clique.contains(&id(one)));
        for other in (0..count).filter(|other| clique.contains(&id(*other))) {
            assert!(world.reaches(one, other), "{one} {other} {cut:?}");
            assert_eq!(world.members(other), clique, "{one} {other} {cut:?}");
        }
    }
    let first = world.members(0);
    for other in (1..count).filter(|other| !first.contains(&id(*other))) {
        assert!((0..count).any(|of| first.contains(&id(of)) && !world.reaches(of, other)), "{other} {cut:?}");
    }
}
