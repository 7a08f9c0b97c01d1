//! A model's files in pieces, so that a node that runs some layers receives only the bytes of those layers.
//!
//! ```text
//! file  = outline (headers, everything before the first tensor) | tensor | tensor | …
//! piece = at most 8 MiB of one tensor, with its padding
//! ```
//! Pieces follow from the outlines alone: two nodes with equal outlines number them alike. A file that has its outline,
//! and holes in place of tensors, opens like the whole file.

use super::{Layout, ModelFiles, TensorSlice, TokenizerSource, WeightSource};
use crate::format::{FormatError, Gguf, SafeTensors};
use std::collections::BTreeSet;
use std::ops::Range;
use std::path::{Path, PathBuf};

/// The files of a model folder besides its safetensors.
pub const FOLDER_FILES: [&str; 7] = [
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "model.safetensors.index.json",
];

/// The most bytes of a piece. A whole piece is held in memory while it is checked.
const PIECE_BYTES_MAX: u64 = 8 << 20;

/// One file of a model.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PartedFile {
    /// The file's path on this machine.
    pub path: PathBuf,
    /// The file's length.
    pub length_bytes: u64,
    /// Offsets of the tensors, in order. Each tensor extends to the next one, the last to the end of the file.
    tensors: Vec<u64>,
}

impl PartedFile {
    /// Bytes before the first tensor; all bytes of a file without tensors.
    pub fn outline_bytes(&self) -> u64 {
        self.tensors.first().copied().unwrap_or(self.length_bytes)
    }

    fn tensor_at(&self, offset_bytes: u64) -> Option<Range<u64>> {
        let behind = self.tensors.partition_point(|&start| start <= offset_bytes);
        let start = *self.tensors.get(behind.checked_sub(1)?)?;
        Some(start..self.tensors.get(behind).copied().unwrap_or(self.length_bytes))
    }
}

/// A byte range in a model's files.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Piece {
    /// Index into [`Pieces::files`].
    pub file: usize,
    /// Offset of the first byte from the start of the file.
    pub offset_bytes: u64,
    /// Length of the range, 1 byte to 8 MiB.
    pub length_bytes: u64,
}

/// All files of a model, and the pieces of their tensors.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Pieces {
    /// Sorted by path.
    pub files: Vec<PartedFile>,
    /// Sorted by file and offset.
    pub pieces: Vec<Piece>,
}

impl Pieces {
    /// Divides the files of `model`, after reading their headers again.
    ///
    /// # Errors
    /// [`FormatError`] if a file has changed, or no longer exists.
    pub fn of(model: &ModelFiles) -> Result<Self, FormatError> {
        match &model.tokenizer {
            TokenizerSource::Gguf(_) => Ok(Self::in_files(vec![gguf(&model.path)?])),
            TokenizerSource::Folder(folder) => Self::of_folder(folder),
        }
    }

    /// Divides the files of a folder of safetensors, of any model.
    ///
    /// # Errors
    /// [`FormatError`] if a header is damaged.
    pub fn of_folder(folder: &Path) -> Result<Self, FormatError> {
        Ok(Self::in_files(parted_folder(folder)?))
    }

    fn in_files(mut files: Vec<PartedFile>) -> Self {
        files.sort_by(|a, b| a.path.cmp(&b.path));
        let mut pieces = Vec::new();
        for (file, parted) in files.iter().enumerate() {
            let ends = parted.tensors.iter().skip(1).chain([&parted.length_bytes]);
            for (&start, &end) in parted.tensors.iter().zip(ends) {
                let starts = (start..end).step_by(PIECE_BYTES_MAX as usize);
                pieces.extend(starts.map(|offset_bytes| {
                    let length_bytes = PIECE_BYTES_MAX.min(end - offset_bytes);
                    Piece { file, offset_bytes, length_bytes }
                }));
            }
        }
        Self { files, pieces }
    }

    /// The indices into [`Pieces::pieces`] from which a shard of the layers `range`, out of `layer_count`, is loaded.
    pub fn of_shard(&self, weights: &WeightSource, range: Range<usize>, layer_count: usize) -> BTreeSet<u32> {
        let slices = weights.roles_of(range, layer_count).map(|(_, slice)| slice);
        let places = slices.flat_map(|slice| {
            places(slice).into_iter().filter_map(|(file, offset)| Some((weights.files.get(file)?, offset)))
        });
        let tensors: BTreeSet<(usize, u64, u64)> = places
            .filter_map(|(path, offset)| {
                let file = self.files.iter().position(|file| file.path == *path)?;
                let tensor = self.files[file].tensor_at(offset)?;
                Some((file, tensor.start, tensor.end))
            })
            .collect();
        tensors.into_iter().flat_map(|(file, start, end)| self.within(file, start..end)).collect()
    }

    fn within(&self, file: usize, range: Range<u64>) -> impl Iterator<Item = u32> + use<> {
        let at = |offset: u64| self.pieces.partition_point(|piece| (piece.file, piece.offset_bytes) < (file, offset));
        at(range.start) as u32..at(range.end) as u32
    }
}

/// The offsets of the values of `slice`, as (file, offset): one, or two if the scales are stored separately.
fn places(slice: &TensorSlice) -> Vec<(usize, u64)> {
    let values = (slice.file, slice.offset_bytes);
    match slice.layout {
        Layout::Rows | Layout::Strided { .. } => vec![values],
        Layout::Mxfp4Apart { scales_file, scales_offset_bytes, .. } => {
            vec![values, (scales_file, scales_offset_bytes)]
        }
    }
}

fn gguf(path: &Path) -> Result<PartedFile, FormatError> {
    let gguf = Gguf::open(path)?;
    let tensors = gguf.tensors.values().map(|info| info.offset_bytes);
    Ok(parted(path, gguf.file.length_bytes(), tensors))
}

fn parted_folder(folder: &Path) -> Result<Vec<PartedFile>, FormatError> {
    let found = SafeTensors::open_folder(folder)?;
    let mut files = Vec::new();
    for (number, file) in found.files.iter().enumerate() {
        let numbers = found.tensors.values().map(|(of, info)| (*of, info.offset_bytes));
        let bytes = found.bytes.values().map(|(of, info)| (*of, info.offset_bytes));
        let starts = numbers.chain(bytes).filter(|(of, _)| *of == number).map(|(_, offset)| offset);
        files.push(parted(file.path(), file.length_bytes(), starts));
    }
    for name in FOLDER_FILES {
        let path = folder.join(name);
        if let Ok(metadata) = std::fs::metadata(&path) {
            files.push(PartedFile { path, length_bytes: metadata.len(), tensors: Vec::new() });
        }
    }
    Ok(files)
}

fn parted(path: &Path, length_bytes: u64, starts: impl Iterator<Item = u64>) -> PartedFile {
    // A tensor without values at the end of a file has no bytes.
    let starts: BTreeSet<u64> = starts.filter(|&start| start < length_bytes).collect();
    PartedFile { path: path.to_owned(), length_bytes, tensors: starts.into_iter().collect() }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::format::{ElementType, Writers};
    use crate::model::{LayerRole, Role};
    use std::collections::BTreeMap;

    fn slice(file: usize, offset_bytes: u64, length_bytes: u64) -> TensorSlice {
        TensorSlice {
            name: String::new(),
            file,
            element: ElementType::F32,
            rows: 1,
            columns: length_bytes as usize / 4,
            offset_bytes,
            length_bytes,
            layout: Layout::Rows,
            kept_as: ElementType::F32,
        }
    }

    /// A shard needs the pieces of its own layers, and of the embedding or the head if it has that end of the model.
    #[test]
    fn a_shard_needs_the_pieces_of_its_layers() {
        let path = PathBuf::from("m");
        let long = PIECE_BYTES_MAX + 64;
        // The embedding, which is also the head, two layer norms, and the output norm.
        let files = vec![parted(&path, 100 + long + 128 + 60, [100, 100 + long, 164 + long, 228 + long].into_iter())];
        assert_eq!(files[0].outline_bytes(), 100);
        let mut pieces = Vec::new();
        for (offset_bytes, length_bytes) in [(100, PIECE_BYTES_MAX), (100 + PIECE_BYTES_MAX, 64), (100 + long, 64)] {
            pieces.push(Piece { file: 0, offset_bytes, length_bytes });
        }
        pieces.push(Piece { file: 0, offset_bytes: 164 + long, length_bytes: 64 });
        pieces.push(Piece { file: 0, offset_bytes: 228 + long, length_bytes: 60 });
        let all = Pieces { files, pieces };
        let tensors = BTreeMap::from([
            (Role::TokenEmbedding, slice(0, 100, long)),
            (Role::Output, slice(0, 100, long)),
            (Role::Layer(0, LayerRole::AttentionNorm), slice(0, 100 + long, 60)),
            (Role::Layer(1, LayerRole::AttentionNorm), slice(0, 164 + long, 64)),
            (Role::OutputNorm, slice(0, 228 + long, 60)),
        ]);
        let weights = WeightSource { files: vec![path], tensors, writers: Writers::Nobody };
        let needed = |range| all.of_shard(&weights, range, 2).into_iter().collect::<Vec<_>>();
        assert_eq!(needed(0..1), [0, 1, 2]);
        assert_eq!(needed(1..2), [0, 1, 3, 4]);
        assert_eq!(needed(0..2), [0, 1, 2, 3, 4]);
    }
}
