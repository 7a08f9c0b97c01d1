//! Families × backends against Hugging Face's float32 logits, whole and split (R3.1–R3.5, R4.1, R4.2).
//!
//! The fixtures are tiny random models; `fixtures/make.py` makes them.

#![allow(clippy::expect_used)] // A test that cannot go on says why.

use exo_engines::candle::CandleFactory;
use exo_engines::cpu::{CpuFactory, Tier};
use exo_engines::engine::*;
use exo_engines::model::{ModelFiles, families::FAMILIES};
use serde::Deserialize;
use std::path::{Path, PathBuf};

#[derive(Deserialize)]
struct Expected {
    prompt: Vec<u32>,
    last_logprobs: Vec<f64>,
    middle_logprobs: Vec<f64>,
    greedy: Vec<u32>,
}

const SEQ: SeqId = SeqId(7);
const LIFE: Incarnation = Incarnation { epoch: 1, owner: [0; 32] };

/// A model over one engine or several in a row.
struct Pipeline {
    engines: Vec<Box<dyn Engine>>,
}

impl Pipeline {
    fn new(model: &ModelFiles, factory: &dyn EngineFactory, shards: usize) -> Self {
        let device = factory.probe().remove(0).id;
        let layers = model.architecture.layers.len();
        let cut = |index: usize| layers * index / shards;
        let engines = (0..shards).map(|index| {
            let spec = ShardSpec {
                architecture: model.architecture.clone(),
                layers: cut(index)..cut(index + 1),
                tensor: TensorRank::WHOLE,
                kv_element: KvElement::F32,
                kv_pages: 16,
            };
            let mut engine = factory.open(&device).expect("the device is there");
            engine.load(&spec, &model.weights, &mut |_| {}).expect("the fixture loads");
            engine.warm_up().expect("the first row is finite");
            engine
        });
        Self { engines: engines.collect() }
    }

    fn step(&mut self, operations: &[Operation], rows: &[Row], tokens: Vec<u32>) -> Vec<f32> {
        let step = Step { incarnation: LIFE, id: StepId(0), operations: operations.to_vec(), rows: rows.to_vec() };
        let mut input = Input::Tokens(tokens);
        for engine in &mut self.engines {
            match engine.forward(&step, input).expect("a valid step").rows {
                OutputRows::Hidden(hidden) => input = Input::Hidden(hidden),
                OutputRows::Logits(logits) => return logits,
            }
        }
        panic!("the last shard gives logits");
    }

    /// Logits of every row of `tokens`, from `start` on, in chunks of `chunk`.
    fn logits(&mut self, tokens: &[u32], chunk: usize) -> Vec<Vec<f32>> {
        let mut rows_out = Vec::new();
        let release = [Operation::Release { seq: SEQ }];
        for (index, part) in tokens.chunks(chunk).enumerate() {
            let rows: Vec<Row> = (0..part.len()).map(|i| row(SEQ, index * chunk + i)).collect();
            let logits = self.step(if index == 0 { &release } else { &[] }, &rows, part.to_vec());
            rows_out.extend(logits.chunks(logits.len() / part.len()).map(<[f32]>::to_vec));
        }
        rows_out
    }
}

fn row(seq: SeqId, position: usize) -> Row {
    Row { seq, position: position as u32, wants_logits: true }
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
