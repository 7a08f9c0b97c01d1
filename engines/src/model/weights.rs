//! Which tensor plays which role, and the bytes it is stored in.
//!
//! Families name tensors; the decoder asks for roles. A role's tensor may be a run of rows of a fused tensor.

use crate::format::{ElementType, FormatError, Mapped, MappedBytes, TensorInfo};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::path::PathBuf;

/// What a tensor is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub enum Role {
    TokenEmbedding,
    OutputNorm,
    /// The language-model head; the same bytes as [`Role::TokenEmbedding`] where the two are tied.
    Output,
    Layer(u32, LayerRole),
}

/// What a tensor of one layer is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub enum LayerRole {
    AttentionNorm,
    Query,
    Key,
    Value,
    QueryBias,
    KeyBias,
    ValueBias,
    QueryNorm,
    KeyNorm,
    AttentionOutput,
    AttentionOutputBias,
    PostAttentionNorm,
    FeedForwardNorm,
    Gate,
    Up,
    Down,
    GateBias,
    UpBias,
    DownBias,
    PostFeedForwardNorm,
}

/// A tensor's place: whole rows of `columns` values, in one run of bytes.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct TensorSlice {
    /// Name in its file, for errors.
    pub name: String,
    /// Index into [`WeightSource::files`].
    pub file: usize,
    pub element: ElementType,
    pub rows: usize,
    pub columns: usize,
    pub offset_bytes: u64,
    pub length_bytes: u64,
}

impl TensorSlice {
    /// All of a tensor. Vectors count as one row.
    pub fn whole(name: &str, file: usize, info: &TensorInfo) -> Self {
        let columns = info.shape.last().copied().unwrap_or(1);
        Self {
            name: name.to_owned(),
            file,
            element: info.element,
            rows: info.shape.iter().rev().skip(1).product(),
            columns,
            offset_bytes: info.offset_bytes,
            length_bytes: info.length_bytes,
        }
    }
}

/// A model's tensors as paths and byte ranges. Plain data.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct WeightSource {
    pub files: Vec<PathBuf>,
    pub tensors: BTreeMap<Role, TensorSlice>,
}

impl WeightSource {
    /// The roles that a shard of the layers `range`, out of `layer_count`, needs.
    pub fn roles_of(
        &self,
        range: std::ops::Range<usize>,
        layer_count: usize,
    ) -> impl Iterator<Item = (&Role, &TensorSlice)> {
        self.tensors.iter().filter(move |(role, _)| match role {
            Role::TokenEmbedding => range.start == 0,
            Role::OutputNorm | Role::Output => range.end == layer_count,
            Role::Layer(layer, _) => range.contains(&(*layer as usize)),
        })
    }

    /// Bytes in the files that a shard of the layers `range` takes. Tied embeddings count once for a shard that
    /// has both ends, and once each where they fall to two shards.
    pub fn shard_bytes(&self, range: std::ops::Range<usize>, layer_count: usize) -> u64 {
        let mut places = std::collections::BTreeSet::new();
        let slices = self.roles_of(range, layer_count).map(|(_, slice)| slice);
        slices.filter(|slice| places.insert((slice.file, slice.offset_bytes))).map(|slice| slice.length_bytes).sum()
    }
}

/// The files of a [`WeightSource`], opened to be read.
#[derive(Debug)]
pub struct WeightReader {
    files: Vec<Mapped>,
}

impl WeightReader {
    /// Opens all files. No tensor is read yet.
    pub fn open(source: &WeightSource) -> Result<Self, FormatError> {
        let files = source.files.iter().map(|path| Mapped::open(path)).collect::<Result<_, _>>()?;
        Ok(Self { files })
    }

    /// The bytes of `slice`.
    pub fn bytes(&self, slice: &TensorSlice) -> Result<MappedBytes<'_>, FormatError> {
        let file = self.file(slice)?;
        file.part(slice.offset_bytes..slice.offset_bytes.saturating_add(slice.length_bytes), &slice.name)
    }

    /// Says that `slice` has been copied and its pages need not stay resident.
    pub fn forget(&self, slice: &TensorSlice) {
        if let Ok(file) = self.file(slice) {
            file.forget(slice.offset_bytes..slice.offset_bytes + slice.length_bytes);
        }
    }

    /// The path of `slice`'s file, for errors.
    pub fn path(&self, slice: &TensorSlice) -> PathBuf {
        self.file(slice).map(|file| file.path().to_owned()).unwrap_or_default()
    }

    fn file(&self, slice: &TensorSlice) -> Result<&Mapped, FormatError> {
        self.files.get(slice.file).ok_or_else(|| FormatError::BadTensor {
            path: PathBuf::new(),
            tensor: slice.name.clone(),
            what: format!("file number {} is not in the source", slice.file),
        })
    }
}
