//! The exact search: dynamic programming over (device, layers placed so far).

use super::{Demand, Links, Offer, Policy, Stage, stage};
use std::ops::Range;

/// A place for one shard: a device, or a share of one.
pub(super) struct Slot<'a> {
    pub(super) offer: &'a Offer,
    pub(super) free_bytes: u64,
}

/// What a chain of shards costs. The first number decides, the others decide between equals.
#[derive(Debug, Clone, Copy, PartialEq)]
struct Cost {
    /// Nodes that the chain goes to.
    nodes: u32,
    total_s: f64,
    slowest_s: f64,
    stages: u32,
}

const NOTHING: Cost = Cost { nodes: 0, total_s: 0.0, slowest_s: 0.0, stages: 0 };

impl Cost {
    /// With one more shard, which takes `compute_s` and is reached in `hop_s`.
    fn and(self, compute_s: f64, hop_s: f64, new_node: bool) -> Self {
        Self {
            nodes: self.nodes + u32::from(new_node),
            total_s: self.total_s + compute_s + hop_s,
            slowest_s: self.slowest_s.max(compute_s).max(hop_s),
            stages: self.stages + 1,
        }
    }

    /// Sums of the same terms in another order differ in the last bits: those are equals.
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
pub(super) fn exact_split(demand: &Demand, slots: &[Slot<'_>]) -> Option<Vec<Range<usize>>> {
    let layers = demand.layers();
    let table = Table::new(demand);
    // best[slot][end]: cost of layers 0..end over the slots up to `slot`, and where the slot's range starts.
    let mut best: Vec<Vec<Option<(Cost, usize)>>> = Vec::new();
    for (index, slot) in slots.iter().enumerate() {
        // Every slot before and behind has a layer at least.
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
                let cost = before.and(table.compute_bytes(start, end) / slot.offer.bytes_per_s.max(1.0), 0.0, false);
                let is_better = cheapest.is_none_or(|(other, _)| even(cost, other));
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

/// The number of shards is given: the least total wins, and of equals the most even split.
fn even(a: Cost, b: Cost) -> bool {
    let margin = 1e-9 * b.total_s.abs();
    a.total_s < b.total_s - margin || (a.total_s <= b.total_s + margin && a.slowest_s < b.slowest_s)
}

/// The best chain over any of the devices, in their order.
pub(super) fn best_chain(demand: &Demand, ordered: &[&Offer], links: &Links, policy: Policy) -> Option<Vec<Stage>> {
    let table = Table::new(demand);
    let mut best: Option<(Cost, Vec<Stage>)> = None;
    // The way back depends on where a chain begins: one search for each beginning.
    for first in 0..ordered.len() {
        let search = Search { demand, table: &table, ordered, links, policy };
        if let Some((cost, stages)) = search.from(first)
            && best.as_ref().is_none_or(|(other, _)| cost.is_less(*other, policy))
        {
            best = Some((cost, stages));
        }
    }
    best.map(|(_, stages)| stages)
}

struct Search<'a> {
    demand: &'a Demand,
    table: &'a Table,
    ordered: &'a [&'a Offer],
    links: &'a Links,
    policy: Policy,
}

/// How a chain came to a device and an end: its cost, where its last range starts, and the device before.
type Reached = Option<(Cost, usize, usize)>;

impl Search<'_> {
    /// The best chain that begins on device `first`.
    fn from(&self, first: usize) -> Option<(Cost, Vec<Stage>)> {
        let layers = self.demand.layers();
        let devices = &self.ordered[first..];
        let mut reached: Vec<Vec<Reached>> = Vec::with_capacity(devices.len());
        for (index, offer) in devices.iter().enumerate() {
            let arrivals = self.arrivals(devices, &reached, index);
            let mut row: Vec<Reached> = vec![None; layers + 1];
            for (start, arrival) in arrivals.into_iter().enumerate() {
                let Some((before, from, hop_s, is_new)) = arrival else { continue };
                for (end, slot) in row.iter_mut().enumerate().skip(start + 1) {
                    if self.table.memory_bytes(start, end) > offer.free_bytes {
                        // More layers need no less.
                        break;
                    }
                    let compute_s = self.table.compute_bytes(start, end) / offer.bytes_per_s.max(1.0);
                    let cost = before.and(compute_s, hop_s, is_new);
                    if slot.is_none_or(|(other, ..)| cost.is_less(other, self.policy)) {
                        *slot = Some((cost, start, from));
                    }
                }
            }
            reached.push(row);
        }
        self.best_end(devices, &reached)
    }

    /// For each layer, the cheapest way to begin it on device `index`: the cost so far, the device before, the hop.
    fn arrivals(
        &self,
        devices: &[&Offer],
        reached: &[Vec<Reached>],
        index: usize,
    ) -> Vec<Option<(Cost, usize, f64, bool)>> {
        let layers = self.demand.layers();
        let mut arrivals = vec![None; layers];
        if index == 0 {
            arrivals[0] = Some((NOTHING, 0, 0.0, true));
            return arrivals;
        }
        for (from, row) in reached.iter().enumerate() {
            let hop_s = self.links.seconds(devices[from].node, devices[index].node, self.demand.row_bytes);
            let is_new = devices[from].node != devices[index].node;
            for (start, slot) in arrivals.iter_mut().enumerate().skip(1) {
                let Some((cost, ..)) = row[start] else { continue };
                let arrived = cost.and(0.0, hop_s, is_new);
                let is_better = slot.is_none_or(|(other, _, other_hop, other_new): (Cost, usize, f64, bool)| {
                    arrived.is_less(other.and(0.0, other_hop, other_new), self.policy)
                });
                if is_better {
                    *slot = Some((cost, from, hop_s, is_new));
                }
            }
        }
        arrivals
    }

    fn best_end(&self, devices: &[&Offer], reached: &[Vec<Reached>]) -> Option<(Cost, Vec<Stage>)> {
        let layers = self.demand.layers();
        let mut best: Option<(Cost, usize)> = None;
        for (index, row) in reached.iter().enumerate() {
            let Some((cost, ..)) = row[layers] else { continue };
            let back_s = self.links.seconds(devices[index].node, devices[0].node, 0);
            let cost = Cost { total_s: cost.total_s + back_s, ..cost };
            if best.is_none_or(|(other, _)| cost.is_less(other, self.policy)) {
                best = Some((cost, index));
            }
        }
        let (cost, mut index) = best?;
        let mut stages = Vec::new();
        let mut end = layers;
        while end > 0 {
            let (_, start, from) = reached[index][end]?;
            stages.push(stage(self.demand, devices[index], start..end));
            (end, index) = (start, from);
        }
        stages.reverse();
        Some((cost, stages))
    }
}

/// Sums up to each layer, so that a range costs a subtraction.
struct Table {
    layers: usize,
    weights: Vec<u64>,
    kv: Vec<u64>,
    embedding_bytes: u64,
    head_bytes: u64,
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
            ties_embeddings: demand.ties_embeddings,
        }
    }

    fn memory_bytes(&self, start: usize, end: usize) -> u64 {
        let (first, last) = (start == 0, end == self.layers);
        let embedding = if first { self.embedding_bytes } else { 0 };
        let head = if last && !(self.ties_embeddings && first) { self.head_bytes } else { 0 };
        self.weights[end] - self.weights[start] + self.kv[end] - self.kv[start] + embedding + head
    }

    /// Looking up an embedding costs nothing.
    fn compute_bytes(&self, start: usize, end: usize) -> f64 {
        let head = if end == self.layers { self.head_bytes } else { 0 };
        (self.weights[end] - self.weights[start] + head) as f64
    }
}
