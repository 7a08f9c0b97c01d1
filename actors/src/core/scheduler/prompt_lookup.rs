//! Drafts by prompt lookup: the tokens that followed the latest tokens where these occurred before (Saxena 2023,
//! "Prompt Lookup Decoding"). Answers that quote, summarise or edit their prompt repeat much of it.

/// Tokens that must have occurred before.
const MATCH_MIN: usize = 3;
/// The longest match that is distinguished: of several matches, the longest is taken, and of equal ones the latest.
const MATCH_MAX: usize = 8;
/// Tokens that are searched. The bound keeps the search far shorter than a step.
const SEARCHED_MAX: usize = 16_384;

/// The place after the best earlier occurrence of the last tokens.
pub(super) fn continuation(tokens: &[u32]) -> Option<usize> {
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

/// The `count` tokens from `start` on. A draft that reaches the end of the tokens goes on as if they repeated.
pub(super) fn draft(tokens: &[u32], start: usize, count: usize) -> Vec<u32> {
    (0..count).map(|i| tokens[start + i % (tokens.len() - start)]).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_longest_and_then_the_latest_match_is_continued() {
        let draft = |tokens: &[u32]| continuation(tokens).map(|start| draft(tokens, start, 2)).unwrap_or_default();
        assert_eq!(draft(&[1, 2, 3, 10, 11, 1, 2, 3, 20, 21, 1, 2, 3]), [20, 21], "the latest");
        assert_eq!(draft(&[9, 1, 2, 3, 10, 11, 8, 1, 2, 3, 20, 21, 9, 1, 2, 3]), [10, 11], "the longest");
        assert_eq!(draft(&[7, 2, 3, 10, 11, 1, 2, 3]), [0; 0], "two tokens are no match");
        assert_eq!(draft(&[5, 6, 5, 6, 5, 6, 5]), [6, 5], "a period goes on");
        assert_eq!(draft(&[]), [0; 0]);
    }
}
