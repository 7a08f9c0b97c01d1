//! The tensor of each role, and the bytes in which it is stored.
//!
//! Families name tensors; the decoder asks for roles. A role's tensor may be some rows of a fused tensor, or strided
//! over one. The reader always returns contiguous rows.

use super::{Recipe, gather};
use crate::format::{ElementType, FormatError, SourceFile, TensorBytes, TensorInfo, Writers};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::path::PathBuf;

/// The purpose of a tensor.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub enum Role {
    /// The embedding table: `[vocabulary × hidden]`.
    TokenEmbedding,
    /// The norm before the head: `[hidden]`.
    OutputNorm,
    /// The language-model head, `[vocabulary × hidden]`; the bytes of [`Role::TokenEmbedding`] if the two are tied.
    Output,
    /// A tensor of the layer with this index, counted from 0.
    Layer(u32, LayerRole),
}

/// The purpose of a tensor of one layer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub enum LayerRole {
    /// The norm of attention's input: `[hidden]`.
    AttentionNorm,
    /// The query projection: `[query width × hidden]`.
    Query,
    /// The key projection: `[key/value width × hidden]`.
    Key,
    /// The value projection: `[key/value width × hidden]`.
    Value,
    /// The bias of the queries: `[query width]`.
    QueryBias,
    /// The bias of the keys: `[key/value width]`.
    KeyBias,
    /// The bias of the values: `[key/value width]`.
    ValueBias,
    /// The norm of the queries: `[head dimension]`, or `[query width]` if it spans all heads.
    QueryNorm,
    /// The norm of the keys: `[head dimension]`, or `[key/value width]` if it spans all heads.
    KeyNorm,
    /// The extra score of each query head: `[heads]`.
    Sinks,
    /// The output projection of attention: `[hidden × query width]`.
    AttentionOutput,
    /// The bias of attention's output: `[hidden]`.
    AttentionOutputBias,
    /// The norm of attention's output: `[hidden]`.
    PostAttentionNorm,
    /// The norm of the feed-forward's input: `[hidden]`.
    FeedForwardNorm,
    /// A tensor of a feed-forward without experts.
    Gated(Part),
    /// The router over the experts: `[experts × hidden]`.
    Router,
    /// The bias of the router: `[experts]`.
    RouterBias,
    /// A tensor of the expert with this index, counted from 0.
    Expert(u32, Part),
    /// The norm of the feed-forward's output: `[hidden]`.
    PostFeedForwardNorm,
}

/// A tensor of one gated feed-forward.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub enum Part {
    /// The gate projection: `[width × hidden]`.
    Gate,
    /// The up projection: `[width × hidden]`.
    Up,
    /// The down projection: `[hidden × width]`.
    Down,
    /// The bias of the gate projection: `[width]`.
    GateBias,
    /// The bias of the up projection: `[width]`.
    UpBias,
    /// The bias of the down projection: `[hidden]`.
    DownBias,
}

/// The location of a tensor: `rows` rows of `columns` values.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct TensorSlice {
    /// The tensor's name in its file, for errors.
    pub name: String,
    /// Index into [`WeightSource::files`].
    pub file: usize,
    /// The storage type in the file.
    pub element: ElementType,
    /// Number of rows; 1 for a vector.
    pub rows: usize,
    /// Values in a row.
    pub columns: usize,
    /// Offset of the first value from the start of the file.
    pub offset_bytes: u64,
    /// Length of all values, contiguous or not.
    pub length_bytes: u64,
    /// The layout of the rows in the file.
    pub layout: Layout,
    /// The type in which the engine keeps the tensor: its type in the file, or the target of quantisation on loading.
    pub kept_as: ElementType,
}

/// The layout of a tensor's rows in their file.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Layout {
    /// Contiguous rows.
    Rows,
    /// The dense value of row r, column c lies r · `row_step` + c · `column_step` values after the first.
    Strided {
        /// Values from a row to the next.
        row_step: u64,
        /// Values from a column to the next.
        column_step: u64,
    },
    /// MXFP4 as in checkpoints of gpt_oss. A row has sixteen bytes for each 32 values, two successive values in a
    /// byte, and starts `row_step` rows after the previous one. The scales have the same layout in another tensor.
    Mxfp4Apart {
        /// Stored rows from a row to the next.
        row_step: u64,
        /// Index of the scales' file into [`WeightSource::files`].
        scales_file: usize,
        /// Offset of the first scale from the start of that file.
        scales_offset_bytes: u64,
    },
}

impl TensorSlice {
    /// All of a tensor. A vector counts as one row.
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
            layout: Layout::Rows,
            kept_as: info.element,
        }
    }

    /// Bytes of the values in the type in which the engine keeps them.
    pub fn kept_bytes(&self) -> u64 {
        match self.kept_as == self.element {
            true => self.length_bytes,
            false => self.kept_as.row_bytes(self.columns).map_or(0, |bytes| (bytes * self.rows) as u64),
        }
    }
}

/// A model's tensors as paths and byte ranges. Plain data.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct WeightSource {
    /// Paths of the files with weights.
    pub files: Vec<PathBuf>,
    /// The location of each role's tensor.
    pub tensors: BTreeMap<Role, TensorSlice>,
    /// Who may write to the files while they are read.
    #[serde(default)]
    pub writers: Writers,
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

    /// Bytes in the files that a shard of the layers `range` loads. Tied embeddings count once for a shard that has
    /// both ends of the model, and once for each of two shards that have one end each.
    pub fn shard_bytes(&self, range: std::ops::Range<usize>, layer_count: usize) -> u64 {
        let mut places = std::collections::BTreeSet::new();
        let slices = self.roles_of(range, layer_count).map(|(_, slice)| slice);
        slices.filter(|slice| places.insert((slice.file, slice.offset_bytes))).map(|slice| slice.length_bytes).sum()
    }

    /// Marks dense matrices for quantisation on loading; returns whether there are any.
    #[must_use]
    pub(super) fn quantise(&mut self, recipe: Recipe) -> bool {
        let mut is_changed = false;
        for (role, slice) in &mut self.tensors {
            slice.kept_as = recipe.element_for(*role, slice);
            is_changed |= slice.kept_as != slice.element;
        }
        is_changed
    }
}

/// The files of a [`WeightSource`], opened for reading.
#[derive(Debug)]
pub struct WeightReader {
    files: Vec<SourceFile>,
}

impl WeightReader {
    /// Opens all files. No tensor is read yet.
    pub fn open(source: &WeightSource) -> Result<Self, FormatError> {
        let opened = source.files.iter().map(|path| SourceFile::open_beside(path, source.writers));
        let files = opened.collect::<Result<_, _>>()?;
        Ok(Self { files })
    }

    /// The rows of `slice`.
    pub fn bytes<'a>(&'a self, slice: &'a TensorSlice) -> Result<TensorBytes<'a>, FormatError> {
        let file = self.file(slice, slice.file)?;
        match slice.layout {
            Layout::Rows => {
                let range = slice.offset_bytes..slice.offset_bytes.saturating_add(slice.length_bytes);
                Ok(TensorBytes::InFile { file, range, name: &slice.name })
            }
            Layout::Strided { row_step, column_step } => {
                Ok(TensorBytes::Gathered(gather::strided(file, slice, row_step, column_step)?))
            }
            Layout::Mxfp4Apart { row_step, scales_file, scales_offset_bytes } => {
                let scales = self.file(slice, scales_file)?;
                Ok(TensorBytes::Gathered(gather::mxfp4(file, scales, slice, row_step, scales_offset_bytes)?))
            }
        }
    }

    /// The path of `slice`'s file, for errors.
    pub fn path(&self, slice: &TensorSlice) -> PathBuf {
        self.file(slice, slice.file).map(|file| file.path().to_owned()).unwrap_or_default()
    }

    fn file(&self, slice: &TensorSlice, number: usize) -> Result<&SourceFile, FormatError> {
        self.files.get(number).ok_or_else(|| FormatError::BadTensor {
            path: PathBuf::new(),
            tensor: slice.name.clone(),
            what: format!("the weight source has no file number {number}"),
        })
    }
}
