//! A whole node over fake engines: batching, splitting, cancellation, and every way in which a shard can fail.

#![allow(clippy::expect_used)] // A test that cannot go on says why.

mod downloads;
mod fake;
mod hub;

use exo_actors::core::view::Phase;
use exo_actors::{Generated, Prompt, RequestError};
use exo_engines::engine::DeviceKind;
use exo_engines::sampler::SamplingParams;
use fake::{How, Script, When, World, answer};
use std::sync::Arc;
use std::time::Duration;

const PROMPT: [u32; 40] = {
    let mut prompt = [0; 40];
    let mut i = 0;
    while i < 40 {
        prompt[i] = 3 + (i as u32 * 7) % 90;
        i += 1;
    }
    prompt
};

fn failing(failures: Vec<(usize, When, How, u32)>) -> Script {
    Script { failures, ..Script::default() }
}

/// R4.2, R4.4: the same tokens from one shard and from three.
#[tokio::test(flavor = "multi_thread")]
async fn shards_pass_tokens_on() {
    let world = World::new(Script::default()).await;
    for shards in [1, 3] {
        assert_eq!(world.ask(world.request(shards, &PROMPT, 30)).await, Ok(answer(&PROMPT, 30)));
    }
    world.node.shutdown().await;
}

/// R7.5: requests share steps, and each gets its own answer.
#[tokio::test(flavor = "multi_thread")]
async fn requests_share_steps() {
    let script = Script { step_delay: Duration::from_millis(2), ..Script::default() };
    let world = Arc::new(World::new(script).await);
    let asks = (0..20_u32).map(|i| {
        let world = Arc::clone(&world);
        tokio::spawn(async move {
            let prompt: Vec<u32> = (0..10 + i * 4).map(|k| 3 + (k * 5 + i) % 90).collect();
            let got = world.ask(world.request(2, &prompt, 25)).await;
            assert_eq!(got, Ok(answer(&prompt, 25)));
        })
    });
    for ask in asks.collect::<Vec<_>>() {
        ask.await.expect("the answer is right");
    }
    assert!(world.script.lock().expect("not poisoned").rows_max > 20, "steps were shared");
}

/// R1.4, R8.4: whatever fails, whenever, in whichever shard: it is restarted, sequences are replayed, and the client's
/// stream goes on without a lost or doubled token.
#[tokio::test(flavor = "multi_thread")]
async fn a_failed_shard_is_replaced_and_streams_go_on() {
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
                assert!(world.script.lock().expect("not poisoned").loads > 3, "something was restarted");
                world.node.shutdown().await;
            }
        }
    }
}

/// R1.4: a lost GPU's shard goes to the processor, in the middle of the answer.
#[tokio::test(flavor = "multi_thread")]
async fn a_lost_device_falls_back_to_the_processor() {
    let devices = [("gpu", DeviceKind::Gpu), ("cpu", DeviceKind::Cpu)];
    let world = World::with_devices(failing(vec![(0, When::Decode, How::DeviceLost, 1)]), &devices).await;
    assert_eq!(world.ask(world.request(1, &PROMPT, 40)).await, Ok(answer(&PROMPT, 40)));
    assert_eq!(world.script.lock().expect("not poisoned").loads, 2);
    world.node.shutdown().await;
}

/// R8.3: a shard that keeps failing ends its requests with the reason and a remedy; a later request starts anew.
#[tokio::test(flavor = "multi_thread")]
async fn a_shard_beyond_help_is_told_to_its_clients() {
    let world = World::new(failing(vec![(0, When::Decode, How::Panic, 4)])).await;
    let failed = world.ask(world.request(1, &PROMPT, 40)).await;
    let Err(RequestError::Engine { what, remedy }) = failed else { panic!("{failed:?}") };
    assert!(what.contains("panicked") && !remedy.is_empty());
    let mut facts = world.node.subscribe().await.expect("the node lives");
    let is_stopped = |facts: &exo_actors::Subscription| {
        facts.state().instances.values().any(|instance| matches!(instance.phase, Phase::Stopped { error: Some(_) }))
    };
    while !is_stopped(&facts) {
        facts.next().await.expect("not too slow");
    }
    assert_eq!(world.ask(world.request(1, &PROMPT, 40)).await, Ok(answer(&PROMPT, 40)));
    world.node.shutdown().await;
}

/// Dropping a stream cancels its work and frees its pages; others go on.
#[tokio::test(flavor = "multi_thread")]
async fn a_dropped_stream_is_cancelled() {
    let script = Script { step_delay: Duration::from_millis(5), ..Script::default() };
    let world = World::new(script).await;
    let mut dropped = world.node.generate(world.request(1, &PROMPT, 80)).expect("admitted");
    while !matches!(dropped.next().await, Some(Ok(Generated::Token { .. }))) {}
    let other = world.ask(world.request(1, &PROMPT[..5], 10));
    drop(dropped);
    assert_eq!(other.await, Ok(answer(&PROMPT[..5], 10)));
    let mut facts = world.node.subscribe().await.expect("the node lives");
    let freed = async {
        while facts.state().instances.values().any(|instance| instance.pages_used > 0 || instance.requests_running > 0)
        {
            facts.next().await.expect("not too slow");
        }
    };
    tokio::time::timeout(Duration::from_secs(5), freed).await.expect("pages are freed");
    world.node.shutdown().await;
}

/// Bad requests get an error that names the matter, and harm nobody.
#[tokio::test(flavor = "multi_thread")]
async fn bad_requests_are_refused_and_others_go_on() {
    let world = World::new(Script::default()).await;
    let with = |change: &dyn Fn(&mut exo_actors::GenerateRequest)| {
        let mut request = world.request(1, &PROMPT, 5);
        change(&mut request);
        request
    };
    let cases: [(exo_actors::GenerateRequest, &str); 7] = [
        (with(&|r| r.prompt = Prompt::Tokens(Vec::new())), "empty"),
        (with(&|r| r.prompt = Prompt::Tokens(vec![3; 4000])), "4000 tokens"),
        (with(&|r| r.prompt = Prompt::Tokens(vec![3, 5000])), "5000"),
        (with(&|r| r.params = SamplingParams { temperature: -1.0, ..SamplingParams::greedy() }), "temperature"),
        (with(&|r| r.model.model = "no-such-model".to_owned()), "no-such-model"),
        (with(&|r| r.model.shards = Some(99)), "99 shards"),
        (with(&|r| r.model.device = Some(exo_engines::engine::DeviceId("gpu:7".to_owned()))), "gpu:7"),
    ];
    for (request, named) in cases {
        let error = world.ask(request).await.expect_err(named);
        assert!(error.to_string().contains(named), "`{error}` does not name {named}");
        assert!(!error.remedy().is_empty());
        assert_eq!(world.ask(world.request(1, &PROMPT, 5)).await, Ok(answer(&PROMPT, 5)));
    }
    world.node.shutdown().await;
}

/// Two that want the same model at once share one load.
#[tokio::test(flavor = "multi_thread")]
async fn one_model_is_loaded_once() {
    let world = World::new(Script::default()).await;
    let (a, b) = tokio::join!(world.node.load(world.spec(1)), world.node.load(world.spec(1)));
    assert_eq!(a.expect("loaded").id, b.expect("loaded").id);
    assert_eq!(world.script.lock().expect("not poisoned").loads, 1);
    world.node.shutdown().await;
}

/// A stop string that spans tokens ends the answer before it.
#[tokio::test(flavor = "multi_thread")]
async fn a_stop_string_ends_the_answer() {
    let world = World::new(Script::default()).await;
    let tokens = answer(&PROMPT, 12);
    let mut request = world.request(1, &PROMPT, 12);
    let words: Vec<String> = tokens.iter().map(|id| format!("w{id}")).collect();
    // The end of the third word and the start of the fourth.
    request.stop = vec![format!("{}{}", &words[2][1..], &words[3][..1])];
    let mut generation = world.node.generate(request).expect("admitted");
    let mut text = String::new();
    loop {
        match generation.next().await.expect("an end").expect("no error") {
            Generated::Token { text: more, .. } => text.push_str(&more),
            Generated::Finished { text: more, .. } => {
                text.push_str(&more);
                break;
            }
            Generated::Started { .. } => {}
        }
    }
    assert_eq!(text, format!("{}{}w", words[0], words[1]));
    world.node.shutdown().await;
}

/// Streams end when the node does.
#[tokio::test(flavor = "multi_thread")]
async fn a_shutdown_ends_streams() {
    let script = Script { step_delay: Duration::from_millis(20), ..Script::default() };
    let world = World::new(script).await;
    let mut generation = world.node.generate(world.request(1, &PROMPT, 80)).expect("admitted");
    while !matches!(generation.next().await, Some(Ok(Generated::Token { .. }))) {}
    world.node.clone().shutdown().await;
    let ended = async {
        loop {
            match generation.next().await {
                Some(Err(RequestError::ShuttingDown)) | None => break,
                Some(Ok(_)) => {}
                Some(Err(other)) => panic!("{other}"),
            }
        }
    };
    tokio::time::timeout(Duration::from_secs(5), ended).await.expect("the stream ends");
}
