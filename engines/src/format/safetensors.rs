//! safetensors: one file, or an index of several.
//!
//! ```text
//! header length:u64 | JSON {name: {dtype, shape, data_offsets:[start, end)}, "__metadata__": …} | data
//! ```
//! Source of the format: the README of huggingface/safetensors. This module parses the header itself, so that every
//! error names its file and tensor, and the data stays in the mapped file.

use super::tensor::{check_disjoint, length_bytes};
use super::{ElementType, FormatError, SourceFile, TensorInfo};
use serde::Deserialize;
use std::collections::BTreeMap;
use std::ops::Range;
use std::path::{Path, PathBuf};

/// The format's own limit of a header.
const HEADER_BYTES_MAX: u64 = 100_000_000;
/// The largest published models have under 200 files.
const FILES_MAX: usize = 4096;
/// The file of a model in one file.
const WHOLE_FILE: &str = "model.safetensors";
/// An index is a list of names; a larger file is damaged.
const INDEX_BYTES_MAX: u64 = 100_000_000;

/// The tensors of one model, from one file or several.
#[derive(Debug, Clone)]
pub struct SafeTensors {
    /// The files, sorted by path.
    pub files: Vec<SourceFile>,
    /// By name: index into `files`, and the location in that file.
    pub tensors: BTreeMap<String, (usize, TensorInfo)>,
    /// The same for tensors of plain bytes (`U8`). Their names tell what the bytes mean.
    pub bytes: BTreeMap<String, (usize, BytesInfo)>,
}

/// The location of a tensor of bytes in its file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BytesInfo {
    /// Sizes of the dimensions, rows first.
    pub shape: Vec<usize>,
    /// Offset of the first byte from the start of the file.
    pub offset_bytes: u64,
}

/// One tensor as a header describes it.
enum Described {
    Numbers(TensorInfo),
    Bytes(BytesInfo),
}

#[derive(Deserialize)]
struct Index {
    weight_map: BTreeMap<String, String>,
}

#[derive(Deserialize)]
struct HeaderEntry {
    dtype: String,
    shape: Vec<usize>,
    data_offsets: (u64, u64),
}

impl SafeTensors {
    /// Opens the tensors in `folder`: of `model.safetensors`, else of the files that `model.safetensors.index.json`
    /// names, as transformers chooses them; without both, of every other file that may be a part of a model.
    ///
    /// # Errors
    /// [`FormatError`] if a file is missing or damaged, or has a type that no engine supports.
    pub fn open_folder(folder: &Path) -> Result<Self, FormatError> {
        let paths = file_paths(folder)?;
        let mut all = Self { files: Vec::new(), tensors: BTreeMap::new(), bytes: BTreeMap::new() };
        for path in paths {
            let file = SourceFile::open(&path)?;
            let number = all.files.len();
            for (name, described) in read_header(&file)? {
                let is_new = match described {
                    Described::Numbers(info) => all.tensors.insert(name.clone(), (number, info)).is_none(),
                    Described::Bytes(info) => all.bytes.insert(name.clone(), (number, info)).is_none(),
                };
                if !is_new {
                    return Err(FormatError::BadTensor {
                        path,
                        tensor: name,
                        what: "the name occurs in two files".to_owned(),
                    });
                }
            }
            all.files.push(file);
        }
        Ok(all)
    }
}

/// Files beside a model's own: Mistral's copy of the weights, and adapters.
const OTHER_FILES: [&str; 2] = ["consolidated", "adapter_model"];

fn file_paths(folder: &Path) -> Result<Vec<PathBuf>, FormatError> {
    let index = folder.join("model.safetensors.index.json");
    let mut names: Vec<String> = if folder.join(WHOLE_FILE).is_file() {
        vec![WHOLE_FILE.to_owned()]
    } else if index.is_file() {
        indexed_names(&index)?
    } else {
        let listing = std::fs::read_dir(folder).map_err(|e| FormatError::io(folder, &e))?;
        // macOS puts hidden files beside those that it copies.
        let is_part = |name: &String| {
            let is_other = OTHER_FILES.iter().any(|other| name.starts_with(other));
            name.ends_with(".safetensors") && !name.starts_with('.') && !is_other
        };
        listing.filter_map(|entry| entry.ok()?.file_name().into_string().ok()).filter(is_part).collect()
    };
    names.sort();
    names.dedup();
    if names.is_empty() || names.len() > FILES_MAX {
        return Err(FormatError::NotAModel {
            path: folder.to_owned(),
            reason: format!("{} safetensors files", names.len()),
        });
    }
    Ok(names.into_iter().map(|name| folder.join(name)).collect())
}

fn indexed_names(index: &Path) -> Result<Vec<String>, FormatError> {
    let text = read_text(index, INDEX_BYTES_MAX)?;
    let parsed: Index = serde_json::from_str(&text).map_err(|e| FormatError::Malformed {
        path: index.to_owned(),
        what: format!("it is not a safetensors index: {e}"),
    })?;
    let names: Vec<String> = parsed.weight_map.into_values().collect();
    // A name with a folder in it could point to any file on the disk.
    match names.iter().find(|name| name.contains(['/', '\\']) || name.starts_with('.')) {
        Some(name) => {
            Err(FormatError::Malformed { path: index.to_owned(), what: format!("`{name}` is not a file name") })
        }
        None => Ok(names),
    }
}

/// Reads the text of a file of at most `limit` bytes.
pub(crate) fn read_text(path: &Path, limit: u64) -> Result<String, FormatError> {
    let length = std::fs::metadata(path).map_err(|e| FormatError::io(path, &e))?.len();
    if length > limit {
        return Err(FormatError::TooLarge {
            path: path.to_owned(),
            what: "its length".to_owned(),
            claimed: length,
            limit,
        });
    }
    std::fs::read_to_string(path).map_err(|e| FormatError::io(path, &e))
}

fn read_header(file: &SourceFile) -> Result<BTreeMap<String, Described>, FormatError> {
    let malformed = |what: String| FormatError::Malformed { path: file.path().to_owned(), what };
    let mut length = [0; 8];
    length.copy_from_slice(&file.read(0..8, "the header's length")?);
    let header_length = u64::from_le_bytes(length);
    if header_length > HEADER_BYTES_MAX {
        return Err(FormatError::TooLarge {
            path: file.path().to_owned(),
            what: "the header's length".to_owned(),
            claimed: header_length,
            limit: HEADER_BYTES_MAX,
        });
    }
    let data_start = 8 + header_length;
    let header = file.read(8..data_start, "the header")?;
    let entries: BTreeMap<String, serde_json::Value> =
        serde_json::from_slice(&header).map_err(|e| malformed(format!("the header is not JSON: {e}")))?;
    let mut tensors = BTreeMap::new();
    let mut extents = Vec::new();
    for (name, entry) in entries {
        if name == "__metadata__" {
            continue;
        }
        let entry: HeaderEntry = serde_json::from_value(entry).map_err(|e| FormatError::BadTensor {
            path: file.path().to_owned(),
            tensor: name.clone(),
            what: e.to_string(),
        })?;
        let (described, extent) = place(file, &name, entry, data_start)?;
        extents.push((extent.start, extent.end, name.clone()));
        tensors.insert(name, described);
    }
    check_disjoint(&mut extents).map_err(|(tensor, what)| FormatError::BadTensor {
        path: file.path().to_owned(),
        tensor,
        what,
    })?;
    Ok(tensors)
}

fn place(
    file: &SourceFile,
    name: &str,
    entry: HeaderEntry,
    data_start: u64,
) -> Result<(Described, Range<u64>), FormatError> {
    let bad = |what: String| FormatError::BadTensor { path: file.path().to_owned(), tensor: name.to_owned(), what };
    let element = ElementType::from_safetensors(&entry.dtype);
    if element.is_none() && entry.dtype != "U8" {
        return Err(FormatError::UnsupportedType {
            path: file.path().to_owned(),
            tensor: name.to_owned(),
            element: entry.dtype,
        });
    }
    let (start, end) = entry.data_offsets;
    let expected = match element {
        Some(element) => length_bytes(element, &entry.shape),
        None => entry.shape.iter().try_fold(1, |bytes: u64, &size| bytes.checked_mul(size as u64)),
    };
    let expected = expected.ok_or_else(|| bad("its shape overflows".to_owned()))?;
    if end.checked_sub(start) != Some(expected) {
        let what = format!("bytes {start}..{end} do not fit {} of the shape {:?}", entry.dtype, entry.shape);
        return Err(bad(what));
    }
    if data_start.checked_add(end).is_none_or(|last| last > file.length_bytes()) {
        return Err(bad("it ends after the file's end: the file is cut short".to_owned()));
    }
    let (shape, offset_bytes) = (entry.shape, data_start + start);
    let described = match element {
        Some(element) => Described::Numbers(TensorInfo { element, shape, offset_bytes, length_bytes: expected }),
        None => Described::Bytes(BytesInfo { shape, offset_bytes }),
    };
    Ok((described, offset_bytes..offset_bytes + expected))
}

#[cfg(test)]
mod tests;
