//! Decoding over two processes beside one, with a thread each; and how long a death is felt.

use super::processes::{cluster, shards, stream, throughput};
use anyhow::Context;
use exo_actors::ModelSpec;
use std::path::Path;
use std::time::Duration;

pub(crate) fn bench(exo_node: &Path, model: &str, tokens: u32, repeat: usize) -> anyhow::Result<()> {
    let (mut single, mut pair) = (Vec::new(), Vec::new());
    let (mut two, mut four, mut four_of_pair) = (Vec::new(), Vec::new(), Vec::new());
    for _ in 0..repeat {
        let alone = cluster(exo_node, 1)?.remove(0);
        let whole = ModelSpec::new(model);
        single.push(throughput(&alone, &whole, tokens, 1)?);
        two.push(throughput(&alone, &whole, tokens, 2)?);
        four.push(throughput(&alone, &whole, tokens, 4)?);
        drop(alone);
        let both = cluster(exo_node, 2)?;
        let split = shards(model, 2);
        stream(&both[0], &split, 1)?;
        pair.push(throughput(&both[0], &split, tokens, 1)?);
        four_of_pair.push(throughput(&both[0], &split, tokens, 4)?);
    }
    let ratios = |ours: &[f64], theirs: &[f64]| crate::median(ours.iter().zip(theirs).map(|(a, b)| a / b).collect());
    let [single_m, pair_m, two_m, four_m, of_pair_m] =
        [&single, &pair, &two, &four, &four_of_pair].map(|values| crate::median(values.clone()));
    println!(
        "one stream: {pair_m:.1} tokens/s over two processes, {single_m:.1} in one: {:.3}",
        ratios(&pair, &single)
    );
    // A step of a batch takes batch / throughput.
    let limits: Vec<f64> = two.iter().zip(&four).map(|(two, four)| (4.0 / four) / (2.0 / two)).collect();
    let (ratio, limit) = (ratios(&four_of_pair, &four), crate::median(limits));
    println!(
        "four streams: {of_pair_m:.1} tokens/s over two processes, {four_m:.1} in one (two streams {two_m:.1}): {ratio:.2}, {:.2} of the limit {limit:.2}",
        ratio / limit
    );
    Ok(())
}

/// From the death of a process with a third of the layers to the next token, beside what is between tokens else.
pub(crate) fn recovery(exo_node: &Path, model: &str, tokens: u32, repeat: usize) -> anyhow::Result<()> {
    let (mut pauses, mut usual) = (Vec::new(), Vec::new());
    for _ in 0..repeat {
        let mut processes = cluster(exo_node, 3)?;
        let split = shards(model, 3);
        stream(&processes[0], &split, 1)?;
        let mut last = processes.pop().context("three processes")?;
        let asked = &processes[0];
        let times = std::thread::scope(|scope| {
            let streaming = scope.spawn(|| stream(asked, &split, tokens));
            std::thread::sleep(Duration::from_millis(700));
            last.kill()?;
            streaming.join().map_err(|_| anyhow::anyhow!("the stream failed"))?
        })?;
        let mut gaps: Vec<f64> = times.windows(2).map(|pair| pair[1].duration_since(pair[0]).as_secs_f64()).collect();
        gaps.sort_by(f64::total_cmp);
        pauses.push(*gaps.last().context("tokens")?);
        usual.push(gaps[gaps.len() / 2]);
    }
    let (longest, pause, usual) =
        (pauses.iter().copied().fold(0.0, f64::max), crate::median(pauses.clone()), crate::median(usual));
    println!(
        "a process dies: {pause:.2} s to the next token, {longest:.2} s at most; {:.1} ms between tokens else",
        usual * 1e3
    );
    Ok(())
}
