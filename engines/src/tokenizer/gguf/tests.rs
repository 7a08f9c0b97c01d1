//! Tests with tiny vocabularies, whose merges cross the boundaries that a pre-tokenizer must keep.

use crate::format::FormatError;
use crate::format::gguf_writer::{Datum, GgufWriter};
use crate::model::TokenizerSource;
use crate::tokenizer::token_bytes::byte_level_alphabet;
use crate::tokenizer::{SpecialTokens, Tokenizer};

fn open(file: &GgufWriter) -> Result<Tokenizer, FormatError> {
    let folder = tempfile::tempdir().expect("a temporary folder");
    Tokenizer::open(&TokenizerSource::Gguf(file.write(folder.path())))
}

/// A vocabulary of all bytes, the results of `merges`, and three control tokens.
fn byte_level(pre: &str, merges: &[(&str, &str)]) -> GgufWriter {
    let alphabet = byte_level_alphabet();
    let mut tokens: Vec<String> = alphabet.keys().map(|c| c.to_string()).collect();
    tokens.extend(merges.iter().map(|(left, right)| format!("{left}{right}")));
    let normal = tokens.len();
    tokens.extend(["<s>", "<|im_end|>", "<tool>"].map(str::to_owned));
    let kinds = (0..tokens.len()).map(|id| Datum::Signed(if id < normal { 1 } else { 3 })).collect();
    GgufWriter::default()
        .text("tokenizer.ggml.model", "gpt2")
        .text("tokenizer.ggml.pre", pre)
        .texts("tokenizer.ggml.tokens", tokens.iter().map(String::as_str))
        .texts(
            "tokenizer.ggml.merges",
            merges.iter().map(|(l, r)| format!("{l} {r}")).collect::<Vec<_>>().iter().map(String::as_str),
        )
        .pair("tokenizer.ggml.token_type", Datum::Array(kinds))
        .count("tokenizer.ggml.bos_token_id", normal as u64)
}

/// The tokens of `text`, each as the text that is shown for it.
fn pieces(tokenizer: &Tokenizer, text: &str) -> Vec<String> {
    let ids = tokenizer.encode(text, SpecialTokens::AreThere).expect("a text");
    ids.iter().map(|&id| tokenizer.name(id)).collect()
}

/// Merges that join everything that a pre-tokenizer does not separate.
const EAGER: [(&str, &str); 9] =
    [("1", "2"), ("12", "3"), ("123", "4"), ("Ġ", "a"), ("Ġ", "Ġ"), ("Ċ", "Ċ"), ("'", "s"), ("a", "'s"), ("Ġ", "1")];

/// R4.1: each pre-tokenizer splits a text where the pre-tokenizer of its model does.
#[test]
fn pre_tokenizers_split_where_their_models_do() {
    let cases: [(&str, &str, &[&str]); 15] = [
        ("smollm", "1234", &["1", "2", "3", "4"]),
        ("qwen2", "1234", &["1", "2", "3", "4"]),
        ("llama-bpe", "1234", &["123", "4"]),
        ("gpt-2", "1234", &["1234"]),
        ("default", "1234", &["123", "4"]),
        ("smollm", "a's", &["a", "'s"]),
        ("gpt-2", "a's", &["a", "'s"]),
        ("qwen2", "a'S", &["a", "'", "S"]),
        ("gpt-2", "a  a", &["a", " ", " a"]),
        ("llama-bpe", "a  a", &["a", " ", " a"]),
        ("qwen2", "a\n\na", &["a", "\n\n", "a"]),
        ("gpt-2", "a\n\na", &["a", "\n", "\n", "a"]),
        ("llama-bpe", "a 1", &["a", " ", "1"]),
        ("gpt-2", "a 1", &["a", " 1"]),
        ("smollm", "a 1", &["a", " ", "1"]),
    ];
    for (pre, text, expected) in cases {
        let tokenizer = open(&byte_level(pre, &EAGER)).expect("a valid vocabulary");
        assert_eq!(pieces(&tokenizer, text), expected, "{pre}: {text:?}");
    }
}

#[test]
fn control_tokens_are_cut_out_and_bos_is_added_where_due() {
    for (pre, adds_bos) in [("llama-bpe", true), ("qwen2", false)] {
        let tokenizer = open(&byte_level(pre, &EAGER)).expect("a valid vocabulary");
        assert_eq!(pieces(&tokenizer, "a<|im_end|>a"), ["a", "<|im_end|>", "a"]);
        let with = tokenizer.encode("a", SpecialTokens::Add).expect("a text");
        assert_eq!(with.first() == tokenizer.bos().as_ref(), adds_bos, "{pre}");
        assert_eq!(tokenizer.ends().len(), 1);
        assert!(
            tokenizer.ends().iter().all(|&id| tokenizer.name(id) == "<|im_end|>" && tokenizer.bytes(id).is_empty())
        );
    }
    let told = byte_level("llama-bpe", &EAGER).pair("tokenizer.ggml.add_bos_token", Datum::Bool(false));
    let tokenizer = open(&told).expect("a valid vocabulary");
    assert_ne!(tokenizer.encode("a", SpecialTokens::Add).expect("a text").first(), tokenizer.bos().as_ref());
}

#[test]
fn every_text_survives_a_round_trip() {
    let tokenizer = open(&byte_level("llama-bpe", &EAGER)).expect("a valid vocabulary");
    for text in ["", "a'sé 12 \u{1f980}\n\n\t 日本", "\u{0}\u{7f}", "  a  "] {
        let ids = tokenizer.encode(text, SpecialTokens::AreThere).expect("a text");
        let bytes: Vec<u8> = ids.iter().flat_map(|&id| tokenizer.bytes(id)).copied().collect();
        assert_eq!(bytes, text.as_bytes(), "{text:?}");
    }
}

#[test]
fn unusable_vocabularies_are_reported() {
    let cases = [
        (byte_level("magic", &[]), "magic"),
        (byte_level("gpt-2", &[]).count("tokenizer.ggml.eos_token_id", 9999), "eos_token_id"),
        (
            GgufWriter::default().text("tokenizer.ggml.model", "wordpiece").texts("tokenizer.ggml.tokens", ["a"]),
            "wordpiece",
        ),
        (GgufWriter::default().text("tokenizer.ggml.model", "gpt2").texts("tokenizer.ggml.tokens", ["a"]), "merges"),
        (GgufWriter::default().text("tokenizer.ggml.model", "gpt2"), "no tokenizer"),
    ];
    for (file, named) in cases {
        let error = open(&file).expect_err(named);
        assert!(error.to_string().contains(named), "{named}: {error}");
        assert!(!error.remedy().is_empty());
    }
}

/// Phi-3's control tokens swallow the whitespace behind them, but for the tokens that begin and end a text.
#[test]
fn phi_3_swallows_whitespace_behind_control_tokens() {
    let split = |name: &str| {
        let file = byte_level("gpt-2", &[]).text("general.name", name);
        pieces(&open(&file).expect("a tokenizer"), "<tool>  a<s> a")
    };
    assert_eq!(split("Phi-3 mini"), ["<tool>", "a", "<s>", " ", "a"]);
    assert_eq!(split("Other"), ["<tool>", " ", " ", "a", "<s>", " ", "a"]);
}
