//! What the actors decide, and nothing else.
//!
//! Pure: no actor, no clock, no I/O, no thread. Inputs go in, effects come out, time is an argument; so all of it is
//! tested by properties and by seeded simulation.
//!
//! - [`plan`]: model and devices in, placement out;
//! - [`spec`]: which model is asked for;
//! - [`state`]: how a machine and an instance are;
//! - [`desired`]: what is to run, as every member knows it;
//! - [`lead`]: what the leader decides;
//! - [`line`]: how far a placement's shards are;
//! - [`circle`]: who plans together;
//! - [`members`]: what members tell each other of themselves;
//! - [`patience`]: how long work may give no sign;
//! - [`schedule`]: requests and results in, steps and tokens out;
//! - [`supervise`]: failures in, what to do about them out;
//! - [`view`]: facts in, the state that people see out.

pub mod circle;
pub mod desired;
pub mod lead;
pub(crate) mod line;
pub mod members;
pub mod patience;
pub mod plan;
pub mod schedule;
#[cfg(test)]
mod simulation;
pub mod spec;
pub mod state;
pub mod supervise;
pub mod view;
