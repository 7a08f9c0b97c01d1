//! The arithmetic as a backend: one row at a time, one output at a time. It is slow, and made to be read; tests compare
//! other backends with it, to the bit.

use crate::arithmetic::functions::{clamped_swish, gelu_tanh, silu};
use crate::arithmetic::norms::rms_norm;
use crate::arithmetic::weights::{self, WeightRow};
use crate::arithmetic::{self, SUPERBLOCK, activations, attention, cache, products, rotary};
use crate::backend::{
    AttentionWeights, Backend, Batch, FeedForwardKind, FeedForwardWeights, Gated, Linear, Mixture, Norm, TensorData,
};
use crate::decoder::DecoderEngine;
use crate::engine::{
    ActivationBits, DeviceId, DeviceKind, DeviceReport, Engine, EngineFactory, KvElement, PAGE_TOKENS,
};
use crate::error::EngineError;
use crate::expert_routing;
use crate::format::FormatError;
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
        vec![DeviceReport {
            id: DeviceId(Self::DEVICE.to_owned()),
            kind: DeviceKind::Cpu,
            engine: self.name().to_owned(),
            name: std::env::consts::ARCH.to_owned(),
            compute_units: Some(1),
            tier: "plain".to_owned(),
        }]
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

fn gated(bits: ActivationBits, activation: Activation, gated: &Gated<ReferenceBackend>, row: &[f32]) -> Vec<f32> {
    let gate = linear(bits, &gated.gate, row);
    let up = linear(bits, &gated.up, row);
    let inner: Vec<f32> = gate.into_iter().zip(up).map(|(gate, up)| activate(activation, gate, up)).collect();
    linear(bits, &gated.down, &inner)
}

fn activate(activation: Activation, gate: f32, up: f32) -> f32 {
    match activation {
        Activation::Silu => silu(gate) * up,
        Activation::GeluTanh => gelu_tanh(gate) * up,
        Activation::ClampedSwish { slope, limit } => clamped_swish(gate, up, slope, limit),
    }
}

/// Each output is one fused chain over the row's experts, in the order of its choices.
fn mixture(bits: ActivationBits, activation: Activation, mixture: &Mixture<ReferenceBackend>, row: &[f32]) -> Vec<f32> {
    let logits = linear(bits, &mixture.router, row);
    let mut out = vec![0.0_f32; row.len()];
    for choice in expert_routing::route(&mixture.spec, &logits) {
        let part = gated(bits, activation, &mixture.experts[choice.expert], row);
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
    type Vector = Vec<f32>;
    type Buffer = Rows;
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

    fn vector(&mut self, values: Vec<f32>) -> Result<Vec<f32>, EngineError> {
        Ok(values)
    }

    fn cache(&mut self, layers: &[Attention], element: KvElement, pages: u32) -> Result<Cache, EngineError> {
        let tokens = pages as usize * PAGE_TOKENS as usize;
        let layers = layers.iter().map(|spec| CachedLayer {
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

    fn attention(
        &mut self,
        weights: &AttentionWeights<Self>,
        cache: &mut Cache,
        layer: usize,
        batch: &TurnedBatch,
        hidden: &Rows,
    ) -> Result<Rows, EngineError> {
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
                    turned(spec, weights.query_norm.as_ref(), rotation, linear(self.bits, &weights.query, &input));
                let key = turned(spec, weights.key_norm.as_ref(), rotation, linear(self.bits, &weights.key, &input));
                let value = linear(self.bits, &weights.value, &input);
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
                out.push(linear(self.bits, &weights.output, &mixed));
            }
        }
        Ok(out)
    }

    fn feed_forward(&mut self, weights: &FeedForwardWeights<Self>, hidden: &Rows) -> Result<Rows, EngineError> {
        let row = |row: &Vec<f32>| {
            let input = normed(weights.norm.as_ref(), row);
            match &weights.kind {
                FeedForwardKind::Dense(dense) => gated(self.bits, weights.activation, dense, &input),
                FeedForwardKind::Mixture(experts) => mixture(self.bits, weights.activation, experts, &input),
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

    fn logits(
        &mut self,
        norm: &Norm<Self>,
        head: &Matrix,
        hidden: Rows,
        rows: &[usize],
    ) -> Result<Vec<f32>, EngineError> {
        let mut out = Vec::with_capacity(rows.len() * head.rows.len());
        for &row in rows {
            let input = activations::encode(self.bits, &normed(Some(norm), &hidden[row]));
            out.extend(head.rows.iter().map(|weights| products::dot(weights, &input)));
        }
        Ok(out)
    }
}
