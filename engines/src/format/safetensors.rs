//! safetensors: one file, or an index of several.
//!
//! ```text
//! header length:u64 | JSON {name: {dtype, shape, data_offsets:[start, end)}, "__metadata__": …} | data
//! ```
//! Source of the format: the README of huggingface/safetensors. The header is read by us, so that every
//! error names its file and tensor, and the data stays where it lies.

use super::tensor::{check_disjoint, length_bytes};
use super::{ElementType, FormatError, Mapped, TensorInfo};
use serde::Deserialize;
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

/// The format's own limit.
const HEADER_BYTES_MAX: u64 = 100_000_000;
/// The largest published models have under 200 files.
const FILES_MAX: usize = 4096;
/// An index is a list of names; a larger one is damage.
const INDEX_BYTES_MAX: u64 = 100_000_000;

/// The tensors of one model, over one file or more.
#[derive(Debug, Clone)]
pub struct SafeTensors {
    pub files: Vec<Mapped>,
    /// By name: which of `files`, and where in it.
    pub tensors: BTreeMap<String, (usize, TensorInfo)>,
}

#[derive(Deserialize)]
struct Index {
    weight_map: BTreeMap<String, String>,
}

#[derive(Deserialize)]
struct Entry {
    dtype: String,
    shape: Vec<usize>,
    data_offsets: (u64, u64),
}

impl SafeTensors {
    /// Opens the tensors in `folder`: those of `model.safetensors.index.json` where there is one, else
    /// those of every `*.safetensors` file.
    ///
    /// # Errors
    /// [`FormatError`] where a file is missing, damaged, or has a type that no engine computes on.
    pub fn open_folder(folder: &Path) -> Result<Self, FormatError> {
        let paths = file_paths(folder)?;
        let mut files = Vec::new();
        let mut tensors = BTreeMap::new();
        for path in paths {
            let file = Mapped::open(&path)?;
            for (name, info) in read_header(&file)? {
                if tensors.insert(name.clone(), (files.len(), info)).is_some() {
                    return Err(FormatError::BadTensor {
                        path,
                        tensor: name,
                        what: "the name stands in two files".to_owned(),
                    });
                }
            }
            files.push(file);
        }
        Ok(Self { files, tensors })
    }
}

fn file_paths(folder: &Path) -> Result<Vec<PathBuf>, FormatError> {
    let index = folder.join("model.safetensors.index.json");
    let mut names: Vec<String> = if index.is_file() {
        indexed_names(&index)?
    } else {
        let listing = std::fs::read_dir(folder).map_err(|e| FormatError::io(folder, &e))?;
        listing
            .filter_map(|entry| entry.ok()?.file_name().into_string().ok())
            .filter(|name| name.ends_with(".safetensors"))
            .collect()
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
        what: format!("not an index of safetensors: {e}"),
    })?;
    let names: Vec<String> = parsed.weight_map.into_values().collect();
    // A name with a folder in it could point anywhere on the disk.
    match names.iter().find(|name| name.contains(['/', '\\']) || name.starts_with('.')) {
        Some(name) => {
            Err(FormatError::Malformed { path: index.to_owned(), what: format!("`{name}` is not a file name") })
        }
        None => Ok(names),
    }
}

/// The text of a file of at most `limit` bytes.
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

fn read_header(file: &Mapped) -> Result<BTreeMap<String, TensorInfo>, FormatError> {
    let malformed = |what: String| FormatError::Malformed { path: file.path().to_owned(), what };
    let mut length = [0; 8];
    length.copy_from_slice(file.slice(0..8, "the header's length")?);
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
    let header = file.slice(8..data_start, "the header")?;
    let entries: BTreeMap<String, serde_json::Value> =
        serde_json::from_slice(header).map_err(|e| malformed(format!("the header is not JSON: {e}")))?;
    let mut tensors = BTreeMap::new();
    let mut extents = Vec::new();
    for (name, entry) in entries {
        if name == "__metadata__" {
            continue;
        }
        let entry: Entry = serde_json::from_value(entry).map_err(|e| FormatError::BadTensor {
            path: file.path().to_owned(),
            tensor: name.clone(),
            what: e.to_string(),
        })?;
        let info = place(file, &name, entry, data_start)?;
        extents.push((info.offset_bytes, info.offset_bytes + info.length_bytes, name.clone()));
        tensors.insert(name, info);
    }
    check_disjoint(&mut extents).map_err(|(tensor, what)| FormatError::BadTensor {
        path: file.path().to_owned(),
        tensor,
        what,
    })?;
    Ok(tensors)
}

fn place(file: &Mapped, name: &str, entry: Entry, data_start: u64) -> Result<TensorInfo, FormatError> {
    let bad = |what: String| FormatError::BadTensor { path: file.path().to_owned(), tensor: name.to_owned(), what };
    let element = ElementType::from_safetensors(&entry.dtype).ok_or_else(|| FormatError::UnsupportedType {
        path: file.path().to_owned(),
        tensor: name.to_owned(),
        element: entry.dtype.clone(),
    })?;
    let (start, end) = entry.data_offsets;
    let expected = length_bytes(element, &entry.shape).ok_or_else(|| bad("its shape overflows".to_owned()))?;
    if end.checked_sub(start) != Some(expected) {
        return Err(bad(format!("bytes {start}..{end} do not fit {element} of the shape {:?}", entry.shape)));
    }
    match data_start.checked_add(end) {
        Some(last) if last <= file.length_bytes() => {
            Ok(TensorInfo { element, shape: entry.shape, offset_bytes: data_start + start, length_bytes: expected })
        }
        _ => Err(bad("it ends behind the file's end: the file is cut short".to_owned())),
    }
}

#[cfg(test)]
mod tests;
