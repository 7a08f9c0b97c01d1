//! Compares families × backends with Hugging Face's float32 logits, whole and in shards (R3.1–R3.5, R4.1, R4.2).
//!
//! The fixtures are tiny random models; `fixtures/make.py` makes them.

#![allow(clippy::expect_used)] // A failing test names the reason.

mod allocations;
mod golden;
mod independence;
mod opencl;
mod pipeline;
mod queries;
mod templates;

use exo_engines::candle::CandleFactory;
use exo_engines::cpu::{CpuFactory, Tier};
use exo_engines::engine::*;
use exo_engines::model::{ModelFiles, Recipe, families::FAMILIES};
use exo_engines::reference::ReferenceFactory;
use pipeline::{Pipeline, SEQ, row};
use serde::Deserialize;
use std::path::{Path, PathBuf};

#[derive(Deserialize)]
struct Expected {
    prompt: Vec<u32>,
    last_logprobs: Vec<f64>,
    middle_logprobs: Vec<f64>,
    /// Tokens of the prompt's prefix that `short_logprobs` follow: as many as phi3's short table serves.
    short_tokens: usize,
    short_logprobs: Vec<f64>,
    greedy: Vec<u32>,
}

fn fixtures() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures")
}

/// A family in one of its file formats.
struct Fixture {
    name: String,
    model: ModelFiles,
    expected: Expected,
}

/// Every family from safetensors and from GGUF (as llama.cpp's converter writes it), plus gpt_oss with its experts in
/// MXFP4.
fn all_fixtures() -> Vec<Fixture> {
    let names = FAMILIES.iter().map(|family| family.name).chain(["gpt_oss_mxfp4"]);
    names.flat_map(|name| [fixture(name), fixture(&format!("{name}/gguf"))]).collect()
}

fn fixture(name: &str) -> Fixture {
    let folder = fixtures().join(name);
    let path = if name.ends_with("gguf") { folder.join("model.gguf") } else { folder.clone() };
    let model = ModelFiles::open(&path).expect("the fixture opens");
    let expected = std::fs::read_to_string(folder.join("expected.json")).expect("expected.json is there");
    let expected = serde_json::from_str(&expected).expect("expected.json is as make.py writes it");
    Fixture { name: name.to_owned(), model, expected }
}

fn logprobs(logits: &[f32]) -> Vec<f64> {
    let total: f64 = logits.iter().map(|&l| f64::from(l).exp()).sum();
    logits.iter().map(|&l| f64::from(l) - total.ln()).collect()
}

fn distance(got: &[f64], expected: &[f64]) -> f64 {
    got.iter().zip(expected).map(|(a, b)| (a - b).abs()).fold(0.0, f64::max)
}

fn best(logits: &[f32]) -> u32 {
    let best = logits.iter().enumerate().max_by(|a, b| a.1.total_cmp(b.1));
    best.map_or(0, |(id, _)| id as u32)
}

fn factories() -> Vec<(String, Box<dyn EngineFactory>)> {
    let mut factories: Vec<(String, Box<dyn EngineFactory>)> =
        vec![("candle".to_owned(), Box::new(CandleFactory)), ("reference".to_owned(), Box::new(ReferenceFactory))];
    for tier in Tier::available() {
        factories.push((format!("cpu {}", tier.name()), Box::new(CpuFactory::with_tier(2, tier))));
    }
    factories
}

/// Log-probabilities are within 1e-3 of float32, and greedy continuations are equal, for every family in both formats
/// on every backend, whole and in three shards, over prompts longer than any sliding window.
#[test]
fn families_agree_with_transformers_on_every_backend() {
    for Fixture { name, model, expected } in all_fixtures() {
        for (backend, factory) in factories() {
            for shards in [1, 3] {
                let mut pipeline = Pipeline::new(&model, &*factory, shards);
                let rows = pipeline.logits(&expected.prompt, expected.prompt.len());
                let last = distance(&logprobs(&rows[rows.len() - 1]), &expected.last_logprobs);
                let middle = distance(&logprobs(&rows[rows.len() / 2]), &expected.middle_logprobs);
                println!("{name:18} {backend:16} {shards} shards: {last:.2e} {middle:.2e}");
                assert!(last < 1e-3 && middle < 1e-3, "{name} on {backend}: {last} {middle}");
                let mut token = best(&rows[rows.len() - 1]);
                for (index, &wanted) in expected.greedy.iter().enumerate() {
                    assert_eq!(token, wanted, "{name} on {backend}, token {index}");
                    let position = expected.prompt.len() + index;
                    token = best(&pipeline.step(&[], &[row(SEQ, position)], vec![token]));
                }
            }
        }
    }
}

/// R4.3: a model quantised on loading has nearly the same log-probabilities, for every layout of tensors.
#[test]
fn quantising_on_loading_changes_logprobs_little() {
    for name in ["llama", "phi3", "mixtral/gguf", "gpt_oss"] {
        for recipe in Recipe::ALL {
            let Fixture { model, expected, .. } = fixture(name);
            let model = model.quantised(recipe).expect("it is dense");
            let mut pipeline = Pipeline::new(&model, &CpuFactory::new(2), 1);
            let rows = pipeline.logits(&expected.prompt, expected.prompt.len());
            let error = distance(&logprobs(&rows[rows.len() - 1]), &expected.last_logprobs);
            println!("{name:14} {recipe}: {error:.3}");
            let limit = if recipe == Recipe::Q8_0 { 0.5 } else { 3.0 };
            assert!(error > 1e-5 && error < limit, "{name} {recipe}: {error}");
        }
    }
}

/// R4.1: config.json as transformers wrote it before version 5 gives the same architecture.
#[test]
fn the_old_layout_of_configs_gives_the_same_architecture() {
    for family in FAMILIES {
        let new = fixture(family.name).model;
        let folder = tempfile::tempdir().expect("a temporary folder");
        let from = fixtures().join(family.name);
        std::fs::copy(from.join("config.old.json"), folder.path().join("config.json")).expect("copied");
        std::fs::copy(from.join("model.safetensors"), folder.path().join("model.safetensors")).expect("copied");
        let old = ModelFiles::open(folder.path()).expect("the old layout opens");
        assert_eq!(old.architecture, new.architecture, "{}", family.name);
    }
}

/// LongRoPE: a node that serves no contexts longer than the model's original context uses the short table.
#[test]
fn short_contexts_use_the_short_rotary_table() {
    for name in ["phi3", "phi3/gguf"] {
        let Fixture { mut model, expected, .. } = fixture(name);
        let prompt = &expected.prompt[..expected.short_tokens];
        let mut long = Pipeline::new(&model, &CpuFactory::new(1), 1);
        let rows = long.logits(prompt, prompt.len());
        assert!(distance(&logprobs(&rows[rows.len() - 1]), &expected.short_logprobs) > 1e-2, "{name}");
        model.architecture = model.architecture.for_context(prompt.len());
        let mut short = Pipeline::new(&model, &CpuFactory::new(1), 1);
        let rows = short.logits(prompt, prompt.len());
        assert!(distance(&logprobs(&rows[rows.len() - 1]), &expected.short_logprobs) < 1e-3, "{name}");
    }
}
