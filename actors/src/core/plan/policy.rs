//! The choices of a user: what a placement optimises, and a split by hand.

use exo_engines::model::LAYERS_MAX;
use serde::{Deserialize, Serialize};
use std::ops::Range;

/// The goal of a placement.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Policy {
    /// The least time per token of one answer.
    #[default]
    Latency,
    /// The most tokens per second over many answers: the slowest shard is as fast as possible.
    Throughput,
    /// The fewest machines that can hold the model.
    FewestNodes,
}

/// The error of a text that names no policy.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("`{name}` is not one of latency, throughput, fewest-nodes")]
pub struct UnknownPolicy {
    /// The text.
    pub name: String,
}

impl std::str::FromStr for Policy {
    type Err = UnknownPolicy;

    fn from_str(text: &str) -> Result<Self, UnknownPolicy> {
        match text {
            "latency" => Ok(Self::Latency),
            "throughput" => Ok(Self::Throughput),
            "fewest-nodes" => Ok(Self::FewestNodes),
            other => Err(UnknownPolicy { name: other.to_owned() }),
        }
    }
}

/// A split by hand: nodes and their ranges of layers, in order.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Split(pub Vec<(String, Range<usize>)>);

/// The error of a text that is not a split.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("`{text}` is not of the form NODE:FIRST-LAST,NODE:FIRST-LAST")]
pub struct SplitError {
    /// The text.
    pub text: String,
}

/// Parses names or ids of nodes with their first and last layers: `laptop:0-11,desktop:12-29`.
impl std::str::FromStr for Split {
    type Err = SplitError;

    fn from_str(text: &str) -> Result<Self, SplitError> {
        let part = |part: &str| {
            let (node, layers) = part.rsplit_once(':')?;
            let (first, last) = layers.split_once('-').unwrap_or((layers, layers));
            let (first, last): (usize, usize) = (first.parse().ok()?, last.parse().ok()?);
            let is_range = !node.is_empty() && first <= last && last < LAYERS_MAX;
            is_range.then(|| (node.to_owned(), first..last + 1))
        };
        let parts: Option<Vec<_>> = text.split(',').map(|text| part(text.trim())).collect();
        parts.map(Self).ok_or_else(|| SplitError { text: text.to_owned() })
    }
}
