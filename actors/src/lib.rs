//! The runtime: supervised actors that own devices, shards, models and requests.
//!
//! ```text
//! NodeHandle ─► Gateway ─► (Planner ─► Models) ─► Instance ─frames─► engine threads ─tokens─► Instance ─► Generation
//!                               └► Device ─► Shard                                    facts ─► Node ─► Subscription
//! ```
//! [`core`] decides and is pure; the actors carry out. Outsiders hold a [`NodeHandle`] and never an actor.

mod cluster;
mod control;
pub mod core;
mod device;
mod gateway;
mod generation;
mod handle;
mod host;
mod instance;
mod links;
mod machine;
pub mod models;
mod monitor;
mod node;
mod outlet;
mod planner;
mod post;
mod protocol;
mod request;
mod room;
mod shard;
mod stages;
mod subscription;
mod tokenizer;

// What requests and answers are made of.
pub use cluster::Evicted;
pub use exo_engines::sampler::{Sampled, SamplingParams};
pub use exo_engines::template::{Conversation, FunctionCall, Message, Role, ToolCall};
pub use exo_net::{NodeId, WireType};
pub use generation::Generation;
pub use handle::{NodeHandle, start};
pub use machine::host_name;
pub use node::{Joined, NodeConfig};
pub use planner::{PlannerLimits, RunningModel};
pub use request::{GenerateRequest, Generated, ModelSpec, Prompt, RequestError, fresh_seed};
pub use subscription::{Lagged, Subscription};
