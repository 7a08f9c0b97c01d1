//! The tokenizer of a Hugging Face folder: tokenizer.json, and the files beside it.

use super::token_bytes::{Kind, Pieces, Spelling};
use super::{Encoder, Tokenizer, ends_by_text};
use crate::format::FormatError;
use crate::format::safetensors::read_text;
use crate::template::ChatTemplate;
use serde_json::Value;
use std::collections::{BTreeMap, BTreeSet};
use std::mem::ManuallyDrop;
use std::panic::catch_unwind;
use std::path::Path;

/// The largest published tokenizer.json is about 35 MB.
const TOKENIZER_BYTES_MAX: u64 = 256 << 20;
const CONFIG_BYTES_MAX: u64 = 16 << 20;
/// The largest published vocabularies have under 300,000 tokens. A far larger id is damage, and would demand memory.
const TOKENS_MAX: u32 = 1 << 22;

pub(super) fn open(folder: &Path) -> Result<Tokenizer, FormatError> {
    let path = folder.join("tokenizer.json");
    if !path.is_file() {
        return Err(FormatError::NoTokenizer { path: folder.to_owned() });
    }
    let bad = |what: String| FormatError::BadTokenizer { path: path.clone(), what };
    let text = read_text(&path, TOKENIZER_BYTES_MAX)?;
    let json: Value = serde_json::from_str(&text).map_err(|e| bad(format!("it is not JSON: {e}")))?;
    // The crate panics on some malformed parts.
    let parsed = catch_unwind(|| tokenizers::Tokenizer::from_bytes(text.as_bytes()));
    let tokenizer = match parsed {
        Ok(Ok(tokenizer)) => tokenizer,
        Ok(Err(error)) => return Err(bad(error.to_string())),
        Err(_) => return Err(bad("a part of it is malformed".to_owned())),
    };
    let config = optional_json(&folder.join("tokenizer_config.json"))?;
    let id_of = |key: &str| {
        let text = token_text(config.get(key)?)?;
        tokenizer.token_to_id(text).map(|id| (id, text))
    };
    let (bos, eos) = (id_of("bos_token"), id_of("eos_token"));
    let added = tokenizer.get_added_tokens_decoder();
    let mut ends: BTreeSet<u32> = eos.iter().map(|&(id, _)| id).collect();
    for file in ["generation_config.json", "config.json"] {
        ends.extend(eos_ids(&optional_json(&folder.join(file))?));
    }
    ends.extend(ends_by_text(added.iter().map(|(&id, token)| (id, token.content.as_str()))));
    let vocabulary = tokenizer.get_vocab(true);
    if let Some((text, id)) = vocabulary.iter().find(|&(_, &id)| id >= TOKENS_MAX) {
        return Err(bad(format!("the token `{text}` has the id {id}; ids must be below {TOKENS_MAX}")));
    }
    let by_id: BTreeMap<u32, &str> = vocabulary.iter().map(|(text, &id)| (id, text.as_str())).collect();
    let tokens = by_id.into_iter().map(|(id, text)| {
        let kind = match added.get(&id) {
            Some(token) if token.special => Kind::Control,
            Some(_) => Kind::Verbatim,
            None => Kind::Normal,
        };
        (id, text, kind)
    });
    let pieces = Pieces::new(spelling(&json), tokens);
    let template = template(folder, &config)?
        .map(|source| ChatTemplate::new(&source, bos.map(|(_, text)| text), eos.map(|(_, text)| text)))
        .transpose()
        .map_err(|e| bad(e.to_string()))?;
    let encoder = ManuallyDrop::new(Encoder::Whole(Box::new(tokenizer)));
    Ok(Tokenizer { pieces, bos: bos.map(|(id, _)| id), ends, template, encoder })
}

fn optional_json(path: &Path) -> Result<Value, FormatError> {
    if !path.is_file() {
        return Ok(Value::Null);
    }
    let text = read_text(path, CONFIG_BYTES_MAX)?;
    serde_json::from_str(&text)
        .map_err(|e| FormatError::Malformed { path: path.to_owned(), what: format!("it is not JSON: {e}") })
}

/// The text of a token, which is stored as a string, or as an object with the string at `content`.
fn token_text(value: &Value) -> Option<&str> {
    value.as_str().or_else(|| value.get("content")?.as_str())
}

fn eos_ids(config: &Value) -> Vec<u32> {
    let ids = match config.get("eos_token_id") {
        Some(Value::Array(ids)) => ids.clone(),
        Some(id) => vec![id.clone()],
        None => Vec::new(),
    };
    ids.iter().filter_map(|id| u32::try_from(id.as_u64()?).ok()).collect()
}

/// The vocabulary's spelling. A byte-level vocabulary names the decoder `ByteLevel`, alone or in a sequence.
fn spelling(json: &Value) -> Spelling {
    let decoder = &json["decoder"];
    let is_byte_level = |decoder: &Value| decoder["type"] == "ByteLevel";
    let parts = decoder["decoders"].as_array();
    match is_byte_level(decoder) || parts.is_some_and(|parts| parts.iter().any(is_byte_level)) {
        true => Spelling::ByteLevel,
        false => Spelling::SentencePiece,
    }
}

/// `chat_template.jinja`, or the template in tokenizer_config.json: a string, or the entry named `default` of a list.
fn template(folder: &Path, config: &Value) -> Result<Option<String>, FormatError> {
    let file = folder.join("chat_template.jinja");
    if file.is_file() {
        return read_text(&file, CONFIG_BYTES_MAX).map(Some);
    }
    let template = match &config["chat_template"] {
        Value::Array(list) => list.iter().find(|entry| entry["name"] == "default").map(|entry| &entry["template"]),
        other => Some(other),
    };
    Ok(template.and_then(Value::as_str).map(str::to_owned))
}
