//! A placement explained in words and figures.

use super::{Demand, Links, Placement, PlanError, Policy, ShardCount, place, token_seconds};
use crate::core::context::Context;
use crate::core::offer::Offer;
use exo_net::NodeId;
use serde::{Deserialize, Serialize};
use std::collections::BTreeSet;

/// The placement that a model would get now.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Preview {
    /// The policy.
    pub policy: Policy,
    /// The placement, or why there is none.
    pub outcome: PreviewOutcome,
}

/// The placement that a model would get, or why it gets none.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum PreviewOutcome {
    /// The model fits.
    Placed {
        /// The placement.
        placement: Placement,
        /// The context that the model would get.
        context: Context,
        /// Why it is the best one.
        reason: String,
        /// Seconds per token of one answer; unmeasured devices and links count by guesses.
        token_s: f64,
        /// Seconds per token in each stage.
        stages_s: Vec<f64>,
    },
    /// The model cannot be placed.
    Refused {
        /// Why.
        error: String,
        /// What the user can do about it.
        remedy: String,
    },
}

/// Creates the preview of a placement.
pub fn preview(
    demand: &Demand,
    placement: Placement,
    context: Context,
    offers: &[Offer],
    links: &Links,
    shards: &ShardCount,
    policy: Policy,
) -> Preview {
    let speed = |node: NodeId, device| offers.iter().find(|offer| (offer.node, &offer.device) == (node, device));
    let stages = placement.stages.iter();
    let stages_s =
        stages.map(|stage| speed(stage.node, &stage.device).map_or(0.0, |offer| demand.seconds(&stage.layers, offer)));
    let (stages_s, token_s) = (stages_s.collect(), token_seconds(demand, &placement, offers, links));
    let reason = reason(demand, &placement, offers, links, shards, policy);
    Preview { policy, outcome: PreviewOutcome::Placed { placement, context, reason, token_s, stages_s } }
}

/// Returns why this placement was chosen.
pub fn reason(
    demand: &Demand,
    placement: &Placement,
    offers: &[Offer],
    links: &Links,
    shards: &ShardCount,
    policy: Policy,
) -> String {
    match shards {
        ShardCount::ByHand(_) => return "split by hand".to_owned(),
        ShardCount::Exactly(count) => return format!("{count} shards were asked for"),
        ShardCount::Automatic => {}
    }
    let milliseconds = |placement: &Placement| token_seconds(demand, placement, offers, links) * 1e3;
    let took = milliseconds(placement);
    let alone = place(demand, offers, links, &ShardCount::Exactly(1), policy);
    if placement.stages.len() == 1 {
        let others = offers.iter().map(|offer| offer.node).collect::<BTreeSet<_>>().len() - 1;
        return match others {
            0 => format!("it fits this machine's {}: {took:.1} ms a token", placement.stages[0].device),
            _ => format!("it fits one device: {took:.1} ms a token, and no split over more is better"),
        };
    }
    let places = match placement.machines() {
        1 => format!("{} devices of one machine", placement.stages.len()),
        count => format!("{count} machines"),
    };
    let instead = match alone {
        Ok(alone) => format!("{:.1} ms on one device", milliseconds(&alone)),
        Err(PlanError::DoesNotFit { needed_bytes, .. }) => {
            let largest = offers.iter().map(|offer| offer.free_bytes).max().unwrap_or(0);
            format!("one device alone lacks {:.1} GB", needed_bytes.saturating_sub(largest) as f64 / 1e9)
        }
        Err(error) => error.to_string(),
    };
    let aim = match policy {
        Policy::Latency => "the least time per token",
        Policy::Throughput => "the slowest shard is as fast as it can be",
        Policy::FewestNodes => "fewer cannot hold it",
    };
    format!("{places}, {took:.1} ms a token: {aim} ({instead})")
}
