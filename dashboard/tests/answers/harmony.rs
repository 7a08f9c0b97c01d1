//! R4.5: answers in OpenAI's harmony format: channels, and the tokens that end a turn.

use crate::scripted::World;
use serde_json::{Value, json};

const THOUGHT: [&str; 8] =
    ["<|channel|>", "analysis", "<|message|>", "Think", " hard.", "<|end|>", "<|start|>", "assistant"];
const WORDS: [&str; 8] = ["<|channel|>", "final", "<|message|>", "It", " is", " warm.", "<|return|>", "beyond"];
const CALL: [&str; 9] = [
    "<|channel|>",
    "commentary",
    " to=functions.get_weather ",
    "<|constrain|>",
    "json",
    "<|message|>",
    "{\"city\":\"Rome\"}",
    "<|call|>",
    "beyond",
];

fn tools() -> Value {
    let parameters = json!({"type": "object", "properties": {"city": {"type": "string"}}});
    json!([{"type": "function", "function": {"name": "get_weather", "parameters": parameters}}])
}

/// What the deltas of a streamed answer add up to.
#[derive(Debug, Default, PartialEq, Eq)]
struct Streamed {
    thought: String,
    words: String,
    name: String,
    arguments: String,
    finish: String,
}

fn add_up(stream: &str) -> Streamed {
    let mut sum = Streamed::default();
    let events = stream.lines().filter_map(|line| line.strip_prefix("data: ")).filter(|data| *data != "[DONE]");
    for event in events {
        let event: Value = serde_json::from_str(event).expect("JSON");
        let Some(choice) = event["choices"].get(0) else { continue };
        let delta = &choice["delta"];
        let add = |to: &mut String, value: &Value| to.push_str(value.as_str().unwrap_or_default());
        add(&mut sum.thought, &delta["reasoning_content"]);
        add(&mut sum.words, &delta["content"]);
        add(&mut sum.name, &delta["tool_calls"][0]["function"]["name"]);
        add(&mut sum.arguments, &delta["tool_calls"][0]["function"]["arguments"]);
        add(&mut sum.finish, &choice["finish_reason"]);
    }
    sum
}

/// R4.5: the end of the analysis does not end the turn; the end of the final message does.
#[tokio::test(flavor = "multi_thread")]
async fn the_channels_are_reasoning_and_words() {
    let world = World::answering(&[&THOUGHT[..], &WORDS[..]].concat()).await;
    let answer: Value = serde_json::from_str(&world.chat(json!({})).await).expect("JSON");
    let choice = &answer["choices"][0];
    assert_eq!(choice["message"]["reasoning_content"], "Think hard.", "{answer}");
    assert_eq!(choice["message"]["content"], "It is warm.", "{answer}");
    assert_eq!(choice["finish_reason"], "stop");
    let streamed = add_up(&world.chat(json!({"stream": true})).await);
    let expected = Streamed {
        thought: "Think hard.".to_owned(),
        words: "It is warm.".to_owned(),
        finish: "stop".to_owned(),
        ..Streamed::default()
    };
    assert_eq!(streamed, expected);
    world.shutdown().await;
}

/// R4.5: a message to a function is a call, whose end ends the turn.
#[tokio::test(flavor = "multi_thread")]
async fn a_message_to_a_function_is_a_call() {
    let world = World::answering(&[&THOUGHT[..], &CALL[..]].concat()).await;
    let answer: Value = serde_json::from_str(&world.chat(json!({"tools": tools()})).await).expect("JSON");
    let choice = &answer["choices"][0];
    assert_eq!(choice["message"]["reasoning_content"], "Think hard.", "{answer}");
    assert_eq!(choice["message"]["content"], Value::Null);
    let calls = choice["message"]["tool_calls"].as_array().expect("a list of calls");
    assert_eq!(calls.len(), 1);
    assert_eq!(calls[0]["function"], json!({"name": "get_weather", "arguments": "{\"city\":\"Rome\"}"}));
    assert_eq!(choice["finish_reason"], "tool_calls");
    let streamed = add_up(&world.chat(json!({"tools": tools(), "stream": true})).await);
    let expected = Streamed {
        thought: "Think hard.".to_owned(),
        name: "get_weather".to_owned(),
        arguments: "{\"city\":\"Rome\"}".to_owned(),
        finish: "tool_calls".to_owned(),
        ..Streamed::default()
    };
    assert_eq!(streamed, expected);
    world.shutdown().await;
}
