//! Where the time of an engine's steps goes.
//!
//! An engine counts calls, time and work of each [`Part`] of a step. Reading the clock costs some tens of nanoseconds a
//! part, so counting is always on.

use serde::{Deserialize, Serialize};
use std::time::{Duration, Instant};

/// A part of a step.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Part {
    /// Lookup of the tokens' rows.
    Embedding,
    /// Norms of rows, and the rounding to codes.
    Encoding,
    /// The query, key and value projections.
    QueryKeyValue,
    /// Norms and rotation of queries and keys, and the writes to the cache.
    Rotation,
    /// Scores, softmax and sums of values.
    Attention,
    /// The output projection of attention.
    AttentionOutput,
    /// The router of a mixture, and the gathering of its experts' rows.
    Routing,
    /// The gate and up projections.
    GateUp,
    /// The activation function with the rounding of its results, and the sum of experts.
    Activation,
    /// The down projection.
    Down,
    /// The residual sums.
    Residual,
    /// The projection to logits.
    Head,
}

impl Part {
    /// All parts, in the order of a step.
    pub const ALL: [Self; 12] = [
        Self::Embedding,
        Self::Encoding,
        Self::QueryKeyValue,
        Self::Rotation,
        Self::Attention,
        Self::AttentionOutput,
        Self::Routing,
        Self::GateUp,
        Self::Activation,
        Self::Down,
        Self::Residual,
        Self::Head,
    ];

    /// Returns the name, such as `gate, up`.
    pub fn name(self) -> &'static str {
        match self {
            Self::Embedding => "embedding",
            Self::Encoding => "norm, rounding",
            Self::QueryKeyValue => "query, key, value",
            Self::Rotation => "rotation, cache",
            Self::Attention => "attention",
            Self::AttentionOutput => "attention output",
            Self::Routing => "routing",
            Self::GateUp => "gate, up",
            Self::Activation => "activation",
            Self::Down => "down",
            Self::Residual => "residual",
            Self::Head => "head",
        }
    }
}

/// The work of one part.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Tally {
    /// How often the part ran.
    pub calls: u64,
    /// The time of all calls.
    pub elapsed: Duration,
    /// Operations of matrix products, two for each weight and row; 0 for other parts.
    pub operations: u64,
    /// Bytes of weights that the products read, once a call; 0 for other parts.
    pub bytes: u64,
}

/// The tallies of all parts.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Profile {
    tallies: [Tally; Part::ALL.len()],
}

impl Profile {
    /// Returns the tally of `part`.
    pub fn tally(&self, part: Part) -> Tally {
        self.tallies[part as usize]
    }

    /// Adds a call of `part` that began at `started`.
    pub fn add(&mut self, part: Part, started: Instant) {
        let tally = &mut self.tallies[part as usize];
        tally.calls += 1;
        tally.elapsed += started.elapsed();
    }

    /// Adds the work of a product to `part`.
    pub fn add_work(&mut self, part: Part, operations: u64, bytes: u64) {
        let tally = &mut self.tallies[part as usize];
        tally.operations += operations;
        tally.bytes += bytes;
    }
}
