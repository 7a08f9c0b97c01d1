//! The search: dynamic programming over (devices of the chain, its last device, layers placed so far).

use super::{Demand, Links, Policy, Stage, stage};
use crate::core::offer::Offer;
use std::collections::BTreeSet;
use std::ops::Range;

/// A device, or a share of its memory, for one shard.
pub(super) struct Slot<'a> {
    pub(super) offer: &'a Offer,
    pub(super) free_bytes: u64,
}

/// The cost of a chain of shards. The policy chooses which number decides and which numbers break ties.
#[derive(Debug, Clone, Copy, PartialEq)]
struct Cost {
    /// Nodes in the chain.
    nodes: u32,
    total_s: f64,
    slowest_s: f64,
    stages: u32,
}

const NOTHING: Cost = Cost { nodes: 0, total_s: 0.0, slowest_s: 0.0, stages: 0 };

impl Cost {
    /// Adds the hop to one more device.
    fn and_hop(self, hop_s: f64, new_node: bool) -> Self {
        Self {
            nodes: self.nodes + u32::from(new_node),
            total_s: self.total_s + hop_s,
            slowest_s: self.slowest_s.max(hop_s),
            ..self
        }
    }

    /// Adds one more shard.
    fn and_shard(self, compute_s: f64) -> Self {
        Self {
            total_s: self.total_s + compute_s,
            slowest_s: self.slowest_s.max(compute_s),
            stages: self.stages + 1,
            ..self
        }
    }

    /// Whether every extension of this chain is worse than `best`: costs only grow.
    fn exceeds(self, best: Self, policy: Policy) -> bool {
        match policy {
            Policy::Latency => self.total_s > best.total_s * (1.0 + 1e-6),
            Policy::Throughput => self.slowest_s > best.slowest_s * (1.0 + 1e-6),
            Policy::FewestNodes => self.nodes > best.nodes,
        }
    }

    /// Whether the policy prefers this cost. Costs within a relative 1e-9 count as equal, because sums of the same
    /// terms in another order differ in the last bits.
    fn is_less(self, other: Self, policy: Policy) -> bool {
        let decides = |a: f64, b: f64| {
            let margin = 1e-9 * b.abs();
            if a < b - margin {
                Some(true)
            } else if a > b + margin {
                Some(false)
            } else {
                None
            }
        };
        let total = || decides(self.total_s, other.total_s);
        let slowest = || decides(self.slowest_s, other.slowest_s);
        let verdict = match policy {
            Policy::Latency => {
                total().or_else(|| decides(f64::from(self.stages), f64::from(other.stages))).or_else(slowest)
            }
            Policy::Throughput => slowest().or_else(total),
            Policy::FewestNodes => decides(f64::from(self.nodes), f64::from(other.nodes)).or_else(total),
        };
        verdict.unwrap_or(self.stages < other.stages)
    }
}

/// The cheapest ranges, one for each slot, in order.
pub(super) fn exact_split(demand: &Demand, slots: &[Slot<'_>], policy: Policy) -> Option<Vec<Range<usize>>> {
    let layers = demand.layers();
    let table = Table::new(demand);
    // best[slot][end]: cost of layers 0..end over the slots up to `slot`, and where the slot's range starts.
    let mut best: Vec<Vec<Option<(Cost, usize)>>> = Vec::new();
    for (index, slot) in slots.iter().enumerate() {
        // Each earlier and later slot needs at least one layer.
        let ends = index + 1..=layers - (slots.len() - 1 - index);
        let before = best.last();
        let start_cost = |start: usize| match before {
            Some(row) => row[start].map(|(cost, _)| cost),
            None => (start == 0).then_some(NOTHING),
        };
        let row = (0..=layers).map(|end| {
            if !ends.contains(&end) {
                return None;
            }
            let mut cheapest: Option<(Cost, usize)> = None;
            for start in index..end {
                let Some(before) = start_cost(start) else { continue };
                if table.memory_bytes(start, end) > slot.free_bytes {
                    continue;
                }
                let cost = before.and_shard(table.work(start, end) / slot.offer.speed.bytes_per_s.max(1.0));
                let is_better = cheapest.is_none_or(|(other, _)| even(cost, other, policy));
                if is_better {
                    cheapest = Some((cost, start));
                }
            }
            cheapest
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

/// Whether `a` is better than `b` for a fixed number of shards: the least total wins, and ties go to the most even
/// split. For throughput the order is reversed.
fn even(a: Cost, b: Cost, policy: Policy) -> bool {
    let of = |cost: Cost| match policy {
        Policy::Throughput => (cost.slowest_s, cost.total_s),
        Policy::Latency | Policy::FewestNodes => (cost.total_s, cost.slowest_s),
    };
    let ((a, then_a), (b, then_b)) = (of(a), of(b));
    let margin = 1e-9 * b.abs();
    a < b - margin || (a <= b + margin && then_a < then_b)
}

/// Up to this many devices every order is tried. More devices have too many subsets for a planner.
const ORDERS_TRIED_MAX: usize = 7;
/// Up to this many devices every pair of first and last device is tried.
const ENDS_TRIED_MAX: usize = 12;
/// For more devices, this many of the fastest, and of those with the most memory, are tried as the first device of a
/// chain: more would take too long.
const BEGINNINGS_TRIED: usize = 8;
/// The limit on searched devices: the time of a search grows with their square, and a peer may report any number.
pub(super) const DEVICES_SEARCHED_MAX: usize = 64;

/// The devices that are searched, in their order. Of more than [`DEVICES_SEARCHED_MAX`] devices, one half are the first
/// ones, and the other half are those of the rest with the most memory.
fn searched<'a>(ordered: &[&'a Offer]) -> Vec<&'a Offer> {
    let first = ordered.len().min(DEVICES_SEARCHED_MAX / 2);
    let mut others: Vec<usize> = (first..ordered.len()).collect();
    others.sort_by_key(|&index| std::cmp::Reverse(ordered[index].free_bytes));
    others.truncate(DEVICES_SEARCHED_MAX - first);
    others.sort_unstable();
    (0..first).chain(others).map(|index| ordered[index]).collect()
}

/// The best chain over any of the devices. Few devices are tried in every order, more with every first and last device,
/// and many with some first devices; the devices between stay in order. The ends matter most: they hold the embedding
/// and the output head, and the path back connects them.
pub(super) fn best_chain(demand: &Demand, ordered: &[&Offer], links: &Links, policy: Policy) -> Option<Vec<Stage>> {
    let ordered = &searched(ordered)[..];
    let table = Table::new(demand);
    let search = Search { demand, table: &table, links, policy };
    // The cost of a first chain bounds the search for better ones.
    let mut best = search.along(ordered, None);
    let mut consider = |find: &dyn Fn(Option<Cost>) -> Option<(Cost, Vec<Stage>)>| {
        let bound = best.as_ref().map(|(cost, _)| *cost);
        if let Some((cost, stages)) = find(bound)
            && best.as_ref().is_none_or(|(other, _)| cost.is_less(*other, policy))
        {
            best = Some((cost, stages));
        }
    };
    if ordered.len() <= ORDERS_TRIED_MAX {
        (0..ordered.len()).for_each(|first| consider(&|bound| search.in_any_order(ordered, first, bound)));
    } else {
        orders(ordered).iter().for_each(|devices| consider(&|bound| search.along(devices, bound)));
    }
    best.map(|(_, stages)| stages)
}

/// Orders to search along; each chain begins with the first of its order.
fn orders<'a>(ordered: &[&'a Offer]) -> Vec<Vec<&'a Offer>> {
    let without = |ends: &[usize]| {
        let others = ordered.iter().enumerate().filter(|(index, _)| !ends.contains(index));
        others.map(|(_, offer)| *offer).collect::<Vec<_>>()
    };
    let count = ordered.len();
    if count > ENDS_TRIED_MAX {
        let mut roomiest: Vec<usize> = (0..count).collect();
        roomiest.sort_by_key(|&index| std::cmp::Reverse(ordered[index].free_bytes));
        let beginnings: BTreeSet<usize> =
            (0..count).take(BEGINNINGS_TRIED).chain(roomiest.into_iter().take(BEGINNINGS_TRIED)).collect();
        return beginnings.into_iter().map(|first| [vec![ordered[first]], without(&[first])].concat()).collect();
    }
    let pairs =
        (0..count).flat_map(|first| (0..count).filter(move |&last| last != first).map(move |last| (first, last)));
    pairs.map(|(first, last)| [vec![ordered[first]], without(&[first, last]), vec![ordered[last]]].concat()).collect()
}

struct Search<'a> {
    demand: &'a Demand,
    table: &'a Table,
    links: &'a Links,
    policy: Policy,
}

/// The cheapest chain up to a device and a layer: its cost, the start of its last range, and the row before.
type Reached = Option<(Cost, usize, usize)>;
/// For each layer, the cheapest chain before a shard that starts there: its cost, and the index of its row.
type Arrivals = Vec<Option<(Cost, usize)>>;

/// The cheapest chains whose last shard is on a device, for each end of that shard.
struct Row<'a> {
    offer: &'a Offer,
    ends: Vec<Reached>,
}

impl Search<'_> {
    /// The best chain that begins on the first device and continues over any of the others, in their order. Chains that
    /// cost more than `bound` are skipped.
    fn along(&self, devices: &[&Offer], bound: Option<Cost>) -> Option<(Cost, Vec<Stage>)> {
        let mut rows: Vec<Row<'_>> = Vec::with_capacity(devices.len());
        for &offer in devices {
            let arrivals = match rows.is_empty() {
                true => self.beginning(),
                false => {
                    let before = rows.iter().enumerate().map(|(row, other)| (row, other.offer.node != offer.node));
                    self.arrivals(&rows, before, offer)
                }
            };
            rows.push(self.extended(offer, &arrivals, bound));
        }
        self.best_end(&rows)
    }

    /// The best chain that begins on the device `first` and continues over any of the others, in any order. Dynamic
    /// programming over (devices of the chain, its last device, layers placed so far).
    fn in_any_order(&self, devices: &[&Offer], first: usize, bound: Option<Cost>) -> Option<(Cost, Vec<Stage>)> {
        let count = devices.len();
        let of_set = |set: usize| (0..count).filter(move |device| set & (1 << device) != 0);
        let mut rows = vec![self.extended(devices[first], &self.beginning(), bound)];
        // The row of each set and last device. A set without one of its devices is a smaller number, so its row exists.
        let mut row_of = vec![None; count << count];
        row_of[(1 << first) * count + first] = Some(0);
        for set in (0..1_usize << count).filter(|set| set & (1 << first) != 0) {
            for last in of_set(set).filter(|&last| last != first) {
                let others = set & !(1 << last);
                let is_new = of_set(others).all(|other| devices[other].node != devices[last].node);
                let before = of_set(others).filter_map(|other| row_of[others * count + other]).map(|row| (row, is_new));
                let arrivals = self.arrivals(&rows, before, devices[last]);
                if arrivals.iter().any(Option::is_some) {
                    row_of[set * count + last] = Some(rows.len());
                    rows.push(self.extended(devices[last], &arrivals, bound));
                }
            }
        }
        self.best_end(&rows)
    }

    /// The empty chain, from which every chain begins.
    fn beginning(&self) -> Arrivals {
        let mut arrivals = vec![None; self.table.layers];
        arrivals[0] = Some((NOTHING.and_hop(0.0, true), 0));
        arrivals
    }

    /// The cheapest chains to `offer` from the rows `before`, each with whether `offer` adds a node to its chain.
    fn arrivals(&self, rows: &[Row<'_>], before: impl Iterator<Item = (usize, bool)>, offer: &Offer) -> Arrivals {
        let mut arrivals: Arrivals = vec![None; self.table.layers];
        for (row, is_new) in before {
            let hop_s = self.links.seconds(rows[row].offer.node, offer.node, self.demand.row_bytes);
            for (start, slot) in arrivals.iter_mut().enumerate().skip(1) {
                let Some((cost, ..)) = rows[row].ends[start] else { continue };
                let arrived = cost.and_hop(hop_s, is_new);
                if slot.is_none_or(|(other, _): (Cost, usize)| arrived.is_less(other, self.policy)) {
                    *slot = Some((arrived, row));
                }
            }
        }
        arrivals
    }

    /// Extends each arrival at `offer` by one shard on it.
    fn extended<'a>(&self, offer: &'a Offer, arrivals: &Arrivals, bound: Option<Cost>) -> Row<'a> {
        let mut ends: Vec<Reached> = vec![None; self.table.layers + 1];
        for (start, arrival) in arrivals.iter().enumerate() {
            let Some((before, from)) = *arrival else { continue };
            for (end, slot) in ends.iter_mut().enumerate().skip(start + 1) {
                if self.table.memory_bytes(start, end) > offer.free_bytes {
                    // More layers need at least as much memory.
                    break;
                }
                let compute_s = self.table.work(start, end) / offer.speed.bytes_per_s.max(1.0);
                let cost = before.and_shard(compute_s);
                if bound.is_some_and(|bound| cost.exceeds(bound, self.policy)) {
                    // More layers cost at least as much.
                    break;
                }
                if slot.is_none_or(|(other, ..)| cost.is_less(other, self.policy)) {
                    *slot = Some((cost, start, from));
                }
            }
        }
        Row { offer, ends }
    }

    fn best_end(&self, rows: &[Row<'_>]) -> Option<(Cost, Vec<Stage>)> {
        let layers = self.table.layers;
        let first = rows.first()?.offer.node;
        let mut best: Option<(Cost, usize)> = None;
        for (index, row) in rows.iter().enumerate() {
            let Some((cost, ..)) = row.ends[layers] else { continue };
            let back_s = self.links.seconds(row.offer.node, first, 0);
            let cost = Cost { total_s: cost.total_s + back_s, ..cost };
            if best.is_none_or(|(other, _)| cost.is_less(other, self.policy)) {
                best = Some((cost, index));
            }
        }
        let (cost, mut index) = best?;
        let mut stages = Vec::new();
        let mut end = layers;
        while end > 0 {
            let (_, start, from) = rows[index].ends[end]?;
            stages.push(stage(self.demand, rows[index].offer, start..end));
            (end, index) = (start, from);
        }
        stages.reverse();
        Some((cost, stages))
    }
}

/// Prefix sums over the layers: the sum of a range is one subtraction.
struct Table {
    layers: usize,
    weights: Vec<u64>,
    kv: Vec<u64>,
    embedding_bytes: u64,
    head_bytes: u64,
    work: Vec<u64>,
    head_cost_bytes: u64,
    ties_embeddings: bool,
}

impl Table {
    fn new(demand: &Demand) -> Self {
        let sums = |bytes: &[u64]| {
            let mut sum = 0_u64;
            std::iter::once(0)
                .chain(bytes.iter().map(|bytes| {
                    sum = sum.saturating_add(*bytes);
                    sum
                }))
                .collect()
        };
        Self {
            layers: demand.layers(),
            weights: sums(&demand.layer_bytes),
            kv: sums(&demand.kv_bytes),
            embedding_bytes: demand.embedding_bytes,
            head_bytes: demand.head_bytes,
            work: sums(&demand.layer_cost_bytes),
            head_cost_bytes: demand.head_cost_bytes,
            ties_embeddings: demand.ties_embeddings,
        }
    }

    fn memory_bytes(&self, start: usize, end: usize) -> u64 {
        let (first, last) = (start == 0, end == self.layers);
        let embedding = if first { self.embedding_bytes } else { 0 };
        let head = if last && !(self.ties_embeddings && first) { self.head_bytes } else { 0 };
        self.weights[end] - self.weights[start] + self.kv[end] - self.kv[start] + embedding + head
    }

    /// The cost of a range in bytes. The embedding look-up counts as free.
    fn work(&self, start: usize, end: usize) -> f64 {
        let head = if end == self.layers { self.head_cost_bytes } else { 0 };
        (self.work[end] - self.work[start] + head) as f64
    }
}
