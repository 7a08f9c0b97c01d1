//! The native CPU backend: runs on any CPU, and uses vector instructions where available.
//!
//! ```text
//! rows ─norm, round to 16 or 8 bits─► matmul (packed panels) ─► rotary, cache ─► attention ─► matmul ─► …
//! ```
//! [`arithmetic`] defines every bit of the results. Threads share panels and rows, but never split a sum of floats.

mod activation;
mod attention;
mod buffer_pool;
mod cache;
mod disjoint;
mod experts;
mod factory;
mod kernels;
mod limits;
mod lines;
mod matmul;
mod pack;
mod packed;
mod rotary;
mod scratch;
#[cfg(test)]
pub(crate) mod test_weights;
mod thread_pool;

pub use crate::simd::Tier;
pub use cache::KvCache;
pub use factory::CpuFactory;
pub use limits::Limits;
pub use packed::Packed;

use crate::arithmetic::{self, functions};
use crate::backend::{
    AttentionWeights, Backend, Batch, FeedForwardWeights, LayerState, Linear, LinearData, MatrixShape, MixerWeights,
    Norm, TensorData,
};
use crate::engine::{ActivationBits, DeviceRates, KvElement, TopLogits, TopQuery};
use crate::error::{DeviceFault, EngineError};
use crate::format::FormatError;
use crate::logits;
use crate::model::{QueryKeyNorm, Rope};
use crate::profile::{Part, Profile};
use activation::Rows;
use buffer_pool::BufferPool;
use kernels::{Operand, RmsNorm};
use matmul::Product;
use pack::{PackError, Source};
use rotary::Rotations;
use std::ops::Range;
use std::time::Instant;
use thread_pool::{Panicked, ThreadPool};

/// The kernel tier of this CPU, and the threads that run the kernels.
#[derive(Debug)]
pub struct CpuBackend {
    tier: Tier,
    pool: ThreadPool,
    buffers: BufferPool,
    attention: attention::Workspace,
    bits: ActivationBits,
    profile: Profile,
}

/// The rows of a step, with their rotations.
#[derive(Debug)]
pub struct CpuBatch {
    batch: Batch,
    /// One table for each rope of the model.
    rotations: Vec<Rotations>,
}

/// Returns a norm in the kernels' form.
fn rms_norm(norm: &Norm<CpuBackend>) -> RmsNorm<'_> {
    RmsNorm { weight: &norm.weight, epsilon: norm.epsilon }
}

/// Describes the product of the operand's `rows` with `linear`.
fn product<'a>(linear: &'a Linear<CpuBackend>, rows: Range<usize>, out: &'a mut [f32]) -> Product<'a> {
    Product::new(&linear.weight, linear.bias.as_deref(), rows, out)
}

impl From<Panicked> for EngineError {
    fn from(panic: Panicked) -> Self {
        Self::Panicked { what: panic.to_string() }
    }
}

impl CpuBackend {
    /// Creates a backend at `tier` with `threads` threads, the caller's included.
    ///
    /// # Errors
    /// [`EngineError::Device`] if the operating system starts no threads, or the CPU does not support the tier.
    pub fn new(threads: usize, tier: Tier) -> Result<Self, EngineError> {
        if !Tier::available().contains(&tier) {
            return Err(EngineError::Device {
                device: "cpu".to_owned(),
                fault: DeviceFault::System,
                what: format!("this CPU does not support {}", tier.name()),
            });
        }
        let pool = ThreadPool::new(threads).map_err(|e| EngineError::Device {
            device: "cpu".to_owned(),
            fault: DeviceFault::System,
            what: format!("cannot start {threads} threads: {e}"),
        })?;
        let bits = ActivationBits::default();
        let (buffers, attention) = (BufferPool::default(), attention::Workspace::default());
        Ok(Self { tier, pool, buffers, attention, bits, profile: Profile::default() })
    }

    /// Measures the limits of this backend's threads. It takes about a second.
    ///
    /// # Errors
    /// [`EngineError::Panicked`] if a thread panicked.
    pub fn limits(&mut self) -> Result<Limits, EngineError> {
        Ok(limits::measure(self.tier, &mut self.pool)?)
    }

    /// Returns the products of `operand` with each of `linears`.
    fn project<const N: usize>(
        &mut self,
        part: Part,
        operand: Operand<'_>,
        linears: &[Linear<Self>],
    ) -> Result<[Rows; N], EngineError> {
        let linears: &[Linear<Self>; N] = linears
            .try_into()
            .map_err(|_| EngineError::BadStep { what: format!("{} projections in place of {N}", linears.len()) })?;
        let rows = operand.rows().count();
        let mut outs = linears.each_ref().map(|linear| self.buffers.rows(rows, linear.weight.rows));
        let mut number = 0;
        let mut products = outs.each_mut().map(|out| {
            let product = product(&linears[number], 0..rows, &mut out.values);
            number += 1;
            product
        });
        self.multiply(part, operand, &mut products)?;
        Ok(outs)
    }

    /// Computes `products`, which share the operand.
    fn multiply(&mut self, part: Part, operand: Operand<'_>, products: &mut [Product<'_>]) -> Result<(), EngineError> {
        let Self { tier, pool, buffers, bits, profile, .. } = self;
        let wanted = matmul::wanted(*tier, *bits, products);
        let started = Instant::now();
        let codes = kernels::encode(*tier, pool, buffers, operand, *bits, wanted)?;
        profile.add(if let Operand::Gated { .. } = operand { Part::Activation } else { Part::Encoding }, started);
        let started = Instant::now();
        matmul::run(*tier, pool, &codes, products)?;
        profile.add(part, started);
        for Product { weights, rows, .. } in products.iter() {
            let operations = 2 * (rows.len() * weights.rows * weights.columns) as u64;
            profile.add_work(part, operations, weights.memory_bytes());
        }
        buffers.keep_coded(codes);
        Ok(())
    }

    /// Computes an attention half-layer.
    fn attend(
        &mut self,
        weights: &AttentionWeights<Self>,
        cache: &mut KvCache,
        layer: usize,
        batch: &CpuBatch,
        hidden: &Rows,
    ) -> Result<Rows, EngineError> {
        let spec = &weights.spec;
        let operand = Operand::new(hidden, weights.norm.as_ref().map(rms_norm));
        let [mut queries, mut keys, values] = self.project(Part::QueryKeyValue, operand, &weights.query_key_value)?;
        let started = Instant::now();
        let per_head = spec.query_key_norm == Some(QueryKeyNorm::PerHead);
        let rotations = &batch.rotations[spec.rope];
        for (rows, norm) in [(&mut queries, &weights.query_norm), (&mut keys, &weights.key_norm)] {
            let norm_width = if per_head { spec.head_dim } else { rows.width };
            let turn =
                kernels::Turn { norm: norm.as_ref().map(rms_norm), norm_width, head_dim: spec.head_dim, rotations };
            kernels::turn_heads(self.tier, &mut self.pool, &turn, rows)?;
        }
        let cache = &mut cache.layers[layer];
        kernels::write_cache(self.tier, cache, &batch.batch, &keys, &values);
        self.profile.add(Part::Rotation, started);
        let started = Instant::now();
        let mut mixed = self.buffers.rows(batch.batch.rows, spec.query_width());
        let sinks = weights.sinks.as_deref();
        let heads = attention::Heads { spec, sinks, cache, spans: &batch.batch.spans };
        self.attention.run(self.tier, &mut self.pool, &heads, &queries, &mut mixed)?;
        self.profile.add(Part::Attention, started);
        let [out] = self.project(Part::AttentionOutput, Operand::Rows(&mixed), &weights.output)?;
        [queries, keys, values, mixed].into_iter().for_each(|rows| self.buffers.keep(rows));
        Ok(out)
    }

    /// Copies `rows` of `hidden`.
    fn chosen(&mut self, hidden: &Rows, rows: &[usize]) -> Rows {
        let mut chosen = self.buffers.rows(rows.len(), hidden.width);
        for (chosen, &row) in chosen.values.chunks_mut(hidden.width).zip(rows) {
            chosen.copy_from_slice(hidden.row(row));
        }
        chosen
    }
}

impl Backend for CpuBackend {
    type Matrix = Packed;
    type Linears = Vec<Linear<Self>>;
    type Vector = Vec<f32>;
    type Buffer = Rows;
    type Logits = Rows;
    type Cache = KvCache;
    type Batch = CpuBatch;

    fn take_profile(&mut self) -> Profile {
        std::mem::take(&mut self.profile)
    }

    fn measure(&mut self) -> Result<DeviceRates, EngineError> {
        let Limits { read_bytes_per_s, byte_operations_per_s } = self.limits()?;
        // An operation is half a product of bytes, and a weight times a 16-bit activation takes two products.
        let multiplications_per_s = Some(byte_operations_per_s / 4.0);
        Ok(DeviceRates { read_bytes_per_s: Some(read_bytes_per_s), multiplications_per_s })
    }

    fn set_activations(&mut self, bits: ActivationBits) -> Result<(), EngineError> {
        self.bits = bits;
        Ok(())
    }

    fn fingerprint(&self) -> String {
        arithmetic::fingerprint(self.bits)
    }

    fn matrix(&mut self, tensor: &TensorData<'_>) -> Result<Packed, EngineError> {
        let source =
            Source { element: tensor.element, rows: tensor.rows, columns: tensor.columns, bytes: &tensor.bytes };
        Packed::pack(self.tier, &mut self.pool, &source).map_err(|error| match error {
            PackError::NotANumber { row } => EngineError::Format(FormatError::not_a_number(tensor.name, row)),
            PackError::Unreadable(error) => EngineError::Format(error),
            PackError::OutOfMemory { bytes } => EngineError::OutOfMemory {
                what: format!("the matrix {}", tensor.name),
                needed_bytes: bytes,
                free_bytes: 0,
            },
            PackError::Panicked => Panicked.into(),
        })
    }

    fn matrix_bytes(matrix: &Packed) -> u64 {
        matrix.memory_bytes()
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
        self.buffers.memory_bytes()
    }

    fn vector(&mut self, values: Vec<f32>) -> Result<Vec<f32>, EngineError> {
        Ok(values)
    }

    fn cache(&mut self, layers: &[LayerState<'_>], element: KvElement, pages: u32) -> Result<KvCache, EngineError> {
        let layers: Vec<_> = layers.iter().map(|&LayerState::KeysAndValues(spec)| spec).collect();
        KvCache::new(&layers, element, pages).ok_or_else(|| EngineError::OutOfMemory {
            what: format!("a cache of {pages} pages"),
            needed_bytes: KvCache::bytes(&layers, element, pages),
            free_bytes: 0,
        })
    }

    fn copy_pages(&mut self, cache: &mut KvCache, copies: &[(u32, u32)]) -> Result<(), EngineError> {
        for layer in &mut cache.layers {
            for &(from, to) in copies {
                layer.copy_page(from, to);
            }
        }
        Ok(())
    }

    fn begin(&mut self, batch: Batch, ropes: &[Rope]) -> Result<CpuBatch, EngineError> {
        let rotations = ropes.iter().map(|rope| Rotations::new(rope, &batch)).collect();
        Ok(CpuBatch { batch, rotations })
    }

    fn embed(&mut self, table: &Packed, tokens: &[u32], scale: f32) -> Result<Rows, EngineError> {
        let started = Instant::now();
        let mut rows = self.buffers.rows(tokens.len(), table.columns);
        for (&token, row) in tokens.iter().zip(rows.values.chunks_mut(table.columns)) {
            table.read_row(token as usize, row);
            row.iter_mut().for_each(|value| *value *= scale);
        }
        self.profile.add(Part::Embedding, started);
        Ok(rows)
    }

    fn upload(&mut self, values: Vec<f32>, width: usize) -> Result<Rows, EngineError> {
        Ok(Rows { width, values })
    }

    fn download(&mut self, buffer: Rows) -> Result<Vec<f32>, EngineError> {
        // Copied, since a buffer of the pool may have far more memory than these rows.
        let values = buffer.values.clone();
        self.buffers.keep(buffer);
        Ok(values)
    }

    fn mix(
        &mut self,
        weights: &MixerWeights<Self>,
        cache: &mut KvCache,
        layer: usize,
        batch: &CpuBatch,
        hidden: &Rows,
    ) -> Result<Rows, EngineError> {
        let MixerWeights::Attention(weights) = weights;
        self.attend(weights, cache, layer, batch, hidden)
    }

    fn feed_forward(&mut self, weights: &FeedForwardWeights<Self>, hidden: &Rows) -> Result<Rows, EngineError> {
        if let Some(router) = &weights.router {
            return self.mixture(router, weights, hidden);
        }
        let operand = Operand::new(hidden, weights.norm.as_ref().map(rms_norm));
        let [gate, up] = self.project(Part::GateUp, operand, &weights.gate_up)?;
        let inner = Operand::Gated { activation: weights.activation, gate: &gate, up: &up };
        let [out] = self.project(Part::Down, inner, &weights.down)?;
        [gate, up].into_iter().for_each(|rows| self.buffers.keep(rows));
        Ok(out)
    }

    fn add(&mut self, hidden: &mut Rows, delta: Rows, norm: Option<&Norm<Self>>) -> Result<(), EngineError> {
        let started = Instant::now();
        kernels::add(self.tier, &mut self.pool, hidden, &delta, norm.map(rms_norm))?;
        self.profile.add(Part::Residual, started);
        self.buffers.keep(delta);
        Ok(())
    }

    fn final_rows(&mut self, norm: &Norm<Self>, hidden: &Rows, rows: &[usize]) -> Result<Vec<f32>, EngineError> {
        let chosen = self.chosen(hidden, rows);
        let Self { tier, pool, buffers, .. } = self;
        let normed = kernels::norm(*tier, pool, buffers, &chosen, Some(rms_norm(norm)))?;
        self.buffers.keep(chosen);
        Ok(normed.map(|rows| rows.values).unwrap_or_default())
    }

    fn logits(
        &mut self,
        norm: &Norm<Self>,
        head: &Packed,
        hidden: Rows,
        rows: &[usize],
        cap: Option<f32>,
    ) -> Result<Rows, EngineError> {
        let chosen = self.chosen(&hidden, rows);
        let mut out = Rows::zeroed(rows.len(), head.rows);
        self.multiply(
            Part::Head,
            Operand::Normed(&chosen, rms_norm(norm)),
            &mut [Product::new(head, None, 0..rows.len(), &mut out.values)],
        )?;
        [chosen, hidden].into_iter().for_each(|rows| self.buffers.keep(rows));
        if let Some(cap) = cap {
            out.values.iter_mut().for_each(|logit| *logit = functions::softcap(*logit, cap));
        }
        Ok(out)
    }

    fn top_logits(&mut self, logits: &Rows, queries: &[(usize, &TopQuery)]) -> Result<Vec<TopLogits>, EngineError> {
        Ok(queries.iter().map(|&(row, query)| logits::top(logits.row(row), query)).collect())
    }

    fn logit_rows(&mut self, logits: &Rows, rows: &[usize]) -> Result<Vec<f32>, EngineError> {
        Ok(rows.iter().flat_map(|&row| logits.row(row)).copied().collect())
    }

    fn finish(&mut self) -> Result<(), EngineError> {
        Ok(())
    }
}
