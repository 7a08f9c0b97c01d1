//! Converts text to tokens, and tokens to text.
//!
//! ```text
//! text ─► special tokens cut out ─► normalised ─► BPE │ SentencePiece ─► ids
//! id   ─► its bytes (pieces) ─► Utf8Stream ─► StopStream ─► text that may be shown
//! ```
//! The `tokenizers` crate encodes, with tokenizer.json or the vocabulary of a GGUF file. Decoding uses each token's own
//! bytes, so that a stream never delays or changes the text that it has shown.

mod folder;
mod folder_config;
mod gguf;
mod pre_tokenizers;
mod spm;
mod string_table;
mod templates;
mod text_stream;
mod token_bytes;

pub use templates::Tools;
pub use text_stream::{StopStream, Stopped, Utf8Stream};

use crate::format::FormatError;
use crate::model::TokenizerSource;
use crate::template::{ChatTemplate, TemplateError};
use spm::SpmTokenizer;
use std::collections::BTreeSet;
use std::mem::ManuallyDrop;
use std::panic::{AssertUnwindSafe, catch_unwind};
use templates::Templates;
use token_bytes::Pieces;

/// Bytes of the longest text that is encoded at once: slightly more than a million tokens.
pub const TEXT_BYTES_MAX: usize = 8 << 20;

/// The texts of tokens that end a turn in every family (llama.cpp's list of end-of-generation tokens).
const END_TEXTS: [&str; 10] = [
    "<|im_end|>",
    "<|eot_id|>",
    "<|eom_id|>",
    "<|end|>",
    "<end_of_turn>",
    "<|endoftext|>",
    "<|end_of_text|>",
    RETURN,
    CALL,
    "<EOT>",
];
/// Tokens of OpenAI's harmony format: the end of an answer, and of an answer that is a call.
const RETURN: &str = "<|return|>";
const CALL: &str = "<|call|>";
/// In harmony this token ends a message only, after which the turn goes on.
const MESSAGE_END: &str = "<|end|>";

/// A model's tokenizer and chat template.
#[derive(Debug)]
pub struct Tokenizer {
    encoder: ManuallyDrop<Encoder>,
    pieces: Pieces,
    bos: Option<u32>,
    /// Tokens that end an answer.
    ends: BTreeSet<u32>,
    templates: Templates,
}

#[derive(Debug)]
enum Encoder {
    /// From tokenizer.json, whose post-processor adds the special tokens.
    Whole(Box<tokenizers::Tokenizer>),
    /// Byte-level BPE from GGUF, or tokenizer.json with a class that adds the special tokens itself.
    Affixed(Box<tokenizers::Tokenizer>, Affixes),
    /// From GGUF: SentencePiece.
    Spm(Box<SpmTokenizer>, Affixes),
}

/// Tokens around a text that is not a rendered template.
#[derive(Debug, Clone, Default)]
struct Affixes {
    before: Option<u32>,
    after: Option<u32>,
}

/// Whether encoding adds the tokens that begin (and end) a text of the model.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SpecialTokens {
    /// Adds them, for plain text.
    Add,
    /// Adds none, for a rendered chat template, which contains them.
    AreThere,
}

/// The reason why a text cannot be encoded.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum EncodeError {
    /// The text is longer than [`TEXT_BYTES_MAX`].
    #[error("the text has {bytes} bytes, more than the limit of {TEXT_BYTES_MAX}")]
    TooLong {
        /// The text's length.
        bytes: usize,
    },
    /// The vocabulary cannot express the text, or the tokenizer's regular expression failed.
    #[error("the tokenizer failed on the text: {what}")]
    Failed {
        /// The tokenizer's error message.
        what: String,
    },
}

impl Drop for Tokenizer {
    /// Frees the encoder on another thread. Its hundreds of thousands of entries are freed one by one, which takes a
    /// good part of a second and must not delay serving.
    fn drop(&mut self) {
        // SAFETY: nothing uses the encoder after this line.
        let encoder = unsafe { ManuallyDrop::take(&mut self.encoder) };
        // If no thread can be started, the encoder is freed here.
        let _ = std::thread::Builder::new().name("free-tokenizer".to_owned()).spawn(move || drop(encoder));
    }
}

impl Tokenizer {
    /// Reads the tokenizer of `source`.
    ///
    /// # Errors
    /// [`FormatError`] if the tokenizer is missing or malformed.
    pub fn open(source: &TokenizerSource) -> Result<Self, FormatError> {
        match source {
            TokenizerSource::Gguf(path) => gguf::open(path),
            TokenizerSource::Folder(folder) => folder::open(folder),
        }
    }

    /// Returns the ids of `text`. The texts of special tokens become these tokens.
    ///
    /// # Errors
    /// [`EncodeError`] for a text that is too long, or that the vocabulary cannot express.
    pub fn encode(&self, text: &str, special: SpecialTokens) -> Result<Vec<u32>, EncodeError> {
        if text.len() > TEXT_BYTES_MAX {
            return Err(EncodeError::TooLong { bytes: text.len() });
        }
        // The regex engine of the pre-tokenizers panics if a search fails.
        let outcome = catch_unwind(AssertUnwindSafe(|| self.encode_within(text, special)));
        match outcome {
            Ok(ids) => ids,
            Err(_) => Err(EncodeError::Failed { what: "its regular expression failed".to_owned() }),
        }
    }

    fn encode_within(&self, text: &str, special: SpecialTokens) -> Result<Vec<u32>, EncodeError> {
        let add = special == SpecialTokens::Add;
        let failed = |error: tokenizers::Error| EncodeError::Failed { what: error.to_string() };
        let (encoding, affixes) = match &*self.encoder {
            Encoder::Whole(tokenizer) => {
                return Ok(tokenizer.encode_fast(text, add).map_err(failed)?.get_ids().to_vec());
            }
            Encoder::Affixed(tokenizer, affixes) => (tokenizer.encode_fast(text, false), affixes),
            Encoder::Spm(tokenizer, affixes) => (tokenizer.encode_fast(text, false), affixes),
        };
        let encoding = encoding.map_err(failed)?;
        let affixes = if add { affixes.clone() } else { Affixes::default() };
        let ids = encoding.get_ids().iter().copied();
        Ok(affixes.before.into_iter().chain(ids).chain(affixes.after).collect())
    }

    /// The bytes of `token` in an answer: empty for a control token or an id outside the vocabulary.
    pub fn bytes(&self, token: u32) -> &[u8] {
        self.pieces.bytes(token)
    }

    /// The text of `token` for log-probabilities. Control tokens appear by their names.
    pub fn name(&self, token: u32) -> String {
        self.pieces.name(token)
    }

    /// Whether `token` ends an answer.
    pub fn is_end(&self, token: u32) -> bool {
        self.ends.contains(&token)
    }

    /// Tokens that end an answer.
    pub fn ends(&self) -> &BTreeSet<u32> {
        &self.ends
    }

    /// The token that begins a text, if the model has one.
    pub fn bos(&self) -> Option<u32> {
        self.bos
    }

    /// Number of token ids, gaps included: the highest id plus one.
    pub fn vocabulary(&self) -> usize {
        self.pieces.len()
    }

    /// Whether each id that both vocabularies have is the same token in both.
    pub fn shares_tokens(&self, other: &Self) -> bool {
        let shared = self.vocabulary().min(other.vocabulary()) as u32;
        // Control tokens have no bytes, but names.
        let is_same = |id| match (self.bytes(id), other.bytes(id)) {
            ([], []) => self.name(id) == other.name(id),
            (own, others) => own == others,
        };
        (0..shared).all(is_same)
    }

    /// The id of the control token with this name.
    pub fn control_token(&self, name: &str) -> Option<u32> {
        self.pieces.control(name)
    }

    /// The chat template for conversations with or without tools, or the reason why it cannot be used; a base model has
    /// none.
    pub fn template(&self, tools: Tools) -> Option<Result<&ChatTemplate, &TemplateError>> {
        self.templates.find(tools)
    }
}

/// The tokens that end an answer: those that the model's files name, and the control tokens whose texts end a turn.
fn ends<'a>(named: BTreeSet<u32>, control: impl Iterator<Item = (u32, &'a str)>) -> BTreeSet<u32> {
    let by_text: Vec<(u32, &str)> = control.filter(|(_, text)| END_TEXTS.contains(text)).collect();
    let is_harmony = by_text.iter().any(|&(_, text)| matches!(text, RETURN | CALL));
    let mut ends = named;
    ends.extend(by_text.iter().map(|&(id, _)| id));
    for (id, _) in by_text.iter().filter(|&&(_, text)| is_harmony && text == MESSAGE_END) {
        ends.remove(id);
    }
    ends
}
