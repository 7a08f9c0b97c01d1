//! The HTTP API: one router, served over TCP and over a Unix socket.
//!
//! ```text
//! TCP ─► connections ─► guard (host, origin, key) ─┐
//! Unix socket (its folder's owner) ─► connections ─┴► router ─► openai/, native, status, metrics ─► NodeHandle
//! ```
//! Only the owner of the node's data can open the socket, so requests over the socket need no key. All input is
//! bounded; errors have OpenAI's format.

mod answer;
mod body;
mod connections;
mod context;
mod error;
mod guard;
mod metrics;
mod native;
mod openai;
mod paths;
mod places;
mod router;
mod serve;
mod socket;
mod status;

pub use answer::{AnswerParser, Call, Delta};
pub use error::{ApiError, ErrorBody, ErrorDetail};
pub use native::{Eviction, GenerateLine};
pub use serve::{ApiConfig, ApiListeners, ServeError, Served, listen};
pub use socket::SocketPlace;
