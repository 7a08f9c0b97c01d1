//! Drafts by prompt lookup: the tokens that followed the latest tokens where these occurred before (Saxena 2023,
//! "Prompt Lookup Decoding"). Answers that quote, summarise or edit their prompt repeat much of it.
//!
//! Each sequence adapts: drafts grow while they are accepted, shrink when they are rejected, and pause after
//! rejections, so that text without repetition costs little.

/// Tokens that must have occurred before.
const MATCH_MIN: usize = 3;
/// The longest match that is distinguished: of several matches, the longest is taken, and of equal ones the latest.
const MATCH_MAX: usize = 8;
/// Tokens that are searched. The bound keeps the search far shorter than a step.
const SEARCHED_MAX: usize = 16_384;
/// Tokens of a sequence's first draft.
const DRAFT_FIRST: usize = 3;
/// The most tokens of a draft.
const DRAFT_MAX: usize = 15;
/// The longest pause after rejected drafts, in drafts.
const PAUSE_MAX: u32 = 32;

/// The drafting of one sequence.
#[derive(Debug)]
pub(super) struct PromptLookup {
    /// Tokens of the next draft.
    length: usize,
    /// Drafts that are skipped before the next one.
    pause: u32,
    /// The pause after the next rejected draft.
    next_pause: u32,
}

impl Default for PromptLookup {
    fn default() -> Self {
        Self { length: DRAFT_FIRST, pause: 0, next_pause: 1 }
    }
}

impl PromptLookup {
    /// Drafts at most `most` tokens that may follow `tokens`.
    pub(super) fn draft(&mut self, tokens: &[u32], most: usize) -> Vec<u32> {
        if most == 0 {
            return Vec::new();
        }
        let Some(start) = continuation(tokens) else { return Vec::new() };
        if self.pause > 0 {
            self.pause -= 1;
            return Vec::new();
        }
        // A draft that reaches the end of the tokens goes on as if they repeated.
        (0..most.min(self.length)).map(|i| tokens[start + i % (tokens.len() - start)]).collect()
    }

    /// Adapts to the fate of a draft.
    pub(super) fn learn(&mut self, drafted: usize, accepted: usize) {
        if accepted > 0 {
            self.next_pause = 1;
        } else {
            self.pause = self.next_pause;
            self.next_pause = (self.next_pause * 2).min(PAUSE_MAX);
        }
        self.length = if accepted == drafted { (self.length * 2).min(DRAFT_MAX) } else { accepted.max(DRAFT_FIRST) };
    }
}

/// The place after the best earlier occurrence of the last tokens.
fn continuation(tokens: &[u32]) -> Option<usize> {
    let floor = tokens.len().saturating_sub(SEARCHED_MAX);
    let mut best: Option<(usize, usize)> = None;
    for end in (floor + MATCH_MIN..tokens.len()).rev() {
        let pairs = tokens[floor..end].iter().rev().zip(tokens.iter().rev());
        let length = pairs.take(MATCH_MAX).take_while(|(earlier, last)| earlier == last).count();
        if length >= MATCH_MIN && best.is_none_or(|(longest, _)| length > longest) {
            best = Some((length, end));
            if length == MATCH_MAX {
                break;
            }
        }
    }
    best.map(|(_, end)| end)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_longest_and_then_the_latest_match_is_continued() {
        let draft = |tokens: &[u32]| PromptLookup::default().draft(tokens, 2);
        assert_eq!(draft(&[1, 2, 3, 10, 11, 1, 2, 3, 20, 21, 1, 2, 3]), [20, 21], "the latest");
        assert_eq!(draft(&[9, 1, 2, 3, 10, 11, 8, 1, 2, 3, 20, 21, 9, 1, 2, 3]), [10, 11], "the longest");
        assert_eq!(draft(&[7, 2, 3, 10, 11, 1, 2, 3]), [0; 0], "two tokens are no match");
        assert_eq!(draft(&[5, 6, 5, 6, 5, 6, 5]), [6, 5], "a period goes on");
        assert_eq!(draft(&[]), [0; 0]);
    }

    #[test]
    fn accepted_drafts_grow_and_rejected_ones_pause() {
        let tokens = [4; 64];
        let mut lookup = PromptLookup::default();
        let mut lengths = Vec::new();
        for _ in 0..4 {
            let draft = lookup.draft(&tokens, 100);
            lengths.push(draft.len());
            lookup.learn(draft.len(), draft.len());
        }
        assert_eq!(lengths, [3, 6, 12, 15]);
        let mut pauses = Vec::new();
        for _ in 0..8 {
            let skipped = (0..).take_while(|_| lookup.draft(&tokens, 100).is_empty()).count();
            pauses.push(skipped);
            lookup.learn(3, 0);
        }
        assert_eq!(pauses, [0, 1, 2, 4, 8, 16, 32, 32]);
        lookup.learn(3, 1);
        lookup.learn(3, 0);
        assert_eq!((0..).take_while(|_| lookup.draft(&tokens, 100).is_empty()).count(), 1);
    }
}
