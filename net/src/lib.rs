//! Who a node is.
//!
//! Today this crate holds a node's identity; the transport between nodes will stand beside it. It knows no engine
//! and no model.

mod identity;

pub use identity::{Identity, IdentityError, NodeId};
