//! One round of llama.cpp's bench.

use crate::{Round, Work, output};
use anyhow::Context;
use serde_json::Value;
use std::path::Path;
use std::process::Command;

pub(crate) fn round(program: &Path, model: &Path, work: Work) -> anyhow::Result<Round> {
    let prefill = speed(program, model, work, &["-p", &work.prompt_tokens.to_string(), "-n", "0"])?;
    // Decodes after the prompt, as exo-node's bench does.
    let depth = work.prompt_tokens.to_string();
    let decode = speed(program, model, work, &["-p", "0", "-n", &work.generate_tokens.to_string(), "-d", &depth])?;
    Ok(Round { prefill_tokens_per_s: prefill, decode_tokens_per_s: decode, load_ms: None, peak_memory_bytes: None })
}

fn speed(program: &Path, model: &Path, work: Work, test: &[&str]) -> anyhow::Result<f64> {
    let mut command = Command::new(program);
    command.arg("-m").arg(model).args(["-r", "1", "-o", "json", "-t", &work.threads.to_string()]).args(test);
    let report: Vec<Value> = serde_json::from_slice(&output(&mut command)?)?;
    report.first().and_then(|test| test["avg_ts"].as_f64()).context("llama-bench reported no speed")
}
