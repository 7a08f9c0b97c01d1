//! Loads a shard's weights: reads each role, checks it against the architecture, and passes it to the backend.

use super::tensors::Tensors;
use crate::backend::{
    AttentionWeights, Backend, FeedForwardWeights, LinearData, MatrixShape, MixerWeights, Norm, Router,
};
use crate::engine::{LoadProgress, ShardSpec};
use crate::error::EngineError;
use crate::model::{Layer, LayerRole, Part, QueryKeyNorm, Role, TensorSlice, WeightReader, WeightSource};
use std::ops::ControlFlow;

/// The weights of a shard.
pub(super) struct ShardWeights<B: Backend> {
    pub(super) embedding: Option<B::Matrix>,
    pub(super) layers: Vec<LayerWeights<B>>,
    pub(super) output_norm: Option<Norm<B>>,
    pub(super) output: Option<B::Matrix>,
}

pub(super) struct LayerWeights<B: Backend> {
    pub(super) mixer: MixerWeights<B>,
    pub(super) after_mixer: Option<Norm<B>>,
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
    let tensors = Tensors { source, reader: WeightReader::open(source)? };
    let total_bytes = source.shard_bytes(shard.layers.clone(), shard.architecture.layers.len());
    let progress = Progress { loaded: LoadProgress { loaded_bytes: 0, total_bytes }, on };
    let mut loader = Loader { backend, shard, tensors: &tensors, progress, memory_bytes: 0 };
    let weights = loader.shard()?;
    Ok((weights, loader.memory_bytes))
}

struct Loader<'a, B: Backend> {
    backend: &'a mut B,
    shard: &'a ShardSpec,
    tensors: &'a Tensors<'a>,
    progress: Progress<'a>,
    /// The size of the loaded weights in the backend's layout.
    memory_bytes: u64,
}

/// The bytes that were read so far, and the function that is told so.
struct Progress<'a> {
    loaded: LoadProgress,
    on: &'a mut dyn FnMut(LoadProgress) -> ControlFlow<()>,
}

impl Progress<'_> {
    fn add(&mut self, bytes: u64) -> Result<(), EngineError> {
        self.loaded.loaded_bytes += bytes;
        match (self.on)(self.loaded) {
            ControlFlow::Continue(()) => Ok(()),
            ControlFlow::Break(()) => Err(EngineError::Interrupted),
        }
    }
}

/// The roles of a projection's weight and bias, and its shape.
struct Projection {
    weight: Role,
    bias: Option<Role>,
    rows: usize,
    columns: usize,
}

impl<B: Backend> Loader<'_, B> {
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
            if !(self.shard.is_first() && self.tensors.is_tied()) {
                output = Some(self.matrix(Role::Output, vocabulary, hidden)?);
            }
        }
        Ok(ShardWeights { embedding, layers, output_norm, output })
    }

    fn layer(&mut self, index: usize) -> Result<LayerWeights<B>, EngineError> {
        let shard = self.shard;
        let layer = &shard.architecture.layers[index];
        let hidden = shard.architecture.hidden;
        let role = |part| Role::Layer(index as u32, part);
        let mixer = MixerWeights::Attention(self.attention(index, layer)?);
        let feed_forward = self.feed_forward(index, layer)?;
        let mut after = |part| match layer.norms.after() {
            true => self.norm(role(part), hidden).map(Some),
            false => Ok(None),
        };
        Ok(LayerWeights {
            mixer,
            after_mixer: after(LayerRole::PostAttentionNorm)?,
            feed_forward,
            after_feed_forward: after(LayerRole::PostFeedForwardNorm)?,
        })
    }

    fn attention(&mut self, index: usize, layer: &Layer) -> Result<AttentionWeights<B>, EngineError> {
        let spec = &layer.attention;
        let hidden = self.shard.architecture.hidden;
        let (query_width, kv_width) = (spec.query_width(), spec.kv_width());
        let role = |part| Role::Layer(index as u32, part);
        let input = |weight, bias, rows| {
            let bias = spec.input_bias.then(|| role(bias));
            Projection { weight: role(weight), bias, rows, columns: hidden }
        };
        let query_key_value = [
            input(LayerRole::Query, LayerRole::QueryBias, query_width),
            input(LayerRole::Key, LayerRole::KeyBias, kv_width),
            input(LayerRole::Value, LayerRole::ValueBias, kv_width),
        ];
        let output = Projection {
            weight: role(LayerRole::AttentionOutput),
            bias: spec.output_bias.then(|| role(LayerRole::AttentionOutputBias)),
            rows: hidden,
            columns: query_width,
        };
        let (query_norm, key_norm) = match spec.query_key_norm {
            None => (None, None),
            Some(QueryKeyNorm::PerHead) => (Some(spec.head_dim), Some(spec.head_dim)),
            Some(QueryKeyNorm::Projection) => (Some(query_width), Some(kv_width)),
        };
        Ok(AttentionWeights {
            spec: spec.clone(),
            norm: self.norm_if(layer.norms.before().then_some(hidden), role(LayerRole::AttentionNorm))?,
            query_key_value: self.linears(&query_key_value)?,
            query_norm: self.norm_if(query_norm, role(LayerRole::QueryNorm))?,
            key_norm: self.norm_if(key_norm, role(LayerRole::KeyNorm))?,
            sinks: match spec.sinks {
                true => {
                    let sinks = self.vector(role(LayerRole::Sinks), spec.heads)?;
                    Some(self.backend.vector(sinks)?)
                }
                false => None,
            },
            output: self.linears(&[output])?,
        })
    }

    fn feed_forward(&mut self, index: usize, layer: &Layer) -> Result<FeedForwardWeights<B>, EngineError> {
        let spec = &layer.feed_forward;
        let hidden = self.shard.architecture.hidden;
        let role = |part| Role::Layer(index as u32, part);
        let norm = self.norm_if(layer.norms.before().then_some(hidden), role(LayerRole::FeedForwardNorm))?;
        let router = match &spec.experts {
            None => None,
            Some(experts) => {
                let weight = role(LayerRole::Router);
                let bias = experts.router_bias.then(|| role(LayerRole::RouterBias));
                let linear = self.linears(&[Projection { weight, bias, rows: experts.count, columns: hidden }])?;
                Some(Router { spec: experts.clone(), linear })
            }
        };
        let projection = |part: Part, bias: Part, expert: u32| {
            let of = |part| match spec.experts {
                None => role(LayerRole::Gated(part)),
                Some(_) => role(LayerRole::Expert(expert, part)),
            };
            let (rows, columns) = if part == Part::Down { (hidden, spec.width) } else { (spec.width, hidden) };
            Projection { weight: of(part), bias: spec.bias.then(|| of(bias)), rows, columns }
        };
        let experts = 0..spec.experts.as_ref().map_or(1, |experts| experts.count as u32);
        let gate_up: Vec<Projection> = experts
            .clone()
            .flat_map(|expert| {
                [projection(Part::Gate, Part::GateBias, expert), projection(Part::Up, Part::UpBias, expert)]
            })
            .collect();
        let down: Vec<Projection> = experts.map(|expert| projection(Part::Down, Part::DownBias, expert)).collect();
        let (gate_up, down) = (self.linears(&gate_up)?, self.linears(&down)?);
        Ok(FeedForwardWeights { activation: spec.activation, norm, router, gate_up, down })
    }

    /// Loads projections one after the other, so that the bytes of one alone are in memory beside the backend's own.
    fn linears(&mut self, projections: &[Projection]) -> Result<B::Linears, EngineError> {
        let Self { backend, tensors, progress, .. } = self;
        let slices = projections.iter().map(|of| tensors.slice(of.weight, of.rows, of.columns));
        let slices = slices.collect::<Result<Vec<_>, _>>()?;
        let shape =
            |slice: &&TensorSlice| MatrixShape { element: slice.kept_as, rows: slice.rows, columns: slice.columns };
        let shapes: Vec<MatrixShape> = slices.iter().map(shape).collect();
        // The bytes of the part that the backend copies now count when it asks for the next.
        let mut pending_bytes = 0;
        let mut parts = projections.iter().zip(&slices).map(|(of, slice)| {
            if pending_bytes > 0 {
                progress.add(std::mem::take(&mut pending_bytes))?;
            }
            pending_bytes = slice.length_bytes;
            let bias = match of.bias {
                None => None,
                Some(role) => {
                    let (values, bytes) = tensors.vector(role, of.rows)?;
                    pending_bytes += bytes;
                    Some(values)
                }
            };
            Ok(LinearData { weight: tensors.data(slice)?, bias })
        });
        let linears = backend.linears(&shapes, &mut parts);
        drop(parts);
        let linears = linears.map_err(|error| tensors.with_path(&slices, error))?;
        progress.add(pending_bytes)?;
        self.memory_bytes += B::linears_bytes(&linears);
        Ok(linears)
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

    fn vector(&mut self, role: Role, length: usize) -> Result<Vec<f32>, EngineError> {
        let (values, bytes) = self.tensors.vector(role, length)?;
        self.memory_bytes += (values.len() * 4) as u64;
        self.progress.add(bytes)?;
        Ok(values)
    }

    fn matrix(&mut self, role: Role, rows: usize, columns: usize) -> Result<B::Matrix, EngineError> {
        let slice = self.tensors.slice(role, rows, columns)?;
        let data = self.tensors.data(slice)?;
        let matrix = self.backend.matrix(&data).map_err(|error| self.tensors.with_path(&[slice], error))?;
        self.memory_bytes += B::matrix_bytes(&matrix);
        self.progress.add(slice.length_bytes)?;
        Ok(matrix)
    }
}

#[cfg(test)]
mod tests;
