//! A model over a pipeline of engines, which the test drives step by step.

use exo_engines::engine::*;
use exo_engines::model::ModelFiles;
use std::ops::{ControlFlow, Range};

pub(crate) const SEQ: SeqId = SeqId(7);
const LIFE: Incarnation = Incarnation { epoch: 1, owner: [0; 32] };

/// A model on one engine, or on several engines in a pipeline.
pub(crate) struct Pipeline {
    engines: Vec<Box<dyn Engine>>,
}

fn open(
    model: &ModelFiles,
    factory: &dyn EngineFactory,
    layers: Range<usize>,
    kv_element: KvElement,
    activations: ActivationBits,
) -> Box<dyn Engine> {
    let spec = ShardSpec {
        architecture: model.architecture.for_context(usize::MAX),
        layers,
        tensor: TensorRank::WHOLE,
        kv_element,
        activations,
        kv_pages: 32,
    };
    let device = factory.probe().remove(0).id;
    let mut engine = factory.open(&device).expect("the device is there");
    engine.load(&spec, &model.weights, &mut |_| ControlFlow::Continue(())).expect("the fixture loads");
    engine.warm_up().expect("the first row is finite");
    engine
}

impl Pipeline {
    pub(crate) fn new(model: &ModelFiles, factory: &dyn EngineFactory, shards: usize) -> Self {
        Self::with_precision(model, factory, shards, KvElement::F32, ActivationBits::Sixteen)
    }

    pub(crate) fn with_precision(
        model: &ModelFiles,
        factory: &dyn EngineFactory,
        shards: usize,
        kv_element: KvElement,
        activations: ActivationBits,
    ) -> Self {
        let layers = model.architecture.layers.len();
        let cut = |index: usize| layers * index / shards;
        let engine = |index| open(model, factory, cut(index)..cut(index + 1), kv_element, activations);
        Self { engines: (0..shards).map(engine).collect() }
    }

    /// A shard of the first layers alone.
    pub(crate) fn first_layers(
        model: &ModelFiles,
        factory: &dyn EngineFactory,
        layers: usize,
        kv_element: KvElement,
        activations: ActivationBits,
    ) -> Self {
        assert!(layers < model.architecture.layers.len(), "the fixture has more layers");
        Self { engines: vec![open(model, factory, 0..layers, kv_element, activations)] }
    }

    /// Computes `tokens`, and returns the hidden rows of the last shard, which lacks the model's last layer.
    pub(crate) fn hidden(&mut self, rows: &[Row], tokens: Vec<u32>) -> Vec<f32> {
        let step = Step { incarnation: LIFE, id: StepId(0), operations: Vec::new(), rows: rows.to_vec() };
        match self.engines[0].forward(&step, Input::Tokens(tokens), &[]).expect("a valid step").rows {
            OutputRows::Hidden(hidden) => hidden,
            OutputRows::Scores(_) => panic!("the shard has the last layer"),
        }
    }

    /// Computes `tokens`, and returns the logits of the rows that want them.
    pub(crate) fn step(&mut self, operations: &[Operation], rows: &[Row], tokens: Vec<u32>) -> Vec<f32> {
        let queries = vec![RowQuery::Logits; rows.iter().filter(|row| row.wants_logits).count()];
        self.scores(operations, rows, tokens, &queries).values
    }

    /// All logits of a row of the last step.
    pub(crate) fn all_logits(&mut self, row: usize) -> Vec<f32> {
        self.engines.last_mut().expect("an engine").logits(row).expect("it was computed")
    }

    pub(crate) fn scores(
        &mut self,
        operations: &[Operation],
        rows: &[Row],
        tokens: Vec<u32>,
        queries: &[RowQuery],
    ) -> Scores {
        let step = Step { incarnation: LIFE, id: StepId(0), operations: operations.to_vec(), rows: rows.to_vec() };
        let mut input = Input::Tokens(tokens);
        let last = self.engines.len() - 1;
        for engine in &mut self.engines[..last] {
            match engine.forward(&step, input, &[]).expect("a valid step").rows {
                OutputRows::Hidden(hidden) => input = Input::Hidden(hidden),
                OutputRows::Scores(_) => panic!("the shard lacks the last layer"),
            }
        }
        match self.engines[last].forward(&step, input, queries).expect("a valid step").rows {
            OutputRows::Scores(scores) => scores,
            OutputRows::Hidden(_) => panic!("the last shard returned no scores"),
        }
    }

    /// Logits of every row of `tokens`, computed from an empty sequence in chunks of `chunk` tokens.
    pub(crate) fn logits(&mut self, tokens: &[u32], chunk: usize) -> Vec<Vec<f32>> {
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

pub(crate) fn row(seq: SeqId, position: usize) -> Row {
    Row { seq, position: position as u32, wants_logits: true }
}
