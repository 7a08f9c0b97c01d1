//! Models that share memory: which one is unloaded, and when.

use crate::PROMPT;
use crate::fake::{Script, World, answer};
use exo_actors::core::status::Phase;
use exo_actors::{ModelSpec, PlannerLimits, RequestError};
use exo_engines::engine::{ActivationBits, DeviceKind};
use std::sync::Arc;
use std::time::Duration;

/// The number of ready instances.
async fn running(world: &World) -> usize {
    let state = world.node.status().await.expect("the node lives");
    state.instances.values().filter(|instance| instance.phase == Phase::Ready).count()
}

/// An idle model is unloaded, and loaded again by the next request.
#[tokio::test(flavor = "multi_thread")]
async fn an_idle_model_is_unloaded_and_reloaded() {
    let world = World::limited(PlannerLimits { idle: Some(Duration::from_millis(300)), memory_bytes: None }).await;
    assert_eq!(world.ask(world.request(1, &PROMPT, 5)).await, Ok(answer(&PROMPT, 5)));
    assert_eq!(running(&world).await, 1);
    let gone = async {
        while running(&world).await > 0 {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    };
    tokio::time::timeout(Duration::from_secs(10), gone).await.expect("the idle model is unloaded");
    assert_eq!(world.ask(world.request(1, &PROMPT, 5)).await, Ok(answer(&PROMPT, 5)));
    assert_eq!(world.script.lock().loads, 2);
    // A model with an open handle is not unloaded.
    let held = world.node.load(world.spec(1)).await.expect("it runs");
    tokio::time::sleep(Duration::from_millis(1800)).await;
    assert_eq!(running(&world).await, 1);
    drop(held);
    world.node.shutdown().await;
}

/// If models do not fit together, the least recently used idle model is unloaded; a model in use is not.
#[tokio::test(flavor = "multi_thread")]
async fn the_least_recently_used_model_is_unloaded() {
    let probe = World::limited(PlannerLimits::default()).await;
    let placed = probe.node.load(probe.spec(1)).await.expect("it runs");
    let one: u64 = placed.placement().stages.iter().map(|stage| stage.memory_bytes).sum();
    drop(placed);
    probe.node.shutdown().await;

    let world = World::limited(PlannerLimits { idle: None, memory_bytes: Some(one * 5 / 2) }).await;
    // Three instances of one model, with different numbers of shards; two fit.
    for shards in [1, 2, 1, 3] {
        assert_eq!(world.ask(world.request(shards, &PROMPT, 5)).await, Ok(answer(&PROMPT, 5)));
        // A request's task, which counts as use, ends just after the answer's last event.
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    let state = world.node.status().await.expect("the node lives");
    let ready = state.instances.values().filter(|instance| instance.phase == Phase::Ready);
    let mut shards: Vec<usize> = ready.map(|instance| instance.placement.stages.len()).collect();
    shards.sort_unstable();
    assert_eq!(shards, [1, 3], "the instance of two shards was used longest ago");
    // Both are in use, so neither is unloaded, and a third request is refused.
    let held = (world.node.load(world.spec(1)).await, world.node.load(world.spec(3)).await);
    let refused = world.ask(world.request(4, &PROMPT, 5)).await;
    assert!(matches!(refused, Err(RequestError::MemoryBusy { .. })), "{refused:?}");
    drop(held);
    assert_eq!(world.ask(world.request(4, &PROMPT, 5)).await, Ok(answer(&PROMPT, 5)));
    world.node.shutdown().await;
}

/// A shutdown interrupts the loads in progress.
#[tokio::test(flavor = "multi_thread")]
async fn a_shutdown_interrupts_loads() {
    let world = World::new(Script { more_tensors: 30_000, ..Script::default() }).await;
    let (node, spec) = (world.node.clone(), world.spec(2));
    let loading = tokio::spawn(async move { node.load(spec).await.map(drop) });
    let has = |count: fn(&Script) -> u32| {
        let script = Arc::clone(&world.script);
        let all = async move {
            while count(&script.lock()) < 2 {
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        };
        tokio::time::timeout(Duration::from_secs(10), all)
    };
    has(|script| script.loads).await.expect("both shards are being loaded");
    world.node.clone().shutdown().await;
    has(|script| script.interrupted).await.expect("both loads are interrupted");
    assert!(loading.await.expect("no panic").is_err(), "the waiting client gets an error");
}

/// R1.4, R7.1–R7.5: a GPU that runs out of memory during a load keeps as many layers as it has memory for, and the CPU
/// gets the others; the waiting request is answered.
#[tokio::test(flavor = "multi_thread")]
async fn layers_that_a_gpu_has_no_memory_for_go_to_the_cpu() {
    let devices = [("gpu", DeviceKind::Gpu), ("cpu", DeviceKind::Cpu)];
    let row_times = vec![("gpu", Duration::from_millis(1))];
    let world = World::with_devices(Script { row_times, ..Script::default() }, &devices).await;
    let placed = world.node.load(world.spec(1)).await.expect("it runs").placement().clone();
    let [whole] = placed.stages.as_slice() else { panic!("{placed:?}") };

    world.script.lock().short_of_memory = Some(("gpu", whole.layers.end - 1, whole.memory_bytes * 3 / 4));
    let mut request = world.request(1, &PROMPT, 20);
    // Not one of the models that are loaded.
    request.model = ModelSpec { shards: None, activations: Some(ActivationBits::Eight), ..request.model };
    assert_eq!(world.ask(request).await, Ok(answer(&PROMPT, 20)));
    let status = world.node.status().await.expect("the node lives");
    let newest = status.instances.values().max_by_key(|instance| instance.placement.stages.len());
    let stages = &newest.expect("it is served").placement.stages;
    let on =
        |device: &str| stages.iter().filter(|stage| stage.device.0 == device).map(|stage| stage.layers.len()).sum();
    let (gpu, cpu): (usize, usize) = (on("gpu"), on("cpu"));
    assert!(gpu >= cpu && cpu > 0 && stages.len() == 2, "{stages:?}");
    world.node.shutdown().await;
}
