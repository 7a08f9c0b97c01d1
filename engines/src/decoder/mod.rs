//! The decoder: computes a shard's layers on any backend.
//!
//! ```text
//! Step ─operations─► PageTable ─rows─► Batch ─► embed │ upload ─► layers ─► download │ logits, queries ─► Output
//! ```
//! The decoder checks a step before it computes: a refused step changes no sequence of its incarnation.

mod load;
mod output;
mod pages;
mod self_test;
mod tensors;

pub use pages::{PageError, PageTable};

use crate::backend::{Backend, Batch, LayerState, Span};
use crate::collective::{AllReduce, SingleRank};
use crate::engine::{
    DeviceRates, Engine, Incarnation, Input, LoadProgress, LoadReport, Output, OutputRows, PAGE_TOKENS, Row, RowQuery,
    Scores, SelfTestReport, SeqId, ShardSpec, Step, StepId, WarmUpReport,
};
use crate::error::{DeviceFault, EngineError};
use crate::model::WeightSource;
use crate::profile::Profile;
use load::ShardWeights;
use output::{KeptLogits, OutputLayer};
use std::ops::ControlFlow;
use std::time::{Duration, Instant};

/// The most rows that a warm-up times. The fastest one counts: other work on the machine only slows rows down.
const TIMED_ROWS_MAX: usize = 5;
/// The time after which a warm-up times no further row.
const TIMED_WITHIN: Duration = Duration::from_millis(100);

/// An [`Engine`] that runs the decoder on a backend.
#[derive(Debug)]
pub struct DecoderEngine<B: Backend> {
    backend: B,
    loaded: Option<Loaded<B>>,
}

struct Loaded<B: Backend> {
    spec: ShardSpec,
    weights: ShardWeights<B>,
    cache: B::Cache,
    pages: PageTable,
    incarnation: Option<Incarnation>,
    all_reduce: Box<dyn AllReduce>,
    weight_bytes: u64,
    /// The logits of the last step.
    logits: Option<KeptLogits<B>>,
}

impl<B: Backend> std::fmt::Debug for Loaded<B> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Loaded")
            .field("layers", &self.spec.layers)
            .field("incarnation", &self.incarnation)
            .finish_non_exhaustive()
    }
}

impl<B: Backend> DecoderEngine<B> {
    /// Creates an engine with nothing loaded.
    pub fn new(backend: B) -> Self {
        Self { backend, loaded: None }
    }
}

impl<B: Backend> Engine for DecoderEngine<B> {
    fn load(
        &mut self,
        shard: &ShardSpec,
        weights: &WeightSource,
        on: &mut dyn FnMut(LoadProgress) -> ControlFlow<()>,
    ) -> Result<LoadReport, EngineError> {
        let start = Instant::now();
        // The previous model is dropped first, so that memory never holds two models.
        self.loaded = None;
        load::check_spec(shard)?;
        self.backend.set_activations(shard.activations)?;
        let (loaded_weights, weight_bytes) = load::weights(&mut self.backend, shard, weights, on)?;
        let layers = &shard.architecture.layers[shard.layers.clone()];
        let states: Vec<_> = layers.iter().map(|layer| LayerState::KeysAndValues(&layer.attention)).collect();
        let cache = self.backend.cache(&states, shard.kv_element, shard.kv_pages)?;
        self.backend.finish()?;
        self.loaded = Some(Loaded::new(shard.clone(), loaded_weights, cache, weight_bytes));
        Ok(LoadReport {
            weight_bytes,
            kv_bytes: shard.kv_bytes(),
            fingerprint: format!("{}/kv-{}", self.backend.fingerprint(), shard.kv_element.name()),
            elapsed: start.elapsed(),
        })
    }

    fn self_test(&mut self) -> Result<SelfTestReport, EngineError> {
        self.loaded = None;
        Ok(SelfTestReport { step: self_test::run(&mut self.backend)? })
    }

    fn measure(&mut self) -> Result<DeviceRates, EngineError> {
        self.loaded = None;
        self.backend.measure()
    }

    fn warm_up(&mut self) -> Result<WarmUpReport, EngineError> {
        let Self { backend, loaded } = self;
        let loaded = loaded.as_mut().ok_or(EngineError::NotLoaded)?;
        let (first, hidden) = (loaded.spec.is_first(), loaded.spec.architecture.hidden);
        let input = || if first { Input::Tokens(vec![0]) } else { Input::Hidden(vec![0.5; hidden]) };
        // The first pass makes the weights resident.
        let values = loaded.probe(backend, input())?;
        let (begun, mut row) = (Instant::now(), Duration::MAX);
        for _ in 0..TIMED_ROWS_MAX {
            let start = Instant::now();
            loaded.probe(backend, input())?;
            row = row.min(start.elapsed());
            if begun.elapsed() > TIMED_WITHIN {
                break;
            }
        }
        if values.iter().any(|value| !value.is_finite()) {
            return Err(EngineError::SelfTest { what: "the warm-up row has values that are not finite".to_owned() });
        }
        Ok(WarmUpReport { row })
    }

    fn forward(&mut self, step: &Step, input: Input, queries: &[RowQuery]) -> Result<Output, EngineError> {
        let Self { backend, loaded } = self;
        loaded.as_mut().ok_or(EngineError::NotLoaded)?.forward(backend, step, input, queries)
    }

    fn logits(&mut self, row: usize) -> Result<Vec<f32>, EngineError> {
        let Self { backend, loaded } = self;
        let loaded = loaded.as_ref().ok_or(EngineError::NotLoaded)?;
        let kept = loaded.logits.as_ref().and_then(|kept| kept.row(row));
        let (logits, row) = kept.ok_or_else(|| bad_step(format!("the last step has no logits of query {row}")))?;
        backend.logit_rows(logits, &[row])
    }

    fn take_profile(&mut self) -> Profile {
        self.backend.take_profile()
    }
}

fn bad_step(what: String) -> EngineError {
    EngineError::BadStep { what }
}

impl<B: Backend> Loaded<B> {
    fn new(spec: ShardSpec, weights: ShardWeights<B>, cache: B::Cache, weight_bytes: u64) -> Self {
        Self {
            pages: PageTable::new(spec.kv_pages),
            spec,
            weights,
            cache,
            incarnation: None,
            all_reduce: Box::new(SingleRank),
            weight_bytes,
            logits: None,
        }
    }

    /// Computes one row of a temporary sequence, then empties the cache.
    fn probe(&mut self, backend: &mut B, input: Input) -> Result<Vec<f32>, EngineError> {
        let seq = SeqId(u64::MAX);
        let row = Row { seq, position: 0, wants_logits: true };
        let step = Step {
            incarnation: Incarnation { epoch: 0, owner: [0; 32] },
            id: StepId(0),
            operations: Vec::new(),
            rows: vec![row],
        };
        let queries: &[RowQuery] = if self.spec.is_last() { &[RowQuery::Logits] } else { &[] };
        let rows = self.compute(backend, &step, input, queries);
        self.pages.clear();
        backend.finish()?;
        let (OutputRows::Hidden(values) | OutputRows::Scores(Scores { values, .. })) = rows?;
        Ok(values)
    }

    fn forward(
        &mut self,
        backend: &mut B,
        step: &Step,
        input: Input,
        queries: &[RowQuery],
    ) -> Result<Output, EngineError> {
        self.enter(step.incarnation)?;
        output::check_queries(&self.spec, &step.rows, queries)?;
        // Operations run on a copy, so that a refused step changes nothing.
        let mut pages = self.pages.clone();
        for &operation in &step.operations {
            pages.apply(operation).map_err(|e| bad_step(e.to_string()))?;
        }
        let before = std::mem::replace(&mut self.pages, pages);
        let computed = self.compute(backend, step, input, queries);
        let finished = backend.finish();
        match computed.and_then(|rows| finished.map(|()| rows)) {
            Ok(rows) => Ok(Output {
                rows,
                memory_bytes: self.weight_bytes + self.cache_bytes_in_use() + backend.memory_bytes(),
                pages_used: self.pages.used(),
            }),
            Err(error) => {
                self.pages = before;
                Err(error)
            }
        }
    }

    fn cache_bytes_in_use(&self) -> u64 {
        let pages = u64::from(self.spec.kv_pages.max(1));
        self.spec.kv_bytes() / pages * u64::from(self.pages.used())
    }

    /// Refuses an older incarnation, and empties the cache for a newer one.
    fn enter(&mut self, incarnation: Incarnation) -> Result<(), EngineError> {
        match self.incarnation {
            Some(current) if incarnation < current => {
                return Err(EngineError::StaleIncarnation { got: incarnation.epoch, current: current.epoch });
            }
            Some(current) if incarnation == current => {}
            _ => self.pages.clear(),
        }
        self.incarnation = Some(incarnation);
        Ok(())
    }

    fn compute(
        &mut self,
        backend: &mut B,
        step: &Step,
        input: Input,
        queries: &[RowQuery],
    ) -> Result<OutputRows, EngineError> {
        self.logits = None;
        if step.rows.is_empty() {
            return Ok(match self.spec.is_last() {
                true => OutputRows::Scores(Scores::default()),
                false => OutputRows::Hidden(Vec::new()),
            });
        }
        self.check_input(&step.rows, &input)?;
        let (batch, copies) = self.batch(&step.rows)?;
        backend.copy_pages(&mut self.cache, &copies)?;
        let batch = backend.begin(batch, &self.spec.architecture.ropes)?;
        let mut hidden = match input {
            Input::Tokens(tokens) => {
                let table = self.weights.embedding.as_ref().ok_or(EngineError::NotLoaded)?;
                backend.embed(table, &tokens, self.spec.architecture.embedding_scale)?
            }
            Input::Hidden(values) => backend.upload(values, self.spec.architecture.hidden)?,
        };
        for (index, layer) in self.weights.layers.iter().enumerate() {
            let delta = backend.mix(&layer.mixer, &mut self.cache, index, &batch, &hidden)?;
            let delta = sum_ranks(backend, &mut *self.all_reduce, delta, self.spec.architecture.hidden)?;
            backend.add(&mut hidden, delta, layer.after_mixer.as_ref())?;
            let delta = backend.feed_forward(&layer.feed_forward, &hidden)?;
            let delta = sum_ranks(backend, &mut *self.all_reduce, delta, self.spec.architecture.hidden)?;
            backend.add(&mut hidden, delta, layer.after_feed_forward.as_ref())?;
        }
        self.output(backend, &step.rows, queries, hidden)
    }

    fn output(
        &mut self,
        backend: &mut B,
        rows: &[Row],
        queries: &[RowQuery],
        hidden: B::Buffer,
    ) -> Result<OutputRows, EngineError> {
        let Some(norm) = &self.weights.output_norm else {
            return Ok(OutputRows::Hidden(backend.download(hidden)?));
        };
        let head = self.weights.head().ok_or(EngineError::NotLoaded)?;
        let output = OutputLayer { norm, head, architecture: &self.spec.architecture };
        let wanted: Vec<usize> = (0..rows.len()).filter(|&row| rows[row].wants_logits).collect();
        let (scores, logits) = output.answer(backend, hidden, &wanted, queries)?;
        self.logits = logits;
        Ok(OutputRows::Scores(scores))
    }

    fn check_input(&self, rows: &[Row], input: &Input) -> Result<(), EngineError> {
        let architecture = &self.spec.architecture;
        match input {
            Input::Tokens(tokens) => {
                if !self.spec.is_first() || tokens.len() != rows.len() {
                    return Err(bad_step(format!("{} tokens for {} rows", tokens.len(), rows.len())));
                }
                match tokens.iter().find(|&&token| token as usize >= architecture.vocabulary) {
                    Some(token) => {
                        Err(bad_step(format!("token {token} is outside the vocabulary of {}", architecture.vocabulary)))
                    }
                    None => Ok(()),
                }
            }
            Input::Hidden(values) => {
                if self.spec.is_first() || values.len() != rows.len() * architecture.hidden {
                    return Err(bad_step(format!(
                        "{} hidden values for {} rows of {}",
                        values.len(),
                        rows.len(),
                        architecture.hidden
                    )));
                }
                Ok(())
            }
        }
    }

    /// Groups the rows by sequence and allocates their cache pages. Also returns the page copies to do, as (from, to).
    fn batch(&mut self, rows: &[Row]) -> Result<(Batch, Vec<(u32, u32)>), EngineError> {
        let mut spans: Vec<Span> = Vec::new();
        let mut copies = Vec::new();
        let mut start = 0;
        for group in rows.chunk_by(|a, b| a.seq == b.seq) {
            let seq = group[0].seq;
            let first = self.pages.length_tokens(seq);
            let in_order = group.iter().zip(first..).all(|(row, position)| row.position == position);
            if !in_order {
                return Err(bad_step(format!("rows of sequence {} do not continue at position {first}", seq.0)));
            }
            let extended = self.pages.extend(seq, group.len() as u32);
            copies.extend(extended.map_err(|_| EngineError::CacheFull { pages: self.spec.kv_pages })?);
            spans.push(Span {
                rows: start..start + group.len(),
                first_position: first as usize,
                pages: self.pages.pages(seq).to_vec(),
            });
            start += group.len();
        }
        let batch = Batch { rows: rows.len(), spans };
        Ok((batch, copies))
    }
}

fn sum_ranks<B: Backend>(
    backend: &mut B,
    all_reduce: &mut dyn AllReduce,
    partial: B::Buffer,
    width: usize,
) -> Result<B::Buffer, EngineError> {
    if all_reduce.ranks() == 1 {
        return Ok(partial);
    }
    let mut values = backend.download(partial)?;
    all_reduce.sum(&mut values).map_err(|e| EngineError::Device {
        device: format!("rank {}", e.rank),
        fault: DeviceFault::Lost,
        what: e.to_string(),
    })?;
    backend.upload(values, width)
}

/// Returns the number of pages, of [`PAGE_TOKENS`] tokens each, for `tokens` tokens of one sequence.
pub fn pages_for(tokens: u32) -> u32 {
    tokens.div_ceil(PAGE_TOKENS)
}
