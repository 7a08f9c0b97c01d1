//! Decoding over two processes compared with one, with a thread each.

use super::processes::{Process, cluster, shards, stream, throughput, whole};
use exo_actors::ModelSpec;
use std::path::Path;

/// The rates of one round, in tokens per second.
struct Round {
    one: f64,
    two: f64,
    four: f64,
    one_of_pair: f64,
    four_of_pair: f64,
}

impl Round {
    /// Measures each run twice, in order and in reverse order, so that other load of the machine affects all alike.
    fn measure(alone: &Process, pair: &Process, [whole, split]: [&ModelSpec; 2], tokens: u32) -> anyhow::Result<Self> {
        let runs = [(alone, whole, 1), (pair, split, 1), (alone, whole, 4), (pair, split, 4), (alone, whole, 2)];
        let mut rates = [0.0; 5];
        for index in (0..runs.len()).chain((0..runs.len()).rev()) {
            let (process, model, streams) = runs[index];
            rates[index] += throughput(process, model, tokens, streams)? / 2.0;
        }
        let [one, one_of_pair, four, four_of_pair, two] = rates;
        Ok(Self { one, two, four, one_of_pair, four_of_pair })
    }

    /// The speed of two concurrent half-batches over that of a whole batch: a step of a batch takes batch / throughput.
    fn limit(&self) -> f64 {
        (4.0 / self.four) / (2.0 / self.two)
    }
}

pub(crate) fn bench(exo_node: &Path, model: &str, tokens: u32, repeat: usize) -> anyhow::Result<()> {
    let alone = cluster(exo_node, 1)?.remove(0);
    let pair = cluster(exo_node, 2)?;
    let (whole, split) = (whole(model), shards(model, 2));
    stream(&alone, &whole, 1)?;
    stream(&pair[0], &split, 1)?;
    let rounds = (0..repeat)
        .map(|_| Round::measure(&alone, &pair[0], [&whole, &split], tokens))
        .collect::<anyhow::Result<Vec<_>>>()?;
    let median = |of: &dyn Fn(&Round) -> f64| crate::median(rounds.iter().map(of).collect());
    println!(
        "one stream: {:.1} tokens/s over two processes, {:.1} in one: {:.3}",
        median(&|round| round.one_of_pair),
        median(&|round| round.one),
        median(&|round| round.one_of_pair / round.one)
    );
    println!(
        "four streams: {:.1} tokens/s over two processes, {:.1} in one (two streams {:.1}): {:.2}, {:.2} of the limit {:.2}",
        median(&|round| round.four_of_pair),
        median(&|round| round.four),
        median(&|round| round.two),
        median(&|round| round.four_of_pair / round.four),
        median(&|round| round.four_of_pair / round.four / round.limit()),
        median(&Round::limit)
    );
    Ok(())
}
