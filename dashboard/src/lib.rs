//! The HTTP interface between clients and a node.
//!
//! ```text
//! TCP, Unix socket ─► api (guard ─► router ─► OpenAI's schemas) ─► NodeHandle
//! ```
//! This crate knows no actors and no engines: it calls the node only through the handle.

pub mod api;
