//! Sequences that are over, and whose pages stay: a prompt that begins as one of them did is computed from where they
//! part.

use exo_engines::engine::{PAGE_TOKENS, SeqId};
use std::collections::VecDeque;

/// Sequences that are kept at most: each is compared with every prompt that is taken up.
const CACHED_SEQUENCES_MAX: usize = 64;
/// Shorter beginnings are computed sooner than they are found.
pub(super) const PREFIX_TOKENS_MIN: usize = PAGE_TOKENS as usize;

/// Kept sequences, the one that was used longest ago first.
#[derive(Debug, Default)]
pub(super) struct PrefixCache {
    entries: VecDeque<CachedSequence>,
}

#[derive(Debug)]
struct CachedSequence {
    seq: SeqId,
    /// As many as are in the caches.
    tokens: Vec<u32>,
}

/// Tokens that two sequences have in common from the start.
pub(super) fn common_tokens(a: &[u32], b: &[u32]) -> usize {
    // Whole pages at a time: equal slices are compared much faster than single tokens.
    let pages = a.chunks_exact(PREFIX_TOKENS_MIN).zip(b.chunks_exact(PREFIX_TOKENS_MIN));
    let start = pages.take_while(|(a, b)| a == b).count() * PREFIX_TOKENS_MIN;
    start + a[start..].iter().zip(&b[start..]).take_while(|(a, b)| a == b).count()
}

impl PrefixCache {
    /// Keeps a sequence. Gives those that need not be kept (any more): the others that it goes on from, the oldest
    /// where there are too many, and itself where it is short or another goes on from it.
    #[must_use]
    pub(super) fn insert(&mut self, seq: SeqId, tokens: Vec<u32>) -> Vec<SeqId> {
        let is_known = self.entries.iter().any(|entry| entry.tokens.starts_with(&tokens));
        if tokens.len() < PREFIX_TOKENS_MIN || is_known {
            return vec![seq];
        }
        let mut over: Vec<SeqId> = Vec::new();
        self.entries.retain(|entry| {
            let stays = !tokens.starts_with(&entry.tokens);
            if !stays {
                over.push(entry.seq);
            }
            stays
        });
        self.entries.push_back(CachedSequence { seq, tokens });
        if self.entries.len() > CACHED_SEQUENCES_MAX {
            over.extend(self.evict(None));
        }
        over
    }

    /// The sequence that has most of the beginning of `tokens`, and how much of it.
    pub(super) fn best(&self, tokens: &[u32]) -> Option<(SeqId, usize)> {
        let found = self.entries.iter().map(|entry| (entry.seq, common_tokens(&entry.tokens, tokens)));
        found.max_by_key(|&(_, common)| common).filter(|&(_, common)| common > 0)
    }

    /// `seq` was of use now.
    pub(super) fn touch(&mut self, seq: SeqId) {
        if let Some(at) = self.entries.iter().position(|entry| entry.seq == seq) {
            let entry = self.entries.remove(at);
            self.entries.extend(entry);
        }
    }

    /// Lets go of the sequence that was of use longest ago, but not of `except`.
    #[must_use]
    pub(super) fn evict(&mut self, except: Option<SeqId>) -> Option<SeqId> {
        let at = self.entries.iter().position(|entry| Some(entry.seq) != except)?;
        self.entries.remove(at).map(|entry| entry.seq)
    }

    pub(super) fn sequences(&self) -> impl Iterator<Item = SeqId> {
        self.entries.iter().map(|entry| entry.seq)
    }

    pub(super) fn clear(&mut self) {
        self.entries.clear();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tokens(length: u32, last: u32) -> Vec<u32> {
        (0..length).chain([last]).collect()
    }

    #[test]
    fn the_longest_beginning_is_found() {
        let mut cache = PrefixCache::default();
        assert!(cache.insert(SeqId(1), tokens(40, 7)).is_empty());
        assert!(cache.insert(SeqId(2), tokens(90, 7)).is_empty());
        assert_eq!(cache.best(&tokens(60, 1)), Some((SeqId(2), 60)));
        assert_eq!(cache.best(&[5, 6]), None);
    }

    #[test]
    fn what_another_goes_on_from_is_let_go() {
        let mut cache = PrefixCache::default();
        assert_eq!(cache.insert(SeqId(1), tokens(10, 7)), [SeqId(1)], "too short");
        assert!(cache.insert(SeqId(2), (0..40).collect()).is_empty());
        assert_eq!(cache.insert(SeqId(3), (0..80).collect()), [SeqId(2)]);
        assert_eq!(cache.insert(SeqId(4), (0..50).collect()), [SeqId(4)], "the third has it");
    }

    #[test]
    fn the_longest_unused_goes_first() {
        let mut cache = PrefixCache::default();
        for seq in 1..=CACHED_SEQUENCES_MAX as u64 {
            assert!(cache.insert(SeqId(seq), tokens(40, 1000 + seq as u32)).is_empty());
        }
        cache.touch(SeqId(1));
        assert_eq!(cache.insert(SeqId(999), tokens(40, 5000)), [SeqId(2)]);
        assert_eq!(cache.evict(Some(SeqId(3))), Some(SeqId(4)));
    }

    #[test]
    fn common_tokens_are_counted_to_the_token() {
        let a: Vec<u32> = (0..100).collect();
        for length in [0, 1, 31, 32, 33, 64, 99, 100] {
            let mut b = a[..length].to_vec();
            assert_eq!(common_tokens(&a, &b), length);
            b.push(u32::MAX);
            assert_eq!(common_tokens(&a, &b), length);
        }
    }
}
