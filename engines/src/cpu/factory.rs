//! The factory of CPU engines.

use super::{CpuBackend, Tier};
use crate::decoder::DecoderEngine;
use crate::engine::{DeviceId, DeviceReport, Engine, EngineFactory};
use crate::error::EngineError;

/// A factory of engines on this machine's CPU.
#[derive(Debug, Clone)]
pub struct CpuFactory {
    threads: usize,
    tier: Tier,
}

impl CpuFactory {
    /// The name of the engine.
    pub const NAME: &'static str = "cpu";
    /// The id of this factory's only device.
    pub const DEVICE: &'static str = "cpu";

    /// Creates a factory of engines with `threads` threads each (at least 1), at the best tier of this machine.
    pub fn new(threads: usize) -> Self {
        Self::with_tier(threads, Tier::best())
    }

    /// Creates a factory of engines with `threads` threads each (at least 1), at `tier`, one of [`Tier::available`].
    pub fn with_tier(threads: usize, tier: Tier) -> Self {
        Self { threads: threads.max(1), tier }
    }
}

impl EngineFactory for CpuFactory {
    fn name(&self) -> &'static str {
        Self::NAME
    }

    fn probe(&self) -> Vec<DeviceReport> {
        vec![DeviceReport::of_cpu(Self::DEVICE, self.name(), self.tier.name())]
    }

    fn open(&self, device: &DeviceId) -> Result<Box<dyn Engine>, EngineError> {
        if device.0 != Self::DEVICE {
            return Err(EngineError::NoDevice { engine: self.name().to_owned(), device: device.0.clone() });
        }
        let backend = CpuBackend::new(self.threads, self.tier)?;
        Ok(Box::new(DecoderEngine::new(backend)))
    }
}
