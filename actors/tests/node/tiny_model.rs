//! A model with a few random weights, and a tokenizer of the words `w0` … `w95`.

use std::collections::BTreeMap;
use std::path::Path;

/// The number of tokens in the model's vocabulary.
pub(crate) const VOCABULARY: u32 = 96;

/// Writes the model of the folder `fixture` into `folder`, with a context of `context` tokens.
pub(crate) fn write_tiny_model(fixture: &Path, folder: &Path, context: u32) {
    std::fs::copy(fixture.join("model.safetensors"), folder.join("model.safetensors")).expect("the fixture is there");
    let config = std::fs::read_to_string(fixture.join("config.json")).expect("the fixture is there");
    let mut config: serde_json::Value = serde_json::from_str(&config).expect("JSON");
    config["max_position_embeddings"] = context.into();
    std::fs::write(folder.join("config.json"), config.to_string()).expect("written");
    let words: BTreeMap<String, u32> = (0..VOCABULARY).map(|id| (format!("w{id}"), id)).collect();
    let tokenizer = serde_json::json!({
        "version": "1.0",
        "added_tokens": [],
        "pre_tokenizer": {"type": "Whitespace"},
        "model": {"type": "WordLevel", "vocab": words, "unk_token": "w0"},
    });
    std::fs::write(folder.join("tokenizer.json"), tokenizer.to_string()).expect("written");
}
