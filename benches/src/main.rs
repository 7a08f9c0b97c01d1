//! `exo-benches MODEL.gguf…`: speed and memory of exo-node beside its peers, on the same files.
//!
//! ```text
//! a round: exo-node bench ─► candle ─► llama-bench ─► openvino_bench.py     each a process of its own
//! all rounds ─► medians ─► a table of ratios on stdout, or in a document (report.rs)
//! ```
//! Programs take turns, so that a disturbance of the machine affects all of them. Each round is a process of its own,
//! so that peak memory belongs to one program.

mod candle;
mod peers;
mod report;

use anyhow::{Context, ensure};
use clap::{Parser, Subcommand};
use peers::Program;
use report::{Measured, ModelResult};
use serde::{Deserialize, Serialize};
use std::path::PathBuf;
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
#[command(about = "Compares exo-node with candle-transformers, llama.cpp and OpenVINO GenAI, on the same GGUF files")]
#[command(after_help = "Examples:
  exo-benches ~/.cache/exo/models/*.gguf
  exo-benches --llama-bench \"$(benches/llama-bench.sh)\" --openvino python3 --into docs/performance.md MODEL.gguf")]
struct Arguments {
    #[command(subcommand)]
    child: Option<Child>,
    /// The exo-node program to measure [default: the one in this program's folder]
    #[arg(long)]
    exo_node: Option<PathBuf>,
    /// The llama-bench program of llama.cpp, to measure it, too
    #[arg(long)]
    llama_bench: Option<PathBuf>,
    /// A Python with openvino-genai, to measure it, too
    #[arg(long, value_name = "PYTHON")]
    openvino: Option<PathBuf>,
    /// Leave candle-transformers out
    #[arg(long)]
    skip_candle: bool,
    /// Markdown document to write the results to, instead of stdout
    #[arg(long, value_name = "FILE")]
    into: Option<PathBuf>,
    /// Part of the document that the results replace: from `<!-- exo-benches PART -->` to `<!-- end -->`
    #[arg(long, default_value = "models")]
    part: String,
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
    let mut arguments = Arguments::parse();
    if let Some(Child::Candle { model, work }) = arguments.child.take() {
        println!("{}", serde_json::to_string(&candle::round(&model, work)?)?);
        return Ok(());
    }
    let programs = programs(&arguments)?;
    let mut results = Vec::new();
    for model in &arguments.models {
        let mut measured: Vec<Measured> = programs.iter().map(Measured::new).collect();
        for number in 1..=arguments.repeat {
            for of in &mut measured {
                eprintln!("{}: round {number} of {}, {}", model.display(), arguments.repeat, of.program.name());
                of.round(model, arguments.work)?;
            }
        }
        results.push(ModelResult::new(model, measured)?);
    }
    let text = report::text(arguments.repeat, arguments.work, &programs, &results);
    match &arguments.into {
        Some(document) => report::replace(document, &arguments.part, &text)?,
        None => print!("{text}"),
    }
    Ok(())
}

/// The programs to measure, exo-node first.
fn programs(arguments: &Arguments) -> anyhow::Result<Vec<Program>> {
    let this = std::env::current_exe()?;
    let exo_node = arguments.exo_node.clone().unwrap_or_else(|| this.with_file_name("exo-node"));
    ensure!(exo_node.is_file(), "{} does not exist: build it, or name it with --exo-node", exo_node.display());
    let candle = (!arguments.skip_candle).then_some(Program::Candle(this));
    let llama_cpp = arguments.llama_bench.clone().map(Program::LlamaCpp);
    let openvino = arguments.openvino.clone().map(Program::OpenVino);
    let own = [Program::ExoNode(exo_node.clone()), Program::ExoNodeEightBits(exo_node)];
    Ok(own.into_iter().chain([candle, llama_cpp, openvino].into_iter().flatten()).collect())
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
