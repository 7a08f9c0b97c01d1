//! Text to tokens and back.
//!
//! ```text
//! text ─► special tokens cut out ─► normalised ─► BPE │ SentencePiece ─► ids
//! id   ─► its bytes (pieces) ─► Utf8Stream ─► StopStream ─► text that may be shown
//! ```
//! Encoding is the `tokenizers` crate's, over tokenizer.json or the vocabulary of a GGUF file. Decoding is by each
//! token's own bytes, so that a stream never waits for, or changes, what it has shown.

mod folder;
mod gguf;
mod spm;
mod string_table;
mod text_stream;
mod token_bytes;

pub use text_stream::{StopStream, Stopped, Utf8Stream};

use crate::format::FormatError;
use crate::model::TokenizerSource;
use crate::template::ChatTemplate;
use spm::SpmTokenizer;
use std::collections::BTreeSet;
use std::mem::ManuallyDrop;
use std::panic::{AssertUnwindSafe, catch_unwind};
use token_bytes::Pieces;

/// The longest text that is encoded at once: a million tokens, and some.
pub const TEXT_BYTES_MAX: usize = 8 << 20;

/// Tokens with this text end a turn in every family that has them (llama.cpp's list of end-of-generation tokens).
const END_TEXTS: [&str; 9] = [
    "<|im_end|>",
    "<|eot_id|>",
    "<|eom_id|>",
    "<|end|>",
    "<end_of_turn>",
    "<|endoftext|>",
    "<|end_of_text|>",
    "<|return|>",
    "<EOT>",
];

/// A model's tokenizer and chat template.
#[derive(Debug)]
pub struct Tokenizer {
    encoder: ManuallyDrop<Encoder>,
    pieces: Pieces,
    bos: Option<u32>,
    /// Tokens that end an answer.
    ends: BTreeSet<u32>,
    template: Option<ChatTemplate>,
}

#[derive(Debug)]
enum Encoder {
    /// tokenizer.json: its post-processor adds the special tokens.
    Whole(Box<tokenizers::Tokenizer>),
    /// GGUF, byte-level BPE.
    Bpe(Box<tokenizers::Tokenizer>, Affixes),
    /// GGUF, SentencePiece.
    Spm(Box<SpmTokenizer>, Affixes),
}

/// Tokens put around a text that is not a rendered template.
#[derive(Debug, Clone, Default)]
struct Affixes {
    before: Option<u32>,
    after: Option<u32>,
}

/// Whether the tokens that begin (and end) a text of the model are added.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SpecialTokens {
    /// For plain text.
    Add,
    /// For a rendered chat template, which has written them.
    AreThere,
}

/// Why a text could not be encoded.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum EncodeError {
    #[error("the text has {bytes} bytes; {TEXT_BYTES_MAX} are possible")]
    TooLong { bytes: usize },
    #[error("the tokenizer failed on the text: {what}")]
    Failed { what: String },
}

impl Drop for Tokenizer {
    /// Hundreds of thousands of entries are freed one by one, for a good part of a second: nobody who serves waits for it.
    fn drop(&mut self) {
        // SAFETY: nothing uses the encoder after this.
        let encoder = unsafe { ManuallyDrop::take(&mut self.encoder) };
        // Where no thread can be had, it is freed here.
        let _ = std::thread::Builder::new().name("free-tokenizer".to_owned()).spawn(move || drop(encoder));
    }
}

impl Tokenizer {
    /// Reads the tokenizer of `source`.
    ///
    /// # Errors
    /// [`FormatError`] where there is none, or it is malformed.
    pub fn open(source: &TokenizerSource) -> Result<Self, FormatError> {
        match source {
            TokenizerSource::Gguf(path) => gguf::open(path),
            TokenizerSource::Folder(folder) => folder::open(folder),
        }
    }

    /// The ids of `text`. Texts of special tokens become these tokens.
    ///
    /// # Errors
    /// [`EncodeError`] for a text that is too long, or that the vocabulary cannot express.
    pub fn encode(&self, text: &str, special: SpecialTokens) -> Result<Vec<u32>, EncodeError> {
        if text.len() > TEXT_BYTES_MAX {
            return Err(EncodeError::TooLong { bytes: text.len() });
        }
        // The regex engine of the pre-tokenizers panics where a search fails.
        let outcome = catch_unwind(AssertUnwindSafe(|| self.encode_within(text, special)));
        match outcome {
            Ok(ids) => ids,
            Err(_) => Err(EncodeError::Failed { what: "its regular expression gave up".to_owned() }),
        }
    }

    fn encode_within(&self, text: &str, special: SpecialTokens) -> Result<Vec<u32>, EncodeError> {
        let add = special == SpecialTokens::Add;
        let failed = |error: tokenizers::Error| EncodeError::Failed { what: error.to_string() };
        let (encoding, affixes) = match &*self.encoder {
            Encoder::Whole(tokenizer) => {
                return Ok(tokenizer.encode_fast(text, add).map_err(failed)?.get_ids().to_vec());
            }
            Encoder::Bpe(tokenizer, affixes) => (tokenizer.encode_fast(text, false), affixes),
            Encoder::Spm(tokenizer, affixes) => (tokenizer.encode_fast(text, false), affixes),
        };
        let encoding = encoding.map_err(failed)?;
        let affixes = if add { affixes.clone() } else { Affixes::default() };
        let ids = encoding.get_ids().iter().copied();
        Ok(affixes.before.into_iter().chain(ids).chain(affixes.after).collect())
    }

    /// The bytes that `token` stands for in an answer: none for a control token or one outside the vocabulary.
    pub fn bytes(&self, token: u32) -> &[u8] {
        self.pieces.bytes(token)
    }

    /// The token as a reader of log-probabilities sees it, control tokens by their names.
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

    /// The token that begins a text, where the model has one.
    pub fn bos(&self) -> Option<u32> {
        self.bos
    }

    /// Tokens in the vocabulary.
    pub fn vocabulary(&self) -> usize {
        self.pieces.len()
    }

    /// The model's chat template; a base model has none.
    pub fn template(&self) -> Option<&ChatTemplate> {
        self.template.as_ref()
    }
}

/// Ids of the control tokens whose text ends a turn.
fn ends_by_text<'a>(control: impl Iterator<Item = (u32, &'a str)>) -> impl Iterator<Item = u32> {
    control.filter(|(_, text)| END_TEXTS.contains(text)).map(|(id, _)| id)
}
