//! The decisions of the actors, as pure code.
//!
//! No actor, clock, I/O or thread: functions take inputs and the time, and return effects, so property tests and seeded
//! simulations can test all of it.
//!
//! What a user asks for and sees:
//! - [`request`]: requests to generate, events and errors; [`model_error`]: why a model's files are not available;
//! - [`spec`]: which model is asked for, and how it runs; [`context`]: how many tokens a sequence may have;
//! - [`status`], [`node_status`]: the reported status of machines, instances and the node; [`fact`]: what changes it.
//!
//! What runs where:
//! - [`speed`]: how fast a device is, and how certain that is;
//! - [`offer`]: what a device offers to shards, and the memory that devices share;
//! - [`members`]: the report of each member; [`clique`]: which members plan together;
//! - [`desired`]: the deployments that are to run, as every member knows them;
//! - [`plan`]: chooses the placement of a model on devices;
//! - [`leader`]: places, repairs, rebalances and stops deployments.
//!
//! How it runs:
//! - `pipeline`, `stage`: the bring-up of one placement, and the reports of its stages;
//! - [`scheduler`]: turns requests and results into steps and tokens;
//! - [`restart_policy`]: decides what to do about a failed shard; [`device_health`]: when a device is left alone;
//!   `failover`: which engines a shard has, where, and which of them serves;
//! - [`watchdog`]: how long work may take before it counts as hung; [`step_times`]: how long steps do take;
//!   [`memory_watch`]: memory that grows without a cause.

pub mod clique;
pub mod context;
pub mod desired;
pub mod device_health;
pub mod fact;
pub(crate) mod failover;
pub mod leader;
pub mod members;
pub mod memory_watch;
pub mod model_error;
pub mod node_status;
pub mod offer;
pub(crate) mod pipeline;
pub mod plan;
pub mod request;
pub mod restart_policy;
pub mod scheduler;
pub mod spec;
pub mod speed;
pub(crate) mod stage;
pub mod status;
pub mod step_times;
#[cfg(test)]
mod tests;
pub mod watchdog;
