//! The arithmetic as a backend: one row at a time, one output at a time. It is slow, and made to be read; tests compare
//! other backends with it, to the bit.

use crate::arithmetic::functions::{clamped_swish, gelu_tanh, silu, softcap};
use crate::arithmetic::norms::rms_norm;
use crate::arithmetic::weights::{self, WeightRow};
use crate::arithmetic::{self, SUPERBLOCK, activations, attention, cache, products, rotary};
use crate::backend::{
    Backend, Batch, FeedForwardWeights, LayerState, Linear, LinearData, MatrixShape, MixerWeights, Norm, Router,
    TensorData,
};
use crate::decoder::DecoderEngine;
use crate::engine::{
    ActivationBits, DeviceId, DeviceReport, Engine, EngineFactory, KvElement, PAGE_TOKENS, TopLogits, TopQuery,
};
use crate::error::EngineError;
use crate::expert_routing;
use crate::format::FormatError;
use crate::logits;
use crate::model::{Activation, Attention, Pairing, QueryKeyNorm, Rope};
use half::f16;

/// Rows of floats: \[row]\[width].
pub type Rows = Vec<Vec<f32>>;

/// A weight matrix: one [`WeightRow`] for each output.
#[derive(Debug)]
pub struct Matrix {
    rows: Vec<WeightRow>,
}

/// Keys and values of every layer, by page, slot and head: \[layer]\[page · 32 + slot]\[head · dimension].
#[derive(Debug)]
pub struct Cache {
    element: KvElement,
    layers: Vec<CachedLayer>,
}

#[derive(Debug)]
struct CachedLayer {
    keys: Rows,
    values: Rows,
}

/// A batch, and the rotation of each of its rows by each of the model's ropes: \[rope]\[row].
#[derive(Debug)]
pub struct TurnedBatch {
    batch: Batch,
    rotations: Vec<Vec<Rotation>>,
}

#[derive(Debug)]
struct Rotation {
    pairing: Pairing,
    cosines: Vec<f32>,
    sines: Vec<f32>,
}

/// The reference backend.
#[derive(Debug, Default)]
pub struct ReferenceBackend {
    bits: ActivationBits,
}

/// Makes engines of the reference backend.
#[derive(Debug, Clone, Copy, Default)]
pub struct ReferenceFactory;

impl ReferenceFactory {
    /// The id of this factory's only device.
    pub const DEVICE: &'static str = "reference";
}

impl EngineFactory for ReferenceFactory {
    fn name(&self) -> &'static str {
        "reference"
    }

    fn probe(&self) -> Vec<DeviceReport> {
        vec![DeviceReport::of_cpu(Self::DEVICE, self.name(), "plain")]
    }

    fn open(&self, device: &DeviceId) -> Result<Box<dyn Engine>, EngineError> {
        if device.0 != Self::DEVICE {
            return Err(EngineError::NoDevice { engine: self.name().to_owned(), device: device.0.clone() });
        }
        Ok(Box::new(DecoderEngine::new(ReferenceBackend::default())))
    }
}

fn normed(norm: Option<&Norm<ReferenceBackend>>, row: &[f32]) -> Vec<f32> {
    let mut out = row.to_vec();
    if let Some(norm) = norm {
        rms_norm(row, &norm.weight, norm.epsilon, &mut out);
    }
    out
}

fn linear(bits: ActivationBits, linear: &Linear<ReferenceBackend>, row: &[f32]) -> Vec<f32> {
    let input = activations::encode(bits, row);
    let mut out: Vec<f32> = linear.weight.rows.iter().map(|weights| products::dot(weights, &input)).collect();
    if let Some(bias) = &linear.bias {
        out.iter_mut().zip(bias).for_each(|(out, bias)| *out += bias);
    }
    out
}

/// down(activation(gate x, up x)) of one expert.
fn gated(bits: ActivationBits, weights: &FeedForwardWeights<ReferenceBackend>, expert: usize, row: &[f32]) -> Vec<f32> {
    let gate = linear(bits, &weights.gate_up[2 * expert], row);
    let up = linear(bits, &weights.gate_up[2 * expert + 1], row);
    let inner: Vec<f32> = gate.into_iter().zip(up).map(|(gate, up)| activate(weights.activation, gate, up)).collect();
    linear(bits, &weights.down[expert], &inner)
}

fn activate(activation: Activation, gate: f32, up: f32) -> f32 {
    match activation {
        Activation::Silu => silu(gate) * up,
        Activation::GeluTanh => gelu_tanh(gate) * up,
        Activation::ClampedSwish { slope, limit } => clamped_swish(gate, up, slope, limit),
    }
}

/// Each output is one fused chain over the row's experts, in the order of its choices.
fn mixture(
    bits: ActivationBits,
    router: &Router<ReferenceBackend>,
    weights: &FeedForwardWeights<ReferenceBackend>,
    row: &[f32],
) -> Vec<f32> {
    let logits = linear(bits, &router.linear[0], row);
    let mut out = vec![0.0_f32; row.len()];
    for choice in expert_routing::route(&router.spec, &logits) {
        let part = gated(bits, weights, choice.expert, row);
        out.iter_mut().zip(&part).for_each(|(out, part)| *out = choice.weight.mul_add(*part, *out));
    }
    out
}

/// Norms (if the model does) and rotates the heads of a row of queries or keys.
fn turned(spec: &Attention, norm: Option<&Norm<ReferenceBackend>>, rotation: &Rotation, mut row: Vec<f32>) -> Vec<f32> {
    let width = if spec.query_key_norm == Some(QueryKeyNorm::PerHead) { spec.head_dim } else { row.len() };
    row = row.chunks(width).flat_map(|part| normed(norm, part)).collect();
    let Rotation { pairing, cosines, sines } = rotation;
    row.chunks_mut(spec.head_dim).for_each(|head| rotary::turn(*pairing, cosines, sines, head));
    row
}

impl Cache {
    fn rounded(&self, head_dim: usize, values: Vec<f32>) -> Vec<f32> {
        match self.element {
            KvElement::F16 => values.into_iter().map(|value| f16::from_f32(value).to_f32()).collect(),
            KvElement::F32 => values,
            KvElement::Q8_0 => {
                let mut values = values;
                values.chunks_mut(head_dim).for_each(cache::rounded);
                values
            }
        }
    }
}

fn unreadable(tensor: &TensorData<'_>, row: usize) -> EngineError {
    EngineError::Format(FormatError::not_a_number(tensor.name, row))
}

impl Backend for ReferenceBackend {
    type Matrix = Matrix;
    type Linears = Vec<Linear<Self>>;
    type Vector = Vec<f32>;
    type Buffer = Rows;
    type Logits = Rows;
    type Cache = Cache;
    type Batch = TurnedBatch;

    fn set_activations(&mut self, bits: ActivationBits) -> Result<(), EngineError> {
        self.bits = bits;
        Ok(())
    }

    fn fingerprint(&self) -> String {
        arithmetic::fingerprint(self.bits)
    }

    fn matrix(&mut self, tensor: &TensorData<'_>) -> Result<Matrix, EngineError> {
        let row_bytes = tensor.bytes.length() / tensor.rows.max(1);
        let mut buffer = Vec::new();
        let mut rows = Vec::with_capacity(tensor.rows);
        for index in 0..tensor.rows {
            let bytes = tensor.bytes.part(index * row_bytes..(index + 1) * row_bytes, &mut buffer)?;
            let row = weights::row(tensor.element, bytes, tensor.columns);
            if row.units.iter().any(|unit| !unit.is_finite()) {
                return Err(unreadable(tensor, index));
            }
            rows.push(row);
        }
        Ok(Matrix { rows })
    }

    fn matrix_bytes(matrix: &Matrix) -> u64 {
        matrix.rows.iter().map(|row| (row.codes.len() * 2 + row.units.len() * 4) as u64).sum()
    }

    fn linears(
        &mut self,
        _: &[MatrixShape],
        parts: &mut dyn Iterator<Item = Result<LinearData<'_>, EngineError>>,
    ) -> Result<Vec<Linear<Self>>, EngineError> {
        Linear::each(self, parts)
    }

    fn linears_bytes(linears: &Vec<Linear<Self>>) -> u64 {
        Linear::bytes_of(linears)
    }

    fn memory_bytes(&self) -> u64 {
        0
    }

    fn vector(&mut self, values: Vec<f32>) -> Result<Vec<f32>, EngineError> {
        Ok(values)
    }

    fn cache(&mut self, layers: &[LayerState<'_>], element: KvElement, pages: u32) -> Result<Cache, EngineError> {
        let tokens = pages as usize * PAGE_TOKENS as usize;
        let layers = layers.iter().map(|&LayerState::KeysAndValues(spec)| CachedLayer {
            keys: vec![vec![0.0; spec.kv_width()]; tokens],
            values: vec![vec![0.0; spec.kv_width()]; tokens],
        });
        Ok(Cache { element, layers: layers.collect() })
    }

    fn copy_pages(&mut self, cache: &mut Cache, copies: &[(u32, u32)]) -> Result<(), EngineError> {
        for layer in &mut cache.layers {
            for &(from, to) in copies {
                for slot in 0..PAGE_TOKENS {
                    let (from, to) = ((from * PAGE_TOKENS + slot) as usize, (to * PAGE_TOKENS + slot) as usize);
                    layer.keys[to] = layer.keys[from].clone();
                    layer.values[to] = layer.values[from].clone();
                }
            }
        }
        Ok(())
    }

    fn begin(&mut self, batch: Batch, ropes: &[Rope]) -> Result<TurnedBatch, EngineError> {
        let positions: Vec<usize> =
            batch.spans.iter().flat_map(|span| span.first_position..span.first_position + span.rows.len()).collect();
        let rotations = ropes.iter().map(|rope| {
            let rotation = |&position: &usize| {
                let (cosines, sines) = rotary::table(rope, position).unzip();
                Rotation { pairing: rope.pairing, cosines, sines }
            };
            positions.iter().map(rotation).collect()
        });
        let rotations = rotations.collect();
        Ok(TurnedBatch { batch, rotations })
    }

    fn embed(&mut self, table: &Matrix, tokens: &[u32], scale: f32) -> Result<Rows, EngineError> {
        let value = |row: &WeightRow, column: usize| f32::from(row.codes[column]) * row.units[column / SUPERBLOCK];
        let embedding = |&token: &u32| {
            let row = &table.rows[token as usize];
            (0..row.codes.len()).map(|column| value(row, column) * scale).collect()
        };
        Ok(tokens.iter().map(embedding).collect())
    }

    fn upload(&mut self, values: Vec<f32>, width: usize) -> Result<Rows, EngineError> {
        Ok(values.chunks(width).map(<[f32]>::to_vec).collect())
    }

    fn download(&mut self, buffer: Rows) -> Result<Vec<f32>, EngineError> {
        Ok(buffer.concat())
    }

    fn mix(
        &mut self,
        weights: &MixerWeights<Self>,
        cache: &mut Cache,
        layer: usize,
        batch: &TurnedBatch,
        hidden: &Rows,
    ) -> Result<Rows, EngineError> {
        let MixerWeights::Attention(weights) = weights;
        let [query_weights, key_weights, value_weights] = weights.query_key_value.as_slice() else {
            return Err(EngineError::BadStep { what: "attention without its three projections".to_owned() });
        };
        let spec = &weights.spec;
        let mut out = Vec::with_capacity(hidden.len());
        for span in &batch.batch.spans {
            let slot = |position: usize| {
                let page = span.pages[position / PAGE_TOKENS as usize];
                page as usize * PAGE_TOKENS as usize + position % PAGE_TOKENS as usize
            };
            for (row, position) in span.rows.clone().zip(span.first_position..) {
                let input = normed(weights.norm.as_ref(), &hidden[row]);
                let rotation = &batch.rotations[spec.rope][row];
                let query =
                    turned(spec, weights.query_norm.as_ref(), rotation, linear(self.bits, query_weights, &input));
                let key = turned(spec, weights.key_norm.as_ref(), rotation, linear(self.bits, key_weights, &input));
                let value = linear(self.bits, value_weights, &input);
                let (key, value) = (cache.rounded(spec.head_dim, key), cache.rounded(spec.head_dim, value));
                let cached = &mut cache.layers[layer];
                cached.keys[slot(position)] = key;
                cached.values[slot(position)] = value;
                let visible = (position + 1).saturating_sub(spec.window.unwrap_or(usize::MAX))..position + 1;
                let mut mixed = Vec::with_capacity(spec.query_width());
                for (head, query) in query.chunks(spec.head_dim).enumerate() {
                    let start = head / spec.group() * spec.head_dim;
                    let sink = weights.sinks.as_ref().map(|sinks| sinks[head]);
                    mixed.extend(attention::attend(
                        spec,
                        sink,
                        query,
                        visible.clone(),
                        |position| &cached.keys[slot(position)][start..start + spec.head_dim],
                        |position| &cached.values[slot(position)][start..start + spec.head_dim],
                    ));
                }
                out.push(linear(self.bits, &weights.output[0], &mixed));
            }
        }
        Ok(out)
    }

    fn feed_forward(&mut self, weights: &FeedForwardWeights<Self>, hidden: &Rows) -> Result<Rows, EngineError> {
        let row = |row: &Vec<f32>| {
            let input = normed(weights.norm.as_ref(), row);
            match &weights.router {
                None => gated(self.bits, weights, 0, &input),
                Some(router) => mixture(self.bits, router, weights, &input),
            }
        };
        Ok(hidden.iter().map(row).collect())
    }

    fn add(&mut self, hidden: &mut Rows, delta: Rows, norm: Option<&Norm<Self>>) -> Result<(), EngineError> {
        for (row, delta) in hidden.iter_mut().zip(delta) {
            row.iter_mut().zip(normed(norm, &delta)).for_each(|(value, delta)| *value += delta);
        }
        Ok(())
    }

    fn final_rows(&mut self, norm: &Norm<Self>, hidden: &Rows, rows: &[usize]) -> Result<Vec<f32>, EngineError> {
        Ok(rows.iter().flat_map(|&row| normed(Some(norm), &hidden[row])).collect())
    }

    fn logits(
        &mut self,
        norm: &Norm<Self>,
        head: &Matrix,
        hidden: Rows,
        rows: &[usize],
        cap: Option<f32>,
    ) -> Result<Rows, EngineError> {
        let logits = |&row: &usize| {
            let input = activations::encode(self.bits, &normed(Some(norm), &hidden[row]));
            let logits = head.rows.iter().map(|weights| products::dot(weights, &input));
            logits.map(|logit| cap.map_or(logit, |cap| softcap(logit, cap))).collect()
        };
        Ok(rows.iter().map(logits).collect())
    }

    fn top_logits(&mut self, logits: &Rows, queries: &[(usize, &TopQuery)]) -> Result<Vec<TopLogits>, EngineError> {
        Ok(queries.iter().map(|&(row, query)| logits::top(&logits[row], query)).collect())
    }

    fn logit_rows(&mut self, logits: &Rows, rows: &[usize]) -> Result<Vec<f32>, EngineError> {
        Ok(rows.iter().flat_map(|&row| &logits[row]).copied().collect())
    }

    fn finish(&mut self) -> Result<(), EngineError> {
        Ok(())
    }
}
