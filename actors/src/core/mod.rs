//! The decisions of the actors, without actors.
//!
//! Pure: no actor, no clock, no I/O, no thread. Inputs go in, effects come out, and time is an argument, so properties and
//! seeded simulation can test all of it.
//!
//! What a user asks for and sees:
//! - [`request`]: requests to generate, their events and errors; [`model_error`]: why a model's files cannot be had;
//! - [`spec`]: which model is asked for, and how it runs;
//! - [`status`], [`node_status`]: the reported status of machines, instances and the node.
//!
//! What runs where:
//! - [`members`]: what each member reports of itself; [`clique`]: which members plan together;
//! - [`desired`]: the deployments that are to run, as every member knows them;
//! - [`plan`]: a model and devices in, a placement out;
//! - [`leader`]: places, repairs, rebalances and stops deployments.
//!
//! How it runs:
//! - `pipeline`, `stage`: the bring-up of one placement, and what stages report;
//! - [`scheduler`]: requests and results in, steps and tokens out;
//! - [`restart_policy`]: a shard's failures in, what to do about them out;
//! - [`watchdog`]: how long work may take before it counts as hung.

pub mod clique;
pub mod desired;
pub mod leader;
pub mod members;
pub mod model_error;
pub mod node_status;
pub(crate) mod pipeline;
pub mod plan;
pub mod request;
pub mod restart_policy;
pub mod scheduler;
pub mod spec;
pub(crate) mod stage;
pub mod status;
#[cfg(test)]
mod tests;
pub mod watchdog;
