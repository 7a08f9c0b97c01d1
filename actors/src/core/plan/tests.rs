//! Placements, compared with those of an exhaustive search.

use super::*;
use crate::core::offer::MemoryPool;
use crate::core::speed::Speed;
use proptest::prelude::*;
use std::collections::BTreeSet;

fn node() -> NodeId {
    exo_net::Identity::ephemeral().expect("random bytes").node_id()
}

fn demand(layer_bytes: Vec<u64>, ends: u64) -> Demand {
    Demand {
        kv_pages: 1,
        kv_bytes: vec![1; layer_bytes.len()],
        layer_cost_bytes: layer_bytes.clone(),
        layer_bytes,
        head_cost_bytes: ends,
        embedding_bytes: ends,
        head_bytes: ends,
        ties_embeddings: true,
        row_bytes: 16,
    }
}

fn offers(free: &[(u64, f64)]) -> Vec<Offer> {
    let node = node();
    let offer = |(index, &(free_bytes, bytes_per_s)): (usize, &(u64, f64))| Offer {
        node,
        device: DeviceId(format!("gpu:{index}")),
        pool: MemoryPool::Machine,
        free_bytes,
        speed: Speed { bytes_per_s, spread: 1.0 },
    };
    free.iter().enumerate().map(offer).collect()
}

fn automatic(demand: &Demand, offers: &[Offer]) -> Result<Placement, PlanError> {
    place(demand, offers, &Links::default(), &ShardCount::Automatic, Policy::Latency)
}

fn exact(demand: &Demand, offers: &[Offer], count: usize) -> Result<Placement, PlanError> {
    place(demand, offers, &Links::default(), &ShardCount::Exactly(count), Policy::Latency)
}

#[test]
fn a_model_that_fits_one_device_is_not_split() {
    let placement = automatic(&demand(vec![10; 8], 5), &offers(&[(200, 1.0), (200, 2.0)]));
    let stages = placement.expect("it fits").stages;
    assert_eq!(stages.len(), 1);
    assert_eq!(stages[0].device.0, "gpu:1");
    assert_eq!(stages[0].memory_bytes, 8 * 11 + 5);
}

/// R7.1–R7.5: the search is bounded, and still finds the one slow device that has the memory.
#[test]
fn of_many_devices_the_fastest_and_the_roomiest_are_searched() {
    let mut free = vec![(5, 9.0); 299];
    free.push((200, 1.0));
    let stages = automatic(&demand(vec![10; 8], 5), &offers(&free)).expect("it fits").stages;
    assert_eq!(stages.iter().map(|stage| stage.device.0.as_str()).collect::<Vec<_>>(), ["gpu:299"]);
}

#[test]
fn demands_with_impossible_numbers_do_not_fit() {
    let many = Demand { kv_pages: u32::MAX, ..demand(vec![10; 8], 5) };
    let refused = automatic(&many, &offers(&[(200, 1.0)]));
    assert!(matches!(refused, Err(PlanError::DoesNotFit { .. })), "{refused:?}");
    let absurd = Demand { layer_bytes: vec![u64::MAX; 8], ..demand(vec![10; 8], 5) };
    let refused = automatic(&absurd, &offers(&[(u64::MAX, 1.0), (u64::MAX, 1.0)]));
    assert!(matches!(refused, Err(PlanError::DoesNotFit { .. })), "{refused:?}");
}

#[test]
fn errors_name_the_missing_bytes() {
    let missing = automatic(&demand(vec![10; 8], 5), &offers(&[(40, 1.0), (20, 1.0)]));
    let expected = PlanError::DoesNotFit { needed_bytes: 93, free_bytes: 60, missing_bytes: 33 };
    assert_eq!(missing, Err(expected));
    assert_eq!(automatic(&demand(vec![1], 0), &[]), Err(PlanError::NoDevice));
}

#[test]
fn shards_on_one_device_are_even() {
    let placement = exact(&demand(vec![10; 30], 0), &offers(&[(1000, 1.0)]), 3);
    let ranges: Vec<_> = placement.expect("it fits").stages.into_iter().map(|stage| stage.layers).collect();
    assert_eq!(ranges, [0..10, 10..20, 20..30]);
    let too_many = exact(&demand(vec![10; 3], 0), &offers(&[(1000, 1.0)]), 4);
    assert_eq!(too_many, Err(PlanError::TooManyShards { shards: 4, layers: 3 }));
}

/// All splits of `layers` into `count` ranges.
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
    /// R7.1–R7.5: the split that the search finds is the cheapest that fits, compared with all splits.
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
        match exact(&demand, &offers, count) {
            Err(_) => prop_assert_eq!(cheapest, None),
            Ok(placement) => {
                let ranges: Vec<_> = placement.stages.iter().map(|stage| stage.layers.clone()).collect();
                let found = cost(&ranges);
                prop_assert!(found.zip(cheapest).is_some_and(|(found, best)| (found - best).abs() < 1e-6));
            }
        }
    }

    /// R7.1–R7.5: no chain over any devices in any order is better than the one that the search finds, for every
    /// policy, for arbitrary links, and with several devices per node. If no chain fits, the search finds none.
    #[test]
    fn no_chain_is_better(
        layer_bytes in prop::collection::vec(5_u64..15, 1..6),
        ends in 0_u64..30,
        ties_embeddings in any::<bool>(),
        devices in prop::collection::vec((5_u64..60, 1_u32..5), 1..6),
        nodes in prop::collection::vec(0_usize..5, 5),
        rtts_ms in prop::collection::vec(0_u32..4000, 25),
        policy in prop::sample::select(vec![Policy::Latency, Policy::Throughput, Policy::FewestNodes]),
    ) {
        let demand = Demand { ties_embeddings, ..demand(layer_bytes, ends) };
        let mut offers = of_nodes(&devices);
        let ids: Vec<NodeId> = offers.iter().map(|offer| offer.node).collect();
        for (index, offer) in offers.iter_mut().enumerate() {
            offer.node = ids[nodes[index] % ids.len()];
            offer.device = DeviceId(format!("gpu:{index}"));
        }
        let mut links = even_links(&offers, 0.0);
        links.0.values_mut().zip(rtts_ms).for_each(|(link, rtt_ms)| link.rtt_s = f64::from(rtt_ms) / 1e3);
        let best = all_chains(&demand, &offers).into_iter().map(|chain| worth(&demand, &chain, &offers, &links, policy));
        let best = best.min_by(|a, b| a.partial_cmp(b).expect("numbers"));
        let found = place(&demand, &offers, &links, &ShardCount::Automatic, policy).ok();
        let found = found.map(|placement| worth(&demand, &placement, &offers, &links, policy));
        match (found, best) {
            (Some(found), Some(best)) => {
                prop_assert!((found.0 - best.0).abs() < 1e-9 && found.1 <= best.1 + 1e-9, "{found:?} {best:?}");
            }
            (found, best) => prop_assert_eq!(found, best),
        }
    }

    /// A repair keeps the shards whose devices remain, and moves the others to devices with enough memory. It
    /// succeeds if a single shard is lost and any remaining device has enough memory for it.
    #[test]
    fn a_repair_moves_only_lost_shards(
        devices in prop::collection::vec((20_u64..80, 1_u32..5), 2..5),
        lost_node in 0_usize..4,
    ) {
        let demand = demand(vec![10; 4], 5);
        let offers = of_nodes(&devices);
        let links = even_links(&offers, 1e-3);
        let Ok(current) = place(&demand, &offers, &links, &ShardCount::Exactly(2), Policy::Latency) else { return Ok(()) };
        let lost_node = offers[lost_node % offers.len()].node;
        let taken = |offer: &Offer| -> u64 {
            current.stages.iter().filter(|stage| stage.node == offer.node).map(|stage| stage.memory_bytes).sum()
        };
        let left: Vec<Offer> = offers.iter().filter(|offer| offer.node != lost_node).map(|offer| {
            Offer { free_bytes: offer.free_bytes - taken(offer), ..offer.clone() }
        }).collect();
        let lost: Vec<&Stage> = current.stages.iter().filter(|stage| stage.node == lost_node).collect();
        match repair(&demand, &current, &left, &links) {
            Some(repaired) => {
                for (old, new) in current.stages.iter().zip(&repaired.stages) {
                    prop_assert_eq!(&old.layers, &new.layers);
                    let is_kept = old.node != lost_node;
                    prop_assert!(is_kept && old == new || !is_kept && new.node != lost_node);
                }
                for offer in &left {
                    let new = repaired.stages.iter().zip(&current.stages).filter(|(new, old)| new.node == offer.node && old.node == lost_node);
                    prop_assert!(new.map(|(new, _)| new.memory_bytes).sum::<u64>() <= offer.free_bytes);
                }
            }
            None => {
                let roomy = left.iter().any(|offer| lost.iter().all(|stage| offer.free_bytes >= stage.memory_bytes));
                prop_assert!(lost.len() > 1 || !roomy);
            }
        }
    }
}

/// R7.1–R7.5: splits by hand are placed exactly as given, or are refused with an error that names the fault.
#[test]
fn splits_by_hand_are_placed_exactly() {
    let demand = demand(vec![10; 4], 0);
    let offers = of_nodes(&[(100, 1), (25, 2)]);
    let (a, b) = (offers[0].node, offers[1].node);
    let split = |parts: &[(NodeId, Range<usize>)]| {
        place(&demand, &offers, &Links::default(), &ShardCount::ByHand(parts.to_vec()), Policy::Latency)
    };
    let placed = split(&[(b, 0..2), (a, 2..4)]).expect("it fits");
    let stages: Vec<_> = placed.stages.iter().map(|stage| (stage.node, stage.layers.clone())).collect();
    assert_eq!(stages, [(b, 0..2), (a, 2..4)]);
    let bad = PlanError::BadSplit { layers: 4 };
    for parts in
        [&[(a, 0..2)][..], &[(a, 0..2), (b, 3..4)], &[(a, 0..3), (b, 2..4)], &[(a, 0..5)], &[(b, 2..4), (a, 0..2)], &[]]
    {
        assert_eq!(split(parts), Err(bad.clone()), "{parts:?}");
    }
    assert!(matches!(split(&[(a, 0..1), (b, 1..4)]), Err(PlanError::DoesNotFit { .. })), "b has memory for two layers");
    assert!(matches!(split(&[(node(), 0..4)]), Err(PlanError::NoSuchNode { .. })));
}

#[test]
fn splits_are_parsed_from_text() {
    let parsed: Split = "laptop:0-11, desktop:12-29,box:30".parse().expect("a split");
    let expected = [("laptop", 0..12), ("desktop", 12..30), ("box", 30..31)];
    assert_eq!(parsed.0, expected.map(|(name, layers)| (name.to_owned(), layers)));
    for wrong in ["", "a", "a:", ":0-1", "a:3-1", "a:0-x", "a:0-1,", "a:0-99999999999", "a:-1"] {
        assert!(wrong.parse::<Split>().is_err(), "{wrong}");
    }
}

/// A move is worth its cost only if it improves the goal of the policy by a margin.
#[test]
fn a_move_is_judged_by_its_policy() {
    let demand = demand(vec![10; 4], 0);
    let offers = of_nodes(&[(100, 10), (100, 12), (100, 40)]);
    let links = even_links(&offers, 1e-3);
    let on = |parts: &[(usize, Range<usize>)]| Placement {
        stages: parts.iter().map(|(at, layers)| stage(&demand, &offers[*at], layers.clone())).collect(),
    };
    let pays =
        |from: &Placement, to: &Placement, policy| why_move(&demand, from, to, &offers, &links, policy).is_some();
    let (slow, bit_faster, fast) = (on(&[(0, 0..4)]), on(&[(1, 0..4)]), on(&[(2, 0..4)]));
    assert!(!pays(&slow, &bit_faster, Policy::Latency) && pays(&slow, &fast, Policy::Latency));
    let (together, apart) = (on(&[(0, 0..2), (0, 2..4)]), on(&[(0, 0..2), (1, 2..4)]));
    assert!(pays(&together, &apart, Policy::Throughput) && !pays(&together, &apart, Policy::Latency));
    assert!(pays(&apart, &slow, Policy::FewestNodes) && !pays(&slow, &apart, Policy::FewestNodes));
}

/// Measurements that may be off by a factor move no model: the gain must be certain.
#[test]
fn an_uncertain_gain_moves_nothing() {
    let whole = |offers: &[Offer]| automatic(&demand(vec![10; 4], 5), offers).expect("it fits");
    let mut offers = offers(&[(1000, 1e3), (1000, 16e3)]);
    let (slow, fast) = (whole(&offers[..1]), whole(&offers[1..]));
    let why =
        |offers: &[Offer]| why_move(&demand(vec![10; 4], 5), &slow, &fast, offers, &Links::default(), Policy::Latency);
    assert!(why(&offers).is_some_and(|why| why.contains("16.0 times")));
    offers.iter_mut().for_each(|offer| offer.speed.spread = 3.0);
    assert!(why(&offers).is_some(), "16 / 9 is still more than the cost of a move");
    offers.iter_mut().for_each(|offer| offer.speed.spread = 4.0);
    assert_eq!(why(&offers), None);
}

/// A link that may be faster than measured keeps the model where it is.
#[test]
fn an_uncertain_link_moves_nothing() {
    let (demand, offers) = (demand(vec![10; 4], 5), of_nodes(&[(1000, 1000), (1000, 1000)]));
    let split = Placement { stages: vec![stage(&demand, &offers[0], 0..2), stage(&demand, &offers[1], 2..4)] };
    let whole = Placement { stages: vec![stage(&demand, &offers[0], 0..4)] };
    let why = |spread: f64| {
        let mut links = even_links(&offers, 0.4);
        links.0.values_mut().for_each(|link| link.spread = spread);
        why_move(&demand, &split, &whole, &offers, &links, Policy::Latency)
    };
    assert!(why(1.0).is_some());
    assert!(why(2.0).is_some(), "the measured time is ten times that of the work");
    assert_eq!(why(50.0), None);
}

/// One device on each of several nodes, from pairs of memory and speed.
fn of_nodes(devices: &[(u64, u32)]) -> Vec<Offer> {
    let offer = |&(free_bytes, speed): &(u64, u32)| Offer {
        node: node(),
        device: DeviceId("gpu:0".to_owned()),
        pool: MemoryPool::Machine,
        free_bytes,
        speed: Speed { bytes_per_s: f64::from(speed), spread: 1.0 },
    };
    devices.iter().map(offer).collect()
}

fn even_links(offers: &[Offer], rtt_s: f64) -> Links {
    let pairs = offers.iter().flat_map(|from| offers.iter().map(move |to| (from.node, to.node)));
    Links(pairs.map(|pair| (pair, Link { rtt_s, bytes_per_s: Some(1e3), spread: 1.0 })).collect())
}

/// All placements of the layers on any devices, in any order, that fit the memory.
fn all_chains(demand: &Demand, offers: &[Offer]) -> Vec<Placement> {
    fn orders(left: Vec<&Offer>) -> Vec<Vec<&Offer>> {
        let mut all = vec![Vec::new()];
        for index in 0..left.len() {
            let mut others = left.clone();
            let first = others.remove(index);
            all.extend(orders(others).into_iter().map(|order| [vec![first], order].concat()));
        }
        all
    }
    let mut chains = Vec::new();
    for order in orders(offers.iter().collect()) {
        if order.is_empty() || order.len() > demand.layers() {
            continue;
        }
        for split in all_splits(demand.layers(), order.len()) {
            if split.iter().zip(&order).all(|(range, offer)| demand.memory_bytes(range) <= offer.free_bytes) {
                let stages = split.into_iter().zip(&order).map(|(range, offer)| stage(demand, offer, range)).collect();
                chains.push(Placement { stages });
            }
        }
    }
    chains
}

/// The number that a policy minimises, and the number that breaks ties.
fn worth(demand: &Demand, placement: &Placement, offers: &[Offer], links: &Links, policy: Policy) -> (f64, f64) {
    let total = token_seconds(demand, placement, offers, links);
    let speed = |stage: &Stage| {
        let is_its = |offer: &&Offer| (offer.node, &offer.device) == (stage.node, &stage.device);
        offers.iter().find(is_its).expect("the device is offered")
    };
    let nodes: BTreeSet<NodeId> = placement.stages.iter().map(|stage| stage.node).collect();
    let stages = placement.stages.iter().map(|stage| demand.seconds(&stage.layers, speed(stage)));
    let hops = placement.stages.windows(2).map(|pair| links.seconds(pair[0].node, pair[1].node, demand.row_bytes));
    let slowest = stages.chain(hops).fold(0.0, f64::max);
    match policy {
        Policy::Latency => (total, f64::INFINITY),
        Policy::Throughput => (slowest, f64::INFINITY),
        Policy::FewestNodes => (nodes.len() as f64, total),
    }
}
