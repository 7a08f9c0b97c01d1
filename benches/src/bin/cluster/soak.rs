//! Memory under load: three processes answer four concurrent streams for minutes, and their memory at the end is
//! compared with that soon after the start.

use super::processes::{cluster, shards, stream};
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

/// The number of concurrent streams.
const STREAMS: usize = 4;
/// The time after which caches and allocators grow no more.
const SETTLED: Duration = Duration::from_secs(60);

pub(crate) fn bench(exo_node: &Path, model: &str, tokens: u32, seconds: u64) -> anyhow::Result<()> {
    let processes = cluster(exo_node, 3)?;
    let split = shards(model, 3);
    let (begun, end) = (Instant::now(), Duration::from_secs(seconds));
    let answers = AtomicU64::new(0);
    let mut sizes: Vec<Vec<u64>> = Vec::new();
    std::thread::scope(|scope| {
        let asking = (0..STREAMS).map(|client| {
            let (processes, split, answers) = (&processes, &split, &answers);
            scope.spawn(move || {
                while begun.elapsed() < end {
                    stream(&processes[client % 3], split, tokens)?;
                    answers.fetch_add(1, Ordering::Relaxed);
                }
                anyhow::Ok(())
            })
        });
        let asking: Vec<_> = asking.collect();
        while begun.elapsed() < end {
            std::thread::sleep(Duration::from_secs(10).min(end));
            if begun.elapsed() > SETTLED.min(end / 4) {
                sizes.push(processes.iter().map(|process| process.resident_bytes(exo_node)).collect::<Result<_, _>>()?);
            }
        }
        for client in asking {
            client.join().map_err(|_| anyhow::anyhow!("a client failed"))??;
        }
        anyhow::Ok(())
    })?;
    let answers = answers.load(Ordering::Relaxed);
    let (Some(first), Some(last)) = (sizes.first(), sizes.last()) else { return Ok(()) };
    for (name, (first, last)) in ["a", "b", "c"].iter().zip(first.iter().zip(last)) {
        let (before, after) = (*first as f64 / 1e6, *last as f64 / 1e6);
        println!(
            "memory of {name} under {seconds} s of load: {before:.1} MB, then {after:.1} MB: {:.3}",
            after / before
        );
    }
    println!("{answers} answers");
    Ok(())
}
