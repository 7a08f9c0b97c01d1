//! Splits the reasoning off an answer: the text between `<think>` and `</think>`, or `[THINK]` and `[/THINK]`, at the
//! answer's start.

use super::held_back;

/// Opening and closing tags; Mistral has its own.
const TAGS: [(&str, &str); 2] = [("<think>", "</think>"), ("[THINK]", "[/THINK]")];

/// Splits a streamed answer into reasoning (`thought`) and content (`words`).
#[derive(Debug, Default)]
pub(super) struct Splitter {
    section: Section,
    /// The tags of this answer: an index into [`TAGS`].
    tags: usize,
    /// Text held back: it may be the start of a tag.
    held: String,
}

#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
enum Section {
    /// Before any text but whitespace.
    #[default]
    Start,
    /// Line breaks after the opening tag.
    Opened,
    Thought,
    /// Line breaks between the thought and the words.
    Gap,
    Words,
}

/// The reasoning and the content of an answer, or of a piece.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct SplitText {
    pub(super) thought: String,
    pub(super) words: String,
}

impl Splitter {
    /// A splitter for an answer whose prompt ends with the opening tag.
    pub(super) fn within_thought() -> Self {
        Self { section: Section::Opened, ..Self::default() }
    }

    /// Adds the next piece. Returns the text that can be classified now.
    pub(super) fn push(&mut self, text: &str) -> SplitText {
        self.held.push_str(text);
        let mut parts = SplitText::default();
        loop {
            match self.section {
                Section::Start => {
                    let rest = self.held.trim_start();
                    if let Some(tags) = TAGS.iter().position(|(open, _)| rest.starts_with(open)) {
                        self.held = rest[TAGS[tags].0.len()..].to_owned();
                        (self.section, self.tags) = (Section::Opened, tags);
                    } else if TAGS.iter().any(|(open, _)| open.starts_with(rest)) {
                        return parts;
                    } else {
                        self.section = Section::Words;
                    }
                }
                Section::Thought => match self.held.find(TAGS[self.tags].1) {
                    Some(at) => {
                        parts.thought.push_str(self.held[..at].trim_end_matches('\n'));
                        self.held.drain(..at + TAGS[self.tags].1.len());
                        self.section = Section::Gap;
                    }
                    None => {
                        let keep = kept_back(&self.held, TAGS[self.tags].1);
                        parts.thought.extend(self.held.drain(..self.held.len() - keep));
                        return parts;
                    }
                },
                Section::Opened | Section::Gap => {
                    self.held = self.held.trim_start_matches('\n').to_owned();
                    if self.held.is_empty() {
                        return parts;
                    }
                    self.section = if self.section == Section::Opened { Section::Thought } else { Section::Words };
                }
                Section::Words => {
                    parts.words.push_str(&std::mem::take(&mut self.held));
                    return parts;
                }
            }
        }
    }

    /// Returns the text that was held back, at the answer's end.
    pub(super) fn finish(&mut self) -> SplitText {
        let held = std::mem::take(&mut self.held);
        match self.section {
            Section::Opened | Section::Thought => SplitText { thought: held, words: String::new() },
            _ => SplitText { thought: String::new(), words: held },
        }
    }
}

/// The number of bytes at the end of `text` to hold back: line breaks, and the start of the closing tag.
fn kept_back(text: &str, close: &str) -> usize {
    let tag = held_back(text, &[close]);
    let before = &text[..text.len() - tag];
    tag + before.len() - before.trim_end_matches('\n').len()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The parts of `text`, pushed in pieces of `piece` characters.
    fn split(text: &str, piece: usize, mut splitter: Splitter) -> SplitText {
        let mut all = SplitText::default();
        let chars: Vec<char> = text.chars().collect();
        let pieces = chars.chunks(piece).map(|piece| piece.iter().collect::<String>());
        for part in pieces.map(|piece| splitter.push(&piece)).collect::<Vec<_>>().into_iter().chain([splitter.finish()])
        {
            all.thought.push_str(&part.thought);
            all.words.push_str(&part.words);
        }
        all
    }

    fn parts(thought: &str, words: &str) -> SplitText {
        SplitText { thought: thought.to_owned(), words: words.to_owned() }
    }

    #[test]
    fn thoughts_are_split_off_for_any_piece_length() {
        let cases = [
            ("<think>\nhm, é\n</think>\n\nYes <b>", parts("hm, é", "Yes <b>")),
            ("Plain words", parts("", "Plain words")),
            ("[THINK]hm[/THINK]Yes", parts("hm", "Yes")),
            ("[THIN air", parts("", "[THIN air")),
            ("\n<think>only</think>", parts("only", "")),
            ("Words with <think> inside</think>", parts("", "Words with <think> inside</think>")),
            ("<think>cut off </thin", parts("cut off </thin", "")),
            ("<thin", parts("", "<thin")),
            ("", parts("", "")),
        ];
        for (text, expected) in cases {
            for piece in [1, 2, 3, 7, 100] {
                assert_eq!(split(text, piece, Splitter::default()), expected, "{text:?} by {piece}");
            }
        }
        assert_eq!(split("a\n\nb</think>c", 1, Splitter::within_thought()), parts("a\n\nb", "c"));
    }
}
