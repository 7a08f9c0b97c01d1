//! The requests to the models actor.

use super::ModelName;
use crate::core::spec::FilesId;
use std::ops::Range;

/// A request for a model's files.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(crate) struct ModelRequest {
    /// The model's name, as the user wrote it: see [`ModelName`].
    pub(crate) model: String,
    /// The requested files; `None`: any files with that name.
    pub(crate) files: Option<FilesId>,
    pub(crate) extent: Extent,
}

impl ModelRequest {
    pub(super) fn name(&self) -> ModelName {
        ModelName::parse(&self.model)
    }
}

/// The part of a model's files that a caller needs.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(crate) enum Extent {
    /// The headers, from which the architecture and the tokenizer are read.
    Outline,
    /// The headers and the weights of these layers, with the embedding or the head if the range includes the first or
    /// last layer.
    Layers(Range<usize>),
    /// All files, from this machine or the model's sources.
    Whole,
}

/// Progress of a fetch from other nodes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Fetched {
    pub(crate) fetched_bytes: u64,
    pub(crate) total_bytes: u64,
}
