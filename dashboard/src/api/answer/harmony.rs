//! OpenAI's harmony format, which gpt-oss answers in.
//!
//! ```text
//! <|start|>assistant<|channel|>analysis<|message|>…<|end|>
//! <|start|>assistant<|channel|>commentary to=functions.NAME <|constrain|>json<|message|>{…}<|call|>
//! <|start|>assistant<|channel|>final<|message|>…<|return|>
//! ```
//! The prompt ends with `<|start|>assistant`, and tokens that end the turn have no text. Source: the format's guide in
//! the repository openai/harmony.

use super::tool_calls::{Call, is_object};
use super::{Delta, held_back};

const START: &str = "<|start|>";
const CHANNEL: &str = "<|channel|>";
const CONSTRAIN: &str = "<|constrain|>";
/// The most bytes of a header. What is longer is text.
const HEADER_BYTES_MAX: usize = 512;
const MESSAGE: &str = "<|message|>";
/// What ends the text of a message. The last two are seen only where a vocabulary does not end the answer with them.
const ENDS: [&str; 5] = ["<|end|>", START, CHANNEL, "<|return|>", "<|call|>"];

/// Parses an answer in harmony.
#[derive(Debug)]
pub(super) struct Harmony {
    has_tools: bool,
    part: Part,
    /// Whether a message has begun: until then, the answer may be a text that only looks like harmony.
    has_message: bool,
    /// Text that is not parsed yet.
    held: String,
}

#[derive(Debug)]
enum Part {
    /// The author, channel and recipient of a message.
    Header,
    Analysis,
    /// Text for the user: the final answer, and what the model says before a call.
    Words,
    Call {
        name: String,
        arguments: String,
    },
    /// No harmony after all.
    Text,
}

impl Harmony {
    pub(super) fn new(has_tools: bool) -> Self {
        Self { has_tools, part: Part::Header, has_message: false, held: String::new() }
    }

    /// Whether an answer that begins with `text` is in harmony.
    pub(super) fn begins(text: &str) -> bool {
        text.starts_with(CHANNEL) || text.starts_with(START)
    }

    /// Whether more text may show that the answer is in harmony.
    pub(super) fn may_begin(text: &str) -> bool {
        CHANNEL.starts_with(text) || START.starts_with(text)
    }

    pub(super) fn push(&mut self, text: &str) -> Vec<Delta> {
        self.held.push_str(text);
        let mut deltas = Vec::new();
        loop {
            if let Part::Header = self.part {
                let Some((header, rest)) = self.held.split_once(MESSAGE) else {
                    if self.held.len() <= HEADER_BYTES_MAX {
                        return deltas;
                    }
                    self.part = Part::Text;
                    continue;
                };
                (self.part, self.held) = (part(header), rest.to_owned());
                self.has_message = true;
                continue;
            }
            if let Part::Text = self.part {
                deltas.extend(self.take_all());
                return deltas;
            }
            let end = ENDS.iter().filter_map(|end| Some((self.held.find(end)?, *end))).min();
            let Some((at, end)) = end else {
                let shown = self.held.len() - held_back(&self.held, &ENDS);
                let text: String = self.held.drain(..shown).collect();
                deltas.extend(self.take(text));
                return deltas;
            };
            let text: String = self.held.drain(..at).collect();
            // A marker that begins the next header belongs to it.
            if end != START && end != CHANNEL {
                self.held.drain(..end.len());
            }
            deltas.extend(self.take(text));
            deltas.extend(self.end_message());
        }
    }

    pub(super) fn finish(&mut self) -> Vec<Delta> {
        let held = std::mem::take(&mut self.held);
        let mut deltas: Vec<Delta> = match self.part {
            // A header that was cut off is dropped. Before the first message it is text: the answer may only look like
            // harmony.
            Part::Header if self.has_message && (held.starts_with(START) || held.starts_with(CHANNEL)) => Vec::new(),
            Part::Header => Some(held).filter(|held| !held.is_empty()).map(Delta::Words).into_iter().collect(),
            _ => self.take(held).into_iter().collect(),
        };
        deltas.extend(self.end_message());
        deltas
    }

    fn take_all(&mut self) -> Option<Delta> {
        let text = std::mem::take(&mut self.held);
        self.take(text)
    }

    /// Takes text of the current message.
    fn take(&mut self, text: String) -> Option<Delta> {
        if text.is_empty() {
            return None;
        }
        match &mut self.part {
            Part::Analysis => Some(Delta::Thought(text)),
            Part::Words | Part::Text => Some(Delta::Words(text)),
            Part::Call { arguments, .. } => {
                arguments.push_str(&text);
                None
            }
            Part::Header => None,
        }
    }

    fn end_message(&mut self) -> Option<Delta> {
        match std::mem::replace(&mut self.part, Part::Header) {
            Part::Call { name, arguments } if self.has_tools && arguments.trim().is_empty() => {
                Some(Delta::Call(Call::new(name, "{}".to_owned())))
            }
            // A call is text if its arguments are no JSON object, or if the request has no tools.
            Part::Call { name, arguments } if self.has_tools && is_object(&arguments) => {
                Some(Delta::Call(Call::new(name, arguments.trim().to_owned())))
            }
            Part::Call { arguments, .. } if !arguments.is_empty() => Some(Delta::Words(arguments)),
            _ => None,
        }
    }
}

/// The part of an answer that a message with this header is.
fn part(header: &str) -> Part {
    let channel = header.split_once(CHANNEL).map_or("", |(_, channel)| channel);
    let channel = channel.split(CONSTRAIN).next().unwrap_or_default();
    let recipient = header.split(&[' ', '<'][..]).find_map(|word| word.strip_prefix("to="));
    match recipient.and_then(|recipient| recipient.strip_prefix("functions.")) {
        Some(name) => Part::Call { name: name.to_owned(), arguments: String::new() },
        None if channel.trim_start().starts_with("analysis") => Part::Analysis,
        None => Part::Words,
    }
}
