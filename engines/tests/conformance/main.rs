//! Families × backends against Hugging Face's float32 logits, whole and split (R3.1–R3.5, R4.1, R4.2).
//!
//! The fixtures are tiny random models; `fixtures/make.py` makes them.

#![allow(clippy::expect_used)] // A test that cannot go on says why.

mod independence;
mod pipeline;
mod templates;

use exo_engines::candle::CandleFactory;
use exo_engines::cpu::{CpuFactory, Tier};
use exo_engines::engine::*;
use exo_engines::model::{ModelFiles, families::FAMILIES};
use pipeline::{Pipeline, SEQ, row};
use serde::Deserialize;
use std::path::{Path, PathBuf};

#[derive(Deserialize)]
struct Expected {
    prompt: Vec<u32>,
    last_logprobs: Vec<f64>,
    middle_logprobs: Vec<f64>,
    greedy: Vec<u32>,
}

fn fixtures() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures")
}

fn fixture(family: &str) -> (ModelFiles, Expected) {
    let folder = fixtures().join(family);
    let model = ModelFiles::open(&folder).expect("the fixture opens");
    let expected = std::fs::read_to_string(folder.join("expected.json")).expect("expected.json is there");
    (model, serde_json::from_str(&expected).expect("expected.json is as make.py writes it"))
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
    let mut factories: Vec<(String, Box<dyn EngineFactory>)> = vec![("candle".to_owned(), Box::new(CandleFactory))];
    for tier in Tier::available() {
        factories.push((format!("cpu {}", tier.name()), Box::new(CpuFactory::with_tier(2, tier))));
    }
    factories
}

/// Log-probabilities within 1e-3 of float32, greedy continuations equal, for every family on every backend, whole
/// and in three shards, over prompts longer than any sliding window.
#[test]
fn families_agree_with_transformers_on_every_backend() {
    for family in FAMILIES {
        let (model, expected) = fixture(family.name);
        for (name, factory) in factories() {
            for shards in [1, 3] {
                let mut pipeline = Pipeline::new(&model, &*factory, shards);
                let rows = pipeline.logits(&expected.prompt, expected.prompt.len());
                let last = distance(&logprobs(&rows[rows.len() - 1]), &expected.last_logprobs);
                let middle = distance(&logprobs(&rows[rows.len() / 2]), &expected.middle_logprobs);
                println!("{:8} {name:16} {shards} shards: {last:.2e} {middle:.2e}", family.name);
                assert!(last < 1e-3 && middle < 1e-3, "{} on {name}: {last} {middle}", family.name);
                let mut token = best(&rows[rows.len() - 1]);
                for (index, &wanted) in expected.greedy.iter().enumerate() {
                    assert_eq!(token, wanted, "{} on {name}, token {index}", family.name);
                    let position = expected.prompt.len() + index;
                    token = best(&pipeline.step(&[], &[row(SEQ, position)], vec![token]));
                }
            }
        }
    }
}

/// R4.1: config.json as transformers wrote it before version 5 means the same model.
#[test]
fn the_old_layout_of_configs_means_the_same() {
    for family in FAMILIES {
        let (new, _) = fixture(family.name);
        let folder = tempfile::tempdir().expect("a temporary folder");
        let from = fixtures().join(family.name);
        std::fs::copy(from.join("config.old.json"), folder.path().join("config.json")).expect("copied");
        std::fs::copy(from.join("model.safetensors"), folder.path().join("model.safetensors")).expect("copied");
        let old = ModelFiles::open(folder.path()).expect("the old layout opens");
        assert_eq!(old.architecture, new.architecture, "{}", family.name);
    }
}
