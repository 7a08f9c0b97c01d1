//! The assignment of cache pages to sequences. The table is pure bookkeeping; a backend moves the bytes.
//!
//! Forks share pages, with reference counts; a shared page is copied before it is written. The pipeline head keeps the
//! same table to know what fits, so the head and all shards agree without messages.

use crate::engine::{Operation, PAGE_TOKENS, SeqId};
use std::collections::BTreeMap;

/// The page table of one cache.
#[derive(Debug, Clone)]
pub struct PageTable {
    /// For each page, the number of sequences that use it.
    holders: Vec<u32>,
    free: Vec<u32>,
    sequences: BTreeMap<SeqId, Sequence>,
}

#[derive(Debug, Clone, Default)]
struct Sequence {
    length_tokens: u32,
    pages: Vec<u32>,
}

/// The reason why the table cannot apply an operation or extend a sequence.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum PageError {
    /// The sequence is not in the cache.
    #[error("sequence {} is not in the cache", .0.0)]
    Unknown(SeqId),
    /// The new sequence of a fork is already in the cache.
    #[error("sequence {} is already in the cache", .0.0)]
    Exists(SeqId),
    /// The sequence has fewer tokens than the operation needs.
    #[error("sequence {} has {has} tokens, but {wanted} are needed", .seq.0)]
    TooShort {
        /// The sequence.
        seq: SeqId,
        /// Tokens of the sequence in the cache.
        has: u32,
        /// Tokens that the operation needs.
        wanted: u32,
    },
    /// The free pages do not suffice.
    #[error("the cache has too few free pages")]
    Full,
}

impl PageTable {
    /// Creates a table of `pages` free pages, numbered from 0.
    pub fn new(pages: u32) -> Self {
        Self {
            holders: vec![0; pages as usize],
            // Pages are taken from the end, lowest first, so that a small load touches little memory.
            free: (0..pages).rev().collect(),
            sequences: BTreeMap::new(),
        }
    }

    /// Returns the number of all pages, free or used.
    pub fn capacity(&self) -> u32 {
        self.holders.len() as u32
    }

    /// Returns the number of pages in use.
    pub fn used(&self) -> u32 {
        self.capacity() - self.free.len() as u32
    }

    /// Returns the number of tokens of `seq` in the cache; 0 for an unknown sequence.
    pub fn length_tokens(&self, seq: SeqId) -> u32 {
        self.sequences.get(&seq).map_or(0, |sequence| sequence.length_tokens)
    }

    /// Returns the page numbers of `seq`, in order of position; none for an unknown sequence.
    pub fn pages(&self, seq: SeqId) -> &[u32] {
        self.sequences.get(&seq).map_or(&[], |sequence| &sequence.pages)
    }

    /// Returns the sequences in the table, in order of id.
    pub fn sequences(&self) -> impl Iterator<Item = SeqId> {
        self.sequences.keys().copied()
    }

    /// Drops all sequences and frees all pages.
    pub fn clear(&mut self) {
        *self = Self::new(self.capacity());
    }

    /// Applies one operation. The release of an unknown sequence is not an error, since a release may be repeated.
    ///
    /// # Errors
    /// [`PageError`] if a sequence is unknown, exists already, or is too short; the table is unchanged.
    pub fn apply(&mut self, operation: Operation) -> Result<(), PageError> {
        match operation {
            Operation::Release { seq } => {
                if let Some(sequence) = self.sequences.remove(&seq) {
                    self.let_go(&sequence.pages);
                }
                Ok(())
            }
            Operation::Truncate { seq, length_tokens } => self.truncate(seq, length_tokens),
            Operation::Fork { from, to, length_tokens } => self.fork(from, to, length_tokens),
        }
    }

    fn truncate(&mut self, seq: SeqId, length_tokens: u32) -> Result<(), PageError> {
        let sequence = self.sequences.get_mut(&seq).ok_or(PageError::Unknown(seq))?;
        if sequence.length_tokens < length_tokens {
            return Err(PageError::TooShort { seq, has: sequence.length_tokens, wanted: length_tokens });
        }
        sequence.length_tokens = length_tokens;
        let dropped = sequence.pages.split_off(length_tokens.div_ceil(PAGE_TOKENS) as usize);
        self.let_go(&dropped);
        Ok(())
    }

    fn fork(&mut self, from: SeqId, to: SeqId, length_tokens: u32) -> Result<(), PageError> {
        if self.sequences.contains_key(&to) {
            return Err(PageError::Exists(to));
        }
        let source = self.sequences.get(&from).ok_or(PageError::Unknown(from))?;
        if source.length_tokens < length_tokens {
            return Err(PageError::TooShort { seq: from, has: source.length_tokens, wanted: length_tokens });
        }
        let pages = source.pages[..length_tokens.div_ceil(PAGE_TOKENS) as usize].to_vec();
        for &page in &pages {
            self.holders[page as usize] += 1;
        }
        self.sequences.insert(to, Sequence { length_tokens, pages });
        Ok(())
    }

    fn let_go(&mut self, pages: &[u32]) {
        for &page in pages {
            self.holders[page as usize] -= 1;
            if self.holders[page as usize] == 0 {
                self.free.push(page);
            }
        }
    }

    /// Returns the number of free pages that [`Self::extend`] would take for `tokens` more tokens of `seq`.
    pub fn pages_needed(&self, seq: SeqId, tokens: u32) -> u32 {
        let length = self.length_tokens(seq);
        let pages = self.pages(seq);
        let fresh = (length + tokens).div_ceil(PAGE_TOKENS) - pages.len() as u32;
        fresh + u32::from(tokens > 0 && self.last_is_shared(length, pages))
    }

    /// Returns whether the next token belongs in a page that another sequence shares.
    fn last_is_shared(&self, length: u32, pages: &[u32]) -> bool {
        let partly_filled = !length.is_multiple_of(PAGE_TOKENS);
        partly_filled && pages.last().is_some_and(|&page| self.holders[page as usize] > 1)
    }

    /// Returns the number of free pages.
    pub fn free(&self) -> u32 {
        self.free.len() as u32
    }

    /// Allocates pages for `tokens` more tokens of `seq`, and adds `seq` if it is new. Returns the page copy, as
    /// (from, to), that must be done before the tokens are written.
    ///
    /// # Errors
    /// [`PageError::Full`] if the free pages do not suffice; the table is unchanged.
    pub fn extend(&mut self, seq: SeqId, tokens: u32) -> Result<Option<(u32, u32)>, PageError> {
        let needed = self.pages_needed(seq, tokens);
        if needed > self.free() {
            return Err(PageError::Full);
        }
        let mut fresh = self.free.split_off(self.free.len() - needed as usize);
        fresh.reverse();
        for &page in &fresh {
            self.holders[page as usize] = 1;
        }
        let length = self.length_tokens(seq);
        let copies = tokens > 0 && self.last_is_shared(length, self.pages(seq));
        let sequence = self.sequences.entry(seq).or_default();
        sequence.length_tokens += tokens;
        let mut copy = None;
        let mut fresh = fresh.into_iter();
        if copies {
            copy = sequence.pages.pop().zip(fresh.next());
            if let Some((shared, own)) = copy {
                sequence.pages.push(own);
                self.holders[shared as usize] -= 1;
            }
        }
        sequence.pages.extend(fresh);
        Ok(copy)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[derive(Debug, Clone)]
    enum Act {
        Extend(u64, u32),
        Apply(Operation),
    }

    fn act() -> impl Strategy<Value = Act> {
        let seq = || (0_u64..5).prop_map(SeqId);
        prop_oneof![
            4 => (0_u64..5, 0_u32..80).prop_map(|(seq, tokens)| Act::Extend(seq, tokens)),
            1 => seq().prop_map(|seq| Act::Apply(Operation::Release { seq })),
            1 => (seq(), 0_u32..100).prop_map(|(seq, length_tokens)| Act::Apply(Operation::Truncate { seq, length_tokens })),
            2 => (seq(), seq(), 0_u32..100).prop_map(|(from, to, length_tokens)| {
                Act::Apply(Operation::Fork { from, to, length_tokens })
            }),
        ]
    }

    /// A simulated cache, written through the table, and plain vectors of the expected contents.
    #[derive(Default)]
    struct Model {
        written: BTreeMap<SeqId, Vec<u64>>,
        memory: BTreeMap<(u32, u32), u64>,
        counter: u64,
    }

    impl Model {
        fn extend(&mut self, table: &mut PageTable, seq: SeqId, tokens: u32) {
            let before = table.clone();
            let needed = table.pages_needed(seq, tokens);
            match table.extend(seq, tokens) {
                Err(_) => {
                    assert!(needed > before.free(), "extend failed although enough pages were free");
                    assert_eq!(table.used(), before.used());
                }
                Ok(copy) => {
                    assert_eq!(table.used(), before.used() + needed);
                    if let Some((from, to)) = copy {
                        for slot in 0..PAGE_TOKENS {
                            if let Some(&value) = self.memory.get(&(from, slot)) {
                                self.memory.insert((to, slot), value);
                            }
                        }
                    }
                    let values = self.written.entry(seq).or_default();
                    for _ in 0..tokens {
                        self.counter += 1;
                        let position = values.len() as u32;
                        let page = table.pages(seq)[(position / PAGE_TOKENS) as usize];
                        self.memory.insert((page, position % PAGE_TOKENS), self.counter);
                        values.push(self.counter);
                    }
                }
            }
        }

        fn apply(&mut self, table: &mut PageTable, operation: Operation) {
            if table.apply(operation).is_err() {
                return;
            }
            match operation {
                Operation::Release { seq } => drop(self.written.remove(&seq)),
                Operation::Truncate { seq, length_tokens } => {
                    self.written.entry(seq).or_default().truncate(length_tokens as usize);
                }
                Operation::Fork { from, to, length_tokens } => {
                    let prefix = self.written[&from][..length_tokens as usize].to_vec();
                    self.written.insert(to, prefix);
                }
            }
        }
    }

    proptest! {
        /// R6.1–R6.5: after any operations, every sequence reads back its own writes, no page leaks, and no page is
        /// written while two sequences share it.
        #[test]
        fn every_sequence_reads_back_its_own_writes(acts in prop::collection::vec(act(), 1..60)) {
            let mut table = PageTable::new(12);
            let mut model = Model::default();
            for act in acts {
                match act {
                    Act::Extend(seq, tokens) => model.extend(&mut table, SeqId(seq), tokens),
                    Act::Apply(operation) => model.apply(&mut table, operation),
                }
                for (&seq, values) in &model.written {
                    prop_assert_eq!(table.length_tokens(seq) as usize, values.len());
                    for (position, value) in values.iter().enumerate() {
                        let page = table.pages(seq)[position / PAGE_TOKENS as usize];
                        prop_assert_eq!(model.memory[&(page, position as u32 % PAGE_TOKENS)], *value);
                    }
                }
            }
            for seq in table.sequences().collect::<Vec<_>>() {
                table.apply(Operation::Release { seq }).map_err(|e| TestCaseError::fail(e.to_string()))?;
            }
            prop_assert_eq!(table.used(), 0);
        }
    }
}
