//! The time to plan a placement, compared with a limit of 100 ms, which users do not notice.

use exo_actors::NodeId;
use exo_actors::core::offer::{MemoryPool, Offer};
use exo_actors::core::plan::{Demand, Link, Links, Policy, ShardCount, place};
use exo_actors::core::speed::Speed;
use exo_engines::engine::DeviceId;
use std::collections::BTreeMap;
use std::time::Instant;

const DEVICES: u64 = 64;
const LAYERS: usize = 128;
const LIMIT_MS: f64 = 100.0;

pub(crate) fn bench(repeat: usize) -> anyhow::Result<()> {
    let ids: Vec<NodeId> = (1..=DEVICES).map(|number| format!("{number:064x}").parse()).collect::<Result<_, _>>()?;
    let demand = Demand {
        layer_bytes: vec![1 << 30; LAYERS],
        layer_cost_bytes: vec![1 << 30; LAYERS],
        kv_pages: 512,
        kv_bytes: vec![1 << 26; LAYERS],
        embedding_bytes: 1 << 30,
        head_bytes: 1 << 30,
        head_cost_bytes: 1 << 30,
        ties_embeddings: false,
        row_bytes: 16 << 10,
    };
    // Each device holds only a few layers, and no two devices are alike: the search has much to compare.
    let offer = |(index, &node): (usize, &NodeId)| Offer {
        node,
        device: DeviceId("gpu:0".to_owned()),
        pool: MemoryPool::Machine,
        free_bytes: (3 + index as u64 % 5) << 30,
        speed: Speed { bytes_per_s: 1e11 + 1e9 * index as f64, spread: 1.0 },
    };
    let offers: Vec<Offer> = ids.iter().enumerate().map(offer).collect();
    let mut links = BTreeMap::new();
    for (index, &from) in ids.iter().enumerate() {
        for &to in &ids {
            links.insert((from, to), Link { rtt_s: 1e-3 + 1e-5 * index as f64, bytes_per_s: Some(1e9), spread: 1.0 });
        }
    }
    let links = Links(links);
    for policy in [Policy::Latency, Policy::Throughput, Policy::FewestNodes] {
        let took: Vec<f64> = (0..repeat)
            .map(|_| {
                let begun = Instant::now();
                let placement = place(&demand, &offers, &links, &ShardCount::Automatic, policy);
                assert!(placement.is_ok(), "the model fits");
                begun.elapsed().as_secs_f64() * 1e3
            })
            .collect();
        let took = crate::median(took);
        println!(
            "plan, {DEVICES} devices, {LAYERS} layers, {policy:?}: {took:.1} ms, {:.2} of {LIMIT_MS} ms",
            took / LIMIT_MS
        );
    }
    Ok(())
}
