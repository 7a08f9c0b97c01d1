//! What becomes of a placement when devices go or come.

use super::{Demand, Links, Offer, Placement, Policy, Stage, slowest_seconds, stage, token_seconds};
use exo_engines::engine::DeviceId;
use exo_net::NodeId;

/// A move must make tokens this much faster: loading, and replaying what runs, are not free, and measurements waver.
const GAIN_MIN: f64 = 1.3;

/// The placement with each shard that is where no device is offered on another device that has room, and all others
/// where they are. `None` where some shard has no place. `offers` count what the shards that stay take as taken.
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

/// Why a move to a better placement is worth it, by what the policy minimises; `None` where it is not.
pub fn why_move(
    demand: &Demand,
    current: &Placement,
    better: &Placement,
    offers: &[Offer],
    links: &Links,
    policy: Policy,
) -> Option<String> {
    let ratio = |of: fn(&Demand, &Placement, &[Offer], &Links) -> f64| {
        let ratio = of(demand, current, offers, links) / of(demand, better, offers, links);
        (ratio > GAIN_MIN).then_some(ratio)
    };
    match policy {
        Policy::FewestNodes if better.machines() < current.machines() => Some("on fewer machines".to_owned()),
        Policy::FewestNodes if better.machines() > current.machines() => None,
        Policy::Latency | Policy::FewestNodes => {
            ratio(token_seconds).map(|ratio| format!("{ratio:.1} times as fast as where it was"))
        }
        Policy::Throughput => {
            ratio(slowest_seconds).map(|ratio| format!("its slowest shard is {ratio:.1} times as fast as it was"))
        }
    }
}

/// Whether a placement has room while the shards of the current one are still there. `offers` count those as taken.
pub fn fits_beside(current: &Placement, better: &Placement, offers: &[Offer]) -> bool {
    let is_there = |index: usize| current.stages.get(index) == better.stages.get(index);
    offers.iter().all(|offer| {
        let more =
            better.stages.iter().enumerate().filter(|(index, stage)| stage.node == offer.node && !is_there(*index));
        more.map(|(_, stage)| stage.memory_bytes).fold(0, u64::saturating_add) <= offer.free_bytes
    })
}
