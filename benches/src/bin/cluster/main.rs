//! `exo-cluster-benches MODEL`: what it costs to be several, each figure beside its peer or its limit in the same run.
//!
//! - decoding over two processes, beside one; four streams, beside the limit of two half-batches;
//! - a 16 KiB hop over a link, beside a plain QUIC stream;
//! - from the death of a process to the next token;
//! - planning 128 layers on 64 devices;
//! - with `--soak`, memory under minutes of load.

mod hop;
mod pipeline;
mod plan;
mod processes;
mod soak;

use anyhow::ensure;
use clap::Parser;
use std::path::PathBuf;

#[derive(Debug, Parser)]
#[command(about = "What it costs to be several: exo-node's processes beside one process, links beside plain QUIC")]
#[command(after_help = "Example:
  cargo run --release -p exo-benches --bin exo-cluster-benches -- smollm2")]
struct Arguments {
    /// The program that is measured [default: beside this one]
    #[arg(long)]
    exo_node: Option<PathBuf>,
    /// Rounds, of which the medians are taken
    #[arg(long, default_value_t = 5)]
    repeat: usize,
    /// Tokens of each answer
    #[arg(long, default_value_t = 200)]
    tokens: u32,
    /// Only this: load for so many seconds, and memory beside it
    #[arg(long, value_name = "SECONDS")]
    soak: Option<u64>,
    /// A model of the catalogue, or a path
    model: String,
}

fn main() -> anyhow::Result<()> {
    let arguments = Arguments::parse();
    let exo_node = arguments.exo_node.unwrap_or(std::env::current_exe()?.with_file_name("exo-node"));
    ensure!(exo_node.is_file(), "{} is not there: build it, or name it with --exo-node", exo_node.display());
    if let Some(seconds) = arguments.soak {
        return soak::bench(&exo_node, &arguments.model, arguments.tokens, seconds);
    }
    plan::bench(arguments.repeat)?;
    hop::bench(arguments.repeat)?;
    pipeline::bench(&exo_node, &arguments.model, arguments.tokens, arguments.repeat)?;
    pipeline::recovery(&exo_node, &arguments.model, arguments.tokens, arguments.repeat)
}

/// The middle of what was measured.
fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values.get(values.len() / 2).copied().unwrap_or(f64::NAN)
}
