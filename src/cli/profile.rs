//! `exo-node bench --profile`: where the time of prefill and decode goes, beside the machine's measured limits.
//!
//! It runs an engine without a node, so that no other work of the node is counted.

use super::bare_engine::{Precision, forward, open, threads_or_cores};
use exo_engines::cpu::{CpuBackend, Limits, Tier};
use exo_engines::engine::{Operation, PAGE_TOKENS, Row, SeqId};
use exo_engines::model::ModelFiles;
use exo_engines::profile::{Part, Profile};
use serde::Serialize;

/// Rows of a step of the prompt, as a node has them when it computes one prompt alone.
const PROMPT_ROWS: usize = 256;

#[derive(Debug, Serialize)]
pub(super) struct Report {
    threads: usize,
    tier: &'static str,
    /// The threads' measured read rate.
    read_bytes_per_s: f64,
    /// The threads' measured rate of byte products: two operations for each pair of bytes.
    byte_operations_per_s: f64,
    prefill_tokens_per_s: f64,
    prefill: Vec<PartReport>,
    sequences: u32,
    /// Of all sequences together.
    decode_tokens_per_s: f64,
    decode: Vec<PartReport>,
}

#[derive(Debug, Serialize)]
struct PartReport {
    part: &'static str,
    calls: u64,
    ms: f64,
    /// The share of the time of all parts.
    share: f64,
    /// Operations of the products: two for each weight and row.
    operations_per_s: Option<f64>,
    /// The share of the limit of byte products, though a weight takes two to four of these.
    operations_share: Option<f64>,
    /// Bytes of weights read, once a call.
    bytes_per_s: Option<f64>,
    /// The share of the limit of reads; caches read faster.
    bytes_share: Option<f64>,
}

/// The work to profile: the ids of a prompt, then of tokens that are computed one by one.
#[derive(Debug)]
pub(super) struct Work {
    pub(super) prompt: Vec<u32>,
    pub(super) generated: Vec<u32>,
    /// Sequences that continue the prompt, at least 1: each step computes a token of each.
    pub(super) sequences: u32,
    pub(super) precision: Precision,
    pub(super) threads: Option<u32>,
}

/// Does the work, and reports the time of every part.
pub(super) fn profile(model: &ModelFiles, work: &Work) -> anyhow::Result<Report> {
    let threads = threads_or_cores(work.threads);
    let tier = Tier::best();
    let limits = CpuBackend::new(threads, tier)?.limits()?;
    let Work { prompt, generated, .. } = work;
    // The sequences share the pages of the prompt, but for the last, partly filled one.
    let generated_tokens = generated.len().next_multiple_of(PAGE_TOKENS as usize) + PAGE_TOKENS as usize;
    let context = prompt.len() + generated_tokens * work.sequences as usize;
    let mut engine = open(model, work.precision, context as u32, work.threads)?;
    engine.warm_up()?;
    engine.take_profile();
    for (index, tokens) in prompt.chunks(PROMPT_ROWS).enumerate() {
        let last = tokens.len() - 1;
        let row = |i| Row { seq: SeqId(0), position: (index * PROMPT_ROWS + i) as u32, wants_logits: i == last };
        forward(&mut *engine, Vec::new(), (0..tokens.len()).map(row).collect(), tokens.to_vec())?;
    }
    let prefill = engine.take_profile();
    let mut operations = forks(prompt.len(), work.sequences);
    for (offset, &token) in generated.iter().enumerate() {
        let position = (prompt.len() + offset) as u32;
        let row = |seq| Row { seq: SeqId(u64::from(seq)), position, wants_logits: true };
        let rows = (0..work.sequences).map(row).collect();
        forward(&mut *engine, std::mem::take(&mut operations), rows, vec![token; work.sequences as usize])?;
    }
    let decode = engine.take_profile();
    let Limits { read_bytes_per_s, byte_operations_per_s } = limits;
    Ok(Report {
        threads,
        tier: tier.name(),
        read_bytes_per_s,
        byte_operations_per_s,
        prefill_tokens_per_s: prompt.len() as f64 / seconds(&prefill),
        prefill: parts(&prefill, limits),
        sequences: work.sequences,
        decode_tokens_per_s: generated.len() as f64 * f64::from(work.sequences) / seconds(&decode),
        decode: parts(&decode, limits),
    })
}

/// Copies of the prompt's sequence, for all sequences but the first.
fn forks(prompt_tokens: usize, sequences: u32) -> Vec<Operation> {
    let fork = |seq| Operation::Fork { from: SeqId(0), to: SeqId(u64::from(seq)), length_tokens: prompt_tokens as u32 };
    (1..sequences).map(fork).collect()
}

/// The time of all parts, in seconds.
fn seconds(profile: &Profile) -> f64 {
    Part::ALL.iter().map(|&part| profile.tally(part).elapsed.as_secs_f64()).sum()
}

fn parts(profile: &Profile, limits: Limits) -> Vec<PartReport> {
    let total = seconds(profile);
    let used = Part::ALL.into_iter().filter(|&part| profile.tally(part).calls > 0);
    used.map(|part| {
        let tally = profile.tally(part);
        let seconds = tally.elapsed.as_secs_f64();
        let rate = |amount: u64| (amount > 0).then(|| amount as f64 / seconds);
        PartReport {
            part: part.name(),
            calls: tally.calls,
            ms: seconds * 1000.0,
            share: seconds / total,
            operations_per_s: rate(tally.operations),
            operations_share: rate(tally.operations).map(|rate| rate / limits.byte_operations_per_s),
            bytes_per_s: rate(tally.bytes),
            bytes_share: rate(tally.bytes).map(|rate| rate / limits.read_bytes_per_s),
        }
    })
    .collect()
}

impl Report {
    pub(super) fn print(&self) {
        println!(
            "{} threads, {}: read {:.1} GB/s, byte products {:.0} Gop/s",
            self.threads,
            self.tier,
            self.read_bytes_per_s / 1e9,
            self.byte_operations_per_s / 1e9
        );
        let prefill = ("prefill", self.prefill_tokens_per_s, 1, &self.prefill);
        let decode = ("decode", self.decode_tokens_per_s, self.sequences, &self.decode);
        for (title, rate, sequences, parts) in [prefill, decode] {
            println!("\n{title}: {rate:.1} tokens/s, sequences: {sequences}");
            println!(
                "{:18} {:>7} {:>10} {:>7} {:>9} {:>8} {:>8} {:>8}",
                "part", "calls", "ms", "share", "Gop/s", "of limit", "GB/s", "of limit"
            );
            for part in parts {
                let giga = |rate: Option<f64>| rate.map_or(String::new(), |rate| format!("{:.1}", rate / 1e9));
                let percent =
                    |share: Option<f64>| share.map_or(String::new(), |share| format!("{:.0} %", share * 100.0));
                println!(
                    "{:18} {:>7} {:>10.2} {:>6.1}% {:>9} {:>8} {:>8} {:>8}",
                    part.part,
                    part.calls,
                    part.ms,
                    part.share * 100.0,
                    giga(part.operations_per_s),
                    percent(part.operations_share),
                    giga(part.bytes_per_s),
                    percent(part.bytes_share)
                );
            }
        }
    }
}
