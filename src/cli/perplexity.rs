//! `exo-node perplexity`: e to the power of the mean negative log-probability of a text's tokens.
//!
//! It follows llama-perplexity's convention: the text is cut into chunks of the context's length, and only the second
//! half of each chunk is scored, so that at least half a context precedes every scored token.

use super::bare_engine::{Precision, forward, open};
use super::model_args::pull;
use super::outcome::Outcome;
use super::progress::Display;
use anyhow::Context;
use clap::Args;
use exo_engines::engine::{ActivationBits, Engine, KvElement, Operation, Row, SeqId};
use exo_engines::model::ModelFiles;
use exo_engines::tokenizer::{SpecialTokens, Tokenizer};
use serde::Serialize;
use std::path::PathBuf;
use std::sync::Arc;

#[derive(Debug, Args)]
#[command(after_help = "Example:
  exo-node perplexity smollm2 /usr/share/common-licenses/GPL-3")]
pub(super) struct PerplexityArguments {
    /// Catalogue name, path of a .gguf file or safetensors folder, or hub name
    model: String,
    /// Text file
    file: PathBuf,
    /// Tokens in a chunk
    #[arg(long, value_name = "TOKENS", default_value_t = 512, value_parser = clap::value_parser!(u32).range(8..=65536))]
    context: u32,
    /// Most chunks to score [default: all]
    #[arg(long, value_name = "N")]
    chunks: Option<usize>,
    /// Use only the first N bytes of the file
    #[arg(long, value_name = "N")]
    bytes: Option<usize>,
    /// Type of the cached keys and values: f16, f32 or q8_0
    #[arg(long, value_name = "TYPE", default_value = "f16")]
    kv_cache: KvElement,
    /// Bits of activations in matrix products: 16 or 8
    #[arg(long, value_name = "BITS", default_value = "16")]
    activations: ActivationBits,
    /// Threads [default: all cores]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=1024))]
    threads: Option<u32>,
    /// Print one JSON object on stdout
    #[arg(long)]
    json: bool,
}

#[derive(Debug, Serialize)]
struct Report {
    model: String,
    perplexity: f64,
    scored_tokens: usize,
    chunks: usize,
    context: u32,
}

/// Rows per step. It bounds the logits in memory.
const ROWS: usize = 64;

pub(super) async fn run(arguments: PerplexityArguments) -> anyhow::Result<Outcome> {
    let display = Arc::new(if arguments.json { Display::quiet() } else { Display::new() });
    // Read before the download, so that a missing file fails at once.
    let text = std::fs::read(&arguments.file).with_context(|| arguments.file.display().to_string())?;
    let Some(model) = pull(&arguments.model, None, &display).await? else { return Ok(Outcome::Interrupted) };
    let measured = tokio::task::spawn_blocking(move || measure(&arguments, &text, &model.files));
    tokio::select! {
        outcome = measured => outcome.context("the computation panicked")?.map(|()| Outcome::Done),
        _ = tokio::signal::ctrl_c() => Ok(Outcome::Interrupted),
    }
}

fn measure(arguments: &PerplexityArguments, text: &[u8], model: &ModelFiles) -> anyhow::Result<()> {
    let tokenizer = Tokenizer::open(&model.tokenizer)?;
    let text = &text[..arguments.bytes.unwrap_or(text.len()).min(text.len())];
    let tokens = tokenizer.encode(&String::from_utf8_lossy(text), SpecialTokens::Add)?;
    let context = arguments.context as usize;
    let chunks: Vec<&[u32]> = tokens.chunks_exact(context).take(arguments.chunks.unwrap_or(usize::MAX)).collect();
    anyhow::ensure!(!chunks.is_empty(), "the text has {} tokens: fewer than one chunk of {context}", tokens.len());
    let precision = Precision { kv_element: arguments.kv_cache, activations: arguments.activations };
    let mut engine = open(model, precision, arguments.context, arguments.threads)?;
    let bos = tokenizer.bos().filter(|bos| tokens.first() == Some(bos));
    let (mut sum, mut scored) = (0.0, 0);
    for (number, chunk) in chunks.iter().enumerate() {
        let mut chunk = chunk.to_vec();
        // Where the tokenizer starts texts with a BOS token, every chunk starts with it.
        if let Some(bos) = bos {
            chunk[0] = bos;
        }
        let (chunk_sum, chunk_scored) = score(&mut *engine, SeqId(number as u64), &chunk)?;
        sum += chunk_sum;
        scored += chunk_scored;
        if !arguments.json {
            eprintln!("[{}] {:.4}", number + 1, (sum / scored as f64).exp());
        }
    }
    let report = Report {
        model: arguments.model.clone(),
        perplexity: (sum / scored as f64).exp(),
        scored_tokens: scored,
        chunks: chunks.len(),
        context: arguments.context,
    };
    if arguments.json {
        println!("{}", serde_json::to_string(&report)?);
    } else {
        println!("perplexity {:.4} over {} tokens in {} chunks", report.perplexity, scored, report.chunks);
    }
    Ok(())
}

/// The sum of the negative log-probabilities of the tokens in the chunk's second half, and their number.
fn score(engine: &mut dyn Engine, seq: SeqId, chunk: &[u32]) -> anyhow::Result<(f64, usize)> {
    let half = chunk.len() / 2;
    let (mut sum, mut scored) = (0.0, 0);
    for start in (0..chunk.len()).step_by(ROWS) {
        let part = &chunk[start..(start + ROWS).min(chunk.len())];
        let scores = |position: usize| position >= half && position + 1 < chunk.len();
        let positions = start..start + part.len();
        let row = |position: usize| Row { seq, position: position as u32, wants_logits: scores(position) };
        let logits = forward(engine, Vec::new(), positions.clone().map(row).collect(), part.to_vec())?;
        let wanted: Vec<usize> = positions.filter(|&position| scores(position)).collect();
        if wanted.is_empty() {
            continue;
        }
        for (position, logits) in wanted.iter().zip(logits.chunks_exact(logits.len() / wanted.len())) {
            sum += negative_logprob(logits, chunk[position + 1]);
            scored += 1;
        }
    }
    forward(engine, vec![Operation::Release { seq }], Vec::new(), Vec::new())?;
    Ok((sum, scored))
}

fn negative_logprob(logits: &[f32], token: u32) -> f64 {
    let largest = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let sum: f64 = logits.iter().map(|&logit| f64::from(logit - largest).exp()).sum();
    f64::from(largest) + sum.ln() - f64::from(logits[token as usize])
}
