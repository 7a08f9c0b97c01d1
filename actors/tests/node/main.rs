//! Tests of a whole node, with engines that fail by a script and a hub that misbehaves.

#![allow(clippy::expect_used)] // A test that cannot continue panics with the reason.

mod downloads;
mod fake;
mod hub;
mod memory;
mod recovery;
mod sabotage;
mod scheduling;
mod tiny_model;

use exo_actors::{GenerateRequest, Generated, Prompt, RequestError};
use exo_engines::sampler::SamplingParams;
use fake::{How, Script, When, World, answer};
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

/// R4.2, R4.4, R4.5: the same tokens from one shard and from three.
#[tokio::test(flavor = "multi_thread")]
async fn one_shard_and_three_give_the_same_tokens() {
    let world = World::new(Script::default()).await;
    for shards in [1, 3] {
        assert_eq!(world.ask(world.request(shards, &PROMPT, 30)).await, Ok(answer(&PROMPT, 30)));
    }
    world.node.shutdown().await;
}

/// A bad request fails with an error that names the bad value, and later requests succeed.
#[tokio::test(flavor = "multi_thread")]
async fn bad_requests_are_refused_and_others_succeed() {
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

/// R8.1–R8.5: a failed load reports its cause (no tokenizer, a shard that keeps failing), whichever actor detects the
/// cause first.
#[tokio::test(flavor = "multi_thread")]
async fn a_model_that_cannot_be_loaded_says_why() {
    for _ in 0..10 {
        let world = World::new(Script::default()).await;
        std::fs::remove_file(world.model.join("tokenizer.json")).expect("it was there");
        let error = world.node.load(world.spec(1)).await.expect_err("no tokenizer");
        assert!(error.to_string().contains("no tokenizer") && error.remedy().contains("tokenizer.json"), "{error}");
        world.node.shutdown().await;
    }
    for _ in 0..5 {
        let script = Script { failures: vec![(0, When::Load, How::Panic, 4)], ..Script::default() };
        let world = World::new(script).await;
        let error = world.node.load(world.spec(1)).await.expect_err("it panics");
        assert!(error.to_string().contains("panicked"), "{error}");
        world.node.shutdown().await;
    }
}

/// Concurrent loads of one model share one load.
#[tokio::test(flavor = "multi_thread")]
async fn one_model_is_loaded_once() {
    let world = World::new(Script::default()).await;
    let (a, b) = tokio::join!(world.node.load(world.spec(1)), world.node.load(world.spec(1)));
    assert_eq!(a.expect("loaded").id(), b.expect("loaded").id());
    assert_eq!(world.script.lock().loads, 1);
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

/// A stop string that is a control token's name stops at the token, which has no text.
#[tokio::test(flavor = "multi_thread")]
async fn the_name_of_a_control_token_ends_the_answer() {
    let world = World::new(Script::default()).await;
    let tokens = answer(&PROMPT, 12);
    let name = format!("w{}", tokens[3]);
    let config = serde_json::json!({ "additional_special_tokens": [name] });
    std::fs::write(world.model.join("tokenizer_config.json"), config.to_string()).expect("written");
    let stopped = GenerateRequest { stop: vec![name], ..world.request(1, &PROMPT, 12) };
    let first = tokens.iter().position(|&token| token == tokens[3]).expect("it is there");
    assert_eq!(world.ask(stopped).await, Ok(tokens[..=first].to_vec()));
    assert_eq!(world.ask(world.request(1, &PROMPT, 12)).await, Ok(tokens));
    world.node.shutdown().await;
}

/// A shutdown of the node ends its streams.
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
