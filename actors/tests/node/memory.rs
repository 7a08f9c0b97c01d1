//! Models that share the memory: who leaves, and when.

use crate::PROMPT;
use crate::fake::{Script, World, answer};
use exo_actors::core::status::Phase;
use exo_actors::{PlannerLimits, RequestError};
use std::sync::Arc;
use std::time::Duration;

/// Models that run now.
async fn running(world: &World) -> usize {
    let state = world.node.status().await.expect("the node lives");
    state.instances.values().filter(|instance| instance.phase == Phase::Ready).count()
}

/// A model that nobody uses leaves memory, and comes back when it is asked for.
#[tokio::test(flavor = "multi_thread")]
async fn an_idle_model_leaves_and_comes_back() {
    let world = World::limited(PlannerLimits { idle: Some(Duration::from_millis(300)), memory_bytes: None }).await;
    assert_eq!(world.ask(world.request(1, &PROMPT, 5)).await, Ok(answer(&PROMPT, 5)));
    assert_eq!(running(&world).await, 1);
    let gone = async {
        while running(&world).await > 0 {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    };
    tokio::time::timeout(Duration::from_secs(10), gone).await.expect("it leaves");
    assert_eq!(world.ask(world.request(1, &PROMPT, 5)).await, Ok(answer(&PROMPT, 5)));
    assert_eq!(world.script.lock().expect("not poisoned").loads, 2);
    // Whoever holds a running model keeps it.
    let held = world.node.load(world.spec(1)).await.expect("it runs");
    tokio::time::sleep(Duration::from_millis(1800)).await;
    assert_eq!(running(&world).await, 1);
    drop(held);
    world.node.shutdown().await;
}

/// Where two models do not fit together, the one that nobody uses makes room; one that is in use does not.
#[tokio::test(flavor = "multi_thread")]
async fn the_least_recently_used_makes_room() {
    let probe = World::limited(PlannerLimits::default()).await;
    let placed = probe.node.load(probe.spec(1)).await.expect("it runs");
    let one: u64 = placed.placement().stages.iter().map(|stage| stage.memory_bytes).sum();
    drop(placed);
    probe.node.shutdown().await;

    let world = World::limited(PlannerLimits { idle: None, memory_bytes: Some(one * 5 / 2) }).await;
    // Three instances of one model, each with shards of its own; two fit.
    for shards in [1, 2, 1, 3] {
        assert_eq!(world.ask(world.request(shards, &PROMPT, 5)).await, Ok(answer(&PROMPT, 5)));
    }
    let state = world.node.status().await.expect("the node lives");
    let ready = state.instances.values().filter(|instance| instance.phase == Phase::Ready);
    let mut shards: Vec<usize> = ready.map(|instance| instance.placement.stages.len()).collect();
    shards.sort_unstable();
    assert_eq!(shards, [1, 3], "the second was used longest ago");
    // In use, neither leaves: who comes is told so.
    let held = (world.node.load(world.spec(1)).await, world.node.load(world.spec(3)).await);
    let refused = world.ask(world.request(4, &PROMPT, 5)).await;
    assert!(matches!(refused, Err(RequestError::MemoryBusy { .. })), "{refused:?}");
    drop(held);
    assert_eq!(world.ask(world.request(4, &PROMPT, 5)).await, Ok(answer(&PROMPT, 5)));
    world.node.shutdown().await;
}

/// A load that nobody wants any more does not go on to its end.
#[tokio::test(flavor = "multi_thread")]
async fn a_node_that_stops_loads_no_further() {
    let world = World::new(Script { more_tensors: 30_000, ..Script::default() }).await;
    let (node, spec) = (world.node.clone(), world.spec(2));
    let loading = tokio::spawn(async move { node.load(spec).await.map(drop) });
    let has = |count: fn(&Script) -> u32| {
        let script = Arc::clone(&world.script);
        let all = async move {
            while count(&script.lock().expect("not poisoned")) < 2 {
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        };
        tokio::time::timeout(Duration::from_secs(10), all)
    };
    has(|script| script.loads).await.expect("both shards are being loaded");
    world.node.clone().shutdown().await;
    has(|script| script.interrupted).await.expect("both loads break off");
    assert!(loading.await.expect("no panic").is_err(), "whoever waits is told");
}
