//! Where a model's layers go.
//!
//! An exact search over contiguous ranges: the devices are taken in order, each gets a range, and the split with the
//! least time per token wins under every device's free memory, KV cache and embeddings counted. A model that fits one
//! device is not split unless it is asked for.

use exo_engines::engine::DeviceId;
use exo_net::NodeId;
use serde::{Deserialize, Serialize};
use std::ops::Range;

/// A device that shards can be put on.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Offer {
    pub node: NodeId,
    pub device: DeviceId,
    /// Memory that a shard may take.
    pub free_bytes: u64,
    /// Weights that the device goes through in a second of decoding: measured, or a guess of its kind.
    pub bytes_per_s: f64,
}

/// What a model needs.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Demand {
    /// Weights of each layer.
    pub layer_bytes: Vec<u64>,
    /// KV cache of each layer, at its bound.
    pub kv_bytes: Vec<u64>,
    /// The embedding table, on the first shard.
    pub embedding_bytes: u64,
    /// The head and the final norm, on the last shard; where it is the embedding, a model that is not split has it once.
    pub head_bytes: u64,
    pub ties_embeddings: bool,
}

/// How many shards.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum ShardCount {
    /// One, if it fits somewhere; else as few as fit.
    Automatic,
    /// This many: distinct nodes first, then distinct devices, then the same device several times.
    Exactly(usize),
}

/// One shard of a placement.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Stage {
    pub node: NodeId,
    pub device: DeviceId,
    pub layers: Range<usize>,
    /// Weights and cache at their bound.
    pub memory_bytes: u64,
}

/// Shards in the order in which a token passes them.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Placement {
    pub stages: Vec<Stage>,
}

/// Why a model cannot be placed.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error, Serialize, Deserialize)]
pub enum PlanError {
    #[error("no device is there to place a model on")]
    NoDevice,
    #[error("the model needs {needed_bytes} bytes and {free_bytes} are free: {missing_bytes} bytes are missing")]
    DoesNotFit { needed_bytes: u64, free_bytes: u64, missing_bytes: u64 },
    #[error("{shards} shards of a model of {layers} layers")]
    TooManyShards { shards: usize, layers: usize },
}

impl Demand {
    fn layers(&self) -> usize {
        self.layer_bytes.len()
    }

    /// Weights of a shard of `layers`.
    fn weight_bytes(&self, layers: &Range<usize>) -> u64 {
        let (first, last) = (layers.start == 0, layers.end == self.layers());
        let shared = self.ties_embeddings && first && last;
        let ends = [(first, self.embedding_bytes), (last && !shared, self.head_bytes)];
        let ends: u64 = ends.iter().filter(|(has, _)| *has).map(|(_, bytes)| bytes).sum();
        ends + self.layer_bytes[layers.clone()].iter().sum::<u64>()
    }

    /// Memory of a shard of `layers`, its cache included.
    pub fn memory_bytes(&self, layers: &Range<usize>) -> u64 {
        self.weight_bytes(layers) + self.kv_bytes[layers.clone()].iter().sum::<u64>()
    }

    /// Seconds that a token spends in a shard of `layers` on `offer`. Looking up an embedding costs nothing.
    fn seconds(&self, layers: &Range<usize>, offer: &Offer) -> f64 {
        let head = if layers.end == self.layers() { self.head_bytes } else { 0 };
        let bytes = head + self.layer_bytes[layers.clone()].iter().sum::<u64>();
        bytes as f64 / offer.bytes_per_s.max(1.0)
    }
}

/// Places a model.
///
/// # Errors
/// [`PlanError`] with what is missing.
pub fn place(demand: &Demand, offers: &[Offer], shards: ShardCount) -> Result<Placement, PlanError> {
    if offers.is_empty() {
        return Err(PlanError::NoDevice);
    }
    let layers = demand.layers();
    let ordered = in_order(offers);
    let counts = match shards {
        ShardCount::Exactly(count) if count == 0 || count > layers => {
            return Err(PlanError::TooManyShards { shards: count, layers });
        }
        ShardCount::Exactly(count) => count..count + 1,
        ShardCount::Automatic => 1..layers.min(offers.len()) + 1,
    };
    for count in counts {
        if let Some(placement) = best_of(demand, &ordered, count) {
            return Ok(placement);
        }
    }
    let needed_bytes = demand.memory_bytes(&(0..layers));
    let free_bytes = offers.iter().map(|offer| offer.free_bytes).sum();
    // Where the sum would suffice, one layer or end is larger than any device.
    let missing_bytes = needed_bytes.saturating_sub(free_bytes).max(1);
    Err(PlanError::DoesNotFit { needed_bytes, free_bytes, missing_bytes })
}

/// Each node's fastest device first, then each node's second, and so on.
fn in_order(offers: &[Offer]) -> Vec<&Offer> {
    let mut by_speed: Vec<&Offer> = offers.iter().collect();
    by_speed.sort_by(|a, b| b.bytes_per_s.total_cmp(&a.bytes_per_s).then(a.device.cmp(&b.device)));
    let mut ranked: Vec<(usize, &Offer)> = Vec::new();
    for offer in by_speed {
        let rank = ranked.iter().filter(|(_, other)| other.node == offer.node).count();
        ranked.push((rank, offer));
    }
    ranked.sort_by_key(|(rank, _)| *rank);
    ranked.into_iter().map(|(_, offer)| offer).collect()
}

/// The best split into `count` shards. One shard goes to the fastest device that has room; several go to devices in
/// order, and over again where there are more shards than devices.
fn best_of(demand: &Demand, ordered: &[&Offer], count: usize) -> Option<Placement> {
    let layers = demand.layers();
    if count == 1 {
        let whole = 0..layers;
        let needed = demand.memory_bytes(&whole);
        let fits = ordered.iter().filter(|offer| offer.free_bytes >= needed);
        let offer = fits.max_by(|a, b| a.bytes_per_s.total_cmp(&b.bytes_per_s))?;
        return Some(Placement { stages: vec![stage(demand, offer, whole)] });
    }
    let slots: Vec<Slot<'_>> = (0..count)
        .map(|index| {
            let offer = ordered[index % ordered.len()];
            let sharers = (0..count).filter(|other| other % ordered.len() == index % ordered.len()).count() as u64;
            Slot { offer, free_bytes: offer.free_bytes / sharers }
        })
        .collect();
    let ranges = split(demand, &slots)?;
    let stages = ranges.into_iter().zip(&slots).map(|(range, slot)| stage(demand, slot.offer, range));
    Some(Placement { stages: stages.collect() })
}

/// A place for one shard: a device, or a share of one.
struct Slot<'a> {
    offer: &'a Offer,
    free_bytes: u64,
}

/// What a split costs: the time of a token, then, of equals, the slowest shard's.
#[derive(Debug, Clone, Copy, PartialEq, PartialOrd)]
struct Cost {
    total_s: f64,
    slowest_s: f64,
}

/// The cheapest ranges, one for each slot, in order; dynamic programming over (slot, first layer not yet placed).
fn split(demand: &Demand, slots: &[Slot<'_>]) -> Option<Vec<Range<usize>>> {
    let layers = demand.layers();
    // best[slot][end]: cost of layers 0..end over the slots up to `slot`, and where the slot's range starts.
    let mut best: Vec<Vec<Option<(Cost, usize)>>> = Vec::new();
    for (index, slot) in slots.iter().enumerate() {
        // Every slot before and behind has a layer at least.
        let ends = index + 1..=layers - (slots.len() - 1 - index);
        let before = best.last();
        let row = (0..=layers).map(|end| match ends.contains(&end) {
            true => cheapest_to(demand, slot, before.map(Vec::as_slice), index..end),
            false => None,
        });
        best.push(row.collect());
    }
    let mut ranges = Vec::new();
    let mut end = layers;
    for row in best.iter().rev() {
        let (_, start) = row[end]?;
        ranges.push(start..end);
        end = start;
    }
    ranges.reverse();
    Some(ranges)
}

/// The cheapest way to have layers 0..`starts.end` placed with `slot` as the last, whose range starts in `starts`.
fn cheapest_to(
    demand: &Demand,
    slot: &Slot<'_>,
    before: Option<&[Option<(Cost, usize)>]>,
    starts: Range<usize>,
) -> Option<(Cost, usize)> {
    let end = starts.end;
    let mut best: Option<(Cost, usize)> = None;
    for start in starts {
        let before = match before {
            Some(row) => row[start].map(|(cost, _)| cost),
            None => (start == 0).then_some(Cost { total_s: 0.0, slowest_s: 0.0 }),
        };
        let range = start..end;
        let Some(before) = before.filter(|_| demand.memory_bytes(&range) <= slot.free_bytes) else { continue };
        let seconds = demand.seconds(&range, slot.offer);
        let cost = Cost { total_s: before.total_s + seconds, slowest_s: before.slowest_s.max(seconds) };
        if best.is_none_or(|(other, _)| cheaper(cost, other)) {
            best = Some((cost, start));
        }
    }
    best
}

/// Sums of the same terms in another order differ in the last bits: those are equals.
fn cheaper(a: Cost, b: Cost) -> bool {
    let margin = 1e-9 * b.total_s.abs();
    a.total_s < b.total_s - margin || (a.total_s <= b.total_s + margin && a.slowest_s < b.slowest_s)
}

fn stage(demand: &Demand, offer: &Offer, layers: Range<usize>) -> Stage {
    Stage { node: offer.node, device: offer.device.clone(), memory_bytes: demand.memory_bytes(&layers), layers }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn node() -> NodeId {
        exo_net::Identity::ephemeral().expect("random bytes").node_id()
    }

    fn demand(layer_bytes: Vec<u64>, ends: u64) -> Demand {
        Demand {
            kv_bytes: vec![1; layer_bytes.len()],
            layer_bytes,
            embedding_bytes: ends,
            head_bytes: ends,
            ties_embeddings: true,
        }
    }

    fn offers(free: &[(u64, f64)]) -> Vec<Offer> {
        let node = node();
        let offer = |(index, &(free_bytes, bytes_per_s)): (usize, &(u64, f64))| Offer {
            node,
            device: DeviceId(format!("gpu:{index}")),
            free_bytes,
            bytes_per_s,
        };
        free.iter().enumerate().map(offer).collect()
    }

    #[test]
    fn a_model_that_fits_one_device_is_not_split() {
        let placement = place(&demand(vec![10; 8], 5), &offers(&[(200, 1.0), (200, 2.0)]), ShardCount::Automatic);
        let stages = placement.expect("it fits").stages;
        assert_eq!(stages.len(), 1);
        assert_eq!(stages[0].device.0, "gpu:1");
        assert_eq!(stages[0].memory_bytes, 8 * 11 + 5);
    }

    #[test]
    fn what_is_missing_is_named() {
        let missing = place(&demand(vec![10; 8], 5), &offers(&[(40, 1.0), (20, 1.0)]), ShardCount::Automatic);
        let expected = PlanError::DoesNotFit { needed_bytes: 93, free_bytes: 60, missing_bytes: 33 };
        assert_eq!(missing, Err(expected));
        assert_eq!(place(&demand(vec![1], 0), &[], ShardCount::Automatic), Err(PlanError::NoDevice));
    }

    #[test]
    fn shards_on_one_device_are_even() {
        let placement = place(&demand(vec![10; 30], 0), &offers(&[(1000, 1.0)]), ShardCount::Exactly(3));
        let ranges: Vec<_> = placement.expect("it fits").stages.into_iter().map(|stage| stage.layers).collect();
        assert_eq!(ranges, [0..10, 10..20, 20..30]);
        let too_many = place(&demand(vec![10; 3], 0), &offers(&[(1000, 1.0)]), ShardCount::Exactly(4));
        assert_eq!(too_many, Err(PlanError::TooManyShards { shards: 4, layers: 3 }));
    }

    /// Every way to cut `layers` into `count` ranges.
    fn all_splits(layers: usize, count: usize) -> Vec<Vec<Range<usize>>> {
        if count == 1 {
            return vec![vec![0..layers]];
        }
        let mut splits = Vec::new();
        for cut in count - 1..layers {
            for mut split in all_splits(cut, count - 1) {
                split.push(cut..layers);
                splits.push(split);
            }
        }
        splits
    }

    proptest! {
        /// R7.4: the split found is the cheapest that fits, as trying all of them shows.
        #[test]
        fn the_search_is_exact(
            layer_bytes in prop::collection::vec(1_u64..20, 3..8),
            ends in 0_u64..10,
            devices in prop::collection::vec((5_u64..120, 1_u32..5), 2..4),
        ) {
            let devices: Vec<(u64, f64)> = devices.into_iter().map(|(free, speed)| (free, f64::from(speed))).collect();
            let (demand, offers) = (demand(layer_bytes, ends), offers(&devices));
            let count = offers.len();
            let ordered = in_order(&offers);
            let cost = |split: &[Range<usize>]| -> Option<f64> {
                let fits = split.iter().zip(&ordered).all(|(range, offer)| demand.memory_bytes(range) <= offer.free_bytes);
                fits.then(|| split.iter().zip(&ordered).map(|(range, offer)| demand.seconds(range, offer)).sum())
            };
            let splits = all_splits(demand.layers(), count);
            let cheapest = splits.iter().filter_map(|split| cost(split)).min_by(f64::total_cmp);
            match place(&demand, &offers, ShardCount::Exactly(count)) {
                Err(_) => prop_assert_eq!(cheapest, None),
                Ok(placement) => {
                    let ranges: Vec<_> = placement.stages.iter().map(|stage| stage.layers.clone()).collect();
                    let found = cost(&ranges);
                    prop_assert!(found.zip(cheapest).is_some_and(|(found, best)| (found - best).abs() < 1e-6));
                }
            }
        }
    }
}
