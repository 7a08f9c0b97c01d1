//! The bytes of each token.

use super::string_table::StringTable;
use std::collections::BTreeMap;

/// A vocabulary's spelling of bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Spelling {
    /// GPT-2's: every byte is spelt as a printable character.
    ByteLevel,
    /// SentencePiece's: `▁` is a space, `<0x0A>` a byte.
    SentencePiece,
}

/// Control tokens that structure an answer: its thoughts, calls and channels. They are shown, so that the answer can be
/// parsed.
const MARKERS: [&str; 17] = [
    "<think>",
    "</think>",
    "[THINK]",
    "[/THINK]",
    "<tool_call>",
    "</tool_call>",
    "<|tool_call|>",
    "<|/tool_call|>",
    "<|python_tag|>",
    "[TOOL_CALLS]",
    "[ARGS]",
    "<|start|>",
    "<|channel|>",
    "<|constrain|>",
    "<|message|>",
    "<|end|>",
    "<|call|>",
];

/// The kind of a token, which decides its bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    Normal,
    /// The token's bytes are its text, unchanged.
    Verbatim,
    /// The token has no bytes, and is never shown.
    Control,
}

impl Kind {
    /// The kind of a control token. A token that ends answers is never shown.
    pub(super) fn of_control(text: &str, is_end: bool) -> Self {
        if MARKERS.contains(&text) && !is_end { Self::Verbatim } else { Self::Control }
    }
}

/// Bytes and names of tokens, by id.
#[derive(Debug)]
pub(super) struct Pieces {
    bytes: StringTable,
    /// Texts of control tokens, which have no bytes.
    controls: BTreeMap<u32, Box<str>>,
}

impl Pieces {
    /// Builds the pieces from (id, text, kind), in the order of ids. An id that is missing has no bytes.
    pub(super) fn new<'a>(spelling: Spelling, tokens: impl Iterator<Item = (u32, &'a str, Kind)>) -> Self {
        let alphabet = byte_level_alphabet();
        let mut bytes = StringTable::default();
        let mut controls = BTreeMap::new();
        for (id, text, kind) in tokens {
            while bytes.len() < id as usize {
                bytes.push(b"");
            }
            match kind {
                Kind::Control => {
                    controls.insert(id, text.into());
                    bytes.push(b"");
                }
                Kind::Verbatim => bytes.push(text.as_bytes()),
                Kind::Normal => bytes.push(&match spelling {
                    Spelling::ByteLevel => byte_level(text, &alphabet),
                    Spelling::SentencePiece => sentence_piece(text),
                }),
            }
        }
        Self { bytes, controls }
    }

    pub(super) fn bytes(&self, id: u32) -> &[u8] {
        self.bytes.get(id as usize)
    }

    pub(super) fn name(&self, id: u32) -> String {
        match self.controls.get(&id) {
            Some(text) => text.to_string(),
            None => String::from_utf8_lossy(self.bytes(id)).into_owned(),
        }
    }

    /// The id of the control token with this name. The shown [`MARKERS`] are not found.
    pub(super) fn control(&self, name: &str) -> Option<u32> {
        self.controls.iter().find(|(_, text)| text.as_ref() == name).map(|(&id, _)| id)
    }

    pub(super) fn len(&self) -> usize {
        self.bytes.len()
    }
}

/// The byte of each character of GPT-2's alphabet (`bytes_to_unicode` of openai/gpt-2): printable Latin-1 bytes stand
/// for themselves, the other 68 bytes are the characters from U+0100 on.
pub(super) fn byte_level_alphabet() -> BTreeMap<char, u8> {
    let printable = |byte: u8| matches!(byte, b'!'..=b'~' | 0xa1..=0xac | 0xae..=0xff);
    let mut others = 0x100_u32..;
    (0..=u8::MAX)
        .filter_map(|byte| {
            let code = if printable(byte) { u32::from(byte) } else { others.next()? };
            Some((char::from_u32(code)?, byte))
        })
        .collect()
}

fn byte_level(text: &str, alphabet: &BTreeMap<char, u8>) -> Vec<u8> {
    let bytes: Option<Vec<u8>> = text.chars().map(|c| alphabet.get(&c).copied()).collect();
    // A token with a character outside the alphabet keeps its text.
    bytes.unwrap_or_else(|| text.as_bytes().to_vec())
}

fn sentence_piece(text: &str) -> Vec<u8> {
    match byte_token(text) {
        Some(byte) => vec![byte],
        None => text.replace('▁', " ").into_bytes(),
    }
}

/// The byte of a token such as `<0x0A>`.
pub(super) fn byte_token(text: &str) -> Option<u8> {
    let digits = text.strip_prefix("<0x")?.strip_suffix('>')?;
    (digits.len() == 2).then(|| u8::from_str_radix(digits, 16).ok())?
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_of_both_spellings() {
        let tokens = [(0, "Ġhello", Kind::Normal), (1, "<s>", Kind::Control), (3, "Ã©Ċ", Kind::Normal)];
        let pieces = Pieces::new(Spelling::ByteLevel, tokens.into_iter());
        assert_eq!(pieces.bytes(0), b" hello");
        assert_eq!(pieces.bytes(1), b"");
        assert_eq!(pieces.name(1), "<s>");
        assert_eq!(pieces.bytes(2), b"");
        assert_eq!(pieces.bytes(3), "é\n".as_bytes());
        let tokens = [(0, "▁a", Kind::Normal), (1, "<0xE2>", Kind::Normal), (2, "  ", Kind::Verbatim)];
        let pieces = Pieces::new(Spelling::SentencePiece, tokens.into_iter());
        assert_eq!(pieces.bytes(0), b" a");
        assert_eq!(pieces.bytes(1), [0xe2]);
        assert_eq!(pieces.bytes(2), b"  ");
        assert_eq!(byte_level_alphabet().len(), 256);
    }
}
