//! SentencePiece's unigram-scored BPE, as llama.cpp runs it on GGUF vocabularies.
//!
//! Neighbouring symbols whose joined text is a token are merged, highest score first, leftmost among equals. A symbol
//! that is not a token at the end is spelt in bytes (`llm_tokenizer_spm` of llama.cpp). [`Spm`] is a model for the
//! `tokenizers` crate, which cuts out special tokens and normalises the text first.

use super::string_table::StringTable;
use super::token_bytes::byte_token;
use hashbrown::HashTable;
use std::cmp::Ordering;
use std::collections::{BinaryHeap, HashMap};
use std::hash::{BuildHasher, RandomState};
use std::path::{Path, PathBuf};
use tokenizers::models::bpe::BpeTrainer;
use tokenizers::{
    DecoderWrapper, Model, NormalizerWrapper, PostProcessorWrapper, PreTokenizerWrapper, Token, TokenizerImpl,
};

/// A tokenizer over [`Spm`].
pub(super) type SpmTokenizer =
    TokenizerImpl<Spm, NormalizerWrapper, PreTokenizerWrapper, PostProcessorWrapper, DecoderWrapper>;

/// A vocabulary whose tokens have scores.
#[derive(Debug, Clone)]
pub(super) struct Spm {
    texts: StringTable,
    /// Ids by the hash of their texts. Equal texts have the first id.
    ids: HashTable<u32>,
    hasher: RandomState,
    scores: Vec<f32>,
    bytes: [Option<u32>; 256],
    unknown: Option<u32>,
}

impl Spm {
    pub(super) fn new(tokens: &[&str], scores: Vec<f32>, unknown: Option<u32>) -> Self {
        let mut spm = Self {
            texts: StringTable::default(),
            ids: HashTable::with_capacity(tokens.len()),
            hasher: RandomState::new(),
            scores,
            bytes: [None; 256],
            unknown,
        };
        for (id, text) in tokens.iter().enumerate() {
            spm.texts.push(text.as_bytes());
            if let Some(byte) = byte_token(text) {
                spm.bytes[usize::from(byte)] = Some(id as u32);
            }
            let (texts, hasher) = (&spm.texts, &spm.hasher);
            let rehash = |&id: &u32| hasher.hash_one(texts.get(id as usize));
            let is_same = |&id: &u32| texts.get(id as usize) == text.as_bytes();
            spm.ids.entry(hasher.hash_one(text.as_bytes()), is_same, rehash).or_insert(id as u32);
        }
        spm
    }

    fn id(&self, text: &str) -> Option<u32> {
        let is_same = |&id: &u32| self.texts.get(id as usize) == text.as_bytes();
        self.ids.find(self.hasher.hash_one(text.as_bytes()), is_same).copied()
    }

    fn score(&self, text: &str) -> Option<f32> {
        let id = self.id(text)? as usize;
        Some(self.scores.get(id).copied().unwrap_or(0.0))
    }
}

/// A byte range of the text. Symbols are a linked list from left to right.
struct Symbol {
    start: usize,
    end: usize,
    previous: Option<usize>,
    next: Option<usize>,
}

/// Two neighbouring symbols whose joined text is a token.
struct Pair {
    score: f32,
    left: usize,
    right: usize,
    /// Length of the joined text. A pair is stale if its symbols have changed since.
    length: usize,
}

impl PartialEq for Pair {
    fn eq(&self, other: &Self) -> bool {
        self.cmp(other) == Ordering::Equal
    }
}

impl Eq for Pair {}

impl PartialOrd for Pair {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

impl Ord for Pair {
    fn cmp(&self, other: &Self) -> Ordering {
        self.score.total_cmp(&other.score).then(other.left.cmp(&self.left))
    }
}

/// The symbols of one text, and the pairs that may be merged.
struct Merger<'a> {
    spm: &'a Spm,
    text: &'a str,
    symbols: Vec<Symbol>,
    pairs: BinaryHeap<Pair>,
}

impl<'a> Merger<'a> {
    fn new(spm: &'a Spm, text: &'a str) -> Self {
        let count = text.chars().count();
        let symbols = text.char_indices().enumerate().map(|(index, (start, c))| Symbol {
            start,
            end: start + c.len_utf8(),
            previous: index.checked_sub(1),
            next: Some(index + 1).filter(|&next| next < count),
        });
        let mut merger = Self { spm, text, symbols: symbols.collect(), pairs: BinaryHeap::new() };
        for right in 1..count {
            merger.offer(Some(right - 1), Some(right));
        }
        merger
    }

    fn offer(&mut self, left: Option<usize>, right: Option<usize>) {
        let (Some(left), Some(right)) = (left, right) else { return };
        let joined = &self.text[self.symbols[left].start..self.symbols[right].end];
        if let Some(score) = self.spm.score(joined) {
            self.pairs.push(Pair { score, left, right, length: joined.len() });
        }
    }

    fn merge_all(mut self) -> Vec<Symbol> {
        while let Some(pair) = self.pairs.pop() {
            let (left, right) = (&self.symbols[pair.left], &self.symbols[pair.right]);
            let is_stale = left.end == left.start
                || right.end == right.start
                || left.end != right.start
                || right.end - left.start != pair.length;
            if is_stale {
                continue;
            }
            let (end, next) = (right.end, right.next);
            let symbol = &mut self.symbols[pair.right];
            symbol.end = symbol.start;
            self.symbols[pair.left].end = end;
            self.symbols[pair.left].next = next;
            if let Some(next) = next {
                self.symbols[next].previous = Some(pair.left);
            }
            self.offer(self.symbols[pair.left].previous, Some(pair.left));
            self.offer(Some(pair.left), next);
        }
        self.symbols.retain(|symbol| symbol.end > symbol.start);
        self.symbols
    }
}

impl Model for Spm {
    type Trainer = BpeTrainer;

    fn tokenize(&self, text: &str) -> tokenizers::Result<Vec<Token>> {
        let mut tokens = Vec::new();
        for symbol in Merger::new(self, text).merge_all() {
            let piece = &text[symbol.start..symbol.end];
            let offsets = (symbol.start, symbol.end);
            if let Some(id) = self.id(piece) {
                tokens.push(Token::new(id, piece.to_owned(), offsets));
                continue;
            }
            for byte in piece.bytes() {
                let id = self.bytes[usize::from(byte)].or(self.unknown);
                let id = id.ok_or_else(|| format!("no token for the byte {byte:#04x}"))?;
                tokens.push(Token::new(id, format!("<0x{byte:02X}>"), offsets));
            }
        }
        Ok(tokens)
    }

    fn token_to_id(&self, token: &str) -> Option<u32> {
        self.id(token)
    }

    fn id_to_token(&self, id: u32) -> Option<String> {
        let is_there = (id as usize) < self.texts.len();
        is_there.then(|| String::from_utf8_lossy(self.texts.get(id as usize)).into_owned())
    }

    fn get_vocab(&self) -> HashMap<String, u32> {
        let text_of = |&id: &u32| (String::from_utf8_lossy(self.texts.get(id as usize)).into_owned(), id);
        self.ids.iter().map(text_of).collect()
    }

    fn get_vocab_size(&self) -> usize {
        self.texts.len()
    }

    fn save(&self, _folder: &Path, _prefix: Option<&str>) -> tokenizers::Result<Vec<PathBuf>> {
        Err("a vocabulary read from GGUF is not saved".into())
    }

    fn get_trainer(&self) -> BpeTrainer {
        BpeTrainer::default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn spm() -> Spm {
        let tokens = [
            ("<unk>", 0.0),
            ("a", -3.0),
            ("b", -3.0),
            ("ab", -1.0),
            ("ba", -0.5),
            ("aba", -2.0),
            ("<0xC3>", 0.0),
            ("<0xA9>", 0.0),
        ];
        let (texts, scores): (Vec<_>, Vec<_>) = tokens.iter().copied().unzip();
        Spm::new(&texts, scores, Some(0))
    }

    fn pieces(text: &str) -> Vec<String> {
        spm().tokenize(text).expect("the text can be tokenised").into_iter().map(|token| token.value).collect()
    }

    #[test]
    fn the_best_score_merges_first_and_then_the_leftmost() {
        // `ba` (−0.5) before `ab` (−1), then `a` + `ba`.
        assert_eq!(pieces("aba"), ["aba"]);
        assert_eq!(pieces("abab"), ["aba", "b"]);
        assert_eq!(pieces("abba"), ["ab", "ba"]);
    }

    #[test]
    fn text_without_a_token_is_spelt_in_bytes() {
        assert_eq!(pieces("aé"), ["a", "<0xC3>", "<0xA9>"]);
        let ids: Vec<u32> = spm().tokenize("z").expect("unknown is there").iter().map(|t| t.id).collect();
        assert_eq!(ids, [0]);
    }
}
