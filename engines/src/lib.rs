//! Models and kernels: from a file's bytes to a token.
//!
//! ```text
//! format (bytes) ─► model (architecture, roles of tensors, tokenizer) ─► decoder over a backend ─► logits ─► sampler
//! ```
//! Synchronous. Nothing here knows an actor, a network or a clock but to time itself; threads are an engine's own.
//! [`engine`] is the port that the actors use; [`backend`] is what a device implements.

pub mod backend;
pub mod candle;
pub mod collective;
pub mod cpu;
pub mod decoder;
pub mod engine;
mod error;
pub mod expert_routing;
pub mod format;
pub mod model;
pub mod sampler;
mod simd;
pub mod template;
pub mod tokenizer;

pub use engine::{Engine, EngineFactory};
pub use error::{EngineError, ErrorClass};
