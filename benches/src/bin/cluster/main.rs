//! `exo-cluster-benches MODEL`: the cost of a cluster. The same run measures each figure and its comparison or limit.
//!
//! - decoding over two processes, compared with one; four streams, compared with the limit of two half-batches;
//! - a 16 KiB hop over a link, compared with a plain QUIC stream;
//! - the pauses of an answer when processes die or are stopped;
//! - planning 128 layers on 64 devices;
//! - with `--pauses`, only the pauses; with `--busy`, while other threads compute;
//! - with `--watch`, how often a live process is taken for a dead one;
//! - with `--soak`, memory under minutes of load.

mod busy;
mod hop;
mod pauses;
mod pipeline;
mod plan;
mod processes;
mod soak;
mod watch;

use anyhow::ensure;
use clap::Parser;
use std::path::PathBuf;

#[derive(Debug, Parser)]
#[command(about = "The cost of a cluster: several exo-node processes compared with one, links with plain QUIC")]
#[command(after_help = "Example:
  cargo run --release -p exo-benches --bin exo-cluster-benches -- smollm2")]
struct Arguments {
    /// The exo-node program to measure [default: the one in this program's folder]
    #[arg(long)]
    exo_node: Option<PathBuf>,
    /// Number of rounds; the medians are reported
    #[arg(long, default_value_t = 5)]
    repeat: usize,
    /// Tokens of each answer
    #[arg(long, default_value_t = 200)]
    tokens: u32,
    /// Only measure the pauses of an answer when processes die or are stopped
    #[arg(long)]
    pauses: bool,
    /// Only measure the pauses whose names contain this text
    #[arg(long, value_name = "TEXT", default_value = "", hide_default_value = true, requires = "pauses")]
    fault: String,
    /// Only count, for this many seconds of load, how often a live process is taken for a dead one
    #[arg(long, value_name = "SECONDS", conflicts_with = "pauses")]
    watch: Option<u64>,
    /// Let this many threads compute beside what is measured
    #[arg(long, value_name = "THREADS", default_value_t = 0)]
    busy: usize,
    /// Only measure memory under this many seconds of load
    #[arg(long, value_name = "SECONDS")]
    soak: Option<u64>,
    /// A model's name in the catalogue, or a path
    model: String,
}

fn main() -> anyhow::Result<()> {
    let arguments = Arguments::parse();
    let exo_node = arguments.exo_node.unwrap_or(std::env::current_exe()?.with_file_name("exo-node"));
    ensure!(exo_node.is_file(), "{} does not exist: build it, or name it with --exo-node", exo_node.display());
    let _busy = busy::Busy::start(arguments.busy);
    if arguments.pauses {
        return pauses::bench(&exo_node, &arguments.model, arguments.repeat, &arguments.fault);
    }
    if let Some(seconds) = arguments.watch {
        return watch::bench(&exo_node, &arguments.model, arguments.tokens, seconds);
    }
    if let Some(seconds) = arguments.soak {
        return soak::bench(&exo_node, &arguments.model, arguments.tokens, seconds);
    }
    plan::bench(arguments.repeat)?;
    hop::bench(arguments.repeat)?;
    pipeline::bench(&exo_node, &arguments.model, arguments.tokens, arguments.repeat)?;
    pauses::bench(&exo_node, &arguments.model, arguments.repeat, &arguments.fault)
}

/// The median of `values`; NaN if there are none.
fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values.get(values.len() / 2).copied().unwrap_or(f64::NAN)
}
