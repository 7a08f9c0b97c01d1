//! Changes of a placement when devices appear or are lost.

use super::{Demand, Link, Links, Placement, Policy, Stage, slowest_seconds, stage, token_seconds};
use crate::core::offer::Offer;
use crate::core::speed::Speed;
use exo_engines::engine::DeviceId;
use exo_net::NodeId;

/// A move must make tokens this many times as fast: loading and replaying cost time.
const GAIN_MIN: f64 = 1.3;

/// Moves each shard whose device is not in `offers` to an offered device with enough memory; other shards stay. Returns
/// `None` if some shard fits no device. The free memory in `offers` excludes the memory of the shards that stay.
pub fn repair(demand: &Demand, current: &Placement, offers: &[Offer], links: &Links) -> Option<Placement> {
    let is_offered = |stage: &Stage| offers.iter().any(|offer| is_on(stage, offer.node, &offer.device));
    let mut free: Vec<(&Offer, u64)> = offers.iter().map(|offer| (offer, offer.free_bytes)).collect();
    let mut stages = current.stages.clone();
    for index in 0..stages.len() {
        if is_offered(&stages[index]) {
            continue;
        }
        let range = stages[index].layers.clone();
        let needed = demand.memory_bytes(&range);
        let hops = |offer: &Offer| -> f64 {
            let near = [index.checked_sub(1), Some(index + 1)].into_iter().flatten().filter_map(|at| stages.get(at));
            near.map(|other| links.seconds(other.node, offer.node, demand.row_bytes)).sum()
        };
        let seconds = |offer: &Offer| demand.seconds(&range, offer) + hops(offer);
        let fits = free.iter_mut().filter(|(_, free)| *free >= needed);
        let (offer, free) = fits.min_by(|(a, _), (b, _)| seconds(a).total_cmp(&seconds(b)))?;
        *free -= needed;
        stages[index] = stage(demand, offer, range);
    }
    Some(Placement { stages })
}

fn is_on(stage: &Stage, node: NodeId, device: &DeviceId) -> bool {
    (stage.node, &stage.device) == (node, device)
}

/// Returns why a move to a better placement is worth its cost by the policy, or `None` if it is not, or if the speeds
/// of devices or links are too uncertain to tell.
pub fn why_move(
    demand: &Demand,
    current: &Placement,
    better: &Placement,
    offers: &[Offer],
    links: &Links,
    policy: Policy,
) -> Option<String> {
    let ratio = |of: fn(&Demand, &Placement, &[Offer], &Links) -> f64| {
        // The devices and links that the move gives up may be faster than estimated, and those that it takes slower.
        let at_best = at_bounds(offers, current, better, |speed| speed.bytes_per_s * speed.spread);
        let at_worst = at_bounds(offers, better, current, |speed| speed.bytes_per_s / speed.spread);
        let links_at_best = links_at_bounds(links, current, better, |link| link.slowed(1.0 / link.spread));
        let links_at_worst = links_at_bounds(links, better, current, |link| link.slowed(link.spread));
        let certain = of(demand, current, &at_best, &links_at_best) / of(demand, better, &at_worst, &links_at_worst);
        (certain > GAIN_MIN).then(|| of(demand, current, offers, links) / of(demand, better, offers, links))
    };
    match policy {
        Policy::FewestNodes if better.machines() < current.machines() => Some("on fewer machines".to_owned()),
        Policy::FewestNodes if better.machines() > current.machines() => None,
        Policy::Latency | Policy::FewestNodes => {
            ratio(token_seconds).map(|ratio| format!("{ratio:.1} times as fast as before"))
        }
        Policy::Throughput => {
            ratio(slowest_seconds).map(|ratio| format!("its slowest device or link is {ratio:.1} times as fast"))
        }
    }
}

/// The offers, with other speeds for the devices that `only` uses and `not` does not.
fn at_bounds(offers: &[Offer], only: &Placement, not: &Placement, bound: impl Fn(Speed) -> f64) -> Vec<Offer> {
    let bounded = |offer: &Offer| {
        let mut offer = offer.clone();
        if only.uses(offer.node, &offer.device) && !not.uses(offer.node, &offer.device) {
            offer.speed.bytes_per_s = bound(offer.speed);
        }
        offer
    };
    offers.iter().map(bounded).collect()
}

/// The links, with other times for those that `only` uses and `not` does not.
fn links_at_bounds(links: &Links, only: &Placement, not: &Placement, bound: impl Fn(Link) -> Link) -> Links {
    let mut bounded = links.clone();
    let is_shared = |hop: (NodeId, NodeId)| not.hops().any(|other| other == hop || other == (hop.1, hop.0));
    for (from, to) in only.hops().filter(|&hop| !is_shared(hop)) {
        bounded.0.insert((from, to), bound(links.link(from, to)));
    }
    bounded
}

/// Whether a placement fits beside the shards of the current one. The free memory in `offers` excludes those shards.
/// Shards on a device without an offer count for all memory of their node.
pub fn fits_beside(current: &Placement, better: &Placement, offers: &[Offer]) -> bool {
    let is_there = |index: usize| current.stages.get(index) == better.stages.get(index);
    let pool = |stage: &Stage| {
        let offer = offers.iter().find(|offer| is_on(stage, offer.node, &offer.device));
        offer.map(|offer| offer.pool.clone())
    };
    let new: Vec<_> = better.stages.iter().enumerate().filter(|(index, _)| !is_there(*index)).collect();
    offers.iter().all(|offer| {
        let uses = |stage: &Stage| stage.node == offer.node && pool(stage).is_none_or(|pool| pool == offer.pool);
        let more = new.iter().filter(|(_, stage)| uses(stage)).map(|(_, stage)| stage.memory_bytes);
        more.fold(0, u64::saturating_add) <= offer.free_bytes
    })
}
