//! Tests with a tiny folder, whose words are `w0` … `w95`.

use crate::format::FormatError;
use crate::model::TokenizerSource;
use crate::template::{Conversation, Message, Role};
use crate::tokenizer::{SpecialTokens, Tokenizer, Tools};
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::path::Path;

fn tiny(changes: Value) -> Value {
    let words: BTreeMap<String, u32> = (0..96).map(|id| (format!("w{id}"), id)).collect();
    let mut tokenizer = json!({
        "version": "1.0",
        "added_tokens": [],
        "pre_tokenizer": {"type": "Whitespace"},
        "model": {"type": "WordLevel", "vocab": words, "unk_token": "w0"},
    });
    for (key, value) in changes.as_object().expect("an object") {
        tokenizer[key] = value.clone();
    }
    tokenizer
}

fn open(files: &[(&str, Value)]) -> Result<Tokenizer, FormatError> {
    let folder = tempfile::tempdir().expect("a temporary folder");
    for (name, content) in files {
        let text = content.as_str().map_or_else(|| content.to_string(), str::to_owned);
        std::fs::write(folder.path().join(name), text).expect("written");
    }
    Tokenizer::open(&TokenizerSource::Folder(folder.path().to_owned()))
}

fn ids(tokenizer: &Tokenizer, text: &str) -> Vec<u32> {
    tokenizer.encode(text, SpecialTokens::Add).expect("a text")
}

/// R4.1: truncation and padding are settings of the training, and never applied.
#[test]
fn truncation_and_padding_are_ignored() {
    let changes = json!({
        "truncation": {"direction": "Right", "max_length": 8, "strategy": "LongestFirst", "stride": 0},
        "padding": {"strategy": {"Fixed": 32}, "direction": "Left", "pad_to_multiple_of": null, "pad_id": 9,
                    "pad_type_id": 0, "pad_token": "w9"},
    });
    let tokenizer = open(&[("tokenizer.json", tiny(changes))]).expect("a tokenizer");
    let text = (5..25).map(|id| format!("w{id} ")).collect::<String>();
    assert_eq!(ids(&tokenizer, &text), (5..25).collect::<Vec<u32>>());
}

/// R4.1: the tokens around a text, for each tokenizer class, flag and post-processor (`fixtures/bos/make.py`).
#[test]
fn each_class_adds_the_tokens_that_transformers_adds() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/bos/table.json");
    let rows: Vec<Value> = serde_json::from_slice(&std::fs::read(path).expect("the table")).expect("a list");
    let template = json!({
        "type": "TemplateProcessing",
        "single": [{"SpecialToken": {"id": "w1", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {"w1": {"id": "w1", "ids": [1], "tokens": ["w1"]}},
    });
    let bytes = json!({"type": "ByteLevel", "add_prefix_space": true, "trim_offsets": false, "use_regex": true});
    let mut wrong = Vec::new();
    for row in &rows {
        let processor = match row[4].as_str() {
            Some("template_w1") => template.clone(),
            Some("bytelevel") => bytes.clone(),
            Some("seq_bytelevel_template") => json!({"type": "Sequence", "processors": [bytes, template]}),
            _ => Value::Null,
        };
        let mut config = json!({"unk_token": "w0"});
        for (key, value) in [("add_bos_token", 2), ("add_eos_token", 3), ("bos_token", 5), ("eos_token", 6)] {
            if row[value] != "(absent)" {
                config[key] = row[value].clone();
            }
        }
        if row[0].is_string() {
            config["tokenizer_class"] = row[0].clone();
        }
        let files = [
            ("tokenizer.json", tiny(json!({ "post_processor": processor }))),
            ("tokenizer_config.json", config),
            ("config.json", json!({ "model_type": row[1] })),
        ];
        let got = ids(&open(&files).expect("a tokenizer"), "w5 w6");
        if json!(got) != row[7] {
            wrong.push(format!("{row}: {got:?}"));
        }
    }
    assert!(rows.len() > 1000 && wrong.is_empty(), "{} differ:\n{}", wrong.len(), wrong.join("\n"));
}

/// R4.1: an added token that is not special is spelt as any other: Gemma's runs of `▁` are spaces.
#[test]
fn added_tokens_are_decoded_as_others() {
    let added = |id: u32, content: &str, special: bool| {
        json!({"id": id, "content": content, "single_word": false, "lstrip": false, "rstrip": false,
               "normalized": false, "special": special})
    };
    let changes = json!({
        "added_tokens": [added(96, "▁▁", false), added(97, "<think>", true), added(98, "<file_sep>", true),
                         added(99, "<|im_end|>", true)],
        "decoder": {"type": "Sequence", "decoders": [
            {"type": "Replace", "pattern": {"String": "▁"}, "content": " "}, {"type": "ByteFallback"}, {"type": "Fuse"}]},
    });
    let tokenizer = open(&[("tokenizer.json", tiny(changes))]).expect("a tokenizer");
    assert_eq!(tokenizer.bytes(96), b"  ");
    // A marker of thoughts has text, so that an answer can be split; other control tokens have names only.
    assert_eq!(tokenizer.bytes(97), b"<think>");
    assert_eq!((tokenizer.bytes(98), tokenizer.control_token("<file_sep>")), (&b""[..], Some(98)));
    assert!(tokenizer.is_end(99) && tokenizer.bytes(99).is_empty());
}

/// In harmony, a message's end is not the turn's end, and a call is.
#[test]
fn harmony_ends_a_turn_with_return_or_call() {
    let names = ["<|start|>", "<|channel|>", "<|message|>", "<|end|>", "<|return|>", "<|call|>"];
    let open_with = |names: &[&str]| {
        let added = (96u32..).zip(names).map(|(id, name)| {
            json!({"id": id, "content": name, "single_word": false, "lstrip": false, "rstrip": false,
                   "normalized": false, "special": true})
        });
        let tokenizer = tiny(json!({ "added_tokens": added.collect::<Vec<_>>() }));
        open(&[("tokenizer.json", tokenizer), ("tokenizer_config.json", json!({"eos_token": names.last()}))])
    };
    let harmony = open_with(&names).expect("a tokenizer");
    assert_eq!(harmony.ends().iter().copied().collect::<Vec<_>>(), [100, 101]);
    assert_eq!(harmony.bytes(99), b"<|end|>");
    let phi = open_with(&["<|user|>", "<|end|>"]).expect("a tokenizer");
    assert_eq!(phi.ends().iter().copied().collect::<Vec<_>>(), [97]);
}

/// A template that cannot be compiled keeps no one from the model; an empty one is none.
#[test]
fn templates_fail_only_where_they_are_used() {
    let with = |template: Value| {
        let config = json!({ "chat_template": template });
        open(&[("tokenizer.json", tiny(json!({}))), ("tokenizer_config.json", config)]).expect("a tokenizer")
    };
    let broken = with(json!("{% unknown %}"));
    assert_eq!(ids(&broken, "w5"), [5]);
    assert!(broken.template(Tools::Absent).expect("a template").is_err());
    assert!(with(json!(" \n")).template(Tools::Absent).is_none());
    let named = with(json!([
        {"name": "default", "template": "first"}, {"name": "tool_use", "template": "tools"},
        {"name": "default", "template": "last"}
    ]));
    let chat = Conversation::from(vec![Message::new(Role::User, "Hi")]);
    let text = |tools| {
        let template = named.template(tools).expect("a template").expect("it compiles");
        template.render(&chat, chrono::NaiveDateTime::default()).expect("it renders")
    };
    assert_eq!((text(Tools::Absent).as_str(), text(Tools::Given).as_str()), ("last", "tools"));
}
