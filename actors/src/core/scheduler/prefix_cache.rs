//! Finished sequences whose pages stay in the caches: a prompt that shares a prefix with one is computed only from
//! where the two diverge.

use exo_engines::engine::{PAGE_TOKENS, SeqId};
use std::collections::VecDeque;

/// The limit on cached sequences: each is compared with every prompt at admission.
const CACHED_SEQUENCES_MAX: usize = 64;
/// The shortest cached prefix: computing a shorter one is faster than finding it.
pub(super) const PREFIX_TOKENS_MIN: usize = PAGE_TOKENS as usize;

/// The cached sequences, least recently used first.
#[derive(Debug, Default)]
pub(super) struct PrefixCache {
    entries: VecDeque<CachedSequence>,
}

#[derive(Debug)]
struct CachedSequence {
    seq: SeqId,
    /// The sequence's tokens that are in the caches.
    tokens: Vec<u32>,
}

/// The length of the common prefix of two sequences, in tokens.
pub(super) fn common_tokens(a: &[u32], b: &[u32]) -> usize {
    // Whole pages are compared first: equal slices compare much faster than single tokens.
    let pages = a.chunks_exact(PREFIX_TOKENS_MIN).zip(b.chunks_exact(PREFIX_TOKENS_MIN));
    let start = pages.take_while(|(a, b)| a == b).count() * PREFIX_TOKENS_MIN;
    start + a[start..].iter().zip(&b[start..]).take_while(|(a, b)| a == b).count()
}

impl PrefixCache {
    /// Caches a sequence, and returns the sequences to release: cached ones that are prefixes of it, and the least
    /// recently used one if there are too many. If it is too short, or a prefix of a cached one, it is returned itself.
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

    /// The sequence that shares the longest prefix with `tokens`, and the length of that prefix in tokens.
    pub(super) fn best(&self, tokens: &[u32]) -> Option<(SeqId, usize)> {
        let found = self.entries.iter().map(|entry| (entry.seq, common_tokens(&entry.tokens, tokens)));
        found.max_by_key(|&(_, common)| common).filter(|&(_, common)| common > 0)
    }

    /// Marks `seq` as used most recently.
    pub(super) fn touch(&mut self, seq: SeqId) {
        if let Some(at) = self.entries.iter().position(|entry| entry.seq == seq) {
            let entry = self.entries.remove(at);
            self.entries.extend(entry);
        }
    }

    /// Removes and returns the least recently used sequence other than `except`.
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
    fn the_longest_prefix_is_found() {
        let mut cache = PrefixCache::default();
        assert!(cache.insert(SeqId(1), tokens(40, 7)).is_empty());
        assert!(cache.insert(SeqId(2), tokens(90, 7)).is_empty());
        assert_eq!(cache.best(&tokens(60, 1)), Some((SeqId(2), 60)));
        assert_eq!(cache.best(&[5, 6]), None);
    }

    #[test]
    fn prefixes_of_other_sequences_are_released() {
        let mut cache = PrefixCache::default();
        assert_eq!(cache.insert(SeqId(1), tokens(10, 7)), [SeqId(1)], "too short");
        assert!(cache.insert(SeqId(2), (0..40).collect()).is_empty());
        assert_eq!(cache.insert(SeqId(3), (0..80).collect()), [SeqId(2)]);
        assert_eq!(cache.insert(SeqId(4), (0..50).collect()), [SeqId(4)], "the third sequence contains it");
    }

    #[test]
    fn the_least_recently_used_is_evicted_first() {
        let mut cache = PrefixCache::default();
        for seq in 1..=CACHED_SEQUENCES_MAX as u64 {
            assert!(cache.insert(SeqId(seq), tokens(40, 1000 + seq as u32)).is_empty());
        }
        cache.touch(SeqId(1));
        assert_eq!(cache.insert(SeqId(999), tokens(40, 5000)), [SeqId(2)]);
        assert_eq!(cache.evict(Some(SeqId(3))), Some(SeqId(4)));
    }

    #[test]
    fn common_tokens_are_counted_exactly() {
        let a: Vec<u32> = (0..100).collect();
        for length in [0, 1, 31, 32, 33, 64, 99, 100] {
            let mut b = a[..length].to_vec();
            assert_eq!(common_tokens(&a, &b), length);
            b.push(u32::MAX);
            assert_eq!(common_tokens(&a, &b), length);
        }
    }
}
