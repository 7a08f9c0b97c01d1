//! Merging of entries, and what a member holds afterwards.

use super::*;
use proptest::prelude::*;

fn node() -> NodeId {
    exo_net::Identity::ephemeral().expect("random bytes").node_id()
}

fn run(model: &str) -> Target {
    Target::Run(Box::new(Deployment::of_one_layer(model, node())))
}

#[test]
fn the_latest_instance_of_a_model_is_found() {
    let mut desired = Desired::new(node());
    desired.set(InstanceId(7), run("a"), Duration::ZERO);
    desired.set(InstanceId(3), run("a"), Duration::ZERO);
    assert_eq!(desired.find(&ModelSpec::new("a")).map(|(id, ..)| id), Some(InstanceId(3)));
    desired.set(InstanceId(3), Target::Stopped { error: None }, Duration::ZERO);
    assert_eq!(desired.find(&ModelSpec::new("a")).map(|(id, ..)| id), Some(InstanceId(7)));
}

#[test]
fn a_shard_is_kept_until_its_instance_stops_or_moves() {
    let (mut desired, by, second) = (Desired::new(node()), node(), Duration::from_secs(1));
    let (id, stamp) = (InstanceId(1), |counter| Stamp { counter, by });
    let keeps = |desired: &Desired, counter, age, owner_is_here: bool| {
        desired.snapshot().keeps(id, stamp(counter), age, |_| owner_is_here)
    };
    assert!(keeps(&desired, 1, second, true), "the entry may arrive after the order");
    assert!(!keeps(&desired, 1, ENTRY_WITHIN, true), "no entry arrived in time");
    let apply = |desired: &mut Desired, counter, target| {
        drop(desired.merge(vec![(id, DesiredEntry { stamp: stamp(counter), target })], second));
    };
    apply(&mut desired, 1, run("a"));
    apply(&mut desired, 2, Target::Stopped { error: None });
    assert!(!keeps(&desired, 1, second, true));
    assert!(keeps(&desired, 3, second, true), "an entry that runs the instance again may be on its way");
    apply(&mut desired, 3, run("a"));
    assert!(keeps(&desired, 3, 2 * ENTRY_WITHIN, false));
    assert!(keeps(&desired, 1, 2 * ENTRY_WITHIN, true), "the owner stops shards of earlier placements");
    assert!(!keeps(&desired, 1, 2 * ENTRY_WITHIN, false), "an unreachable owner stops no shards");
    assert!(!keeps(&desired, 4, ENTRY_WITHIN, true), "the entry of the order did not arrive in time");
}

#[test]
fn implausible_entries_are_not_merged() {
    let mut desired = Desired::new(node());
    let by = node();
    let mut apply = |change: &dyn Fn(&mut Deployment)| {
        let Target::Run(mut deployment) = run("a") else { unreachable!("the target is to run") };
        change(&mut deployment);
        let entry = DesiredEntry { stamp: Stamp { counter: 1, by }, target: Target::Run(deployment) };
        desired.merge(vec![(InstanceId(1), entry)], Duration::ZERO).len()
    };
    assert_eq!(apply(&|deployment| deployment.demand.kv_bytes.clear()), 0);
    assert_eq!(apply(&|deployment| deployment.demand.head_bytes = u64::MAX), 0);
    assert_eq!(apply(&|deployment| deployment.demand.kv_pages = u32::MAX), 0);
    assert_eq!(apply(&|deployment| deployment.placement.stages.clear()), 0);
    let nowhere = MoveStrategy::Beside { rollback: Some(Placement { stages: Vec::new() }) };
    assert_eq!(apply(&|deployment| deployment.strategy = nowhere.clone()), 0);
    assert_eq!(apply(&|deployment| deployment.reason = "x".repeat(1 << 20)), 0);
    assert_eq!(apply(&|deployment| deployment.placement.stages[0].layers = 0..2), 0);
    assert_eq!(apply(&|deployment| deployment.placement.stages[0].memory_bytes = u64::MAX), 0);
    assert_eq!(apply(&|_| {}), 1);
}

#[test]
fn a_stopped_instance_does_not_return_and_its_tombstone_expires() {
    let (mut here, mut away) = (Desired::new(node()), Desired::new(node()));
    let begun = here.set(InstanceId(1), run("a"), Duration::ZERO);
    away.merge(vec![(InstanceId(1), begun.clone())], Duration::ZERO);
    here.set(InstanceId(1), Target::Stopped { error: None }, Duration::ZERO);
    assert!(here.merge(vec![(InstanceId(1), begun)], Duration::ZERO).is_empty());
    let known: Vec<_> = here.entries().map(|(id, entry)| (id, entry.clone())).collect();
    assert_eq!(away.merge(known, Duration::ZERO), [InstanceId(1)]);
    assert_eq!(away.running().count(), 0);
    for id in 2..5000 {
        away.set(InstanceId(id), Target::Stopped { error: None }, Duration::from_secs(id));
    }
    assert_eq!(away.entries().count(), TOMBSTONES_MAX);
    away.set(InstanceId(1), Target::Stopped { error: None }, TOMBSTONES_KEPT * 3);
    assert_eq!(away.entries().count(), 1);
}

#[test]
fn hostile_stamps_cannot_exhaust_the_counter() {
    let mut desired = Desired::new(node());
    let absurd = DesiredEntry { stamp: Stamp { counter: u64::MAX, by: node() }, target: run("a") };
    assert!(desired.merge(vec![(InstanceId(1), absurd)], Duration::ZERO).is_empty());
    assert!(desired.set(InstanceId(1), run("a"), Duration::ZERO).stamp.counter < 10);
    // Stamps that leap from one entry to the next cannot exhaust it either.
    let by = node();
    let leap =
        |at: u64| (InstanceId(1), DesiredEntry { stamp: Stamp { counter: at * LEAP_MAX, by }, target: run("a") });
    desired.merge((1..4096).map(leap).collect(), Duration::ZERO);
    assert!(desired.set(InstanceId(1), run("a"), Duration::ZERO).stamp.counter <= 2 * LEAP_MAX);
}

proptest! {
    /// Members that have received the same entries hold the same list, in whatever order, and however often, the
    /// entries arrive; and a later stamp has later incarnations.
    #[test]
    fn members_with_the_same_entries_hold_the_same_list(
        writes in prop::collection::vec((0_u64..4, 0_usize..3, any::<bool>()), 1..30),
        order in any::<u64>(),
    ) {
        let nodes = [node(), node(), node()];
        let mut writers = nodes.map(Desired::new);
        let mut log = Vec::new();
        for (id, writer, is_run) in writes {
            let want = if is_run { run("a") } else { Target::Stopped { error: None } };
            log.push((InstanceId(id), writers[writer].set(InstanceId(id), want, Duration::ZERO)));
        }
        let mut shuffled = log.clone();
        fastrand::Rng::with_seed(order).shuffle(&mut shuffled);
        let (mut a, mut b) = (Desired::new(nodes[0]), Desired::new(nodes[1]));
        a.merge(log.clone(), Duration::ZERO);
        for entry in shuffled.iter().chain(&shuffled) {
            b.merge(vec![entry.clone()], Duration::ZERO);
        }
        prop_assert!(a.entries().eq(b.entries()));
        for (_, first) in &log {
            for (_, second) in log.iter().filter(|(_, second)| second.stamp.counter > first.stamp.counter) {
                let earlier = incarnation(first.stamp, u64::MAX, first.stamp.by);
                prop_assert!(earlier < incarnation(second.stamp, 0, second.stamp.by));
            }
        }
    }
}
