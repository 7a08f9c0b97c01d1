//! Circles of members, as each of them sees them.

use super::*;
use crate::core::plan::Link;

const SECOND: Duration = Duration::from_secs(1);

fn id(number: u8) -> NodeId {
    format!("{number:02x}{:062x}", 0).parse().expect("an id")
}

/// Members with the pairs of them that cannot meet.
struct World {
    count: u8,
    cut: BTreeSet<(u8, u8)>,
    /// Who tells nothing of itself to whom.
    silent: BTreeSet<(u8, u8)>,
    views: Vec<(Circle, Members)>,
}

impl World {
    fn of(count: u8, cut: impl IntoIterator<Item = (u8, u8)>) -> Self {
        let views = (0..count).map(|_| (Circle::default(), Members::default())).collect();
        Self { count, cut: cut.into_iter().collect(), silent: BTreeSet::new(), views }
    }

    fn reaches(&self, one: u8, other: u8) -> bool {
        !self.cut.contains(&(one.min(other), one.max(other)))
    }

    fn report(&self, of: u8) -> MemberReport {
        let seen = (0..self.count).filter(|&other| other != of && self.reaches(of, other));
        let links = seen.map(|other| (id(other), Link { rtt_s: 1e-3, bytes_per_s: None })).collect();
        let (apart, cuts) = (self.views[usize::from(of)].0.declared(), self.views[usize::from(of)].0.cuts());
        MemberReport { links, apart, cuts, ..MemberReport::of_cpu(1 << 30, 1e10) }
    }

    /// All tell all whom they reach, and look.
    fn second(&mut self, now: Duration) -> Vec<Change> {
        let reports: Vec<MemberReport> = (0..self.count).map(|of| self.report(of)).collect();
        let mut views = std::mem::take(&mut self.views);
        let look = |(own, (circle, members)): (u8, &mut (Circle, Members))| {
            for other in 0..self.count {
                match self.reaches(own, other) {
                    true if self.silent.contains(&(other, own)) => {}
                    true => {
                        let _ = circle.handle_return(id(other));
                        circle.handle_report(members, id(other), reports[usize::from(other)].clone());
                    }
                    false => drop(circle.handle_loss(members, id(other), now)),
                }
            }
            circle.look(id(own), members, now)
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
fn a_pair_that_does_not_meet_is_of_two_circles() {
    let mut world = World::of(3, [(0, 1)]);
    world.seconds(0, 10);
    assert_eq!([0, 1, 2].map(|of| world.members(of)), [ids([0, 2]), ids([1, 2]), ids([0, 1, 2])], "they may yet meet");
    let changes = world.second(10 * SECOND);
    assert_eq!([0, 1, 2].map(|of| world.members(of)), [ids([0, 2]), ids([1]), ids([0, 2])]);
    let apart = |node| (id(node), Apart { name: String::new(), between: Some((id(0), id(1))) });
    assert_eq!(changes[1], Change { parted: vec![apart(2)], ..Change::default() });
    assert_eq!(changes[2], Change { parted: vec![apart(1)], ..Change::default() });
    // The firewall is opened; all say so a second later.
    world.cut.clear();
    world.seconds(11, 13);
    assert_eq!([0, 1, 2].map(|of| world.members(of)), [(); 3].map(|()| ids([0, 1, 2])));
}

#[test]
fn who_dies_parts_nobody() {
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
fn a_link_that_comes_back_in_time_is_no_cut() {
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
fn who_tells_of_nodes_that_are_not_there_harms_itself_alone() {
    let mut world = World::of(3, []);
    for second in 0..40 {
        world.second(second * SECOND);
        let lies = (100..200).map(|number| (id(number), Link { rtt_s: 1e-3, bytes_per_s: None }));
        for (circle, members) in &mut world.views[..2] {
            let mut report = members.0[&id(2)].clone();
            report.links.extend(lies.clone());
            circle.handle_report(members, id(2), report);
            assert!(circle.unmet.len() < 200);
        }
    }
    assert!((0..2).all(|of| world.members(of).is_superset(&ids([0, 1]))));
}

/// One that is connected with some or all, and tells nothing of itself to some, parts nobody from the others.
#[test]
fn who_says_nothing_parts_nobody() {
    for silent_to in [vec![1_u8, 2, 3], vec![1], vec![2, 3]] {
        let mut world = World::of(4, []);
        // The lowest id would be of the first circle.
        world.silent.extend(silent_to.iter().map(|&to| (0, to)));
        world.seconds(0, 40);
        for of in 1..4 {
            assert!(world.members(of).is_superset(&ids([1, 2, 3])), "{of} where it is silent to {silent_to:?}");
        }
    }
}

/// A pair is cut for good, and one of it loses the third, with which it was apart, and meets it again; or the third starts
/// anew and knows nothing. Nobody takes the other for a member meanwhile.
#[test]
fn who_was_apart_and_comes_anew_is_apart() {
    for restarts in [false, true] {
        let mut world = World::of(3, [(0, 1)]);
        world.seconds(0, 20);
        let parted = [ids([0, 2]), ids([1]), ids([0, 2])];
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
                assert_eq!(world.members(1), parted[1], "at {second} s");
                // One that has started anew hears what is cut from those who know.
                assert!(restarts && second < from + away + 2 || world.members(2) == parted[2], "at {second} s");
            }
            assert_eq!([0, 1, 2].map(|of| world.members(of)), parted);
        }
        world.cut.clear();
        world.seconds(400, 403);
        assert_eq!([0, 1, 2].map(|of| world.members(of)), [(); 3].map(|()| ids([0, 1, 2])));
    }
}

/// Whoever died and comes back is a member at once: that it was missed by one before the other was no cut.
#[test]
fn who_dies_and_comes_back_is_apart_from_nobody() {
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

/// Whoever cannot reach whom, of up to six: members of a circle reach each other, and all of them are of one mind on who they
/// are. Nobody is left out of the lowest id's circle who reaches all of it.
#[test]
fn circles_are_of_one_mind() {
    for count in 1_u8..=6 {
        let pairs: Vec<(u8, u8)> = (0..count).flat_map(|a| (a + 1..count).map(move |b| (a, b))).collect();
        for bits in 0_u32..1 << pairs.len() {
            let cut = pairs.iter().enumerate().filter(|(bit, _)| bits >> bit & 1 == 1).map(|(_, &pair)| pair);
            are_of_one_mind(count, &cut.collect::<Vec<_>>());
        }
    }
}

fn are_of_one_mind(count: u8, cut: &[(u8, u8)]) {
    let mut world = World::of(count, cut.iter().copied());
    for second in [0, 10, 11, 12, 13] {
        world.second(second * SECOND);
    }
    for one in 0..count {
        let circle = world.members(one);
        assert!(circle.contains(&id(one)));
        for other in (0..count).filter(|other| circle.contains(&id(*other))) {
            assert!(world.reaches(one, other), "{one} {other} {cut:?}");
            assert_eq!(world.members(other), circle, "{one} {other} {cut:?}");
        }
    }
    let first = world.members(0);
    for other in (1..count).filter(|other| !first.contains(&id(*other))) {
        assert!((0..count).any(|of| first.contains(&id(of)) && !world.reaches(of, other)), "{other} {cut:?}");
    }
}
