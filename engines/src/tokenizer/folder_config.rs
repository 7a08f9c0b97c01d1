//! What the files beside tokenizer.json say: special tokens, the tokens around a text, chat templates.
//!
//! Source: `tokenization_utils_fast.py` and the tokenizer classes of Hugging Face transformers 4.57. Release 5 ignores
//! the flags `add_bos_token` and `add_eos_token`; folders are published for the classes that obey them.

use super::Affixes;
use crate::format::FormatError;
use crate::format::safetensors::read_text;
use serde_json::Value;
use std::path::Path;
use tokenizers::AddedToken;

const CONFIG_BYTES_MAX: u64 = 16 << 20;
/// The keys of single special tokens, besides `additional_special_tokens`.
const SPECIAL_KEYS: [&str; 7] =
    ["bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token"];

/// A tokenizer class that builds its own post-processor, whatever tokenizer.json has.
struct AffixClass {
    name: &'static str,
    /// Values of `model_type` for which this class is the default.
    model_types: &'static [&'static str],
    adds_bos: bool,
    bos: &'static str,
    eos: &'static str,
}

/// All other classes use the post-processor of tokenizer.json, and ignore the flags.
const AFFIX_CLASSES: [AffixClass; 5] = [
    AffixClass {
        name: "Llama",
        model_types: &["llama", "mistral", "mixtral", "phi3"],
        adds_bos: true,
        bos: "<s>",
        eos: "</s>",
    },
    AffixClass { name: "CodeLlama", model_types: &[], adds_bos: true, bos: "<s>", eos: "</s>" },
    AffixClass {
        name: "Gemma",
        model_types: &["gemma", "gemma2", "gemma3", "gemma3_text"],
        adds_bos: true,
        bos: "<bos>",
        eos: "<eos>",
    },
    AffixClass { name: "Cohere", model_types: &[], adds_bos: true, bos: "<BOS_TOKEN>", eos: "<|END_OF_TURN_TOKEN|>" },
    AffixClass {
        name: "GPTNeoX",
        model_types: &["olmo2"],
        adds_bos: false,
        bos: "<|endoftext|>",
        eos: "<|endoftext|>",
    },
];

/// tokenizer_config.json; special_tokens_map.json, where the former has no `added_tokens_decoder`; and config.json.
pub(super) struct FolderConfig {
    config: Value,
    special_map: Value,
    /// config.json.
    model: Value,
}

impl FolderConfig {
    pub(super) fn read(folder: &Path) -> Result<Self, FormatError> {
        let config = optional_json(&folder.join("tokenizer_config.json"))?;
        // Newer configs list the added tokens themselves, and the map is not read.
        let special_map = match config.get("added_tokens_decoder") {
            Some(_) => Value::Null,
            None => optional_json(&folder.join("special_tokens_map.json"))?,
        };
        let model = optional_json(&folder.join("config.json"))?;
        Ok(Self { config, special_map, model })
    }

    /// config.json; null if there is none.
    pub(super) fn model(&self) -> &Value {
        &self.model
    }

    fn model_type(&self) -> &str {
        let inner = self.model["text_config"]["model_type"].as_str();
        inner.or(self.model["model_type"].as_str()).unwrap_or_default()
    }

    /// The value of a special token; `None` if no file has the key.
    fn special(&self, key: &str) -> Option<&Value> {
        self.special_map.get(key).or_else(|| self.config.get(key))
    }

    /// The text of a special token such as `bos_token`.
    pub(super) fn special_text(&self, key: &str) -> Option<&str> {
        token_text(self.special(key)?)
    }

    /// The texts of all special tokens. They are cut out of a text, even where tokenizer.json does not list them.
    pub(super) fn special_texts(&self) -> Vec<&str> {
        let single = SPECIAL_KEYS.iter().filter_map(|key| self.special_text(key));
        let more = self.special("additional_special_tokens").and_then(Value::as_array);
        single.chain(more.into_iter().flatten().filter_map(token_text)).collect()
    }

    /// The added tokens by id, whose properties replace those in tokenizer.json.
    pub(super) fn added_tokens(&self) -> Vec<(u32, AddedToken)> {
        let added = self.config.get("added_tokens_decoder").and_then(Value::as_object);
        let token = |(id, token): (&String, &Value)| {
            let flag = |key: &str| token.get(key).and_then(Value::as_bool);
            let special = flag("special").unwrap_or(false);
            let added = AddedToken::from(token.get("content")?.as_str()?, special)
                .normalized(flag("normalized").unwrap_or(!special))
                .lstrip(flag("lstrip").unwrap_or(false))
                .rstrip(flag("rstrip").unwrap_or(false))
                .single_word(flag("single_word").unwrap_or(false));
            Some((id.parse().ok()?, added))
        };
        let mut tokens: Vec<(u32, AddedToken)> = added.into_iter().flatten().filter_map(token).collect();
        tokens.sort_by_key(|(id, _)| *id);
        tokens
    }

    /// The tokens that the tokenizer's class adds around a text; `None` if tokenizer.json's post-processor adds them.
    pub(super) fn affixes(&self, id_of: impl Fn(&str) -> Option<u32>) -> Option<Affixes> {
        let named = self.config.get("tokenizer_class").and_then(Value::as_str);
        let class = AFFIX_CLASSES.iter().find(|class| match named {
            Some(named) => named.trim_end_matches("Fast").strip_suffix("Tokenizer") == Some(class.name),
            None => class.model_types.contains(&self.model_type()),
        })?;
        let adds = |key: &str, default: bool| match self.config.get(key) {
            Some(flag) => flag.as_bool().unwrap_or(false),
            None => default,
        };
        let id = |key: &str, default: &str| match self.special(key) {
            Some(value) => token_text(value).and_then(&id_of),
            None => id_of(default),
        };
        Some(Affixes {
            before: id("bos_token", class.bos).filter(|_| adds("add_bos_token", class.adds_bos)),
            after: id("eos_token", class.eos).filter(|_| adds("add_eos_token", false)),
        })
    }

    /// The sources of the chat template, and of the template for conversations with tools where it is another.
    /// `chat_template.jinja` takes precedence over tokenizer_config.json, which has a string or named templates.
    pub(super) fn templates(&self, folder: &Path) -> Result<(Option<String>, Option<String>), FormatError> {
        let file = folder.join("chat_template.jinja");
        if file.is_file() {
            return Ok((Some(read_text(&file, CONFIG_BYTES_MAX)?), None));
        }
        let text = |value: &Value| value.as_str().map(str::to_owned);
        let template = &self.config["chat_template"];
        let named = |name: &str| match template {
            // Of equal names, the last counts.
            Value::Array(list) => {
                let entry = list.iter().rev().find(|entry| entry["name"] == name)?;
                text(&entry["template"])
            }
            other => text(&other[name]),
        };
        Ok(match text(template) {
            Some(only) => (Some(only), None),
            None => (named("default"), named("tool_use")),
        })
    }
}

pub(super) fn optional_json(path: &Path) -> Result<Value, FormatError> {
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
