//! What every member that has heard the same holds.

use super::*;
use proptest::prelude::*;

fn node() -> NodeId {
    exo_net::Identity::ephemeral().expect("random bytes").node_id()
}

fn run(model: &str) -> Target {
    Target::Run(Box::new(Deployment::of_one_layer(model, node())))
}

#[test]
fn of_two_instances_of_one_model_the_later_counts() {
    let mut desired = Desired::new(node());
    desired.set(InstanceId(7), run("a"), Duration::ZERO);
    desired.set(InstanceId(3), run("a"), Duration::ZERO);
    assert_eq!(desired.find(&ModelSpec::new("a")).map(|(id, ..)| id), Some(InstanceId(3)));
    desired.set(InstanceId(3), Target::Stopped { error: None }, Duration::ZERO);
    assert_eq!(desired.find(&ModelSpec::new("a")).map(|(id, ..)| id), Some(InstanceId(7)));
}

#[test]
fn a_shard_stays_until_its_instance_is_over_or_elsewhere() {
    let (mut desired, by, second) = (Desired::new(node()), node(), Duration::from_secs(1));
    let (id, stamp) = (InstanceId(1), |counter| Stamp { counter, by });
    let keeps = |desired: &Desired, counter, age, owner_is_here: bool| {
        desired.snapshot().keeps(id, stamp(counter), age, |_| owner_is_here)
    };
    assert!(keeps(&desired, 1, second, true), "the order was faster than the entry");
    assert!(!keeps(&desired, 1, ENTRY_WITHIN, true), "there is no entry");
    let hears = |desired: &mut Desired, counter, target| {
        drop(desired.merge(vec![(id, DesiredEntry { stamp: stamp(counter), target })], second));
    };
    hears(&mut desired, 1, run("a"));
    hears(&mut desired, 2, Target::Stopped { error: None });
    assert!(!keeps(&desired, 1, second, true));
    assert!(keeps(&desired, 3, second, true), "it runs again, as the entry on its way says");
    hears(&mut desired, 3, run("a"));
    assert!(keeps(&desired, 3, 2 * ENTRY_WITHIN, false));
    assert!(keeps(&desired, 1, 2 * ENTRY_WITHIN, true), "its owner clears what is left of earlier ones");
    assert!(!keeps(&desired, 1, 2 * ENTRY_WITHIN, false), "who is away clears nothing");
    assert!(!keeps(&desired, 4, ENTRY_WITHIN, true), "the entry of that order came to nobody");
}

#[test]
fn what_no_planner_places_is_not_taken_in() {
    let mut desired = Desired::new(node());
    let by = node();
    let mut hears = |change: &dyn Fn(&mut Deployment)| {
        let Target::Run(mut deployment) = run("a") else { unreachable!("it is to run") };
        change(&mut deployment);
        let entry = DesiredEntry { stamp: Stamp { counter: 1, by }, target: Target::Run(deployment) };
        desired.merge(vec![(InstanceId(1), entry)], Duration::ZERO).len()
    };
    assert_eq!(hears(&|deployment| deployment.demand.kv_bytes.clear()), 0);
    assert_eq!(hears(&|deployment| deployment.demand.head_bytes = u64::MAX), 0);
    assert_eq!(hears(&|deployment| deployment.demand.kv_pages = u32::MAX), 0);
    assert_eq!(hears(&|deployment| deployment.placement.stages.clear()), 0);
    let nowhere = MoveStrategy::Beside { rollback: Some(Placement { stages: Vec::new() }) };
    assert_eq!(hears(&|deployment| deployment.strategy = nowhere.clone()), 0);
    assert_eq!(hears(&|deployment| deployment.reason = "x".repeat(1 << 20)), 0);
    assert_eq!(hears(&|deployment| deployment.placement.stages[0].layers = 0..2), 0);
    assert_eq!(hears(&|deployment| deployment.placement.stages[0].memory_bytes = u64::MAX), 0);
    assert_eq!(hears(&|_| {}), 1);
}

#[test]
fn what_is_over_does_not_come_back_and_is_forgotten_in_time() {
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
fn nobody_can_use_up_the_stamps() {
    let mut desired = Desired::new(node());
    let absurd = DesiredEntry { stamp: Stamp { counter: u64::MAX, by: node() }, target: run("a") };
    assert!(desired.merge(vec![(InstanceId(1), absurd)], Duration::ZERO).is_empty());
    assert!(desired.set(InstanceId(1), run("a"), Duration::ZERO).stamp.counter < 10);
    // Nor does it help to leap from one entry to the next.
    let by = node();
    let leap =
        |at: u64| (InstanceId(1), DesiredEntry { stamp: Stamp { counter: at * LEAP_MAX, by }, target: run("a") });
    desired.merge((1..4096).map(leap).collect(), Duration::ZERO);
    assert!(desired.set(InstanceId(1), run("a"), Duration::ZERO).stamp.counter <= 2 * LEAP_MAX);
}

proptest! {
    /// Members that have heard the same hold the same, in whatever order, and however often, they heard it; and a
    /// later stamp begins later lives.
    #[test]
    fn all_who_hear_the_same_hold_the_same(
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
