//! An answer on the terminal: gpt-oss's channels are told apart, and everything else is shown as it is.

use crate::api::{AnswerParser, Delta};
use std::io::{self, Write};

/// An answer that is printed while it is generated.
#[derive(Debug)]
pub(super) struct ShownAnswer {
    parser: AnswerParser,
    /// The text of the analysis channel.
    pub(super) thought: String,
    pub(super) words: String,
}

impl ShownAnswer {
    pub(super) fn new() -> Self {
        Self { parser: AnswerParser::of_channels(), thought: String::new(), words: String::new() }
    }

    /// Prints the next text.
    pub(super) fn push(&mut self, text: &str) -> io::Result<()> {
        let deltas = self.parser.push(text);
        self.show(deltas)
    }

    /// Prints what was held back.
    pub(super) fn finish(&mut self) -> io::Result<()> {
        let deltas = self.parser.finish();
        self.show(deltas)
    }

    fn show(&mut self, deltas: Vec<Delta>) -> io::Result<()> {
        if deltas.is_empty() {
            return Ok(());
        }
        let mut out = io::stdout().lock();
        for delta in deltas {
            match delta {
                Delta::Thought(text) => {
                    out.write_all(text.as_bytes())?;
                    self.thought.push_str(&text);
                }
                Delta::Words(text) => {
                    if self.words.is_empty() && !self.thought.is_empty() {
                        out.write_all(b"\n\n")?;
                    }
                    out.write_all(text.as_bytes())?;
                    self.words.push_str(&text);
                }
                // The terminal offers no tools, so that a call is words.
                Delta::Call(_) => {}
            }
        }
        out.flush()
    }
}
