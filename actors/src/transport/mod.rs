//! Messages between nodes, and callbacks between actors of one node.
//!
//! ```text
//! Router ─ControlMessage─► peer's Control ─ReceivedMessage─► the actor that handles it
//! ```
//! - [`protocol`]: the messages that nodes exchange;
//! - [`router`]: the sender of messages to nodes;
//! - [`control`]: the only actor that other nodes can reach;
//! - [`callback`]: the way in which an actor reports to its creator.

pub(crate) mod callback;
pub(crate) mod control;
pub(crate) mod protocol;
pub(crate) mod router;
