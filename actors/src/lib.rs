//! The runtime: supervised actors that own devices, shards, models and requests.
//!
//! ```text
//! NodeHandle ─► Gateway ─► (Planner ─► Models) ─► Instance ─frames─► engine threads ─tokens─► Instance ─► Generation
//!                               └► Device ─► Shard                                    facts ─► Node ─► Subscription
//! ```
//! [`core`] decides and is pure; the actors carry out. Outsiders hold a [`NodeHandle`] and never an actor.

pub mod core;
pub mod device;
pub mod gateway;
mod handle;
pub mod host;
pub mod instance;
pub mod models;
pub mod monitor;
pub mod node;
pub mod planner;
pub mod request;
pub mod shard;
pub mod tokenizer;

pub use handle::{Generation, Lagged, NodeHandle, Subscription};
pub use node::{NodeConfig, start};
pub use request::{GenerateRequest, Generated, ModelSpec, Prompt, RequestError};
