//! The backend: each operation of a decoder as queued kernels.

use super::attention::DeviceBatch;
use super::cache::Cache;
use super::limits;
use super::products::{Chosen, ExpertInput};
use super::programs::KernelSet;
use super::queue::Arg;
use super::rows::{OpenClBackend, Rows};
use super::weights::Matrices;
use crate::arithmetic;
use crate::backend::{
    Backend, Batch, FeedForwardWeights, LayerState, LinearData, MatrixShape, MixerWeights, Norm, Router, TensorData,
};
use crate::engine::{ActivationBits, DeviceRates, KvElement, TopLogits, TopQuery};
use crate::error::EngineError;
use crate::logits;
use crate::model::{Rope, Weighting};
use opencl3::memory::Buffer;

impl OpenClBackend {
    /// Compiles the products of matrices, so that no step waits for that.
    fn prepare(&mut self, matrices: &Matrices) -> Result<(), EngineError> {
        // A layer has three projections of one input at most; more are experts, whose rows are computed one by one.
        let are_experts = matrices.placed().len() > 3;
        let counts = if are_experts { &[1][..] } else { self.tier.row_counts() };
        for placed in matrices.placed() {
            for &rows in counts {
                let (set, _) = self.kernels(placed, rows);
                self.queue.prepare(set)?;
            }
        }
        Ok(())
    }

    /// The experts of each row.
    fn route(&mut self, router: &Router<Self>, logits: &Rows) -> Result<Chosen, EngineError> {
        let used = router.spec.used.min(logits.width);
        let four_bytes = |count: usize| count * size_of::<f32>();
        let order = self.pool.take(&self.queue, four_bytes(logits.values()))?;
        let experts = self.pool.take(&self.queue, four_bytes(logits.count * used))?;
        let weights = self.pool.take(&self.queue, four_bytes(logits.count * used))?;
        let arguments = [
            logits.arg(),
            Arg::int(logits.width),
            Arg::int(used),
            Arg::flag(router.spec.weighting == Weighting::AmongAll),
            Arg::int(logits.count),
            order.arg(),
            experts.arg(),
            weights.arg(),
        ];
        self.each(KernelSet::Rows, "route", logits.count, &arguments)?;
        Ok(Chosen { experts, weights, used })
    }

    /// The feed-forward of each row's experts.
    fn mixture(
        &mut self,
        router: &Router<Self>,
        weights: &FeedForwardWeights<Self>,
        input: &Rows,
    ) -> Result<Rows, EngineError> {
        let codes = self.encode(input)?;
        let logits = self.product(&router.linear, 0, &codes)?;
        let chosen = self.route(router, &logits)?;
        let gate = self.expert_product(&weights.gate_up, (0, 2), &codes, (&chosen, ExpertInput::Shared))?;
        let up = self.expert_product(&weights.gate_up, (1, 2), &codes, (&chosen, ExpertInput::Shared))?;
        self.gated(weights.activation, &gate, &up)?;
        let codes = self.encode(&gate)?;
        let parts = self.expert_product(&weights.down, (0, 1), &codes, (&chosen, ExpertInput::Own))?;
        let out = self.allocate_rows(input.count, parts.width)?;
        let arguments = [
            parts.arg(),
            chosen.weights.arg(),
            Arg::int(chosen.used),
            Arg::int(out.width),
            Arg::int(out.values()),
            out.arg(),
        ];
        self.each(KernelSet::Rows, "combine", out.values(), &arguments)?;
        Ok(out)
    }
}

impl Backend for OpenClBackend {
    type Matrix = Matrices;
    type Linears = Matrices;
    type Vector = Buffer<u8>;
    type Buffer = Rows;
    type Logits = Rows;
    type Cache = Cache;
    type Batch = DeviceBatch;

    fn measure(&mut self) -> Result<DeviceRates, EngineError> {
        limits::measure(self)
    }

    fn set_activations(&mut self, bits: ActivationBits) -> Result<(), EngineError> {
        self.bits = bits;
        Ok(())
    }

    fn fingerprint(&self) -> String {
        arithmetic::fingerprint(self.bits)
    }

    fn matrix(&mut self, tensor: &TensorData<'_>) -> Result<Matrices, EngineError> {
        let matrix = Matrices::one((&self.queue, self.tier), tensor)?;
        self.prepare(&matrix)?;
        Ok(matrix)
    }

    fn matrix_bytes(matrix: &Matrices) -> u64 {
        matrix.bytes()
    }

    fn linears(
        &mut self,
        shapes: &[MatrixShape],
        parts: &mut dyn Iterator<Item = Result<LinearData<'_>, EngineError>>,
    ) -> Result<Matrices, EngineError> {
        let matrices = Matrices::all((&self.queue, self.tier), shapes, parts)?;
        self.prepare(&matrices)?;
        Ok(matrices)
    }

    fn linears_bytes(linears: &Matrices) -> u64 {
        linears.bytes()
    }

    fn memory_bytes(&self) -> u64 {
        self.pool.bytes()
    }

    fn vector(&mut self, values: Vec<f32>) -> Result<Buffer<u8>, EngineError> {
        let mut buffer = self.queue.allocate(size_of_val(values.as_slice()), "a norm")?;
        self.queue.write(&mut buffer, 0, &values)?;
        Ok(buffer)
    }

    fn cache(&mut self, layers: &[LayerState<'_>], element: KvElement, pages: u32) -> Result<Cache, EngineError> {
        self.check_heads(layers)?;
        self.queue.prepare(KernelSet::Attention(element))?;
        Cache::new(&self.queue, layers, element, pages)
    }

    fn copy_pages(&mut self, cache: &mut Cache, copies: &[(u32, u32)]) -> Result<(), EngineError> {
        copies.iter().try_for_each(|&(from, to)| cache.copy_page(&mut self.queue, from, to))
    }

    fn begin(&mut self, batch: Batch, ropes: &[Rope]) -> Result<DeviceBatch, EngineError> {
        self.queue.begin();
        self.batch(&batch, ropes)
    }

    fn embed(&mut self, table: &Matrices, tokens: &[u32], scale: f32) -> Result<Rows, EngineError> {
        let [placed] = table.placed() else {
            return Err(EngineError::BadStep { what: "an embedding of several matrices".to_owned() });
        };
        let row_bytes = u32::try_from(placed.row_bytes).unwrap_or(u32::MAX);
        let (set, _) = self.kernels(placed, 1);
        let out = self.allocate_rows(tokens.len(), placed.columns)?;
        let tokens = self.uploaded(tokens)?;
        let arguments = [
            table.arg(),
            Arg::Unsigned(row_bytes),
            tokens.arg(),
            Arg::int(out.values()),
            Arg::int(out.width),
            Arg::Float(scale),
            out.arg(),
        ];
        self.each(set, "embed", out.values(), &arguments)?;
        Ok(out)
    }

    fn upload(&mut self, values: Vec<f32>, width: usize) -> Result<Rows, EngineError> {
        Ok(Rows { memory: self.uploaded(&values)?, count: values.len() / width.max(1), width })
    }

    fn download(&mut self, buffer: Rows) -> Result<Vec<f32>, EngineError> {
        let mut values = vec![0.0; buffer.values()];
        buffer.memory.read(&self.queue, 0, &mut values)?;
        Ok(values)
    }

    fn mix(
        &mut self,
        weights: &MixerWeights<Self>,
        cache: &mut Cache,
        layer: usize,
        batch: &DeviceBatch,
        hidden: &Rows,
    ) -> Result<Rows, EngineError> {
        let MixerWeights::Attention(weights) = weights;
        self.attention(weights, cache, layer, batch, hidden)
    }

    fn feed_forward(&mut self, weights: &FeedForwardWeights<Self>, hidden: &Rows) -> Result<Rows, EngineError> {
        let normed = self.normed(hidden, weights.norm.as_ref())?;
        let input = normed.as_ref().unwrap_or(hidden);
        if let Some(router) = &weights.router {
            return self.mixture(router, weights, input);
        }
        let codes = self.encode(input)?;
        let (gate, up) = (self.product(&weights.gate_up, 0, &codes)?, self.product(&weights.gate_up, 1, &codes)?);
        self.gated(weights.activation, &gate, &up)?;
        let codes = self.encode(&gate)?;
        self.product(&weights.down, 0, &codes)
    }

    fn add(&mut self, hidden: &mut Rows, delta: Rows, norm: Option<&Norm<Self>>) -> Result<(), EngineError> {
        let delta = self.normed(&delta, norm)?.unwrap_or(delta);
        let arguments = [hidden.arg(), delta.arg(), Arg::int(hidden.values())];
        self.each(KernelSet::Rows, "add", hidden.values(), &arguments)
    }

    fn final_rows(&mut self, norm: &Norm<Self>, hidden: &Rows, rows: &[usize]) -> Result<Vec<f32>, EngineError> {
        let chosen = self.gathered(hidden, rows)?;
        let normed = self.normed_parts(&chosen, norm, chosen.width)?;
        self.download(normed)
    }

    fn logits(
        &mut self,
        norm: &Norm<Self>,
        head: &Matrices,
        hidden: Rows,
        rows: &[usize],
        cap: Option<f32>,
    ) -> Result<Rows, EngineError> {
        let chosen = self.gathered(&hidden, rows)?;
        let normed = self.normed_parts(&chosen, norm, chosen.width)?;
        let codes = self.encode(&normed)?;
        let out = self.product(head, 0, &codes)?;
        if let Some(cap) = cap {
            let arguments = [out.arg(), Arg::int(out.values()), Arg::Float(cap)];
            self.each(KernelSet::Rows, "cap_values", out.values(), &arguments)?;
        }
        Ok(out)
    }

    fn top_logits(&mut self, logits: &Rows, queries: &[(usize, &TopQuery)]) -> Result<Vec<TopLogits>, EngineError> {
        let answer = |&(row, query): &(usize, &TopQuery)| {
            let own = self.logit_rows(logits, &[row])?;
            Ok(logits::top(&own, query))
        };
        queries.iter().map(answer).collect()
    }

    fn logit_rows(&mut self, logits: &Rows, rows: &[usize]) -> Result<Vec<f32>, EngineError> {
        let mut values = vec![0.0; rows.len() * logits.width];
        for (values, &row) in values.chunks_mut(logits.width).zip(rows) {
            logits.memory.read(&self.queue, row * logits.width * size_of::<f32>(), values)?;
        }
        Ok(values)
    }

    fn finish(&mut self) -> Result<(), EngineError> {
        self.queue.finish()
    }
}
