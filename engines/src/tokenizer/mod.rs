//! Converts text to tokens, and tokens to text.
//!
//! ```text
//! text ─► special tokens cut out ─► normalised ─► BPE │ SentencePiece ─► ids
//! id   ─► its bytes (pieces) ─► Utf8Stream ─► StopStream ─► text that may be shown
//! ```
//! The `tokenizers` crate encodes, with tokenizer.json or the vocabulary of a GGUF file. Decoding uses each token's own
//! bytes, so that a stream never delays or changes the text that it has shown.

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

/// Bytes of the longest text that is encoded at once: slightly more than a million tokens.
pub const TEXT_BYTES_MAX: usize = 8 << 20;

/// The texts of tokens that end a turn in every family (llama.cpp's list of end-of-generation tokens).
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
    /// From tokenizer.json, whose post-processor adds the special tokens.
    Whole(Box<tokenizers::Tokenizer>),
    /// From GGUF: byte-level BPE.
    Bpe(Box<tokenizers::Tokenizer>, Affixes),
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
            Encoder::Bpe(tokenizer, affixes) => (tokenizer.encode_fast(text, false), affixes),
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

    /// The model's chat template; a base model has none.
    pub fn template(&self) -> Option<&ChatTemplate> {
        self.template.as_ref()
    }
}

/// Ids of the control tokens whose texts end a turn.
fn ends_by_text<'a>(control: impl Iterator<Item = (u32, &'a str)>) -> impl Iterator<Item = u32> {
    control.filter(|(_, text)| END_TEXTS.contains(text)).map(|(id, _)| id)
}
