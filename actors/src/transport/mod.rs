//! Messages between nodes, and callbacks between actors of one node.
//!
//! ```text
//! Router ─ControlMessage─► peer's Control ─ReceivedMessage─► the actor that handles it
//! ```
//! - [`protocol`]: what nodes say to each other;
//! - [`router`]: where a message to a node goes;
//! - [`control`]: the one actor that other nodes can reach;
//! - [`callback`]: how an actor reports to its creator.

pub(crate) mod callback;
pub(crate) mod control;
pub(crate) mod protocol;
pub(crate) mod router;
