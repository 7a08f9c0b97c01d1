//! Real models compared with float32 references and with llama.cpp.

use super::*;
use std::path::Path;

/// If the log-probabilities of two tokens differ by less, another rounding may rightly choose the other token.
const MARGIN: f64 = 0.02;
/// The text for which llama.cpp's perplexities are known.
const LICENCE: &str = "/usr/share/common-licenses/GPL-3";

fn reference(name: &str) -> Vec<Value> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/reference").join(name);
    let text = std::fs::read_to_string(path).expect("the reference is there");
    text.lines().map(|line| serde_json::from_str(line).expect("JSON")).collect()
}

/// R4.1: prompts have llama.cpp's tokens. Answers have float32's tokens up to the first undecided step, and the
/// log-probabilities of their first token are within 0.01. Answers first differ from llama.cpp's at an undecided step.
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
            assert!(their_margins[at] < 0.3, "{prompt}: token {at} differs from llama.cpp's at a decided step");
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
fn perplexities_are_close_to_llama_cpp() {
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

/// A cache of bytes changes the perplexity by less than 0.4 %.
#[test]
fn a_cache_of_bytes_is_nearly_as_good() {
    models();
    let text = Path::new(env!("CARGO_MANIFEST_DIR")).join("LICENSE-APACHE");
    let perplexity = |model: &str, cache: &str| {
        let file = text.display().to_string();
        let report = json(&["perplexity", model, &file, "--bytes", "6000", "--json", "--kv-cache", cache]);
        report["perplexity"].as_f64().expect("a number")
    };
    for model in [SMOLLM2, GEMMA3] {
        let (bytes, floats) = (perplexity(model, "q8_0"), perplexity(model, "f32"));
        println!("{model}: {bytes:.4} with q8_0, {floats:.4} with f32");
        assert!((bytes / floats - 1.0).abs() < 0.004, "{model}: {bytes} with q8_0, {floats} with f32");
    }
}
