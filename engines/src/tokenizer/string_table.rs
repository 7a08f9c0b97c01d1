//! The strings of a vocabulary in one buffer: one allocation instead of a quarter of a million.

/// Byte strings by index.
#[derive(Debug, Clone, Default)]
pub(super) struct StringTable {
    bytes: Vec<u8>,
    ends: Vec<usize>,
}

impl StringTable {
    pub(super) fn push(&mut self, text: &[u8]) {
        self.bytes.extend_from_slice(text);
        self.ends.push(self.bytes.len());
    }

    /// The bytes of string `index`; empty if there is no such string.
    pub(super) fn get(&self, index: usize) -> &[u8] {
        let start = index.checked_sub(1).map_or(Some(0), |before| self.ends.get(before).copied());
        match (start, self.ends.get(index)) {
            (Some(start), Some(&end)) => &self.bytes[start..end],
            _ => &[],
        }
    }

    pub(super) fn len(&self) -> usize {
        self.ends.len()
    }
}
