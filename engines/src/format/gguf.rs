//! GGUF, versions 2 and 3, little-endian.
//!
//! ```text
//! "GGUF" version:u32 tensors:u64 pairs:u64 | (key, type, value)* | (name, dims, type, offset)* | pad | data
//! ```
//! Source of the format: `docs/gguf.md` of the ggml project.

use super::{ElementType, FormatError, Mapped, TensorInfo, Value};
use std::collections::BTreeMap;
use std::path::Path;

/// More pairs than this is damage: real files have about fifty.
const PAIRS_MAX: u64 = 65_536;
/// The largest published mixtures of experts, one tensor per expert, have under 60,000.
const TENSORS_MAX: u64 = 1 << 20;
/// A key or a tensor's name; the format's own limit for names is 64.
const NAME_BYTES_MAX: u64 = 65_535;
/// Elements of an array: the longest in real files are lists of merges, under a million.
const ARRAY_ELEMENTS_MAX: u64 = 1 << 24;
/// GGUF tensors have at most four dimensions.
const DIMENSIONS_MAX: u32 = 4;
const ALIGNMENT_DEFAULT: u64 = 32;

/// An opened GGUF file: metadata and where each tensor lies.
#[derive(Debug, Clone)]
pub struct Gguf {
    pub file: Mapped,
    pub metadata: BTreeMap<String, Value>,
    pub tensors: BTreeMap<String, TensorInfo>,
}

impl Gguf {
    /// Whether the file at `path` starts as a GGUF file does.
    pub fn is_gguf(path: &Path) -> bool {
        use std::io::Read;
        let mut magic = [0; 4];
        std::fs::File::open(path).and_then(|mut file| file.read_exact(&mut magic)).is_ok_and(|()| &magic == b"GGUF")
    }

    /// Reads the header of `path`.
    ///
    /// # Errors
    /// [`FormatError`] for a file that is not GGUF, is cut short, claims more than it has, has tensors
    /// that overlap or lie outside it, or has a type that no engine computes on.
    pub fn open(path: &Path) -> Result<Self, FormatError> {
        let file = Mapped::open(path)?;
        let mut cursor = Cursor { file: &file, at: 0 };
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
        let alignment = alignment(&cursor, &metadata)?;
        let data_start = cursor.at.next_multiple_of(alignment);
        let tensors = place_tensors(&file, infos, data_start, alignment)?;
        Ok(Self { file, metadata, tensors })
    }

    /// The metadata value at `key`, read by `read`; `None` where the key is missing.
    ///
    /// # Errors
    /// [`FormatError::BadConfig`] where the value is there but of another kind.
    pub fn get<'a, T>(&'a self, key: &str, read: impl Fn(&'a Value) -> Option<T>) -> Result<Option<T>, FormatError> {
        match self.metadata.get(key) {
            None => Ok(None),
            Some(value) => read(value).map(Some).ok_or_else(|| FormatError::BadConfig {
                path: self.file.path().to_owned(),
                key: key.to_owned(),
                what: "has an unexpected type".to_owned(),
            }),
        }
    }
}

fn alignment(cursor: &Cursor<'_>, metadata: &BTreeMap<String, Value>) -> Result<u64, FormatError> {
    match metadata.get("general.alignment") {
        None => Ok(ALIGNMENT_DEFAULT),
        Some(value) => value
            .as_u64()
            .filter(|a| a.is_power_of_two() && (8..=1 << 20).contains(a))
            .ok_or_else(|| cursor.malformed("`general.alignment` is not a power of two from 8 to 1 MiB")),
    }
}

/// A tensor as its header entry says, offset still from the start of the data.
struct RawInfo {
    name: String,
    shape: Vec<usize>,
    element: ElementType,
    length_bytes: u64,
    offset_bytes: u64,
}

fn place_tensors(
    file: &Mapped,
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
            return Err(bad(&info.name, format!("its offset is no multiple of {alignment}")));
        }
        let start = data_start.checked_add(info.offset_bytes);
        let end = start.and_then(|start| start.checked_add(info.length_bytes));
        let (Some(start), Some(end)) = (start, end) else {
            return Err(bad(&info.name, "its offset overflows".to_owned()));
        };
        if end > file.length_bytes() {
            return Err(bad(
                &info.name,
                format!("it ends at byte {end}, and the file has {}: the file is cut short", file.length_bytes()),
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
            return Err(bad(&info.name, "the name stands twice".to_owned()));
        }
    }
    super::safetensors::check_disjoint(&mut extents).map_err(|(name, what)| bad(&name, what))?;
    Ok(tensors)
}

/// A position in the header. Every read is checked against the file's end.
struct Cursor<'a> {
    file: &'a Mapped,
    at: u64,
}

impl<'a> Cursor<'a> {
    fn malformed(&self, what: &str) -> FormatError {
        FormatError::Malformed { path: self.file.path().to_owned(), what: what.to_owned() }
    }

    fn take(&mut self, length: u64, what: &str) -> Result<&'a [u8], FormatError> {
        let end = self.at.saturating_add(length);
        let bytes = self.file.slice(self.at..end, what)?;
        self.at = end;
        Ok(bytes)
    }

    fn array<const N: usize>(&mut self, what: &str) -> Result<[u8; N], FormatError> {
        let mut out = [0; N];
        out.copy_from_slice(self.take(N as u64, what)?);
        Ok(out)
    }

    fn u32(&mut self, what: &str) -> Result<u32, FormatError> {
        Ok(u32::from_le_bytes(self.array(what)?))
    }

    fn u64(&mut self, what: &str) -> Result<u64, FormatError> {
        Ok(u64::from_le_bytes(self.array(what)?))
    }

    fn count(&mut self, what: &str, limit: u64) -> Result<u64, FormatError> {
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

    fn text(&mut self, what: &str, limit: u64) -> Result<String, FormatError> {
        let length = self.count(what, limit)?;
        let bytes = self.take(length, what)?;
        // Vocabularies hold pieces that are no UTF-8 of their own only in byte-level form, which is UTF-8.
        String::from_utf8(bytes.to_vec()).map_err(|_| self.malformed(&format!("{what} is not UTF-8")))
    }

    fn metadata(&mut self, pairs: u64) -> Result<BTreeMap<String, Value>, FormatError> {
        let mut metadata = BTreeMap::new();
        for _ in 0..pairs {
            let key = self.text("a metadata key", NAME_BYTES_MAX)?;
            let kind = self.u32(&key)?;
            let value = self.value(kind, &key)?;
            if metadata.insert(key.clone(), value).is_some() {
                return Err(self.malformed(&format!("the metadata key `{key}` stands twice")));
            }
        }
        Ok(metadata)
    }

    fn value(&mut self, kind: u32, key: &str) -> Result<Value, FormatError> {
        if kind != 9 {
            return self.scalar(kind, key);
        }
        let kind = self.u32(key)?;
        if kind == 9 {
            return Err(self.malformed(&format!("`{key}` is an array of arrays, which no reader here uses")));
        }
        // An element takes at least one byte, so a count above the file's size is a lie.
        let count = self.count(key, self.file.length_bytes().min(ARRAY_ELEMENTS_MAX))?;
        let mut values = Vec::new();
        for _ in 0..count {
            values.push(self.scalar(kind, key)?);
        }
        Ok(Value::Array(values))
    }

    fn scalar(&mut self, kind: u32, key: &str) -> Result<Value, FormatError> {
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
                other => return Err(self.malformed(&format!("`{key}` is a boolean of value {other}"))),
            },
            8 => Value::Text(self.text(key, self.file.length_bytes())?),
            10 => Value::Unsigned(self.u64(key)?),
            11 => Value::Signed(i64::from_le_bytes(self.array(key)?)),
            12 => Value::Float(f64::from_le_bytes(self.array(key)?)),
            other => return Err(self.malformed(&format!("`{key}` has the unknown type {other}"))),
        })
    }

    fn tensor_infos(&mut self, count: u64) -> Result<Vec<RawInfo>, FormatError> {
        let mut infos = Vec::new();
        for _ in 0..count {
            infos.push(self.tensor_info()?);
        }
        Ok(infos)
    }

    fn tensor_info(&mut self) -> Result<RawInfo, FormatError> {
        let name = self.text("a tensor's name", NAME_BYTES_MAX)?;
        let path = self.file.path().to_owned();
        let bad = |what: String| FormatError::BadTensor { path: path.clone(), tensor: name.clone(), what };
        let dimensions = self.u32(&name)?;
        if dimensions > DIMENSIONS_MAX {
            return Err(bad(format!("{dimensions} dimensions, at most {DIMENSIONS_MAX} are allowed")));
        }
        let mut shape = Vec::new();
        for _ in 0..dimensions {
            let size = self.u64(&name)?;
            shape.push(usize::try_from(size).map_err(|_| bad(format!("a dimension of {size}")))?);
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

/// Bytes of a tensor; `None` where its rows are not whole blocks, or the number overflows.
pub(crate) fn length_bytes(element: ElementType, shape: &[usize]) -> Option<u64> {
    let (inner, outer) = match shape.split_last() {
        Some((inner, outer)) => (*inner, outer),
        None => (1, shape),
    };
    let row = element.row_bytes(inner)? as u64;
    outer.iter().try_fold(row, |bytes, &size| bytes.checked_mul(size as u64))
}

#[cfg(test)]
mod tests;
