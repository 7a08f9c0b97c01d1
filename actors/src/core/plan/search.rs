//! The exact search: dynamic programming over (devices so far, the last of them, layers placed so far).

use super::{Demand, Links, Offer, Policy, Stage, stage};
use std::collections::BTreeSet;
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
    /// With the way to one more device.
    fn and_hop(self, hop_s: f64, new_node: bool) -> Self {
        Self {
            nodes: self.nodes + u32::from(new_node),
            total_s: self.total_s + hop_s,
            slowest_s: self.slowest_s.max(hop_s),
            ..self
        }
    }

    /// With one more shard.
    fn and_shard(self, compute_s: f64) -> Self {
        Self {
            total_s: self.total_s + compute_s,
            slowest_s: self.slowest_s.max(compute_s),
            stages: self.stages + 1,
            ..self
        }
    }

    /// Whether whatever this becomes is worse than `best`: costs only grow.
    fn exceeds(self, best: Self, policy: Policy) -> bool {
        match policy {
            Policy::Latency => self.total_s > best.total_s * (1.0 + 1e-6),
            Policy::Throughput => self.slowest_s > best.slowest_s * (1.0 + 1e-6),
            Policy::FewestNodes => self.nodes > best.nodes,
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
pub(super) fn exact_split(demand: &Demand, slots: &[Slot<'_>], policy: Policy) -> Option<Vec<Range<usize>>> {
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
                let cost = before.and_shard(table.work(start, end) / slot.offer.bytes_per_s.max(1.0));
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

/// The number of shards is given: the least total wins, and of equals the most even split; for throughput, the other way
/// round.
fn even(a: Cost, b: Cost, policy: Policy) -> bool {
    let of = |cost: Cost| match policy {
        Policy::Throughput => (cost.slowest_s, cost.total_s),
        Policy::Latency | Policy::FewestNodes => (cost.total_s, cost.slowest_s),
    };
    let ((a, then_a), (b, then_b)) = (of(a), of(b));
    let margin = 1e-9 * b.abs();
    a < b - margin || (a <= b + margin && then_a < then_b)
}

/// Up to so many devices every order is tried: more sets of them than a planner has time for.
const ORDERS_TRIED_MAX: usize = 7;
/// Up to so many, every pair of ends.
const ENDS_TRIED_MAX: usize = 12;
/// Beyond, these many of the fastest and of the roomiest as a beginning: more would take longer than anyone waits.
const BEGINNINGS_TRIED: usize = 8;
/// The most devices that are searched: the search takes time in their square, and a peer may report any number.
pub(super) const DEVICES_SEARCHED_MAX: usize = 64;

/// The devices that are searched, in their order: of more than [`DEVICES_SEARCHED_MAX`], half are the first and half the
/// roomiest others.
fn searched<'a>(ordered: &[&'a Offer]) -> Vec<&'a Offer> {
    let first = ordered.len().min(DEVICES_SEARCHED_MAX / 2);
    let mut others: Vec<usize> = (first..ordered.len()).collect();
    others.sort_by_key(|&index| std::cmp::Reverse(ordered[index].free_bytes));
    others.truncate(DEVICES_SEARCHED_MAX - first);
    others.sort_unstable();
    (0..first).chain(others).map(|index| ordered[index]).collect()
}

/// The best chain over any of the devices: in any order where devices are few; else with any two ends, or with any of some
/// beginnings, and between these in their order. The ends matter most: they hold the embedding and the head, and the way
/// back lies between them.
pub(super) fn best_chain(demand: &Demand, ordered: &[&Offer], links: &Links, policy: Policy) -> Option<Vec<Stage>> {
    let ordered = &searched(ordered)[..];
    let table = Table::new(demand);
    let search = Search { demand, table: &table, links, policy };
    // A first chain bounds the search for better ones.
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

/// How a chain came to a device and an end: its cost, where its last range starts, and the row before.
type Reached = Option<(Cost, usize, usize)>;
/// For each layer, the cheapest way to begin it on a device: the cost until then, and the row before.
type Arrivals = Vec<Option<(Cost, usize)>>;

/// The cheapest chains to a device, for each end.
struct Row<'a> {
    offer: &'a Offer,
    ends: Vec<Reached>,
}

impl Search<'_> {
    /// The best chain that begins on the first of the devices, and goes on over any of the others in their order.
    /// Nothing is looked at that costs more than `bound`.
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

    /// The best chain that begins on the device `first`, and goes on over any of the others in any order. Dynamic
    /// programming over (devices of the chain, the last of them, layers placed so far).
    fn in_any_order(&self, devices: &[&Offer], first: usize, bound: Option<Cost>) -> Option<(Cost, Vec<Stage>)> {
        let count = devices.len();
        let of_set = |set: usize| (0..count).filter(move |device| set & (1 << device) != 0);
        let mut rows = vec![self.extended(devices[first], &self.beginning(), bound)];
        // The row of a set and its last device. A set without one of its devices is a smaller number: it was there before.
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

    /// Where every chain begins.
    fn beginning(&self) -> Arrivals {
        let mut arrivals = vec![None; self.table.layers];
        arrivals[0] = Some((NOTHING.and_hop(0.0, true), 0));
        arrivals
    }

    /// How `offer` is come to from the rows `before`, each with whether it is a node more.
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

    /// One more shard, on `offer`, behind each way to come to it.
    fn extended<'a>(&self, offer: &'a Offer, arrivals: &Arrivals, bound: Option<Cost>) -> Row<'a> {
        let mut ends: Vec<Reached> = vec![None; self.table.layers + 1];
        for (start, arrival) in arrivals.iter().enumerate() {
            let Some((before, from)) = *arrival else { continue };
            for (end, slot) in ends.iter_mut().enumerate().skip(start + 1) {
                if self.table.memory_bytes(start, end) > offer.free_bytes {
                    // More layers need no less.
                    break;
                }
                let compute_s = self.table.work(start, end) / offer.bytes_per_s.max(1.0);
                let cost = before.and_shard(compute_s);
                if bound.is_some_and(|bound| cost.exceeds(bound, self.policy)) {
                    // Nor do they cost less.
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

/// Sums up to each layer, so that a range costs a subtraction.
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

    /// Looking up an embedding costs nothing.
    fn work(&self, start: usize, end: usize) -> f64 {
        let head = if end == self.layers { self.head_cost_bytes } else { 0 };
        (self.work[end] - self.work[start] + head) as f64
    }
}
