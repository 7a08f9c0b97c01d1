//! A metadata value, borrowed from the header.

use super::cursor::Cursor;
use crate::format::FormatError;

/// One metadata value. Integers are widened to 64 bits, floats to f64.
#[derive(Debug, Clone)]
pub enum Value<'a> {
    /// An unsigned integer of 8 to 64 bits in the file.
    Unsigned(u64),
    /// A signed integer of 8 to 64 bits in the file.
    Signed(i64),
    /// A float of 32 or 64 bits in the file.
    Float(f64),
    /// A boolean.
    Bool(bool),
    /// A UTF-8 string.
    Text(&'a str),
    /// A list of values of one type, which is not a list.
    List(List<'a>),
}

/// The elements of a list, read one after the other.
#[derive(Debug, Clone)]
pub struct List<'a> {
    cursor: Cursor<'a>,
    kind: u32,
    left: u64,
}

impl<'a> List<'a> {
    pub(super) fn new(cursor: Cursor<'a>, kind: u32, left: u64) -> Self {
        Self { cursor, kind, left }
    }

    /// Reads and checks all remaining elements.
    pub(super) fn walk(&mut self, key: &str) -> Result<(), FormatError> {
        while self.left > 0 {
            self.left -= 1;
            self.cursor.scalar(self.kind, key)?;
        }
        Ok(())
    }

    /// The position after the elements read so far.
    pub(super) fn end(&self) -> u64 {
        self.cursor.at
    }
}

impl<'a> Iterator for List<'a> {
    type Item = Value<'a>;

    fn next(&mut self) -> Option<Value<'a>> {
        self.left = self.left.checked_sub(1)?;
        self.cursor.scalar(self.kind, "").ok()
    }
}

impl<'a> Value<'a> {
    /// The value as a count, if it is an integer of at least 0.
    pub fn as_u64(self) -> Option<u64> {
        match self {
            Self::Unsigned(v) => Some(v),
            Self::Signed(v) => u64::try_from(v).ok(),
            _ => None,
        }
    }

    /// The value as a number, if it is an integer or a float.
    pub fn as_f64(self) -> Option<f64> {
        match self {
            Self::Float(v) => Some(v),
            Self::Unsigned(v) => Some(v as f64),
            Self::Signed(v) => Some(v as f64),
            _ => None,
        }
    }

    /// The value as a boolean, if it is one.
    pub fn as_bool(self) -> Option<bool> {
        match self {
            Self::Bool(v) => Some(v),
            _ => None,
        }
    }

    /// The value as a string, if it is one.
    pub fn as_text(self) -> Option<&'a str> {
        match self {
            Self::Text(v) => Some(v),
            _ => None,
        }
    }

    /// The value as a list, if it is one.
    pub fn as_list(self) -> Option<List<'a>> {
        match self {
            Self::List(v) => Some(v),
            _ => None,
        }
    }
}
