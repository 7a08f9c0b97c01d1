//! The placement of a model's layers on devices.
//!
//! The search (`search.rs`) assigns contiguous ranges of layers to some of the devices and finds the best assignment by
//! the policy: over all orders of the devices if they are few, else over some. It respects each device's free memory,
//! counts the KV cache and the embeddings, and adds the cost of each hop between nodes. When a node is lost, its ranges
//! move to other nodes and all others stay ([`repair`]). All functions are pure, so a preview makes the same call.

mod policy;
mod preview;
mod repair;
mod search;

pub use policy::{Policy, Split, SplitError, UnknownPolicy};
pub use preview::{Preview, PreviewOutcome, preview, reason};
pub use repair::{fits_beside, repair, why_move};

use crate::core::offer::Offer;
use exo_engines::engine::DeviceId;
use exo_engines::model::LAYERS_MAX;
use exo_net::NodeId;
use search::{Slot, best_chain, exact_split};
use serde::{Deserialize, Serialize};
use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;

/// The link between two nodes.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Link {
    /// The round-trip time in seconds.
    pub rtt_s: f64,
    /// The bandwidth in bytes per second; `None`: not measured yet.
    pub bytes_per_s: Option<f64>,
    /// Time and bandwidth are likely between the estimate divided by this factor and the estimate times this factor.
    /// At least 1. Nodes of earlier versions tell none.
    #[serde(default = "unknown_spread")]
    pub spread: f64,
}

fn unknown_spread() -> f64 {
    LINK_GUESS.spread
}

impl Link {
    /// The link if it takes `factor` times as long.
    fn slowed(self, factor: f64) -> Self {
        Self { rtt_s: self.rtt_s * factor, bytes_per_s: self.bytes_per_s.map(|speed| speed / factor), ..self }
    }
}

/// The links between nodes. The first node of each pair measured the link.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Links(pub BTreeMap<(NodeId, NodeId), Link>);

/// The guess for an unmeasured link: a home network.
const LINK_GUESS: Link = Link { rtt_s: 1e-3, bytes_per_s: Some(1e8), spread: 4.0 };

impl Links {
    /// Seconds that `bytes` take from one node to another; 0 within one node.
    pub(super) fn seconds(&self, from: NodeId, to: NodeId, bytes: u64) -> f64 {
        if from == to {
            return 0.0;
        }
        let link = self.link(from, to);
        let bandwidth = link.bytes_per_s.or(LINK_GUESS.bytes_per_s).unwrap_or(f64::INFINITY).max(1.0);
        link.rtt_s / 2.0 + bytes as f64 / bandwidth
    }

    fn link(&self, from: NodeId, to: NodeId) -> Link {
        self.0.get(&(from, to)).or_else(|| self.0.get(&(to, from))).copied().unwrap_or(LINK_GUESS)
    }
}

/// The limit on each byte count of a demand: sums over all layers stay far below `u64::MAX`.
const BYTES_MAX: u64 = 1 << 48;
/// The limit on the memory of a shard.
pub(super) const SHARD_BYTES_MAX: u64 = BYTES_MAX * LAYERS_MAX as u64;
/// The limit on the pages of a cache: tens of millions of tokens. Each page has a table entry, even if it is unused.
pub(super) const KV_PAGES_MAX: u32 = 1 << 20;

/// What a model needs.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Demand {
    /// Bytes of weights of each layer.
    pub layer_bytes: Vec<u64>,
    /// Bytes of weights that a token computes with in each layer: `ModelFiles::layer_cost_bytes`.
    pub layer_cost_bytes: Vec<u64>,
    /// Pages of each shard's cache.
    pub kv_pages: u32,
    /// Cache bytes of each layer, for all pages.
    pub kv_bytes: Vec<u64>,
    /// Bytes of the embedding table, on the first shard.
    pub embedding_bytes: u64,
    /// Bytes of the output head and the final norm, on the last shard. Not counted for an unsplit model with tied
    /// embeddings.
    pub head_bytes: u64,
    /// Bytes of weights that a token computes with in the output head.
    pub head_cost_bytes: u64,
    /// Whether the output head uses the embedding table.
    pub ties_embeddings: bool,
    /// Bytes of one row that a shard sends to the next.
    pub row_bytes: u64,
}

/// How to split a model into shards.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum ShardCount {
    /// As many as are best by the policy.
    Automatic,
    /// This many: on distinct nodes first, then on distinct devices, then on the same device several times.
    Exactly(usize),
    /// By hand: nodes with their ranges. Each range goes to the node's fastest device that fits it.
    ByHand(Vec<(NodeId, Range<usize>)>),
}

/// One shard of a placement.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Stage {
    /// The shard's node.
    pub node: NodeId,
    /// The shard's device.
    pub device: DeviceId,
    /// The shard's layers, from 0.
    pub layers: Range<usize>,
    /// Bytes of the weights and of the full cache.
    pub memory_bytes: u64,
}

/// The devices of a model's shards.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Placement {
    /// The shards, in the order in which a token passes them.
    pub stages: Vec<Stage>,
}

impl Placement {
    /// The number of machines that the placement uses.
    pub fn machines(&self) -> usize {
        self.stages.iter().map(|stage| stage.node).collect::<BTreeSet<_>>().len()
    }

    /// The links that a token takes, from each shard to the next and from the last to the first.
    pub(super) fn hops(&self) -> impl Iterator<Item = (NodeId, NodeId)> {
        let next = self.stages.iter().cycle().skip(1);
        self.stages.iter().zip(next).map(|(stage, next)| (stage.node, next.node)).filter(|(from, to)| from != to)
    }

    /// The number of devices that the placement uses.
    pub fn devices(&self) -> usize {
        self.stages.iter().map(|stage| (stage.node, &stage.device)).collect::<BTreeSet<_>>().len()
    }

    /// Whether a shard is on this device.
    pub fn uses(&self, node: NodeId, device: &DeviceId) -> bool {
        self.stages.iter().any(|stage| (stage.node, &stage.device) == (node, device))
    }

    /// This placement of a model, with the memory that its shards take under another demand.
    #[must_use]
    pub fn with_demand(&self, demand: &Demand) -> Self {
        let stage = |stage: &Stage| Stage { memory_bytes: demand.memory_bytes(&stage.layers), ..stage.clone() };
        Self { stages: self.stages.iter().map(stage).collect() }
    }

    /// Whether the stages cover all layers of a model with this demand, once and in order.
    pub fn is_of(&self, demand: &Demand) -> bool {
        let mut end = 0;
        let in_order = self.stages.iter().all(|stage| {
            let follows = stage.layers.start == end && stage.layers.end > end;
            end = stage.layers.end;
            follows && stage.memory_bytes <= SHARD_BYTES_MAX
        });
        in_order && end == demand.layers()
    }
}

/// Why a model cannot be placed.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error, Serialize, Deserialize)]
pub enum PlanError {
    /// There is no device.
    #[error("there is no device to place the model on")]
    NoDevice,
    /// The devices do not have enough free memory.
    #[error("the model needs {needed_bytes} bytes and {free_bytes} are free: {missing_bytes} bytes are missing")]
    DoesNotFit {
        /// Bytes that the model needs.
        needed_bytes: u64,
        /// Free bytes of all devices.
        free_bytes: u64,
        /// Bytes that are missing, at least 1.
        missing_bytes: u64,
    },
    /// The number of shards is 0, or larger than the number of layers.
    #[error("a model of {layers} layers cannot be split into {shards} shards")]
    TooManyShards {
        /// The requested number of shards.
        shards: usize,
        /// The model's number of layers.
        layers: usize,
    },
    /// A split by hand does not cover each layer once, in order.
    #[error("the split does not cover the model's {layers} layers once, in order")]
    BadSplit {
        /// The model's number of layers.
        layers: usize,
    },
    /// A split by hand names a node that is unknown or offers no device.
    #[error("no node is called `{node}`")]
    NoSuchNode {
        /// The name or id of the node.
        node: String,
    },
    /// A split by hand names a node that is draining.
    #[error("the node `{node}` is leaving the cluster")]
    Leaving {
        /// The name or id of the node.
        node: String,
    },
}

impl PlanError {
    /// Returns what the caller can do about the error.
    pub fn remedy(&self) -> &'static str {
        match self {
            Self::NoDevice => "name no device to use the best one",
            Self::DoesNotFit { .. } => "close other programs, take a smaller quantisation, or a smaller context",
            Self::TooManyShards { .. } => "ask for at least one shard, and at most one per layer",
            Self::BadSplit { .. } => "give each layer to one node, in order",
            Self::NoSuchNode { .. } => "name a member of the cluster",
            Self::Leaving { .. } => "restart that node, or split the model over others",
        }
    }
}

impl Demand {
    fn layers(&self) -> usize {
        self.layer_bytes.len()
    }

    /// Whether a model can have this demand. Numbers from other nodes are checked before they are used.
    pub fn is_plausible(&self) -> bool {
        let layers = self.layers();
        let of_layers = [&self.layer_bytes, &self.layer_cost_bytes, &self.kv_bytes];
        let ends = [self.embedding_bytes, self.head_bytes, self.head_cost_bytes, self.row_bytes];
        (1..=LAYERS_MAX).contains(&layers)
            && of_layers.iter().all(|bytes| bytes.len() == layers)
            && of_layers.into_iter().flatten().chain(&ends).all(|&bytes| bytes <= BYTES_MAX)
            && self.kv_pages <= KV_PAGES_MAX
    }

    /// This demand, with caches of `pages` pages. Cache bytes are proportional to pages.
    pub fn with_pages(&self, pages: u32) -> Self {
        let now = u64::from(self.kv_pages.max(1));
        let kv_bytes = self.kv_bytes.iter().map(|bytes| (bytes / now).saturating_mul(u64::from(pages)));
        Self { kv_pages: pages, kv_bytes: kv_bytes.collect(), ..self.clone() }
    }

    /// Bytes of weights of a shard of `layers`.
    fn weight_bytes(&self, layers: &Range<usize>) -> u64 {
        let (first, last) = (layers.start == 0, layers.end == self.layers());
        let shared = self.ties_embeddings && first && last;
        let ends = [(first, self.embedding_bytes), (last && !shared, self.head_bytes)];
        let ends: u64 = ends.iter().filter(|(has, _)| *has).map(|(_, bytes)| bytes).sum();
        ends + self.layer_bytes[layers.clone()].iter().sum::<u64>()
    }

    /// Bytes of memory of a shard of `layers`, including its cache.
    pub fn memory_bytes(&self, layers: &Range<usize>) -> u64 {
        self.weight_bytes(layers) + self.kv_bytes[layers.clone()].iter().sum::<u64>()
    }

    /// Seconds that a token spends in a shard of `layers` on `offer`. The embedding look-up counts as free.
    fn seconds(&self, layers: &Range<usize>, offer: &Offer) -> f64 {
        let head = if layers.end == self.layers() { self.head_cost_bytes } else { 0 };
        let work = head + self.layer_cost_bytes[layers.clone()].iter().sum::<u64>();
        work as f64 / offer.speed.bytes_per_s.max(1.0)
    }
}

/// Places a model on devices.
///
/// # Errors
/// [`PlanError`] with the reason why there is no placement.
pub fn place(
    demand: &Demand,
    offers: &[Offer],
    links: &Links,
    shards: &ShardCount,
    policy: Policy,
) -> Result<Placement, PlanError> {
    if offers.is_empty() {
        return Err(PlanError::NoDevice);
    }
    if !demand.is_plausible() {
        return Err(does_not_fit(demand, offers));
    }
    let layers = demand.layers();
    let ordered = in_order(offers);
    let stages = match shards {
        ShardCount::Exactly(count) if *count == 0 || *count > layers => {
            return Err(PlanError::TooManyShards { shards: *count, layers });
        }
        ShardCount::Exactly(1) => whole(demand, &ordered),
        ShardCount::Exactly(count) => exactly(demand, &ordered, *count, policy),
        ShardCount::Automatic => best_chain(demand, &ordered, links, policy),
        ShardCount::ByHand(parts) => by_hand(demand, &ordered, parts)?,
    };
    stages.map(|stages| Placement { stages }).ok_or_else(|| does_not_fit(demand, offers))
}

fn does_not_fit(demand: &Demand, offers: &[Offer]) -> PlanError {
    let sum = |sum: u64, bytes: u64| sum.saturating_add(bytes);
    let of_layers = demand.layer_bytes.iter().chain(&demand.kv_bytes).copied().fold(demand.embedding_bytes, sum);
    let needed_bytes = if demand.ties_embeddings { of_layers } else { sum(of_layers, demand.head_bytes) };
    let free_bytes = offers.iter().map(|offer| offer.free_bytes).fold(0, sum);
    // If the sum of free memory suffices, some part of the model still fits no device: report at least 1 byte.
    let missing_bytes = needed_bytes.saturating_sub(free_bytes).max(1);
    PlanError::DoesNotFit { needed_bytes, free_bytes, missing_bytes }
}

/// Seconds that a token of one answer takes through a placement, including the path back to the pipeline head.
pub fn token_seconds(demand: &Demand, placement: &Placement, offers: &[Offer], links: &Links) -> f64 {
    let stages = &placement.stages;
    let back = stages.first().zip(stages.last()).map_or(0.0, |(first, last)| links.seconds(last.node, first.node, 0));
    let (shards, ways) = placement_seconds(demand, placement, offers, links);
    shards.into_iter().chain(ways).sum::<f64>() + back
}

/// Seconds of the slowest device or link of a placement, which limits many parallel answers.
pub fn slowest_seconds(demand: &Demand, placement: &Placement, offers: &[Offer], links: &Links) -> f64 {
    let (shards, ways) = placement_seconds(demand, placement, offers, links);
    let mut devices = BTreeMap::new();
    for (stage, seconds) in placement.stages.iter().zip(shards) {
        *devices.entry((stage.node, &stage.device)).or_insert(0.0) += seconds;
    }
    devices.into_values().chain(ways).fold(0.0, f64::max)
}

/// Seconds of each shard, and of each hop to the next shard.
fn placement_seconds(demand: &Demand, placement: &Placement, offers: &[Offer], links: &Links) -> (Vec<f64>, Vec<f64>) {
    let stages = &placement.stages;
    let is_its = |stage: &Stage, offer: &Offer| (offer.node, &offer.device) == (stage.node, &stage.device);
    let speed = |stage: &Stage| offers.iter().find(|offer| is_its(stage, offer));
    let compute =
        stages.iter().map(|stage| speed(stage).map_or(f64::INFINITY, |offer| demand.seconds(&stage.layers, offer)));
    let hops = stages.windows(2).map(|pair| links.seconds(pair[0].node, pair[1].node, demand.row_bytes));
    (compute.collect(), hops.collect())
}

/// The offers ordered: each node's fastest device first, then each node's second, and so on.
fn in_order(offers: &[Offer]) -> Vec<&Offer> {
    let mut by_speed: Vec<&Offer> = offers.iter().collect();
    // The sort is stable: equally fast devices stay in the order of the offers.
    by_speed.sort_by(|a, b| b.speed.bytes_per_s.total_cmp(&a.speed.bytes_per_s));
    let mut ranked: Vec<(usize, &Offer)> = Vec::new();
    for offer in by_speed {
        let rank = ranked.iter().filter(|(_, other)| other.node == offer.node).count();
        ranked.push((rank, offer));
    }
    ranked.sort_by_key(|(rank, _)| *rank);
    ranked.into_iter().map(|(_, offer)| offer).collect()
}

/// Places the whole model on the fastest device with enough memory.
fn whole(demand: &Demand, ordered: &[&Offer]) -> Option<Vec<Stage>> {
    let whole = 0..demand.layers();
    let needed = demand.memory_bytes(&whole);
    let mut fits = ordered.iter().filter(|offer| offer.free_bytes >= needed);
    let first = fits.next()?;
    let offer =
        fits.fold(first, |best, offer| if offer.speed.bytes_per_s > best.speed.bytes_per_s { offer } else { best });
    Some(vec![stage(demand, offer, whole)])
}

/// The best split into `count` shards over the devices in order, which repeat if there are more shards than devices.
fn exactly(demand: &Demand, ordered: &[&Offer], count: usize, policy: Policy) -> Option<Vec<Stage>> {
    let slots: Vec<Slot<'_>> = (0..count)
        .map(|index| {
            let offer = ordered[index % ordered.len()];
            let sharers = (0..count).filter(|other| other % ordered.len() == index % ordered.len()).count() as u64;
            Slot { offer, free_bytes: offer.free_bytes / sharers }
        })
        .collect();
    let ranges = exact_split(demand, &slots, policy)?;
    Some(ranges.into_iter().zip(&slots).map(|(range, slot)| stage(demand, slot.offer, range)).collect())
}

fn by_hand(
    demand: &Demand,
    ordered: &[&Offer],
    parts: &[(NodeId, Range<usize>)],
) -> Result<Option<Vec<Stage>>, PlanError> {
    let layers = demand.layers();
    let mut end = 0;
    let mut stages: Vec<Stage> = Vec::new();
    for (node, range) in parts {
        if range.start != end || range.is_empty() || range.end > layers {
            return Err(PlanError::BadSplit { layers });
        }
        end = range.end;
        let needed = demand.memory_bytes(range);
        let taken = |offer: &Offer| -> u64 {
            let here = stages.iter().filter(|stage| (stage.node, &stage.device) == (offer.node, &offer.device));
            here.map(|stage| stage.memory_bytes).sum()
        };
        let of_node = ordered.iter().filter(|offer| offer.node == *node);
        let Some(offer) = of_node.into_iter().find(|offer| offer.free_bytes >= needed + taken(offer)) else {
            return match ordered.iter().any(|offer| offer.node == *node) {
                true => Ok(None),
                false => Err(PlanError::NoSuchNode { node: node.to_string() }),
            };
        };
        stages.push(stage(demand, offer, range.clone()));
    }
    if end == layers { Ok(Some(stages)) } else { Err(PlanError::BadSplit { layers }) }
}

fn stage(demand: &Demand, offer: &Offer, layers: Range<usize>) -> Stage {
    Stage { node: offer.node, device: offer.device.clone(), memory_bytes: demand.memory_bytes(&layers), layers }
}

#[cfg(test)]
mod tests;
