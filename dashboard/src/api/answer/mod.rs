//! Parses an answer while it streams: reasoning, words, and calls of tools.
//!
//! ```text
//! text ─► harmony (channels: analysis, commentary, final) ─────────► Delta
//!     └─► reasoning (<think>…</think>) ─► tool_calls (<tool_call>…) ─┘
//! ```
//! A model's output format is recognised by its first marker. Text is held back only
//! while it may begin a marker, belongs to a call, or is whitespace that may precede one.

mod harmony;
mod reasoning;
mod tool_calls;

use harmony::Harmony;
use reasoning::{SplitText, Splitter};
use serde_json::Value;
pub use tool_calls::Call;
use tool_calls::{CallStream, ToolTypes};

/// A part of an answer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Delta {
    /// Text of the model's reasoning.
    Thought(String),
    /// Text for the user.
    Words(String),
    /// A whole call.
    Call(Call),
}

/// Whether an answer begins within a thought: its prompt ends with the opening tag.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Beginning {
    InThought,
    Plain,
}

/// Parses one answer.
#[derive(Debug)]
pub struct AnswerParser {
    format: Format,
    tools: Option<ToolTypes>,
    /// Whether only harmony is parsed: every other answer is words, unchanged.
    leaves_text: bool,
}

#[derive(Debug)]
enum Format {
    /// Before any text but whitespace, which is held.
    Unknown(String),
    Plain {
        thoughts: Splitter,
        calls: Option<CallStream>,
    },
    Harmony(Harmony),
    /// All text is words.
    Text,
}

impl AnswerParser {
    /// A parser for an answer to a request with these tools. Without tools, calls are words.
    pub(super) fn new(tools: &[Value], beginning: Beginning) -> Self {
        let tools = Some(tools).filter(|tools| !tools.is_empty()).map(ToolTypes::of);
        let mut parser = Self { format: Format::Unknown(String::new()), tools, leaves_text: false };
        if beginning == Beginning::InThought {
            parser.format = parser.plain(Splitter::within_thought());
        }
        parser
    }

    /// A parser for people's eyes: it tells harmony's channels apart, whose markers nobody wants to read, and leaves
    /// all other answers as they are.
    pub fn of_channels() -> Self {
        Self { format: Format::Unknown(String::new()), tools: None, leaves_text: true }
    }

    fn plain(&self, thoughts: Splitter) -> Format {
        if self.leaves_text {
            return Format::Text;
        }
        Format::Plain { thoughts, calls: self.tools.clone().map(CallStream::new) }
    }

    /// Adds the next text. Returns what can be told now.
    pub fn push(&mut self, text: &str) -> Vec<Delta> {
        let Format::Unknown(held) = &mut self.format else { return self.parse(text) };
        held.push_str(text);
        let begun = held.trim_start();
        if !Harmony::begins(begun) && Harmony::may_begin(begun) {
            return Vec::new();
        }
        let is_harmony = Harmony::begins(begun);
        let held = std::mem::take(held);
        self.format = match is_harmony {
            true => Format::Harmony(Harmony::new(self.tools.is_some())),
            false => self.plain(Splitter::default()),
        };
        self.parse(&held)
    }

    fn parse(&mut self, text: &str) -> Vec<Delta> {
        match &mut self.format {
            Format::Unknown(_) => Vec::new(),
            Format::Text => vec![Delta::Words(text.to_owned())],
            Format::Harmony(harmony) => harmony.push(text),
            Format::Plain { thoughts, calls } => deltas(thoughts.push(text), calls.as_mut()),
        }
    }

    /// Ends the answer. Returns what was held back.
    pub fn finish(&mut self) -> Vec<Delta> {
        match &mut self.format {
            Format::Unknown(held) => {
                Some(std::mem::take(held)).filter(|held| !held.is_empty()).map(Delta::Words).into_iter().collect()
            }
            Format::Text => Vec::new(),
            Format::Harmony(harmony) => harmony.finish(),
            Format::Plain { thoughts, calls } => {
                let mut rest = deltas(thoughts.finish(), calls.as_mut());
                rest.extend(calls.iter_mut().flat_map(CallStream::finish));
                rest
            }
        }
    }
}

/// The deltas of a thought, and of words, in which calls are looked for. Empty texts give none.
fn deltas(parts: SplitText, calls: Option<&mut CallStream>) -> Vec<Delta> {
    let mut deltas = Vec::new();
    if !parts.thought.is_empty() {
        deltas.push(Delta::Thought(parts.thought));
    }
    match calls {
        _ if parts.words.is_empty() => {}
        Some(calls) => deltas.extend(calls.push(&parts.words)),
        None => deltas.push(Delta::Words(parts.words)),
    }
    deltas
}

/// The number of bytes at the end of `text` that may be the beginning of one of `markers`.
fn held_back(text: &str, markers: &[&str]) -> usize {
    let longest = markers.iter().map(|marker| marker.len() - 1).max().unwrap_or(0).min(text.len());
    let may_begin = |length: &usize| {
        text.is_char_boundary(text.len() - length)
            && markers.iter().any(|marker| marker.starts_with(&text[text.len() - length..]))
    };
    (1..=longest).rev().find(may_begin).unwrap_or(0)
}

#[cfg(test)]
mod tests;
