//! What clients see of a node.
//!
//! ```text
//! TCP, Unix socket ─► api (guard ─► router ─► OpenAI's shapes) ─► NodeHandle
//! ```
//! Nothing here knows an actor or an engine: all goes through the handle.

pub mod api;
