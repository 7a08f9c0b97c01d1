//! The answers of `run`, and its use of stdout and stderr.

use super::*;
use crate::node::Node;
use std::io::Write;

/// R4.2: one shard on two threads and three on one thread give the same tokens and log-probabilities, bit for bit.
#[test]
fn shards_and_threads_change_no_bit() {
    models();
    let run = |shards: &str, threads: &str| {
        let mut arguments =
            vec!["run", SMOLLM2, "Tell me of the sea.", "--json", "--max-tokens", "24", "--logprobs", "3"];
        arguments.extend(["--temperature", "0.8", "--seed", "5", "--shards", shards, "--threads", threads]);
        json(&arguments)
    };
    let one = run("1", "2");
    let three = run("3", "1");
    assert_eq!(one["token_ids"], three["token_ids"]);
    assert_eq!(one["logprobs"], three["logprobs"]);
    let layers: Vec<Vec<u64>> =
        three["stages"].as_array().expect("a list").iter().map(|stage| ids(&stage["layers"])).collect();
    assert_eq!(layers.len(), 3);
    assert_eq!((layers[0][0], layers[2][1]), (0, 30), "{layers:?}");
    assert!(layers.windows(2).all(|pair| pair[0][1] == pair[1][0]), "{layers:?}");
}

/// R6.1–R6.5: an answer that repeats its prompt takes drafts, and has the tokens and log-probabilities that it has
/// without drafts, bit for bit, also with a temperature.
#[test]
fn drafts_change_no_bit() {
    models();
    let node = Node::up(&[]);
    let text = "One potato, two potato, three potato, four. One potato, two potato, three potato, four. One potato,";
    for temperature in ["0", "0.8"] {
        let mut arguments = vec!["run", SMOLLM2, text, "--raw", "--json", "--max-tokens", "32", "--logprobs", "3"];
        arguments.extend(["--temperature", temperature, "--seed", "5"]);
        let with = node.json(&arguments);
        arguments.extend(["--speculate", "none", "--standalone"]);
        let without = json(&arguments);
        assert_eq!(with["token_ids"], without["token_ids"], "temperature {temperature}");
        assert_eq!(with["logprobs"], without["logprobs"], "temperature {temperature}");
    }
    let accepted = node.metric("accepted_tokens_total");
    assert!(accepted > 3.0, "{accepted} drafted tokens were accepted");
}

/// R6.1–R6.5: an answer with drafts of another model has the tokens and log-probabilities that it has without, bit for
/// bit. A model with other tokens is refused, and so is the model itself.
#[test]
fn a_draft_model_changes_no_bit() {
    models();
    let file = json(&["pull", SMOLLM2, "--json"])["path"].as_str().expect("a path").to_owned();
    let folder = tempfile::tempdir().expect("a folder");
    let draft = folder.path().join("draft.gguf").display().to_string();
    std::fs::copy(file, &draft).expect("copied");
    let node = Node::up(&[]);
    let mut arguments = vec!["run", SMOLLM2, "Why is the sky blue?", "--json", "--max-tokens", "40", "--logprobs", "3"];
    arguments.extend(["--temperature", "0.7", "--seed", "9", "--speculate", "none"]);
    let without = json(&[&arguments[..], &["--standalone"]].concat());
    // On a busy machine a draft model may be late for a while.
    let accepted = (0..10).map(|_| {
        let with = node.json(&[&arguments[..], &["--draft", &draft]].concat());
        assert_eq!(with["token_ids"], without["token_ids"]);
        assert_eq!(with["logprobs"], without["logprobs"]);
        node.metric("accepted_tokens_total")
    });
    assert!(accepted.into_iter().any(|accepted| accepted > 3.0), "no drafted token was accepted");
    for (other, why) in [(GEMMA3, "different tokens"), (SMOLLM2, "the same model")] {
        let refused = output(&["run", SMOLLM2, "Hello", "--max-tokens", "1", "--draft", other]);
        assert!(!refused.status.success(), "{other}");
        assert!(stderr(&refused).contains(why), "{}", stderr(&refused));
    }
}

/// R4.4, R4.5: stdout has the answer and nothing else; the summary goes to stderr.
#[test]
fn stdout_has_the_answer_alone() {
    models();
    let mut child = exo(&["run", SMOLLM2, "-", "--max-tokens", "8"])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .expect("exo-node starts");
    child.stdin.take().expect("a pipe").write_all(b"What is the capital of France?").expect("written");
    let output = child.wait_with_output().expect("it ends");
    assert!(output.status.success());
    let report = json(&["run", SMOLLM2, "What is the capital of France?", "--max-tokens", "8", "--json"]);
    let answer = String::from_utf8(output.stdout.clone()).expect("UTF-8");
    assert_eq!(Some(answer.trim_end_matches('\n')), report["text"].as_str());
    let summary = stderr(&output);
    let tokens = format!("{} generated tokens", report["generated_tokens"]);
    assert!(summary.contains(&tokens) && summary.contains("in 1 shard"), "{summary}");
    assert_eq!(report["finish_reason"], "stop");
    assert_eq!(report["quantization"], "Q4_1");
}

/// For a base model, `run` says that it continues the prompt plainly.
#[test]
fn a_base_model_is_announced() {
    models();
    let output = output(&["run", GEMMA3, "The sky is", "--max-tokens", "4"]);
    assert!(output.status.success());
    assert!(stderr(&output).contains("base model"), "{}", stderr(&output));
}

/// The answer ends before a stop string, which is not shown.
#[test]
fn a_stop_string_ends_the_answer() {
    models();
    let ask = |stop: &[&str]| {
        let mut arguments = vec!["run", SMOLLM2, "Count from one to ten.", "--max-tokens", "40", "--json"];
        stop.iter().for_each(|stop| arguments.extend(["--stop", stop]));
        json(&arguments)
    };
    let whole = ask(&[]);
    let text = whole["text"].as_str().expect("a text");
    // From the middle of one word to the middle of a later one.
    let stop: String = text.chars().skip(12).take(9).collect();
    let before = &text[..text.find(&stop).expect("it is there")];
    let stopped = ask(&["never said", &stop]);
    assert_eq!(stopped["text"].as_str(), Some(before));
    assert_eq!(stopped["finish_reason"], "stop");
    assert!(stopped["generated_tokens"].as_u64() < whole["generated_tokens"].as_u64());
}

/// The same seed gives the same answer; another seed gives a different one.
#[test]
fn a_seed_repeats_an_answer() {
    models();
    let ask = |seed: &str| {
        let arguments = ["run", SMOLLM2, "Tell me a story.", "--max-tokens", "24", "--temperature", "1", "--json"];
        json(&[&arguments[..], &["--top-p", "0.95", "--top-k", "50", "--min-p", "0.01", "--seed", seed]].concat())
    };
    let (one, again, other) = (ask("1"), ask("1"), ask("2"));
    assert_eq!(one["token_ids"], again["token_ids"]);
    assert_ne!(one["token_ids"], other["token_ids"]);
}

/// `--raw` skips the chat template, and `--system` adds a system message to it.
#[test]
fn raw_skips_the_template_and_system_adds_to_it() {
    models();
    let ids_of = |more: &[&str]| {
        let report = json(&[&["run", SMOLLM2, "Hello", "--max-tokens", "1", "--json"], more].concat());
        ids(&report["prompt_token_ids"])
    };
    let (chat, raw, system) = (ids_of(&[]), ids_of(&["--raw"]), ids_of(&["--system", "Be brief."]));
    assert!(raw.len() < 4, "{raw:?}");
    assert!(chat.windows(raw.len()).any(|window| window == raw), "the prompt is in the template");
    assert_ne!(system, chat);
}
