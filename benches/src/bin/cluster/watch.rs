//! False alarms: how often a node takes a live process for a dead one while the machine is busy.

use super::processes::{cluster, shards, stream};
use std::path::Path;
use std::time::{Duration, Instant};

/// Lets three processes answer, one stream after the other, and counts the members that went and the shards that
/// failed. None should: no process dies.
pub(crate) fn bench(exo_node: &Path, model: &str, tokens: u32, seconds: u64) -> anyhow::Result<()> {
    let processes = cluster(exo_node, 3)?;
    let split = shards(model, 3);
    let (begun, end) = (Instant::now(), Duration::from_secs(seconds));
    let (mut answers, mut longest) = (0_u32, 0.0_f64);
    while begun.elapsed() < end {
        let times = stream(&processes[answers as usize % 3], &split, tokens)?;
        let gaps = times.windows(2).map(|pair| pair[1].duration_since(pair[0]).as_secs_f64());
        longest = gaps.fold(longest, f64::max);
        answers += 1;
    }
    let count = |text: &str| processes.iter().map(|process| process.lines_with(text)).sum::<usize>();
    println!(
        "{answers} answers in {seconds} s: {} false alarms, {} failed shards, {longest:.2} s between tokens at most",
        count(" has gone"),
        count("a shard"),
    );
    Ok(())
}
