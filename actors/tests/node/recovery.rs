//! All kinds of failures of a shard while streams run.

use crate::PROMPT;
use crate::fake::{How, Script, When, World, answer, collect};
use crate::sabotage::Sabotaged;
use exo_actors::core::node_status::Fact;
use exo_actors::core::status::Phase;
use exo_actors::{GenerateRequest, RequestError};
use exo_engines::engine::{DeviceId, DeviceKind};
use exo_engines::sampler::SamplingParams;
use parking_lot::Mutex;
use std::sync::Arc;
use std::time::Duration;

fn failing(failures: Vec<(usize, When, How, u32)>) -> Script {
    Script { failures, ..Script::default() }
}

/// R1.4, R8.1–R8.5: after any failure in any operation of any shard, the shard restarts, sequences are replayed, and
/// the client's stream continues without a lost or doubled token.
#[tokio::test(flavor = "multi_thread")]
async fn a_failed_shard_restarts_and_streams_continue() {
    for layer in [0, 1, 3] {
        for when in [When::Load, When::Prefill, When::Decode] {
            for how in [How::Error, How::Panic, How::DeviceLost] {
                let world = World::new(failing(vec![(layer, when, how, 2)])).await;
                let (a, b) = tokio::join!(
                    world.ask(world.request(3, &PROMPT, 40)),
                    world.ask(world.request(3, &PROMPT[..9], 40)),
                );
                assert_eq!(a, Ok(answer(&PROMPT, 40)), "layer {layer}, {when:?}, {how:?}");
                assert_eq!(b, Ok(answer(&PROMPT[..9], 40)), "layer {layer}, {when:?}, {how:?}");
                assert!(world.script.lock().loads > 3, "a shard was restarted");
                world.node.shutdown().await;
            }
        }
    }
}

/// R1.4: the shard of a lost GPU moves to the CPU in the middle of an answer.
#[tokio::test(flavor = "multi_thread")]
async fn a_lost_device_falls_back_to_the_cpu() {
    let devices = [("gpu", DeviceKind::Gpu), ("cpu", DeviceKind::Cpu)];
    let world = World::with_devices(failing(vec![(0, When::Decode, How::DeviceLost, 1)]), &devices).await;
    assert_eq!(world.ask(world.request(1, &PROMPT, 40)).await, Ok(answer(&PROMPT, 40)));
    assert_eq!(world.script.lock().loads, 2);
    world.node.shutdown().await;
}

/// R1.4, R8.1–R8.5: the shard of a GPU that has failed goes back to it, in the middle of an answer, when the GPU has
/// passed a probe; meanwhile the status shows the failure and the fallback.
#[tokio::test(flavor = "multi_thread")]
async fn a_device_that_recovers_takes_its_shard_back() {
    let devices = [("gpu", DeviceKind::Gpu), ("cpu", DeviceKind::Cpu)];
    let failures = vec![(0, When::Decode, How::DeviceLost, 1)];
    let script = Script { failures, step_delay: Duration::from_millis(100), ..Script::default() };
    let world = World::with_devices(script, &devices).await;
    let mut facts = world.node.subscribe().await.expect("the node lives");
    let answering = world.ask(world.request(1, &PROMPT, 40));
    let watching = async {
        let mut seen = Vec::new();
        while let Ok(Some(fact)) = facts.next().await {
            match fact {
                Fact::DeviceFailed { device, .. } => {
                    assert!(facts.status().failed_devices.contains_key(&device));
                    seen.push(format!("{device} failed"));
                }
                Fact::DeviceRecovered(device) => {
                    assert!(facts.status().failed_devices.is_empty());
                    seen.push(format!("{device} recovered"));
                }
                Fact::ShardLoaded { instance, device, .. } => {
                    assert_eq!(facts.status().instances[&instance].devices[&0], device);
                    seen.push(format!("loaded on {device}"));
                }
                _ => {}
            }
            if seen.len() == 5 {
                break;
            }
        }
        seen
    };
    let (answered, seen) = tokio::join!(answering, watching);
    assert_eq!(answered, Ok(answer(&PROMPT, 40)));
    assert_eq!(seen, ["loaded on gpu", "gpu failed", "loaded on cpu", "gpu recovered", "loaded on gpu"]);
    assert_eq!(world.ask(world.request(1, &PROMPT[..9], 10)).await, Ok(answer(&PROMPT[..9], 10)));
    let loaded = |script: &Script| (script.loads, script.loaded_on);
    assert_eq!(loaded(&world.script.lock()), (3, "gpu"));
    world.node.shutdown().await;
}

/// R1.4, R7.1–R7.5, R8.1–R8.5: whatever fails on a GPU and on its fallback, and in whichever order, answers are right;
/// in the end each shard is on the GPU again, and has one engine.
#[tokio::test(flavor = "multi_thread")]
async fn random_failures_of_two_devices_leave_each_shard_one_engine() {
    let devices = [("gpu", DeviceKind::Gpu), ("cpu", DeviceKind::Cpu)];
    for seed in 0..6 {
        println!("seed {seed}");
        let mut random = fastrand::Rng::with_seed(seed);
        // Few enough that the fallback is not given up.
        let failures = (0..6).map(|index| {
            let when = [When::Load, When::Prefill, When::Decode][random.usize(..3)];
            let how = [How::Error, How::Panic, How::DeviceLost][random.usize(..3)];
            (index % 2 * 2, when, how, 1)
        });
        let script =
            Script { failures: failures.collect(), step_delay: Duration::from_millis(15), ..Script::default() };
        let world = World::with_devices(script, &devices).await;
        let request = || {
            let mut request = world.request(2, &PROMPT, 40);
            request.model.device = Some(DeviceId("gpu".to_owned()));
            request
        };
        for _ in 0..3 {
            assert_eq!(world.ask(request()).await, Ok(answer(&PROMPT, 40)));
        }
        let settled = async {
            loop {
                let status = world.node.status().await.expect("the node lives");
                let is_home = |instance: &exo_actors::core::status::InstanceStatus| {
                    instance.phase == Phase::Ready && instance.devices.values().all(|device| device.0 == "gpu")
                };
                let is_settled = status.failed_devices.is_empty() && status.instances.values().all(is_home);
                if is_settled && world.script.lock().alive == 2 {
                    return;
                }
                // A failure that is left happens while an answer is computed.
                assert_eq!(world.ask(request()).await, Ok(answer(&PROMPT, 40)));
            }
        };
        tokio::time::timeout(Duration::from_secs(60), settled).await.expect("each shard has one engine, on the GPU");
        world.node.shutdown().await;
    }
}

/// R1.4, R8.1–R8.5: if a GPU hangs during a load or an answer, the hung shard alone moves to the CPU; later shards
/// start on the CPU at once.
#[tokio::test(flavor = "multi_thread")]
async fn a_hung_device_falls_back_to_the_cpu() {
    let devices = [("gpu", DeviceKind::Gpu), ("cpu", DeviceKind::Cpu)];
    for (layer, when) in [(0, When::Load), (1, When::Prefill), (3, When::Decode)] {
        let world = World::impatient(failing(vec![(layer, when, How::Hang, 1)]), &devices).await;
        let mut request = world.request(3, &PROMPT, 40);
        request.model.device = Some(DeviceId("gpu".to_owned()));
        let answered = world.ask(request).await;
        assert_eq!(answered, Ok(answer(&PROMPT, 40)), "layer {layer}, {when:?}");
        assert_eq!(world.script.lock().loads, 4, "one shard was loaded again");
        let mut later = world.request(1, &PROMPT, 40);
        later.model.device = Some(DeviceId("gpu".to_owned()));
        assert_eq!(world.ask(later).await, Ok(answer(&PROMPT, 40)));
        let loaded = |script: &Script| (script.loads, script.loaded_on);
        assert_eq!(loaded(&world.script.lock()), (5, "cpu"));
        world.node.shutdown().await;
    }
}

/// R8.1–R8.5: without another device, the error names the hung step, and the device gets no new work while it hangs.
#[tokio::test(flavor = "multi_thread")]
async fn a_hang_of_the_only_device_is_reported() {
    let world = World::impatient(failing(vec![(1, When::Decode, How::Hang, 9)]), &[("fake", DeviceKind::Cpu)]).await;
    let failed = world.ask(world.request(3, &PROMPT, 40)).await;
    let Err(RequestError::Engine { what, remedy }) = failed else { panic!("{failed:?}") };
    assert!(what.contains("has not returned from a step of 1 rows") && !remedy.is_empty(), "{what}");
    let failed = world.ask(world.request(1, &PROMPT, 40)).await;
    let Err(RequestError::Engine { what, .. }) = failed else { panic!("{failed:?}") };
    assert!(what.contains("still hangs on the work of an earlier shard"), "{what}");
    assert_eq!(world.script.lock().loads, 3, "the hung device got no further load");
    world.node.shutdown().await;
}

/// Waits until the status shows a failed instance.
async fn wait_for_failure(world: &World) {
    let mut facts = world.node.subscribe().await.expect("the node lives");
    let is_stopped = |facts: &exo_actors::Subscription| {
        facts.status().instances.values().any(|instance| matches!(instance.phase, Phase::Stopped { error: Some(_) }))
    };
    while !is_stopped(&facts) {
        facts.next().await.expect("not too slow");
    }
}

/// R8.1–R8.5: a handle from `load` answers after its instance has failed: the model is loaded again.
#[tokio::test(flavor = "multi_thread")]
async fn a_loaded_model_answers_after_its_instance_has_failed() {
    let world = World::new(failing(vec![(0, When::Decode, How::Panic, 4)])).await;
    let model = world.node.load(world.spec(1)).await.expect("loaded");
    let ask = async || {
        let generation = world.node.generate_with(&model, world.request(1, &PROMPT, 40))?;
        Ok(collect(generation).await?.iter().map(|sampled| sampled.token).collect::<Vec<u32>>())
    };
    let failed = ask().await;
    assert!(matches!(failed, Err(RequestError::Engine { .. })), "{failed:?}");
    wait_for_failure(&world).await;
    for _ in 0..2 {
        assert_eq!(ask().await, Ok(answer(&PROMPT, 40)));
    }
    world.node.shutdown().await;
}

/// R8.1–R8.5: a shard that keeps failing ends its requests with the reason and a remedy; a later request loads it
/// again.
#[tokio::test(flavor = "multi_thread")]
async fn a_shard_that_keeps_failing_ends_its_requests() {
    let world = World::new(failing(vec![(0, When::Decode, How::Panic, 4)])).await;
    let failed = world.ask(world.request(1, &PROMPT, 40)).await;
    let Err(RequestError::Engine { what, remedy }) = failed else { panic!("{failed:?}") };
    assert!(what.contains("panicked") && !remedy.is_empty());
    wait_for_failure(&world).await;
    assert_eq!(world.ask(world.request(1, &PROMPT, 40)).await, Ok(answer(&PROMPT, 40)));
    world.node.shutdown().await;
}

/// R1.4, R8.1–R8.5: if the real CPU engine fails in the middle of a sampled answer, tokens and log-probabilities equal
/// those of an undisturbed run bit for bit.
#[tokio::test(flavor = "multi_thread")]
async fn failures_of_the_cpu_engine_change_no_bit() {
    for shards in [1, 3] {
        let request = |world: &World| GenerateRequest {
            params: SamplingParams { temperature: 0.9, seed: 11, top_logprobs: 4, ..SamplingParams::greedy() },
            ..world.request(shards, &PROMPT, 60)
        };
        let mut answers = Vec::new();
        // Steps, counted over all shards, at which an engine fails: in the prefill, and in the middle of decoding.
        for failures in [vec![], vec![2], vec![shards as u64 * 20], vec![3, shards as u64 * 30 + 1]] {
            let factory = Arc::new(Sabotaged::new(failures.clone()));
            let world = World::with_factories(Arc::new(Mutex::new(Script::default())), vec![factory.clone()]).await;
            answers.push(world.sampled(request(&world)).await.expect("no error"));
            assert_eq!(factory.failures_left(), 0, "{failures:?}: every failure happened");
            world.node.shutdown().await;
        }
        assert!(answers[0].len() > 30, "long enough to be disturbed");
        for answer in &answers[1..] {
            assert_eq!(answer, &answers[0]);
        }
    }
}
