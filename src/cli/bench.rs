//! `exo-node bench`: measures the median speed of a model through the whole pipeline.

use super::bare_engine::Precision;
use super::model_args::{ModelArguments, pull};
use super::outcome::Outcome;
use super::profile;
use super::progress::Display;
use super::report::{StageReport, milliseconds, rate, stages};
use super::session::load;
use crate::{GenerateRequest, Generated, NodeHandle, Prompt, RequestError, RunningModel, SamplingParams, Speculation};
use anyhow::Context;
use clap::Args;
use exo_engines::engine::PAGE_TOKENS;
use serde::Serialize;
use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Instant;

/// A logit bias that keeps a token from being sampled.
const NEVER: f32 = -100.0;

#[derive(Debug, Args)]
#[command(after_help = "Examples:
  exo-node bench smollm2
  exo-node bench gemma3-270m --prompt-tokens 512 --generate-tokens 128 --repeat 5 --threads 2 --json")]
pub(super) struct BenchArguments {
    #[command(flatten)]
    model: ModelArguments,
    /// Tokens in the prompt
    #[arg(long, value_name = "N", default_value_t = 512, value_parser = clap::value_parser!(u32).range(1..))]
    prompt_tokens: u32,
    /// Tokens to generate after the prompt
    #[arg(long, value_name = "N", default_value_t = 128, value_parser = clap::value_parser!(u32).range(2..))]
    generate_tokens: u32,
    /// Answers to the prompt that are computed side by side; the decode speed is that of all together
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=64))]
    sequences: u32,
    /// Rounds to measure; the report has their medians
    #[arg(long, value_name = "N", default_value_t = 5, value_parser = clap::value_parser!(u32).range(1..=1000))]
    repeat: u32,
    /// Show the time of each part of the computation instead, beside the machine's measured limits
    #[arg(long)]
    profile: bool,
    /// Print one JSON object on stdout
    #[arg(long)]
    json: bool,
}

#[derive(Debug, Serialize)]
struct Report {
    model: String,
    quantization: String,
    prompt_tokens: u32,
    generate_tokens: u32,
    sequences: u32,
    repeat: u32,
    threads: Option<u32>,
    prefill_tokens_per_s: f64,
    decode_tokens_per_s: f64,
    load_ms: f64,
    /// Bytes of weights in the model's files.
    file_bytes: u64,
    peak_memory_bytes: Option<u64>,
    stages: Vec<StageReport>,
}

struct Round {
    prefill: f64,
    decode: f64,
}

pub(super) async fn run(arguments: BenchArguments) -> anyhow::Result<Outcome> {
    let display = Arc::new(if arguments.json { Display::quiet() } else { Display::new() });
    if arguments.profile {
        return run_profile(arguments, &display).await;
    }
    let mut arguments = arguments;
    // An answer that repeats itself would be as fast as its drafts.
    arguments.model.speculate.get_or_insert(Speculation::None);
    let mut model = arguments.model.clone();
    // The cache of one context holds all answers, which share the pages of the prompt.
    let others = (arguments.generate_tokens + 2 * PAGE_TOKENS).saturating_mul(arguments.sequences - 1);
    let wanted = (arguments.prompt_tokens + arguments.generate_tokens + 1).saturating_add(others);
    model.context = Some(model.context.unwrap_or(0).max(wanted));
    let node = model.start_node(&display).await?;
    let loaded = load(&node, &model, &display).await?;
    // An answer that ends early would measure nothing.
    let endless = loaded.model.end_tokens().iter().map(|&id| (id, NEVER)).collect();
    let mut rounds = Vec::new();
    for number in 0..arguments.repeat {
        let ids = scattered_prompt(number, arguments.prompt_tokens, loaded.model.vocabulary());
        rounds.push(tokio::select! {
            round = one_round(&node, &arguments, &loaded.model, ids, &endless) => round?,
            _ = tokio::signal::ctrl_c() => return Ok(Outcome::Interrupted),
        });
    }
    let report = Report {
        model: model.model.clone(),
        quantization: loaded.model.quantization().to_owned(),
        prompt_tokens: arguments.prompt_tokens,
        generate_tokens: arguments.generate_tokens,
        sequences: arguments.sequences,
        repeat: arguments.repeat,
        threads: model.engines.threads,
        prefill_tokens_per_s: median(rounds.iter().map(|round| round.prefill)),
        decode_tokens_per_s: median(rounds.iter().map(|round| round.decode)),
        load_ms: milliseconds(loaded.load),
        file_bytes: loaded.model.file_bytes(),
        peak_memory_bytes: peak_memory_bytes(),
        stages: stages(&node.status().await?, loaded.model.placement()),
    };
    print(&report, arguments.json)?;
    node.shutdown().await;
    Ok(Outcome::Done)
}

async fn run_profile(arguments: BenchArguments, display: &Arc<Display>) -> anyhow::Result<Outcome> {
    let name = &arguments.model.model;
    let Some(model) = pull(name, arguments.model.data_dir.as_deref(), display).await? else {
        return Ok(Outcome::Interrupted);
    };
    let vocabulary = model.files.architecture.vocabulary;
    let spec = arguments.model.spec();
    let precision = Precision { kv_element: spec.kv_element(), activations: spec.activation_bits() };
    let work = profile::Work {
        prompt: scattered_prompt(0, arguments.prompt_tokens, vocabulary),
        generated: scattered_prompt(1, arguments.generate_tokens, vocabulary),
        sequences: arguments.sequences,
        precision,
        threads: arguments.model.engines.threads,
    };
    let profiled = tokio::task::spawn_blocking(move || profile::profile(&model.files, &work));
    let report = tokio::select! {
        report = profiled => report.context("the computation panicked")??,
        _ = tokio::signal::ctrl_c() => return Ok(Outcome::Interrupted),
    };
    if arguments.json {
        println!("{}", serde_json::to_string(&report)?);
    } else {
        report.print();
    }
    Ok(Outcome::Done)
}

fn print(report: &Report, json: bool) -> anyhow::Result<()> {
    if json {
        println!("{}", serde_json::to_string(report)?);
        return Ok(());
    }
    println!("{} ({}), medians of {} rounds", report.model, report.quantization, report.repeat);
    println!("prefill  {:10.1} tokens/s ({} tokens)", report.prefill_tokens_per_s, report.prompt_tokens);
    let (tokens, sequences) = (report.generate_tokens, report.sequences);
    println!("decode   {:10.1} tokens/s ({tokens} tokens, sequences: {sequences})", report.decode_tokens_per_s);
    println!("load     {:10.0} ms", report.load_ms);
    let megabytes = |bytes: u64| bytes as f64 / 1e6;
    let peak = report.peak_memory_bytes.map_or("unknown".to_owned(), |bytes| format!("{:.0} MB", megabytes(bytes)));
    println!("memory   {peak} at peak, for {:.0} MB of weights in the files", megabytes(report.file_bytes));
    Ok(())
}

/// A prompt of scattered token ids: its content does not affect the speed. Rounds differ from the first token on;
/// otherwise the prefix cache would save the prefill.
fn scattered_prompt(round: u32, tokens: u32, vocabulary: usize) -> Vec<u32> {
    (0..tokens).map(|i| (i.wrapping_mul(7919).wrapping_add(11 + round * 31)) % vocabulary as u32).collect()
}

async fn one_round(
    node: &NodeHandle,
    arguments: &BenchArguments,
    model: &RunningModel,
    ids: Vec<u32>,
    endless: &BTreeMap<u32, f32>,
) -> anyhow::Result<Round> {
    let request = GenerateRequest {
        model: arguments.model.spec(),
        prompt: Prompt::Tokens(ids),
        params: SamplingParams { logit_bias: endless.clone(), ..SamplingParams::greedy() },
        max_tokens: Some(arguments.generate_tokens),
        stop: Vec::new(),
    };
    let answers = (0..arguments.sequences).map(|_| answer(node, model, request.clone()));
    let answers = futures_util::future::try_join_all(answers).await?;
    let started = answers.iter().filter_map(|answer| answer.started).min();
    let first = answers.iter().filter_map(|answer| answer.tokens.first()).min();
    // The time in which all answers are computed side by side.
    let begin = answers.iter().filter_map(|answer| answer.tokens.first()).max();
    let end = answers.iter().filter_map(|answer| answer.tokens.last()).min();
    let (Some(started), Some(first), Some(begin), Some(end)) = (started, first, begin, end) else {
        return Err(RequestError::BadPrompt { what: "the model ended at once".to_owned() }.into());
    };
    anyhow::ensure!(begin < end, "the answers do not overlap: generate more tokens, or compute fewer sequences");
    let tokens = answers.iter().flat_map(|answer| &answer.tokens).filter(|at| (begin..=end).contains(at)).count();
    let intervals = tokens.saturating_sub(answers.len());
    Ok(Round {
        prefill: rate(arguments.prompt_tokens as usize, *first - started),
        decode: rate(intervals, *end - *begin),
    })
}

/// The times of an answer.
struct Answer {
    started: Option<Instant>,
    tokens: Vec<Instant>,
}

async fn answer(node: &NodeHandle, model: &RunningModel, request: GenerateRequest) -> anyhow::Result<Answer> {
    let mut generation = node.generate_with(model, request)?;
    let mut answer = Answer { started: None, tokens: Vec::new() };
    while let Some(event) = generation.next().await {
        match event? {
            Generated::Started { .. } => answer.started = Some(Instant::now()),
            Generated::Token { .. } => answer.tokens.push(Instant::now()),
            Generated::Finished { .. } => break,
        }
    }
    Ok(answer)
}

fn median(values: impl Iterator<Item = f64>) -> f64 {
    let mut values: Vec<f64> = values.collect();
    values.sort_by(f64::total_cmp);
    let middle = values.len() / 2;
    match values.len() {
        0 => 0.0,
        length if length % 2 == 1 => values[middle],
        _ => f64::midpoint(values[middle - 1], values[middle]),
    }
}

/// The peak resident memory of this process in bytes, where the system reports it (Linux: `VmHWM`).
fn peak_memory_bytes() -> Option<u64> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"))?;
    let kilobytes: u64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    Some(kilobytes * 1024)
}
