//! Files of models, read without trusting them.
//!
//! ```text
//! path ─► Mapped (read-only bytes) ─► Gguf / SafeTensors (names, types, shapes, byte ranges)
//!                                  └► MappedBytes: one tensor's, while a backend takes them over
//! ```
//! Readers look at headers only: a tensor's bytes are touched when the shard that owns it loads.
//! Every count and offset in a header is checked against the file's size before it is used.

pub mod blocks;
mod element;
mod error;
pub mod gguf;
#[cfg(test)]
pub(crate) mod gguf_writer;
mod mapped;
pub mod safetensors;

pub use element::ElementType;
pub use error::FormatError;
pub use gguf::{Gguf, Value};
pub use mapped::{Mapped, MappedBytes};
pub use safetensors::SafeTensors;

/// Where one tensor lies in its file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TensorInfo {
    /// How its numbers are stored.
    pub element: ElementType,
    /// Rows first, innermost dimension last (the order of safetensors; GGUF's is reversed on reading).
    pub shape: Vec<usize>,
    /// First byte, from the start of the file.
    pub offset_bytes: u64,
    /// Length.
    pub length_bytes: u64,
}
