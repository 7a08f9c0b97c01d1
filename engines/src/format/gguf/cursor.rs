//! Sequential reading of a GGUF header.

use super::{List, Value, ValuePosition};
use crate::format::tensor::length_bytes;
use crate::format::{ElementType, FormatError, SourceFile};
use std::collections::BTreeMap;

/// Bytes of a metadata key or a tensor's name. The format's own limit for names is 64.
const NAME_BYTES_MAX: u64 = 65_535;
/// Elements of an array. The longest arrays in real files are lists of merges, with under a million.
const ARRAY_ELEMENTS_MAX: u64 = 1 << 24;
/// GGUF tensors have at most four dimensions.
const DIMENSIONS_MAX: u32 = 4;
/// The type number of an array.
const LIST_KIND: u32 = 9;

/// A tensor's header entry. Its offset counts from the start of the data section.
pub(super) struct RawInfo {
    pub(super) name: String,
    pub(super) shape: Vec<usize>,
    pub(super) element: ElementType,
    pub(super) length_bytes: u64,
    pub(super) offset_bytes: u64,
}

/// A position in the header. Every read is checked against the end of the bytes that were read of the file.
#[derive(Debug, Clone)]
pub(super) struct Cursor<'a> {
    pub(super) file: &'a SourceFile,
    pub(super) header: &'a [u8],
    pub(super) at: u64,
}

impl<'a> Cursor<'a> {
    pub(super) fn malformed(&self, what: &str) -> FormatError {
        FormatError::Malformed { path: self.file.path().to_owned(), what: what.to_owned() }
    }

    pub(super) fn take(&mut self, length: u64, what: &str) -> Result<&'a [u8], FormatError> {
        let end = self.at.saturating_add(length);
        let range = usize::try_from(self.at).ok().zip(usize::try_from(end).ok());
        let bytes = range.and_then(|(start, end)| self.header.get(start..end));
        let bytes =
            bytes.ok_or_else(|| FormatError::Truncated { path: self.file.path().to_owned(), what: what.to_owned() })?;
        self.at = end;
        Ok(bytes)
    }

    fn array<const N: usize>(&mut self, what: &str) -> Result<[u8; N], FormatError> {
        let mut out = [0; N];
        out.copy_from_slice(self.take(N as u64, what)?);
        Ok(out)
    }

    pub(super) fn u32(&mut self, what: &str) -> Result<u32, FormatError> {
        Ok(u32::from_le_bytes(self.array(what)?))
    }

    fn u64(&mut self, what: &str) -> Result<u64, FormatError> {
        Ok(u64::from_le_bytes(self.array(what)?))
    }

    pub(super) fn count(&mut self, what: &str, limit: u64) -> Result<u64, FormatError> {
        let claimed = self.u64(what)?;
        if claimed > limit {
            return Err(FormatError::TooLarge {
                path: self.file.path().to_owned(),
                what: what.to_owned(),
                claimed,
                limit,
            });
        }
        Ok(claimed)
    }

    fn text(&mut self, what: &str, limit: u64) -> Result<&'a str, FormatError> {
        let length = self.count(what, limit)?;
        let bytes = self.take(length, what)?;
        // Pieces of a vocabulary that are not UTF-8 themselves are spelt in the byte-level alphabet, which is UTF-8.
        std::str::from_utf8(bytes).map_err(|_| self.malformed(&format!("{what} is not UTF-8")))
    }

    /// Records the position of each of `pairs` key-value pairs, and checks each value.
    pub(super) fn metadata(&mut self, pairs: u64) -> Result<BTreeMap<String, ValuePosition>, FormatError> {
        let mut metadata = BTreeMap::new();
        for _ in 0..pairs {
            let key = self.text("a metadata key", NAME_BYTES_MAX)?;
            let place = ValuePosition { kind: self.u32(key)?, at: self.at };
            if let Value::List(mut list) = self.value(place.kind, key)? {
                list.walk(key)?;
                self.at = list.end();
            }
            if metadata.insert(key.to_owned(), place).is_some() {
                return Err(self.malformed(&format!("the metadata key `{key}` occurs twice")));
            }
        }
        Ok(metadata)
    }

    /// Reads a value of type `kind`. The elements of a list are not read yet.
    pub(super) fn value(&mut self, kind: u32, key: &str) -> Result<Value<'a>, FormatError> {
        if kind != LIST_KIND {
            return self.scalar(kind, key);
        }
        let kind = self.u32(key)?;
        if kind == LIST_KIND {
            return Err(self.malformed(&format!("`{key}` is an array of arrays, which is not supported")));
        }
        // An element takes at least one byte, so a count above the file's size is wrong.
        let count = self.count(key, self.file.length_bytes().min(ARRAY_ELEMENTS_MAX))?;
        Ok(Value::List(List::new(self.clone(), kind, count)))
    }

    pub(super) fn scalar(&mut self, kind: u32, key: &str) -> Result<Value<'a>, FormatError> {
        Ok(match kind {
            0 => Value::Unsigned(u64::from(self.array::<1>(key)?[0])),
            1 => Value::Signed(i64::from(i8::from_le_bytes(self.array(key)?))),
            2 => Value::Unsigned(u64::from(u16::from_le_bytes(self.array(key)?))),
            3 => Value::Signed(i64::from(i16::from_le_bytes(self.array(key)?))),
            4 => Value::Unsigned(u64::from(self.u32(key)?)),
            5 => Value::Signed(i64::from(i32::from_le_bytes(self.array(key)?))),
            6 => Value::Float(f64::from(f32::from_le_bytes(self.array(key)?))),
            7 => match self.array::<1>(key)?[0] {
                0 => Value::Bool(false),
                1 => Value::Bool(true),
                other => return Err(self.malformed(&format!("`{key}` is a boolean with the value {other}"))),
            },
            8 => Value::Text(self.text(key, self.file.length_bytes())?),
            10 => Value::Unsigned(self.u64(key)?),
            11 => Value::Signed(i64::from_le_bytes(self.array(key)?)),
            12 => Value::Float(f64::from_le_bytes(self.array(key)?)),
            other => return Err(self.malformed(&format!("`{key}` has the unknown type {other}"))),
        })
    }

    pub(super) fn tensor_infos(&mut self, count: u64) -> Result<Vec<RawInfo>, FormatError> {
        let mut infos = Vec::new();
        for _ in 0..count {
            infos.push(self.tensor_info()?);
        }
        Ok(infos)
    }

    fn tensor_info(&mut self) -> Result<RawInfo, FormatError> {
        let name = self.text("a tensor's name", NAME_BYTES_MAX)?.to_owned();
        let path = self.file.path().to_owned();
        let bad = |what: String| FormatError::BadTensor { path: path.clone(), tensor: name.clone(), what };
        let dimensions = self.u32(&name)?;
        if dimensions > DIMENSIONS_MAX {
            return Err(bad(format!("{dimensions} dimensions; at most {DIMENSIONS_MAX} are allowed")));
        }
        let mut shape = Vec::new();
        for _ in 0..dimensions {
            let size = self.u64(&name)?;
            shape.push(usize::try_from(size).map_err(|_| bad(format!("the dimension {size} is too large")))?);
        }
        shape.reverse();
        let kind = self.u32(&name)?;
        let offset_bytes = self.u64(&name)?;
        let element = ElementType::from_gguf(kind).map_err(|element| FormatError::UnsupportedType {
            path: path.clone(),
            tensor: name.clone(),
            element,
        })?;
        let length_bytes = length_bytes(element, &shape)
            .ok_or_else(|| bad(format!("the shape {shape:?} does not fit the type {element}")))?;
        Ok(RawInfo { name, shape, element, length_bytes, offset_bytes })
    }
}
