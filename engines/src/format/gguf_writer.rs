//! Writes small GGUF files for tests: valid files, and deliberately invalid ones.

use std::path::{Path, PathBuf};

/// A metadata value to be written.
#[derive(Debug, Clone)]
pub(crate) enum Datum {
    Unsigned(u64),
    Signed(i64),
    Float(f64),
    Bool(bool),
    Text(String),
    Array(Vec<Datum>),
}

/// A GGUF file under construction.
#[derive(Debug, Clone, Default)]
pub(crate) struct GgufWriter {
    pairs: Vec<(String, Datum)>,
    tensors: Vec<Tensor>,
}

#[derive(Debug, Clone)]
struct Tensor {
    name: String,
    /// Rows first, as in all shapes of this crate.
    shape: Vec<u64>,
    /// The type's number in a GGUF header.
    kind: u32,
    bytes: Vec<u8>,
}

/// Bytes to which the format aligns tensors by default.
const ALIGNMENT: usize = 32;

impl GgufWriter {
    pub(crate) fn pair(mut self, key: &str, value: Datum) -> Self {
        self.pairs.push((key.to_owned(), value));
        self
    }

    pub(crate) fn text(self, key: &str, text: &str) -> Self {
        self.pair(key, Datum::Text(text.to_owned()))
    }

    pub(crate) fn texts<'a>(self, key: &str, texts: impl IntoIterator<Item = &'a str>) -> Self {
        self.pair(key, Datum::Array(texts.into_iter().map(|text| Datum::Text(text.to_owned())).collect()))
    }

    pub(crate) fn count(self, key: &str, count: u64) -> Self {
        self.pair(key, Datum::Unsigned(count))
    }

    /// Adds a tensor with these bytes, which need not fit its shape.
    pub(crate) fn tensor(mut self, name: &str, shape: &[u64], kind: u32, bytes: Vec<u8>) -> Self {
        self.tensors.push(Tensor { name: name.to_owned(), shape: shape.to_vec(), kind, bytes });
        self
    }

    /// Adds a tensor of f32 values.
    pub(crate) fn floats(self, name: &str, shape: &[u64], values: impl IntoIterator<Item = f32>) -> Self {
        self.tensor(name, shape, 0, values.into_iter().flat_map(f32::to_le_bytes).collect())
    }

    pub(crate) fn bytes(&self) -> Vec<u8> {
        let mut offsets = Vec::new();
        let mut end = 0;
        for tensor in &self.tensors {
            offsets.push(end);
            end += tensor.bytes.len().next_multiple_of(ALIGNMENT) as u64;
        }
        self.bytes_with_offsets(&offsets)
    }

    /// The bytes of the file, with `offsets` as the tensors' offsets in its header.
    pub(crate) fn bytes_with_offsets(&self, offsets: &[u64]) -> Vec<u8> {
        let mut out = self.header(offsets);
        for tensor in &self.tensors {
            out.resize(out.len().next_multiple_of(ALIGNMENT), 0);
            out.extend(&tensor.bytes);
        }
        out.resize(out.len().next_multiple_of(ALIGNMENT), 0);
        out
    }

    pub(crate) fn write(&self, folder: &Path) -> PathBuf {
        let path = folder.join("test.gguf");
        std::fs::write(&path, self.bytes()).expect("the temporary folder can be written");
        path
    }

    fn header(&self, offsets: &[u64]) -> Vec<u8> {
        let mut out = b"GGUF".to_vec();
        out.extend(3_u32.to_le_bytes());
        out.extend((self.tensors.len() as u64).to_le_bytes());
        out.extend((self.pairs.len() as u64).to_le_bytes());
        for (key, value) in &self.pairs {
            put_text(&mut out, key);
            out.extend(kind_of(value).to_le_bytes());
            put_value(&mut out, value);
        }
        for (tensor, offset) in self.tensors.iter().zip(offsets) {
            put_text(&mut out, &tensor.name);
            out.extend((tensor.shape.len() as u32).to_le_bytes());
            tensor.shape.iter().rev().for_each(|size| out.extend(size.to_le_bytes()));
            out.extend(tensor.kind.to_le_bytes());
            out.extend(offset.to_le_bytes());
        }
        out
    }
}

fn put_text(out: &mut Vec<u8>, text: &str) {
    out.extend((text.len() as u64).to_le_bytes());
    out.extend(text.as_bytes());
}

fn kind_of(value: &Datum) -> u32 {
    match value {
        Datum::Unsigned(_) => 10,
        Datum::Signed(_) => 11,
        Datum::Float(_) => 12,
        Datum::Bool(_) => 7,
        Datum::Text(_) => 8,
        Datum::Array(_) => 9,
    }
}

fn put_value(out: &mut Vec<u8>, value: &Datum) {
    match value {
        Datum::Unsigned(value) => out.extend(value.to_le_bytes()),
        Datum::Signed(value) => out.extend(value.to_le_bytes()),
        Datum::Float(value) => out.extend(value.to_le_bytes()),
        Datum::Bool(value) => out.push(u8::from(*value)),
        Datum::Text(text) => put_text(out, text),
        Datum::Array(values) => {
            out.extend(values.first().map_or(8, kind_of).to_le_bytes());
            out.extend((values.len() as u64).to_le_bytes());
            values.iter().for_each(|value| put_value(out, value));
        }
    }
}
