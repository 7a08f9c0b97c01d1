//! The tokenizer of a Hugging Face folder: tokenizer.json, and the files beside it.

use super::folder_config::{FolderConfig, optional_json};
use super::templates::Templates;
use super::token_bytes::{Kind, Pieces, Spelling};
use super::{Encoder, Tokenizer, ends};
use crate::format::FormatError;
use crate::format::safetensors::read_text;
use serde_json::Value;
use std::collections::{BTreeMap, BTreeSet};
use std::mem::ManuallyDrop;
use std::panic::catch_unwind;
use std::path::Path;

/// The largest published tokenizer.json is about 35 MB.
const TOKENIZER_BYTES_MAX: u64 = 256 << 20;
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
    let config = FolderConfig::read(folder)?;
    // The crate panics on some malformed parts.
    let parsed = catch_unwind(|| parse(&text, &config));
    let tokenizer = match parsed {
        Ok(Ok(tokenizer)) => tokenizer,
        Ok(Err(error)) => return Err(bad(error.to_string())),
        Err(_) => return Err(bad("a part of it is malformed".to_owned())),
    };
    let vocabulary = tokenizer.get_vocab(true);
    if let Some((text, id)) = vocabulary.iter().find(|&(_, &id)| id >= TOKENS_MAX) {
        return Err(bad(format!("the token `{text}` has the id {id}; ids must be below {TOKENS_MAX}")));
    }
    let id_of = |text: &str| tokenizer.token_to_id(text);
    let special_id = |key: &str| config.special_text(key).and_then(id_of);
    let added = tokenizer.get_added_tokens_decoder();
    let mut named: BTreeSet<u32> = special_id("eos_token").into_iter().collect();
    let generation = optional_json(&folder.join("generation_config.json"))?;
    for json in [&generation, config.model()] {
        named.extend(eos_ids(json));
        named.extend(eos_ids(&json["text_config"]));
    }
    let special = added.iter().filter(|(_, token)| token.special);
    let ends = ends(named, special.map(|(&id, token)| (id, token.content.as_str())));
    let by_id: BTreeMap<u32, &str> = vocabulary.iter().map(|(text, &id)| (id, text.as_str())).collect();
    let tokens = by_id.into_iter().map(|(id, text)| {
        // The decoder treats an added token that is not special as any other.
        let is_special = added.get(&id).is_some_and(|token| token.special);
        let kind = if is_special { Kind::of_control(text, ends.contains(&id)) } else { Kind::Normal };
        (id, text, kind)
    });
    let pieces = Pieces::new(spelling(&json), tokens);
    let (default, with_tools) = config.templates(folder)?;
    let texts = (config.special_text("bos_token"), config.special_text("eos_token"));
    let templates = Templates::new(default.as_deref(), with_tools.as_deref(), texts);
    let bos = special_id("bos_token");
    let affixes = config.affixes(id_of);
    let encoder = match affixes {
        Some(affixes) => Encoder::Affixed(Box::new(tokenizer), affixes),
        None => Encoder::Whole(Box::new(tokenizer)),
    };
    Ok(Tokenizer { encoder: ManuallyDrop::new(encoder), pieces, bos, ends, templates })
}

/// Reads tokenizer.json, without its truncation and padding, and adds the added and special tokens of `config`.
fn parse(text: &str, config: &FolderConfig) -> tokenizers::Result<tokenizers::Tokenizer> {
    let mut tokenizer = tokenizers::Tokenizer::from_bytes(text.as_bytes())?;
    tokenizer.with_truncation(None)?;
    tokenizer.with_padding(None);
    for (id, token) in config.added_tokens() {
        let known = tokenizer.token_to_id(&token.content);
        // A token that is new gets the next id, which must be its own.
        let is_next = known.is_none() && id as usize == tokenizer.get_vocab_size(true);
        if known == Some(id) || is_next {
            tokenizer.add_tokens([token])?;
        }
    }
    let added = tokenizer.get_added_tokens_decoder();
    let is_known = |text: &str| tokenizer.token_to_id(text).is_some_and(|id| !added.contains_key(&id));
    let special: Vec<_> = config.special_texts().into_iter().filter(|text| is_known(text)).collect();
    let special = special.into_iter().map(|text| tokenizers::AddedToken::from(text, true));
    tokenizer.add_special_tokens(special.collect::<Vec<_>>())?;
    Ok(tokenizer)
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

#[cfg(test)]
mod tests;
