//! Rows of activations on the device, and the kernels over them.

use super::device::WORK_GROUP_SIZE;
use super::fault::unsupported;
use super::listing::Found;
use super::programs::KernelSet;
use super::queue::{Arg, Queue, integer};
use super::scratch::{Pool, Scratch};
use super::tier::Tier;
use crate::backend::Norm;
use crate::engine::ActivationBits;
use crate::error::EngineError;
use crate::model::Activation;
use std::rc::Rc;

/// The backend of one device.
#[derive(Debug)]
pub struct OpenClBackend {
    pub(super) queue: Queue,
    pub(super) pool: Rc<Pool>,
    pub(super) tier: Tier,
    pub(super) bits: ActivationBits,
}

/// Rows of floats on the device: \[row]\[width].
#[derive(Debug)]
pub struct Rows {
    pub(super) memory: Scratch,
    pub(super) count: usize,
    pub(super) width: usize,
}

impl Rows {
    pub(super) fn arg(&self) -> Arg {
        self.memory.arg()
    }

    /// The number of values.
    pub(super) fn values(&self) -> usize {
        self.count * self.width
    }
}

impl OpenClBackend {
    pub(super) fn new(found: &Found) -> Result<Self, EngineError> {
        let (queue, pool) = (Queue::new(found)?, Rc::new(Pool::default()));
        let backend = Self { queue, pool, tier: found.tier, bits: ActivationBits::default() };
        let (device, name) = (backend.queue.device(), &found.report.name);
        tracing::debug!(device, name, tier = found.tier.name(), "an OpenCL device is open");
        Ok(backend)
    }

    /// Memory for rows, with arbitrary contents.
    pub(super) fn allocate_rows(&mut self, count: usize, width: usize) -> Result<Rows, EngineError> {
        // Kernels count values in 32 bits.
        if count.saturating_mul(width) > i32::MAX as usize {
            let what = format!("{count} rows of {width} values in one step");
            return Err(unsupported(what));
        }
        let memory = self.pool.take(&self.queue, count * width * size_of::<f32>())?;
        Ok(Rows { memory, count, width })
    }

    /// Copies `values` to the device.
    pub(super) fn uploaded<T: bytemuck::NoUninit>(&mut self, values: &[T]) -> Result<Scratch, EngineError> {
        let mut memory = self.pool.take(&self.queue, size_of_val(values))?;
        memory.write(&self.queue, values)?;
        Ok(memory)
    }

    /// Queues a kernel with one work-item for each of `count` values.
    pub(super) fn each(
        &mut self,
        set: KernelSet,
        name: &'static str,
        count: usize,
        arguments: &[Arg],
    ) -> Result<(), EngineError> {
        self.queue.run(set, name, arguments, (count.div_ceil(WORK_GROUP_SIZE), 1))
    }

    /// The rows after a norm; `None` without one.
    pub(super) fn normed(&mut self, rows: &Rows, norm: Option<&Norm<Self>>) -> Result<Option<Rows>, EngineError> {
        norm.map(|norm| self.normed_parts(rows, norm, rows.width)).transpose()
    }

    /// The rows after a norm of each `width` values.
    pub(super) fn normed_parts(&mut self, rows: &Rows, norm: &Norm<Self>, width: usize) -> Result<Rows, EngineError> {
        let out = self.allocate_rows(rows.count, rows.width)?;
        let weight = Arg::of(&norm.weight);
        let arguments = [rows.arg(), weight, Arg::Float(norm.epsilon), Arg::int(width), out.arg()];
        self.queue.run(KernelSet::Rows, "norm", &arguments, (rows.values() / width, 1))?;
        Ok(out)
    }

    /// The chosen rows of `rows`.
    pub(super) fn gathered(&mut self, rows: &Rows, chosen: &[usize]) -> Result<Rows, EngineError> {
        let indices: Vec<i32> = chosen.iter().copied().map(integer).collect();
        let indices = self.uploaded(&indices)?;
        let out = self.allocate_rows(chosen.len(), rows.width)?;
        let arguments = [rows.arg(), indices.arg(), Arg::int(out.values()), Arg::int(out.width), out.arg()];
        self.each(KernelSet::Rows, "gather", out.values(), &arguments)?;
        Ok(out)
    }

    /// activation(gate) · up, in the memory of `gate`.
    pub(super) fn gated(&mut self, activation: Activation, gate: &Rows, up: &Rows) -> Result<(), EngineError> {
        let (kind, slope, limit) = match activation {
            Activation::Silu => (0, 0.0, 0.0),
            Activation::GeluTanh => (1, 0.0, 0.0),
            Activation::ClampedSwish { slope, limit } => (2, slope, limit),
        };
        let count = gate.values();
        let arguments = [gate.arg(), up.arg(), Arg::int(count), Arg::int(kind), Arg::Float(slope), Arg::Float(limit)];
        self.each(KernelSet::Rows, "gate", count, &arguments)
    }
}
