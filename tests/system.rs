//! Whole processes over real models: what a user types, and what comes back.
//!
//! The models are fetched once, through `exo-node pull`, into the shared cache.

#![allow(clippy::expect_used)] // A test that cannot go on says why.

use serde_json::Value;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::sync::Once;

const SMOLLM2: &str = "smollm2";
const GEMMA3: &str = "gemma3-270m";
/// Where two tokens are this close, another rounding may rightly choose the other.
const MARGIN: f64 = 0.02;
/// The text of which llama.cpp's perplexities are known.
const LICENCE: &str = "/usr/share/common-licenses/GPL-3";

fn exo(arguments: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_exo-node"));
    command.args(arguments).stdin(Stdio::null());
    command
}

fn output(arguments: &[&str]) -> Output {
    exo(arguments).output().expect("exo-node starts")
}

fn stderr(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

fn json(arguments: &[&str]) -> Value {
    let output = output(arguments);
    assert!(output.status.success(), "{arguments:?}: {}", stderr(&output));
    let text = String::from_utf8(output.stdout).expect("UTF-8");
    serde_json::from_str(&text).unwrap_or_else(|error| panic!("one object and nothing else ({error}): {text}"))
}

/// Both models, on this machine.
fn models() {
    static PULLED: Once = Once::new();
    PULLED.call_once(|| {
        for model in [SMOLLM2, GEMMA3] {
            let pulled = output(&["pull", model]);
            assert!(pulled.status.success(), "{}", stderr(&pulled));
        }
    });
}

fn reference(name: &str) -> Vec<Value> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/reference").join(name);
    let text = std::fs::read_to_string(path).expect("the reference is there");
    text.lines().map(|line| serde_json::from_str(line).expect("JSON")).collect()
}

fn ids(value: &Value) -> Vec<u64> {
    value.as_array().expect("a list").iter().map(|id| id.as_u64().expect("an id")).collect()
}

/// R4.1: prompts become llama.cpp's tokens; answers are those of float32, token by token, and their first
/// log-probabilities within 0.01; llama.cpp's own answers are followed as far as its steps are decided.
fn agrees_with_the_references(model: &str, is_raw: bool) {
    models();
    let exact = reference(&format!("{model}.f32.jsonl"));
    for (line, exact) in reference(&format!("{model}.jsonl")).iter().zip(&exact) {
        let prompt = line["prompt"].as_str().expect("a prompt");
        let mut arguments = vec!["run", model, prompt, "--json", "--max-tokens", "64", "--logprobs", "10"];
        if is_raw {
            arguments.push("--raw");
        }
        let report = json(&arguments);
        assert_eq!(report["prompt_token_ids"], line["prompt_token_ids"], "{prompt}");
        let got = ids(&report["token_ids"]);
        let wanted = ids(&exact["output_token_ids"]);
        let margins: Vec<f64> = exact["margins"].as_array().expect("a list").iter().filter_map(Value::as_f64).collect();
        let undecided = margins.iter().position(|&margin| margin < MARGIN).unwrap_or(wanted.len());
        let until = undecided.min(got.len());
        assert!(until > 0, "{prompt}: nothing to compare");
        assert_eq!(got[..until], wanted[..until], "{prompt}");
        let top = &report["logprobs"][0]["top_logprobs"];
        for expected in exact["first_token_top_logprobs"].as_array().expect("a list").iter().take(5) {
            let found = top.as_array().expect("a list").iter().find(|entry| entry["id"] == expected[0]);
            let got = found.and_then(|entry| entry["logprob"].as_f64()).expect("among the likeliest");
            let wanted = expected[1].as_f64().expect("a number");
            assert!((got - wanted).abs() < 0.01, "{prompt}: {got}, float32 has {wanted}");
        }
        let theirs = ids(&line["output_token_ids"]);
        let their_margins: Vec<f64> =
            line["step_top1_top2_margin"].as_array().expect("a list").iter().filter_map(Value::as_f64).collect();
        let differs = got.iter().zip(&theirs).position(|(a, b)| a != b);
        if let Some(at) = differs {
            assert!(their_margins[at] < 0.3, "{prompt}: token {at} differs from llama.cpp's where it was sure");
        }
    }
}

#[test]
fn smollm2_agrees_with_the_references() {
    agrees_with_the_references(SMOLLM2, false);
}

#[test]
fn gemma3_agrees_with_the_references() {
    agrees_with_the_references(GEMMA3, true);
}

/// Perplexities within 2 % of llama.cpp's.
#[test]
fn perplexities_are_llama_cpp_s() {
    models();
    if !Path::new(LICENCE).is_file() {
        eprintln!("SKIPPED: {LICENCE} is not on this machine (Debian's base-files has it)");
        return;
    }
    for (model, expected) in [(SMOLLM2, 18.3746), (GEMMA3, 14.9187)] {
        let report = json(&["perplexity", model, LICENCE, "--bytes", "12000", "--chunks", "5", "--json"]);
        let got = report["perplexity"].as_f64().expect("a number");
        println!("{model}: {got:.4}, llama.cpp {expected}");
        assert!((got / expected - 1.0).abs() < 0.02, "{model}: {got}, llama.cpp has {expected}");
        assert_eq!(report["chunks"], 5);
    }
}

/// R4.2: three shards, one thread or two: the same tokens and the same log-probabilities, to the bit.
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

/// R4.4: the answer streams to stdout alone; the summary goes to stderr.
#[test]
fn the_answer_is_all_that_stdout_has() {
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

/// A base model says that it continues plainly.
#[test]
fn a_base_model_says_so() {
    models();
    let output = output(&["run", GEMMA3, "The sky is", "--max-tokens", "4"]);
    assert!(output.status.success());
    assert!(stderr(&output).contains("base model"), "{}", stderr(&output));
}

/// R8.3: wrong usage is 2; what fails is 1, names the thing and the remedy.
#[test]
fn mistakes_are_told_with_their_remedy() {
    for arguments in
        [&["run"][..], &["run", "m", "p", "--shards", "0"], &["run", "m", "p", "--no-such"], &["frobnicate"]]
    {
        assert_eq!(output(arguments).status.code(), Some(2), "{arguments:?}");
    }
    let folder = tempfile::tempdir().expect("a temporary folder");
    let broken = folder.path().join("broken.gguf");
    std::fs::write(&broken, b"GGUF\x03\0\0\0\xff\xff\xff\xff\xff\xff\xff\xff").expect("written");
    let broken = broken.display().to_string();
    let cases: [(&[&str], &str); 5] = [
        (&["run", "no-such-model", "hello"], "no-such-model"),
        (&["run", &broken, "hello"], "broken.gguf"),
        (&["run", SMOLLM2, ""], "empty"),
        (&["run", SMOLLM2, "x", "--temperature", "-3"], "temperature"),
        (&["perplexity", SMOLLM2, "/no/such/file"], "/no/such/file"),
    ];
    models();
    for (arguments, named) in cases {
        let output = output(arguments);
        let text = stderr(&output);
        assert_eq!(output.status.code(), Some(1), "{arguments:?}: {text}");
        assert!(text.contains(named), "{arguments:?}: {text}");
        assert!(output.stdout.is_empty());
        assert!(!text.contains("panicked"), "{text}");
    }
}

#[test]
fn a_prompt_over_the_context_is_refused_by_its_numbers() {
    models();
    let prompt = "word ".repeat(500);
    let output = output(&["run", SMOLLM2, &prompt, "--context", "64"]);
    assert_eq!(output.status.code(), Some(1));
    assert!(stderr(&output).contains("context 64"), "{}", stderr(&output));
}

/// R7.4: a model that does not fit is refused with how much is missing.
#[test]
fn a_model_that_does_not_fit_is_refused_by_its_numbers() {
    models();
    let copy = huge_context_model();
    let output =
        output(&["run", copy.path().join("huge.gguf").to_str().expect("UTF-8"), "x", "--context", "268435456"]);
    assert_eq!(output.status.code(), Some(1));
    assert!(stderr(&output).contains("bytes are missing"), "{}", stderr(&output));
}

/// SmolLM2's file with a context in its header that no memory has room for.
fn huge_context_model() -> tempfile::TempDir {
    let path = PathBuf::from(json(&["pull", SMOLLM2, "--json"])["path"].as_str().expect("a path"));
    let mut bytes = std::fs::read(path).expect("readable");
    let key = b"llama.context_length";
    let at = bytes.windows(key.len()).position(|window| window == key).expect("the key is there") + key.len() + 4;
    bytes[at..at + 4].copy_from_slice(&(1_u32 << 28).to_le_bytes());
    let folder = tempfile::tempdir().expect("a temporary folder");
    std::fs::write(folder.path().join("huge.gguf"), bytes).expect("written");
    folder
}

/// R6.5: bench gives its figures.
#[test]
fn bench_measures() {
    models();
    let report =
        json(&["bench", SMOLLM2, "--prompt-tokens", "32", "--generate-tokens", "8", "--repeat", "2", "--json"]);
    for field in ["prefill_tokens_per_s", "decode_tokens_per_s", "load_ms", "peak_memory_bytes"] {
        assert!(report[field].as_f64().is_some_and(|value| value > 0.0), "{field}: {report}");
    }
}

/// The models folder is the cache: a second pull fetches nothing, and needs no network.
#[test]
fn what_is_here_is_not_fetched_again() {
    models();
    let mut command = exo(&["pull", SMOLLM2, "--json"]);
    let output = command.env("HF_HUB_OFFLINE", "1").output().expect("exo-node starts");
    assert!(output.status.success(), "{}", stderr(&output));
    let report: Value = serde_json::from_slice(&output.stdout).expect("JSON");
    assert_eq!(report["source"], "the models folder");
}

/// The example service answers through its own actor.
#[test]
fn the_embedding_example_works() {
    models();
    let target = Path::new(env!("CARGO_BIN_EXE_exo-node")).parent().expect("a folder").to_owned();
    let output = Command::new(target.join("examples/embed"))
        .args([SMOLLM2, "The capital of France is"])
        .output()
        .expect("the example is built with the tests");
    let text = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success(), "{}", stderr(&output));
    assert!(text.contains("The capital of France is ->") && text.contains("1 answers in the minutes"), "{text}");
}
