//! The context of a model: the tokens of a prompt and its answer together.

use super::*;
use crate::node::Node;
use serde_json::json as object;

#[test]
fn a_prompt_over_the_context_is_refused_with_its_numbers() {
    models();
    let prompt = "word ".repeat(500);
    let output = output(&["run", SMOLLM2, &prompt, "--context", "64"]);
    assert_eq!(output.status.code(), Some(1));
    assert!(
        stderr(&output).contains("context: 64 tokens, as requested (the model's own: 8192)"),
        "{}",
        stderr(&output)
    );
}

/// R7.1–R7.5: a model that does not fit is refused with the number of missing bytes.
#[test]
fn a_model_that_does_not_fit_is_refused_with_its_numbers() {
    models();
    let copy = huge_context_model();
    let output =
        output(&["run", copy.path().join("huge.gguf").to_str().expect("UTF-8"), "x", "--context", "268435456"]);
    assert_eq!(output.status.code(), Some(1));
    assert!(stderr(&output).contains("bytes are missing"), "{}", stderr(&output));
}

/// SmolLM2's file with a context length in its header that is too large for any memory.
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

/// R7.1–R7.5: without `--context`, a model gets the context for which memory suffices. The status and the refusal of a
/// longer prompt say how long the context is, and why.
#[test]
fn the_default_context_is_what_memory_allows() {
    models();
    let copy = huge_context_model();
    let model = copy.path().join("huge.gguf").display().to_string();
    // 0.1 GB of weights, 0.4 GB for the least cache, and as much again for about 13,000 more tokens.
    let node = Node::up(&[&model, "--memory", "0.8"]);
    let prompt = "word ".repeat(100_000);
    let body = object!({"model": model, "prompt": prompt, "max_tokens": 1});
    let refused = node.post("/v1/completions", &body);
    assert_eq!((refused.status, refused.json()["error"]["code"].as_str()), (400, Some("context_length_exceeded")));
    let state = node.state();
    let instances = state["instances"].as_object().expect("instances by id");
    let context = &instances.values().next().expect("one instance")["model"]["context"];
    let tokens = context["tokens"].as_u64().expect("a number");
    assert!((17_000..36_000).contains(&tokens), "{context}");
    assert_eq!((context["limit"].as_str(), context["model_tokens"].as_u64()), (Some("memory"), Some(1 << 28)));
    let why = format!("{tokens} tokens, as much as memory permits (the model's own: {})", 1 << 28);
    for text in [refused.body, String::from_utf8_lossy(&node.command(&["status"]).stdout).into_owned()] {
        assert!(text.contains(&why), "{text} lacks: {why}");
    }
}

/// A context beyond the model's own is refused, with both numbers.
#[test]
fn a_context_beyond_the_models_own_is_refused() {
    models();
    let output = output(&["run", SMOLLM2, "x", "--context", "8193"]);
    assert_eq!(output.status.code(), Some(1));
    assert!(stderr(&output).contains("8193 tokens, more than the 8192 of the model's own"), "{}", stderr(&output));
}
