//! Loads a shard's weights: reads each role, checks it against the architecture, and passes it to the backend.

use crate::backend::{
    AttentionWeights, Backend, FeedForwardKind, FeedForwardWeights, Gated, Linear, Mixture, Norm, TensorData,
};
use crate::engine::{LoadProgress, ShardSpec};
use crate::error::EngineError;
use crate::format::blocks::dequantise_row;
use crate::format::quantise::{self, QuantiseError};
use crate::format::{ElementType, FormatError, TensorBytes};
use crate::model::{FeedForward, Layer, LayerRole, Part, QueryKeyNorm, Role, TensorSlice, WeightReader, WeightSource};
use std::ops::ControlFlow;

/// The weights of a shard.
pub(super) struct ShardWeights<B: Backend> {
    pub(super) embedding: Option<B::Matrix>,
    pub(super) layers: Vec<LayerWeights<B>>,
    pub(super) output_norm: Option<Norm<B>>,
    output: Option<B::Matrix>,
}

pub(super) struct LayerWeights<B: Backend> {
    pub(super) attention: AttentionWeights<B>,
    pub(super) after_attention: Option<Norm<B>>,
    pub(super) feed_forward: FeedForwardWeights<B>,
    pub(super) after_feed_forward: Option<Norm<B>>,
}

impl<B: Backend> ShardWeights<B> {
    /// Returns the matrix of the output head: its own, or the embedding if the shard has both and they are tied.
    pub(super) fn head(&self) -> Option<&B::Matrix> {
        self.output.as_ref().or(self.embedding.as_ref())
    }
}

/// Returns an error for a shard that the decoder cannot compute.
pub(super) fn check_spec(shard: &ShardSpec) -> Result<(), EngineError> {
    if shard.tensor.of != 1 {
        return Err(EngineError::Unsupported {
            engine: "decoder".to_owned(),
            what: format!("tensor sharding (rank {} of {})", shard.tensor.rank, shard.tensor.of),
        });
    }
    let layers = shard.architecture.layers.len();
    if shard.layers.start >= shard.layers.end || shard.layers.end > layers {
        return Err(EngineError::BadStep { what: format!("layers {:?} of a model of {layers} layers", shard.layers) });
    }
    if shard.kv_pages == 0 {
        return Err(EngineError::BadStep { what: "the shard's cache has no pages".to_owned() });
    }
    Ok(())
}

/// Loads the weights of `shard`; returns them and their size in memory, in bytes.
pub(super) fn weights<B: Backend>(
    backend: &mut B,
    shard: &ShardSpec,
    source: &WeightSource,
    on: &mut dyn FnMut(LoadProgress) -> ControlFlow<()>,
) -> Result<(ShardWeights<B>, u64), EngineError> {
    let reader = WeightReader::open(source)?;
    let total_bytes = source.shard_bytes(shard.layers.clone(), shard.architecture.layers.len());
    let mut loader = Loader {
        backend,
        shard,
        source,
        reader,
        progress: LoadProgress { loaded_bytes: 0, total_bytes },
        on,
        memory_bytes: 0,
    };
    let weights = loader.shard()?;
    Ok((weights, loader.memory_bytes))
}

struct Loader<'a, 's, B: Backend> {
    backend: &'a mut B,
    shard: &'a ShardSpec,
    source: &'s WeightSource,
    reader: WeightReader,
    progress: LoadProgress,
    on: &'a mut dyn FnMut(LoadProgress) -> ControlFlow<()>,
    /// The size of the loaded weights in the backend's layout.
    memory_bytes: u64,
}

impl<'s, B: Backend> Loader<'_, 's, B> {
    fn shard(&mut self) -> Result<ShardWeights<B>, EngineError> {
        let (vocabulary, hidden) = (self.shard.architecture.vocabulary, self.shard.architecture.hidden);
        let embedding = match self.shard.is_first() {
            true => Some(self.matrix(Role::TokenEmbedding, vocabulary, hidden)?),
            false => None,
        };
        let mut layers = Vec::new();
        for index in self.shard.layers.clone() {
            layers.push(self.layer(index)?);
        }
        let mut output_norm = None;
        let mut output = None;
        if self.shard.is_last() {
            output_norm = Some(self.norm(Role::OutputNorm, hidden)?);
            if !(self.shard.is_first() && self.is_tied()) {
                output = Some(self.matrix(Role::Output, vocabulary, hidden)?);
            }
        }
        Ok(ShardWeights { embedding, layers, output_norm, output })
    }

    fn is_tied(&self) -> bool {
        let place = |role| self.source.tensors.get(&role).map(|slice| (slice.file, slice.offset_bytes));
        place(Role::Output) == place(Role::TokenEmbedding)
    }

    fn layer(&mut self, index: usize) -> Result<LayerWeights<B>, EngineError> {
        let shard = self.shard;
        let layer = &shard.architecture.layers[index];
        let hidden = shard.architecture.hidden;
        let role = |part| Role::Layer(index as u32, part);
        let attention = self.attention(index, layer)?;
        let feed_forward = self.feed_forward(index, layer)?;
        let mut after = |part| match layer.norms.after() {
            true => self.norm(role(part), hidden).map(Some),
            false => Ok(None),
        };
        Ok(LayerWeights {
            attention,
            after_attention: after(LayerRole::PostAttentionNorm)?,
            feed_forward,
            after_feed_forward: after(LayerRole::PostFeedForwardNorm)?,
        })
    }

    fn attention(&mut self, index: usize, layer: &Layer) -> Result<AttentionWeights<B>, EngineError> {
        let spec = &layer.attention;
        let hidden = self.shard.architecture.hidden;
        let (query_width, kv_width) = (spec.query_width(), spec.kv_width());
        let role = |part| Role::Layer(index as u32, part);
        let bias = |part, has: bool| has.then(|| role(part));
        let (query_norm, key_norm) = match spec.query_key_norm {
            None => (None, None),
            Some(QueryKeyNorm::PerHead) => (Some(spec.head_dim), Some(spec.head_dim)),
            Some(QueryKeyNorm::Projection) => (Some(query_width), Some(kv_width)),
        };
        Ok(AttentionWeights {
            spec: spec.clone(),
            norm: self.norm_if(layer.norms.before().then_some(hidden), role(LayerRole::AttentionNorm))?,
            query: self.linear(
                role(LayerRole::Query),
                bias(LayerRole::QueryBias, spec.input_bias),
                query_width,
                hidden,
            )?,
            key: self.linear(role(LayerRole::Key), bias(LayerRole::KeyBias, spec.input_bias), kv_width, hidden)?,
            value: self.linear(
                role(LayerRole::Value),
                bias(LayerRole::ValueBias, spec.input_bias),
                kv_width,
                hidden,
            )?,
            query_norm: self.norm_if(query_norm, role(LayerRole::QueryNorm))?,
            key_norm: self.norm_if(key_norm, role(LayerRole::KeyNorm))?,
            sinks: match spec.sinks {
                true => Some(self.bias(role(LayerRole::Sinks), spec.heads)?),
                false => None,
            },
            output: self.linear(
                role(LayerRole::AttentionOutput),
                bias(LayerRole::AttentionOutputBias, spec.output_bias),
                hidden,
                query_width,
            )?,
        })
    }

    fn feed_forward(&mut self, index: usize, layer: &Layer) -> Result<FeedForwardWeights<B>, EngineError> {
        let spec = &layer.feed_forward;
        let hidden = self.shard.architecture.hidden;
        let role = |part| Role::Layer(index as u32, part);
        let norm = self.norm_if(layer.norms.before().then_some(hidden), role(LayerRole::FeedForwardNorm))?;
        let kind = match &spec.experts {
            None => FeedForwardKind::Dense(self.gated(spec, |part| role(LayerRole::Gated(part)))?),
            Some(experts) => {
                let bias = experts.router_bias.then(|| role(LayerRole::RouterBias));
                let router = self.linear(role(LayerRole::Router), bias, experts.count, hidden)?;
                let numbers = 0..experts.count as u32;
                let experts_loaded =
                    numbers.map(|number| self.gated(spec, |part| role(LayerRole::Expert(number, part))));
                let experts_loaded = experts_loaded.collect::<Result<_, _>>()?;
                FeedForwardKind::Mixture(Mixture { spec: experts.clone(), router, experts: experts_loaded })
            }
        };
        Ok(FeedForwardWeights { activation: spec.activation, norm, kind })
    }

    fn gated(&mut self, spec: &FeedForward, role: impl Fn(Part) -> Role) -> Result<Gated<B>, EngineError> {
        let hidden = self.shard.architecture.hidden;
        let bias = |part| spec.bias.then(|| role(part));
        Ok(Gated {
            gate: self.linear(role(Part::Gate), bias(Part::GateBias), spec.width, hidden)?,
            up: self.linear(role(Part::Up), bias(Part::UpBias), spec.width, hidden)?,
            down: self.linear(role(Part::Down), bias(Part::DownBias), hidden, spec.width)?,
        })
    }

    fn linear(
        &mut self,
        weight: Role,
        bias: Option<Role>,
        rows: usize,
        columns: usize,
    ) -> Result<Linear<B>, EngineError> {
        let weight = self.matrix(weight, rows, columns)?;
        let bias = bias.map(|role| self.bias(role, rows)).transpose()?;
        Ok(Linear { weight, bias })
    }

    fn bias(&mut self, role: Role, length: usize) -> Result<B::Vector, EngineError> {
        let values = self.vector(role, length)?;
        self.backend.vector(values)
    }

    fn norm_if(&mut self, length: Option<usize>, role: Role) -> Result<Option<Norm<B>>, EngineError> {
        length.map(|length| self.norm(role, length)).transpose()
    }

    fn norm(&mut self, role: Role, length: usize) -> Result<Norm<B>, EngineError> {
        let mut values = self.vector(role, length)?;
        let offset = self.shard.architecture.norm_offset;
        values.iter_mut().for_each(|value| *value += offset);
        Ok(Norm { weight: self.backend.vector(values)?, epsilon: self.shard.architecture.norm_epsilon })
    }

    fn matrix(&mut self, role: Role, rows: usize, columns: usize) -> Result<B::Matrix, EngineError> {
        let slice = self.slice(role, rows, columns)?;
        let bytes = self.reader.bytes(slice)?;
        let bytes = match slice.kept_as == slice.element {
            true => bytes,
            false => TensorBytes::Gathered(self.quantised(slice, &bytes)?),
        };
        let data = TensorData { name: &slice.name, element: slice.kept_as, rows, columns, bytes };
        let matrix = self.backend.matrix(&data).map_err(|error| self.with_path(slice, error))?;
        self.memory_bytes += B::matrix_bytes(&matrix);
        self.done(slice)?;
        Ok(matrix)
    }

    fn quantised(&self, slice: &TensorSlice, bytes: &TensorBytes<'_>) -> Result<Vec<u8>, FormatError> {
        let types = (slice.element, slice.kept_as);
        quantise::rows(types, bytes, slice.columns).map_err(|error| {
            let what = match error {
                QuantiseError::Unreadable(error) => return error,
                QuantiseError::NotANumber { row } => format!("row {row} has a value that is not a finite number"),
                QuantiseError::Failed { what } => format!("it cannot be quantised: {what}"),
            };
            self.bad(slice, what)
        })
    }

    fn vector(&mut self, role: Role, length: usize) -> Result<Vec<f32>, EngineError> {
        let slice = self.slice(role, 1, length)?;
        let mut values = vec![0.0; length];
        dequantise_row(slice.element, &self.reader.bytes(slice)?.whole()?, &mut values);
        if values.iter().any(|value| !value.is_finite()) {
            return Err(self.bad(slice, "it has a value that is not a finite number".to_owned()).into());
        }
        self.memory_bytes += (values.len() * 4) as u64;
        self.done(slice)?;
        Ok(values)
    }

    /// Returns the tensor of `role`, if its shape and size match the architecture.
    fn slice(&self, role: Role, rows: usize, columns: usize) -> Result<&'s TensorSlice, EngineError> {
        let source = self.source;
        let Some(slice) = source.tensors.get(&role) else {
            return Err(FormatError::BadTensor {
                path: source.files.first().cloned().unwrap_or_default(),
                tensor: format!("{role:?}"),
                what: "it is missing".to_owned(),
            }
            .into());
        };
        if (slice.rows, slice.columns) != (rows, columns) {
            let what = format!("its shape is {}×{}, not {rows}×{columns}", slice.rows, slice.columns);
            return Err(self.bad(slice, what).into());
        }
        if expected_bytes(slice.element, rows, columns) != Some(slice.length_bytes) {
            let what = format!("{} bytes are not {rows}×{columns} values of {}", slice.length_bytes, slice.element);
            return Err(self.bad(slice, what).into());
        }
        Ok(slice)
    }

    fn with_path(&self, slice: &TensorSlice, error: EngineError) -> EngineError {
        match error {
            EngineError::Format(FormatError::BadTensor { tensor, what, .. }) => {
                FormatError::BadTensor { path: self.reader.path(slice), tensor, what }.into()
            }
            other => other,
        }
    }

    fn bad(&self, slice: &TensorSlice, what: String) -> FormatError {
        FormatError::BadTensor { path: self.reader.path(slice), tensor: slice.name.clone(), what }
    }

    fn done(&mut self, slice: &TensorSlice) -> Result<(), EngineError> {
        self.progress.loaded_bytes += slice.length_bytes;
        match (self.on)(self.progress) {
            ControlFlow::Continue(()) => Ok(()),
            ControlFlow::Break(()) => Err(EngineError::Interrupted),
        }
    }
}

fn expected_bytes(element: ElementType, rows: usize, columns: usize) -> Option<u64> {
    (element.row_bytes(columns)? as u64).checked_mul(rows as u64)
}

#[cfg(test)]
mod tests;
