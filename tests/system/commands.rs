//! Tests of single commands: mistakes, limits, interruptions, lists.

use super::*;
use std::io::Read;
use std::path::Path;

/// R8.1–R8.5: wrong usage exits with 2; a failure exits with 1, and stderr names what failed.
#[test]
fn mistakes_are_reported_by_name() {
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

/// R6.1–R6.5: `bench` reports its figures.
#[test]
fn bench_measures() {
    models();
    let report =
        json(&["bench", SMOLLM2, "--prompt-tokens", "32", "--generate-tokens", "8", "--repeat", "2", "--json"]);
    for field in ["prefill_tokens_per_s", "decode_tokens_per_s", "load_ms", "peak_memory_bytes"] {
        assert!(report[field].as_f64().is_some_and(|value| value > 0.0), "{field}: {report}");
    }
}

/// R8.1–R8.5: `bench --profile` reports every part of prefill and decode, beside the machine's limits.
#[test]
fn a_profile_accounts_for_the_time() {
    models();
    let report = json(&["bench", SMOLLM2, "--profile", "--prompt-tokens", "40", "--generate-tokens", "8", "--json"]);
    for limit in ["read_bytes_per_s", "byte_operations_per_s"] {
        assert!(report[limit].as_f64().is_some_and(|limit| limit > 0.0), "{limit}: {report}");
    }
    for (phase, steps) in [("prefill", 1), ("decode", 8)] {
        let parts = report[phase].as_array().expect("parts");
        let shares: f64 = parts.iter().filter_map(|part| part["share"].as_f64()).sum();
        assert!((shares - 1.0).abs() < 1e-6, "{phase}: {report}");
        // SmolLM2 has 30 layers.
        let part = |name: &str| parts.iter().find(|part| part["part"] == name).expect("the part");
        assert_eq!(part("gate, up")["calls"], 30 * steps, "{phase}: {report}");
        assert_eq!(part("attention")["calls"], 30 * steps);
        assert!(part("down")["operations_per_s"].as_f64().is_some_and(|rate| rate > 0.0));
        assert!(part("head")["bytes_per_s"].as_f64().is_some_and(|rate| rate > 0.0));
    }
}

/// The models folder is the cache: a second pull downloads nothing, and needs no network.
#[test]
fn a_second_pull_downloads_nothing() {
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

/// Ctrl-C ends an answer with a summary of the tokens so far, and with 130, the shell's exit code for it.
#[test]
fn ctrl_c_ends_an_answer() {
    models();
    let prompt = "Write a very long story about a lighthouse keeper.";
    let mut child = exo(&["run", SMOLLM2, prompt, "--temperature", "1", "--seed", "3", "--max-tokens", "4000"])
        .args(["--context", "8192"])
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .expect("exo-node starts");
    let mut first = [0; 8];
    child.stdout.as_mut().expect("a pipe").read_exact(&mut first).expect("an answer begins");
    let interrupted = Command::new("kill").args(["-INT", &child.id().to_string()]).status();
    assert!(interrupted.expect("kill is there").success());
    let output = child.wait_with_output().expect("it ends");
    let text = stderr(&output);
    assert_eq!(output.status.code(), Some(130), "{text}");
    assert!(text.contains("generated tokens") && !text.contains("panicked"), "{text}");
}

/// The help of every command shows an example that begins with the program's name.
#[test]
fn every_command_shows_an_example() {
    for command in ["run", "pull", "models", "bench", "perplexity"] {
        let output = output(&[command, "--help"]);
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        assert!(output.status.success() && text.contains(&format!("exo-node {command}")), "{text}");
    }
}

/// `models` lists the catalogue as text and as JSON.
#[test]
fn models_are_listed() {
    let text = String::from_utf8(output(&["models"]).stdout).expect("UTF-8");
    let listed = json(&["models", "--json"]);
    for name in [SMOLLM2, GEMMA3] {
        assert!(text.contains(name), "{text}");
        assert!(listed.as_array().expect("a list").iter().any(|entry| entry["name"] == name), "{listed}");
    }
}

/// R6.1–R6.5: loading takes little more memory than the file's size, even with a vocabulary of 262,144 rows.
#[test]
fn memory_stays_near_the_file_s_size() {
    models();
    let report = json(&["bench", GEMMA3, "--prompt-tokens", "16", "--generate-tokens", "4", "--repeat", "1", "--json"]);
    let peak = report["peak_memory_bytes"].as_u64().expect("Linux reports it");
    let file = report["file_bytes"].as_u64().expect("a size");
    assert!(peak < file * 3 / 2 + (64 << 20), "{peak} bytes at the peak, for {file} of weights");
}
