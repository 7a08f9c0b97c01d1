//! Readers of model files. They do not trust what the files say.
//!
//! ```text
//! path ─► SourceFile (byte ranges) ─► Gguf / SafeTensors (names, types, shapes, byte ranges)
//!                                  └► TensorBytes: one tensor's rows, read as a backend copies them
//! ```
//! Readers parse headers only: a tensor's bytes are first read when the shard that owns the tensor loads.
//! Every count and offset in a header is checked against the file's size before it is used.

pub mod blocks;
mod element;
mod error;
pub mod gguf;
#[cfg(test)]
pub(crate) mod gguf_writer;
pub(crate) mod quantise;
pub mod safetensors;
mod source_file;
mod tensor;

pub use element::ElementType;
pub use error::FormatError;
pub use gguf::{Gguf, Value};
pub use safetensors::SafeTensors;
pub use source_file::{SourceFile, TensorBytes, Writers};
pub use tensor::TensorInfo;
