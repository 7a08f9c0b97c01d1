//! What becomes of a placement when devices go or come.

use super::{Demand, Links, Offer, Placement, Stage, stage, token_seconds};
use exo_engines::engine::DeviceId;
use exo_net::NodeId;

/// A move must make tokens this much faster: loading, and replaying what runs, are not free, and measurements waver.
const GAIN_MIN: f64 = 1.3;

/// The placement with each shard that is where no device is offered on another device that has room, and all others
/// where they are. `None` where some shard has no place. `offers` count what the shards that stay take as taken.
pub fn mend(demand: &Demand, current: &Placement, offers: &[Offer], links: &Links) -> Option<Placement> {
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

/// Whether a better placement is so much better that the move is worth it.
pub fn pays_for_itself(
    demand: &Demand,
    current: &Placement,
    better: &Placement,
    offers: &[Offer],
    links: &Links,
) -> bool {
    let now = token_seconds(demand, current, offers, links);
    now > GAIN_MIN * token_seconds(demand, better, offers, links)
}
