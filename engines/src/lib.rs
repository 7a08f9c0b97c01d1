//! Models and kernels: turns a model file's bytes into tokens.
//!
//! ```text
//! format (bytes) ─► model (architecture, roles of tensors, tokenizer) ─► decoder over a backend ─► logits ─► sampler
//! ```
//! The crate is synchronous. It knows no actors and no network, and reads the clock only to time itself; each engine
//! owns its threads. Actors use the port [`engine`]; a device implements [`backend`].

mod activation_bits;
pub mod arithmetic;
pub mod backend;
pub mod candle;
pub mod collective;
pub mod cpu;
pub mod decoder;
mod device;
pub mod engine;
mod error;
pub mod expert_routing;
pub mod format;
pub mod hardware;
mod kv_element;
mod logits;
pub mod model;
pub mod opencl;
pub mod profile;
pub mod reference;
pub mod sampler;
mod scores;
mod simd;
pub mod template;
pub mod tokenizer;
#[cfg(unix)]
pub mod worker;

pub use engine::{Engine, EngineFactory};
pub use error::{DeviceFault, EngineError, ErrorClass};
