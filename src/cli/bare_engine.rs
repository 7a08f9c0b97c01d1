//! A CPU engine with a whole model, without a node around it.

use exo_engines::cpu::CpuFactory;
use exo_engines::engine::{
    ActivationBits, DeviceId, Engine, EngineFactory, Incarnation, Input, KvElement, Operation, OutputRows, Row,
    RowQuery, ShardSpec, Step, StepId, TensorRank,
};
use exo_engines::model::ModelFiles;
use std::ops::ControlFlow;

/// Returns `threads`, or the number of cores.
pub(super) fn threads_or_cores(threads: Option<u32>) -> usize {
    let cores = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
    threads.map_or(cores, |threads| threads as usize)
}

/// How exactly an engine computes.
#[derive(Debug, Clone, Copy)]
pub(super) struct Precision {
    pub(super) kv_element: KvElement,
    pub(super) activations: ActivationBits,
}

/// Loads all layers of `model`, with a cache for `context` tokens.
pub(super) fn open(
    model: &ModelFiles,
    Precision { kv_element, activations }: Precision,
    context: u32,
    threads: Option<u32>,
) -> anyhow::Result<Box<dyn Engine>> {
    let mut engine = CpuFactory::new(threads_or_cores(threads)).open(&DeviceId(CpuFactory::DEVICE.to_owned()))?;
    let spec = ShardSpec {
        architecture: model.architecture.for_context(context as usize),
        layers: 0..model.architecture.layers.len(),
        tensor: TensorRank::WHOLE,
        kv_element,
        activations,
        kv_pages: exo_engines::decoder::pages_for(context),
    };
    engine.load(&spec, &model.weights, &mut |_| ControlFlow::Continue(()))?;
    Ok(engine)
}

/// Computes `rows`, and returns the logits of those that want them: \[row]\[vocabulary].
pub(super) fn forward(
    engine: &mut dyn Engine,
    operations: Vec<Operation>,
    rows: Vec<Row>,
    tokens: Vec<u32>,
) -> anyhow::Result<Vec<f32>> {
    let incarnation = Incarnation { epoch: 1, owner: [0; 32] };
    let queries = vec![RowQuery::Logits; rows.iter().filter(|row| row.wants_logits).count()];
    let step = Step { incarnation, id: StepId(0), operations, rows };
    match engine.forward(&step, Input::Tokens(tokens), &queries)?.rows {
        OutputRows::Scores(scores) => Ok(scores.values),
        OutputRows::Hidden(_) => anyhow::bail!("the engine gave hidden states instead of logits"),
    }
}
