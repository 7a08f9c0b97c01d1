//! The runtime: supervised actors that own devices, shards, models and requests.
//!
//! ```text
//! NodeHandle ─► gateway ─► planner ─► models          the model is resolved and placed
//!                  │          └─► head ─► worker       the placement's shards are loaded and connected
//!                  └─request─► head ─frames─► engine threads ─tokens─► head ─► Generation
//! ```
//! [`core`] is pure and makes the decisions; the actors carry them out. A module imports only later ones of this list:
//! `node`, `cluster`, `gateway` and `monitor`, `planner`, `head`, `worker`, `models`, `transport`, `core`. Code outside
//! this crate holds a [`NodeHandle`], never an actor.

mod cluster;
pub mod core;
mod gateway;
mod head;
pub mod models;
mod monitor;
mod node;
mod planner;
mod transport;
mod worker;

pub use cluster::Evicted;
pub use core::request::{Answerer, GenerateRequest, Generated, ModelSpec, Prompt, RequestError};
// The types of requests and answers.
pub use exo_engines::sampler::{Sampled, SamplingParams};
pub use exo_engines::template::{Conversation, FunctionCall, Message, Role, ToolCall};
pub use exo_net::{NodeId, WireType};
pub use gateway::Generation;
pub use node::{ClusterConfig, Lagged, NodeConfig, NodeHandle, Subscription, start};
pub use planner::{PlannerLimits, RunningModel, fresh_seed};
pub use transport::protocol::{Revision, Revisions};
pub use worker::discovery::{Discovery, ask_runtime, discover};
pub use worker::machine::{host_name, measure_machine};
