//! Turns the bytes of tokens into text that may be shown: whole characters only, and no part of a stop string.

/// Collects bytes and returns whole characters.
#[derive(Debug, Default, Clone)]
pub struct Utf8Stream {
    /// At most three bytes of an incomplete character.
    pending: Vec<u8>,
}

impl Utf8Stream {
    /// Returns the characters that `bytes` complete. A sequence that can never become a character becomes U+FFFD.
    pub fn push(&mut self, bytes: &[u8]) -> String {
        self.pending.extend_from_slice(bytes);
        let mut text = String::new();
        loop {
            match std::str::from_utf8(&self.pending) {
                Ok(valid) => {
                    text.push_str(valid);
                    self.pending.clear();
                    return text;
                }
                Err(error) => {
                    let valid = error.valid_up_to();
                    text.push_str(&String::from_utf8_lossy(&self.pending[..valid]));
                    let Some(bad) = error.error_len() else {
                        self.pending.drain(..valid);
                        return text;
                    };
                    text.push(char::REPLACEMENT_CHARACTER);
                    self.pending.drain(..valid + bad);
                }
            }
        }
    }

    /// Ends the stream. Returns U+FFFD if the last character is incomplete, else nothing.
    pub fn finish(&mut self) -> String {
        let cut_off = !std::mem::take(&mut self.pending).is_empty();
        if cut_off { char::REPLACEMENT_CHARACTER.to_string() } else { String::new() }
    }
}

/// Holds text back while it may become a stop string.
#[derive(Debug, Clone, Default)]
pub struct StopStream {
    stops: Vec<String>,
    held: String,
}

/// The result of a pushed piece of text.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Stopped {
    /// No stop string was found; this text may be shown.
    Not(String),
    /// A stop string was found; the text before it may be shown.
    Here(String),
}

impl StopStream {
    /// Creates a stream that ends at the first of `stops`. Empty strings are ignored.
    pub fn new(stops: &[String]) -> Self {
        Self { stops: stops.iter().filter(|stop| !stop.is_empty()).cloned().collect(), held: String::new() }
    }

    /// Adds `text`, and returns the text that can no longer be part of a stop string.
    pub fn push(&mut self, text: &str) -> Stopped {
        self.held.push_str(text);
        let first = self.stops.iter().filter_map(|stop| self.held.find(stop.as_str())).min();
        if let Some(at) = first {
            self.held.truncate(at);
            return Stopped::Here(std::mem::take(&mut self.held));
        }
        let keep = self.stops.iter().map(|stop| overlap(&self.held, stop)).max().unwrap_or(0);
        let shown = self.held.len() - keep;
        Stopped::Not(self.held.drain(..shown).collect())
    }

    /// Ends the stream, and returns the text that was held back.
    pub fn finish(&mut self) -> String {
        std::mem::take(&mut self.held)
    }
}

/// Bytes of the longest suffix of `text` that is a prefix of `stop`.
fn overlap(text: &str, stop: &str) -> usize {
    let longest = stop.len().min(text.len());
    (1..=longest)
        .rev()
        .filter(|&length| text.is_char_boundary(text.len() - length))
        .find(|&length| stop.starts_with(&text[text.len() - length..]))
        .unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn streamed(stops: &[String], pieces: &[String]) -> (String, bool) {
        let mut stream = StopStream::new(stops);
        let mut out = String::new();
        for piece in pieces {
            match stream.push(piece) {
                Stopped::Not(text) => out.push_str(&text),
                Stopped::Here(text) => return (out + &text, true),
            }
        }
        (out + &stream.finish(), false)
    }

    #[test]
    fn a_stop_string_over_several_pieces_is_never_shown() {
        let stops = ["</end>".to_owned()];
        let pieces = ["a <", "/", "en", "d", "> b"].map(str::to_owned);
        assert_eq!(streamed(&stops, &pieces), ("a ".to_owned(), true));
        let harmless = ["a </en", "try>"].map(str::to_owned);
        assert_eq!(streamed(&stops, &harmless), ("a </entry>".to_owned(), false));
    }

    proptest! {
        #[test]
        fn cut_points_do_not_matter(
            text in "[abé]{0,30}",
            stops in prop::collection::vec("[abé]{1,4}", 0..3),
            cuts in prop::collection::vec(0_usize..40, 0..8),
        ) {
            let mut cuts: Vec<usize> = cuts.into_iter().filter(|&at| text.is_char_boundary(at.min(text.len()))).map(|at| at.min(text.len())).collect();
            cuts.extend([0, text.len()]);
            cuts.sort_unstable();
            let pieces: Vec<String> = cuts.windows(2).map(|pair| text[pair[0]..pair[1]].to_owned()).collect();
            let expected = stops.iter().filter_map(|stop| text.find(stop.as_str())).min();
            // The earliest stop string wins unless a later one is complete first. Longer pieces may decide this, so the
            // expected result is compared with single characters.
            let chars: Vec<String> = text.chars().map(String::from).collect();
            let (shown, stopped) = streamed(&stops, &chars);
            prop_assert_eq!(stopped, expected.is_some());
            prop_assert!(text.starts_with(&shown));
            prop_assert!(stops.iter().all(|stop| !shown.contains(stop.as_str())));
            let (whole, whole_stopped) = streamed(&stops, &pieces);
            prop_assert_eq!(whole_stopped, stopped);
            prop_assert!(text.starts_with(&whole));
        }

        #[test]
        fn bytes_become_the_same_text_however_they_are_cut(text in "\\PC{0,20}", cut in 0_usize..80) {
            let bytes = text.as_bytes();
            let cut = cut.min(bytes.len());
            let mut stream = Utf8Stream::default();
            let mut out = stream.push(&bytes[..cut]);
            prop_assert!(!out.contains(char::REPLACEMENT_CHARACTER) || text.contains(char::REPLACEMENT_CHARACTER));
            out += &stream.push(&bytes[cut..]);
            out += &stream.finish();
            prop_assert_eq!(out, text);
        }
    }

    #[test]
    fn invalid_bytes_are_replaced() {
        let mut stream = Utf8Stream::default();
        assert_eq!(stream.push(&[b'a', 0xff, b'b', 0xe2]), "a\u{fffd}b");
        assert_eq!(stream.finish(), "\u{fffd}");
    }
}
