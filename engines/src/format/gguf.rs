//! GGUF, versions 2 and 3, little-endian.
//!
//! ```text
//! "GGUF" version:u32 tensors:u64 pairs:u64 | (key, type, value)* | (name, dims, type, offset)* | pad | data
//! ```
//! Source of the format: `docs/gguf.md` of the ggml project.

use super::tensor::check_disjoint;
use super::{FormatError, SourceFile, TensorInfo};
use std::collections::BTreeMap;
use std::path::Path;

mod cursor;
mod value;

pub use value::{List, Value};

use cursor::{Cursor, RawInfo};

/// Metadata pairs. A larger number means a damaged file: real files have about fifty.
const PAIRS_MAX: u64 = 65_536;
/// Tensors. The largest published mixtures of experts, with one tensor per expert, have under 60,000.
const TENSORS_MAX: u64 = 1 << 20;
const ALIGNMENT_DEFAULT: u64 = 32;

/// Bytes of a header. Real ones, with the largest vocabularies, have under 40 MB.
const HEADER_BYTES_MAX: u64 = 256 << 20;
/// Bytes of a header that are read first. Where they do not suffice, four times as many are.
const HEADER_BYTES_FIRST: u64 = 1 << 20;

/// An opened GGUF file: its header, and the positions of its metadata values and tensors.
///
/// Values stay encoded and are decoded on demand: reading the layer count does not copy a vocabulary of a quarter of a
/// million tokens.
#[derive(Debug, Clone)]
pub struct Gguf {
    /// The file.
    pub file: SourceFile,
    header: Vec<u8>,
    metadata: BTreeMap<String, ValuePosition>,
    /// The location of each tensor, by name.
    pub tensors: BTreeMap<String, TensorInfo>,
}

/// The position and the type number of a metadata value.
#[derive(Debug, Clone, Copy)]
struct ValuePosition {
    kind: u32,
    at: u64,
}

impl Gguf {
    /// Whether the file at `path` starts with GGUF's magic number.
    pub fn is_gguf(path: &Path) -> bool {
        use std::io::Read;
        let mut magic = [0; 4];
        std::fs::File::open(path).and_then(|mut file| file.read_exact(&mut magic)).is_ok_and(|()| &magic == b"GGUF")
    }

    /// Reads the header of `path`.
    ///
    /// # Errors
    /// [`FormatError`] for a file that is not GGUF, is cut short, claims more data than it has, has tensors
    /// that overlap or lie outside it, or has a type that no engine supports.
    pub fn open(path: &Path) -> Result<Self, FormatError> {
        let file = SourceFile::open(path)?;
        let longest = file.length_bytes().min(HEADER_BYTES_MAX);
        let mut length = longest.min(HEADER_BYTES_FIRST);
        loop {
            let header = file.read(0..length, "its header")?;
            match Self::parse(&file, header) {
                // The header may go on behind the bytes read.
                Err(FormatError::Truncated { .. }) if length < longest => length = longest.min(length * 4),
                parsed => return parsed,
            }
        }
    }

    /// Reads the header in the first bytes of `file`.
    fn parse(file: &SourceFile, header: Vec<u8>) -> Result<Self, FormatError> {
        let mut cursor = Cursor { file, header: &header, at: 0 };
        if cursor.take(4, "the magic number")? != b"GGUF" {
            return Err(cursor.malformed("it does not start with `GGUF`"));
        }
        let version = cursor.u32("the version")?;
        if !(2..=3).contains(&version) {
            return Err(cursor.malformed(&format!("GGUF version {version}; versions 2 and 3 (little-endian) are read")));
        }
        let tensor_count = cursor.count("the tensor count", TENSORS_MAX)?;
        let pair_count = cursor.count("the metadata count", PAIRS_MAX)?;
        let metadata = cursor.metadata(pair_count)?;
        let infos = cursor.tensor_infos(tensor_count)?;
        let header_end = cursor.at;
        let mut read = Self { file: file.clone(), header, metadata, tensors: BTreeMap::new() };
        read.header.truncate(usize::try_from(header_end).unwrap_or(usize::MAX));
        read.header.shrink_to_fit();
        let alignment = alignment(&read)?;
        read.tensors = place_tensors(file, infos, header_end.next_multiple_of(alignment), alignment)?;
        Ok(read)
    }

    /// The keys of the metadata, in alphabetical order.
    pub fn keys(&self) -> impl Iterator<Item = &str> {
        self.metadata.keys().map(String::as_str)
    }

    /// The metadata value at `key`; `None` if the key is missing.
    pub fn value(&self, key: &str) -> Option<Value<'_>> {
        let place = self.metadata.get(key)?;
        // Opening the file read and checked this value, so that it can be read again.
        Cursor { file: &self.file, header: &self.header, at: place.at }.value(place.kind, key).ok()
    }

    /// The metadata value at `key`, converted by `read`; `None` if the key is missing.
    ///
    /// # Errors
    /// [`FormatError::BadConfig`] if the value has another type.
    pub fn get<'a, T>(
        &'a self,
        key: &str,
        read: impl FnOnce(Value<'a>) -> Option<T>,
    ) -> Result<Option<T>, FormatError> {
        match self.value(key) {
            None => Ok(None),
            Some(value) => read(value).map(Some).ok_or_else(|| FormatError::BadConfig {
                path: self.file.path().to_owned(),
                key: key.to_owned(),
                what: "has an unexpected type".to_owned(),
            }),
        }
    }

    /// The list at `key`, each element converted by `read`; `None` if the key is missing.
    ///
    /// # Errors
    /// As [`Gguf::get`].
    pub fn list<'a, T>(
        &'a self,
        key: &str,
        read: impl FnMut(Value<'a>) -> Option<T>,
    ) -> Result<Option<Vec<T>>, FormatError> {
        self.get(key, |value| value.as_list()?.map(read).collect())
    }
}

fn alignment(file: &Gguf) -> Result<u64, FormatError> {
    let key = "general.alignment";
    let is_possible = |a: &u64| a.is_power_of_two() && (8..=1 << 20).contains(a);
    match file.value(key) {
        None => Ok(ALIGNMENT_DEFAULT),
        Some(value) => value.as_u64().filter(is_possible).ok_or_else(|| FormatError::BadConfig {
            path: file.file.path().to_owned(),
            key: key.to_owned(),
            what: "is not a power of two from 8 to 1 MiB".to_owned(),
        }),
    }
}

fn place_tensors(
    file: &SourceFile,
    infos: Vec<RawInfo>,
    data_start: u64,
    alignment: u64,
) -> Result<BTreeMap<String, TensorInfo>, FormatError> {
    let bad = |tensor: &str, what: String| FormatError::BadTensor {
        path: file.path().to_owned(),
        tensor: tensor.to_owned(),
        what,
    };
    let mut tensors = BTreeMap::new();
    let mut extents = Vec::with_capacity(infos.len());
    for info in infos {
        if info.offset_bytes % alignment != 0 {
            return Err(bad(&info.name, format!("its offset is not a multiple of {alignment}")));
        }
        let start = data_start.checked_add(info.offset_bytes);
        let end = start.and_then(|start| start.checked_add(info.length_bytes));
        let (Some(start), Some(end)) = (start, end) else {
            return Err(bad(&info.name, "its offset overflows".to_owned()));
        };
        if end > file.length_bytes() {
            return Err(bad(
                &info.name,
                format!("it ends at byte {end} of a file of {} bytes: the file is cut short", file.length_bytes()),
            ));
        }
        extents.push((start, end, info.name.clone()));
        let placed = TensorInfo {
            element: info.element,
            shape: info.shape,
            offset_bytes: start,
            length_bytes: info.length_bytes,
        };
        if tensors.insert(info.name.clone(), placed).is_some() {
            return Err(bad(&info.name, "the name occurs twice".to_owned()));
        }
    }
    check_disjoint(&mut extents).map_err(|(name, what)| bad(&name, what))?;
    Ok(tensors)
}

#[cfg(test)]
mod tests;
