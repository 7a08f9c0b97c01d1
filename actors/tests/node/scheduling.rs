//! Concurrent requests: shared steps, fairness, and full caches.

use crate::PROMPT;
use crate::fake::{Script, World, answer};
use exo_actors::{Generated, ModelSpec};
use std::sync::Arc;
use std::time::Duration;

fn prompt(length: usize, salt: u32) -> Vec<u32> {
    (0..length as u32).map(|k| 3 + (k * 5 + salt * 7) % 90).collect()
}

/// R7.1–R7.5: requests share steps, and each gets its own answer.
#[tokio::test(flavor = "multi_thread")]
async fn requests_share_steps() {
    let script = Script { step_delay: Duration::from_millis(2), ..Script::default() };
    let world = Arc::new(World::new(script).await);
    let asks = (0..20_u32).map(|i| {
        let world = Arc::clone(&world);
        tokio::spawn(async move {
            let prompt = prompt(10 + 4 * i as usize, i);
            let got = world.ask(world.request(2, &prompt, 25)).await;
            assert_eq!(got, Ok(answer(&prompt, 25)));
        })
    });
    for ask in asks.collect::<Vec<_>>() {
        ask.await.expect("the answer is right");
    }
    assert!(world.script.lock().rows_max > 20, "steps were shared");
}

/// R6.1–R6.5, R7.1–R7.5: if sequences exceed the cache, some are preempted and replayed, and every answer is right.
#[tokio::test(flavor = "multi_thread")]
async fn preempted_sequences_are_replayed() {
    let script = Script { step_delay: Duration::from_micros(200), ..Script::default() };
    let world = Arc::new(World::new(script).await);
    // The cache holds four sequences of full context.
    let asks = (0..12_u32).map(|i| {
        let world = Arc::clone(&world);
        tokio::spawn(async move {
            let prompt = prompt(20, i);
            let mut request = world.request(2, &prompt, 100);
            request.model = ModelSpec { context_tokens: Some(128), ..world.spec(2) };
            assert_eq!(world.ask(request).await, Ok(answer(&prompt, 100)));
            answer(&prompt, 100).len() + prompt.len()
        })
    });
    let mut rows = 0;
    for ask in asks.collect::<Vec<_>>() {
        rows += ask.await.expect("the answer is right");
    }
    let computed = world.script.lock().rows / 2;
    assert!(computed > rows, "{computed} rows for {rows}: nothing was replayed");
    world.node.clone().shutdown().await;
}

/// A long prompt is computed in chunks; running streams get tokens between chunks.
#[tokio::test(flavor = "multi_thread")]
async fn a_long_prompt_does_not_stall_running_streams() {
    let script = Script { row_delay: Duration::from_micros(200), ..Script::default() };
    let world = World::new(script).await;
    let short = (0..).map(|salt| prompt(8, salt)).find(|prompt| answer(prompt, 400).len() > 300);
    let short = short.expect("some answer is long");
    let mut running = world.node.generate(world.request(1, &short, 400)).expect("admitted");
    while !matches!(running.next().await, Some(Ok(Generated::Token { .. }))) {}
    let mut long = world.node.generate(world.request(1, &prompt(1500, 9), 5)).expect("admitted");
    let first_of_long = async { while !matches!(long.next().await, Some(Ok(Generated::Token { .. }))) {} };
    tokio::pin!(first_of_long);
    let mut meanwhile = 0;
    loop {
        tokio::select! {
            biased;
            () = &mut first_of_long => break,
            event = running.next() => match event {
                Some(Ok(Generated::Token { .. })) => meanwhile += 1,
                other => panic!("{other:?}"),
            }
        }
    }
    // 1500 rows in chunks of at most 64, with a token between any two chunks.
    assert!(meanwhile >= 15, "{meanwhile} tokens while the prompt was computed");
    drop(running);
    world.node.shutdown().await;
}

/// Dropping a stream cancels its work within a step; other streams continue.
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
        while facts.status().instances.values().any(|instance| instance.requests_running > 0) {
            facts.next().await.expect("not too slow");
        }
    };
    tokio::time::timeout(Duration::from_secs(5), freed).await.expect("the request is over");
    let rows = world.script.lock().rows;
    tokio::time::sleep(Duration::from_millis(50)).await;
    assert_eq!(world.script.lock().rows, rows, "nothing more is computed");
    world.node.shutdown().await;
}
