//! The shards that this node hosts, the devices that they run on, and the engines' threads.
//!
//! ```text
//! owner's order ─► Worker (shards.rs) ─► Device ─► Shard ─► engine's thread ─rows─► next shard, or a link to another
//! node
//! ```

pub(crate) mod device;
pub(crate) mod discovery;
mod draws;
pub(crate) mod engine_thread;
mod heartbeat;
mod killer;
pub(crate) mod links;
pub(crate) mod machine;
mod memory_guard;
mod probe;
mod shard;
mod shards;

#[cfg(test)]
pub(crate) use shard::Shard;
pub(crate) use shards::{LocalDevice, Worker, WorkerArgs, WorkerFact, WorkerMsg, WorkerRef};
