//! `exo-benches MODEL.gguf…`: speed and memory of exo-node compared with candle-transformers, on the same files.
//!
//! ```text
//! a round: exo-node bench MODEL ─ a process ─┐
//!          this program's `candle` ─ another ─┴─► medians, and their ratios
//! ```
//! Programs take turns, so that a disturbance of the machine affects all of them. Each round is a process of its own,
//! so that peak memory belongs to one program.

mod candle;
mod llama_cpp;

use anyhow::{Context, ensure};
use clap::{Parser, Subcommand};
use serde::{Deserialize, Serialize};
use std::path::{Path, PathBuf};
use std::process::Command;

/// The work of each round.
#[derive(Debug, Clone, Copy, clap::Args)]
struct Work {
    /// Tokens of the prompt
    #[arg(long, default_value_t = 512)]
    prompt_tokens: usize,
    /// Tokens to generate after the prompt
    #[arg(long, default_value_t = 128)]
    generate_tokens: usize,
    /// Threads of each program
    #[arg(long, default_value_t = 2)]
    threads: usize,
}

#[derive(Debug, Parser)]
#[command(about = "Compares exo-node with candle-transformers and llama.cpp, on the same GGUF files")]
#[command(after_help = "Example:
  cargo run --release -p exo-benches -- --exo-node target/release/exo-node ~/.cache/exo/models/*.gguf")]
struct Arguments {
    #[command(subcommand)]
    child: Option<Child>,
    /// The exo-node program to measure [default: the one in this program's folder]
    #[arg(long)]
    exo_node: Option<PathBuf>,
    /// The llama-bench program of llama.cpp, to measure it too
    #[arg(long)]
    llama_bench: Option<PathBuf>,
    /// Number of rounds; the medians are reported
    #[arg(long, default_value_t = 5)]
    repeat: usize,
    #[command(flatten)]
    work: Work,
    models: Vec<PathBuf>,
}

#[derive(Debug, Subcommand)]
enum Child {
    /// One round of candle-transformers (this program calls it)
    Candle {
        model: PathBuf,
        #[command(flatten)]
        work: Work,
    },
}

/// The result of one round of a program. Extra fields of a program's report are ignored.
#[derive(Debug, Clone, Copy, Serialize, Deserialize)]
struct Round {
    prefill_tokens_per_s: f64,
    decode_tokens_per_s: f64,
    load_ms: Option<f64>,
    peak_memory_bytes: Option<u64>,
}

fn main() -> anyhow::Result<()> {
    let arguments = Arguments::parse();
    if let Some(Child::Candle { model, work }) = arguments.child {
        println!("{}", serde_json::to_string(&candle::round(&model, work)?)?);
        return Ok(());
    }
    let this = std::env::current_exe()?;
    let exo_node = arguments.exo_node.unwrap_or_else(|| this.with_file_name("exo-node"));
    ensure!(exo_node.is_file(), "{} does not exist: build it, or name it with --exo-node", exo_node.display());
    println!("medians of {} rounds, {:?}", arguments.repeat, arguments.work);
    println!("| model | program | prefill tok/s | decode tok/s | load ms | peak MB |");
    println!("|---|---|---|---|---|---|");
    for model in &arguments.models {
        let mut rounds: Vec<(&str, Vec<Round>)> = vec![("exo-node", vec![]), ("candle-transformers", vec![])];
        if arguments.llama_bench.is_some() {
            rounds.push(("llama.cpp", vec![]));
        }
        for _ in 0..arguments.repeat {
            for (program, rounds) in &mut rounds {
                rounds.push(match (*program, &arguments.llama_bench) {
                    ("exo-node", _) => exo_round(&exo_node, model, arguments.work)?,
                    ("llama.cpp", Some(program)) => llama_cpp::round(program, model, arguments.work)?,
                    _ => candle_round(&this, model, arguments.work)?,
                });
            }
        }
        report(model, &rounds)?;
    }
    Ok(())
}

fn report(model: &Path, rounds: &[(&str, Vec<Round>)]) -> anyhow::Result<()> {
    let file_bytes = std::fs::metadata(model)?.len();
    let name = model.file_name().unwrap_or_default().to_string_lossy();
    println!("| {name}, {:.0} MB | | | | | |", file_bytes as f64 / 1e6);
    let medians: Vec<(&str, Round)> = rounds.iter().map(|(program, rounds)| (*program, medians(rounds))).collect();
    let ours = medians[0].1;
    for (program, median) in &medians {
        let ratio = |ours: f64, theirs: f64| {
            if *program == "exo-node" { String::new() } else { format!(" (exo {:.2}×)", ours / theirs) }
        };
        println!(
            "| | {program} | {:.1}{} | {:.1}{} | {} | {} |",
            median.prefill_tokens_per_s,
            ratio(ours.prefill_tokens_per_s, median.prefill_tokens_per_s),
            median.decode_tokens_per_s,
            ratio(ours.decode_tokens_per_s, median.decode_tokens_per_s),
            median.load_ms.map_or("?".to_owned(), |ms| format!("{ms:.0}")),
            median.peak_memory_bytes.map_or("?".to_owned(), |bytes| format!("{:.0}", bytes as f64 / 1e6)),
        );
    }
    Ok(())
}

fn medians(rounds: &[Round]) -> Round {
    let median = |of: fn(&Round) -> Option<f64>| {
        let mut values: Vec<f64> = rounds.iter().filter_map(of).collect();
        values.sort_by(f64::total_cmp);
        values.get(values.len() / 2).copied()
    };
    Round {
        prefill_tokens_per_s: median(|round| Some(round.prefill_tokens_per_s)).unwrap_or(0.0),
        decode_tokens_per_s: median(|round| Some(round.decode_tokens_per_s)).unwrap_or(0.0),
        load_ms: median(|round| round.load_ms),
        peak_memory_bytes: median(|round| round.peak_memory_bytes.map(|bytes| bytes as f64)).map(|bytes| bytes as u64),
    }
}

fn exo_round(program: &Path, model: &Path, work: Work) -> anyhow::Result<Round> {
    let mut command = Command::new(program);
    command.arg("bench").arg(model).args(["--repeat", "1", "--json"]);
    Ok(serde_json::from_slice(&output(&mut work.pass_to(command))?)?)
}

fn candle_round(program: &Path, model: &Path, work: Work) -> anyhow::Result<Round> {
    let mut command = Command::new(program);
    command.arg("candle").arg(model).env("RAYON_NUM_THREADS", work.threads.to_string());
    Ok(serde_json::from_slice(&output(&mut work.pass_to(command))?)?)
}

impl Work {
    fn pass_to(self, mut command: Command) -> Command {
        command.args(["--prompt-tokens", &self.prompt_tokens.to_string()]);
        command.args(["--generate-tokens", &self.generate_tokens.to_string()]);
        command.args(["--threads", &self.threads.to_string()]);
        command
    }
}

/// Runs `command`, which must succeed, and returns its stdout.
fn output(command: &mut Command) -> anyhow::Result<Vec<u8>> {
    let output = command.output().with_context(|| format!("{command:?}"))?;
    ensure!(output.status.success(), "{command:?}: {}", String::from_utf8_lossy(&output.stderr));
    Ok(output.stdout)
}
