//! The factory of candle engines.

use super::CandleBackend;
use crate::decoder::DecoderEngine;
use crate::engine::{DeviceId, DeviceReport, Engine, EngineFactory, ProcessNeed};
use crate::error::EngineError;
use candle_core::Device;

/// A factory of candle engines on the CPU.
#[derive(Debug, Clone, Copy, Default)]
pub struct CandleFactory;

impl CandleFactory {
    /// The id of this factory's only device.
    pub const DEVICE: &'static str = "candle:cpu";
}

impl EngineFactory for CandleFactory {
    fn name(&self) -> &'static str {
        "candle"
    }

    /// A panic in candle's thread pool poisons a lock of the whole process.
    fn process_need(&self) -> ProcessNeed {
        ProcessNeed::Preferred
    }

    fn probe(&self) -> Vec<DeviceReport> {
        vec![DeviceReport::of_cpu(Self::DEVICE, self.name(), "reference")]
    }

    fn open(&self, device: &DeviceId) -> Result<Box<dyn Engine>, EngineError> {
        match device.0.as_str() {
            Self::DEVICE => Ok(Box::new(DecoderEngine::new(CandleBackend::new(Device::Cpu)))),
            other => Err(EngineError::NoDevice { engine: self.name().to_owned(), device: other.to_owned() }),
        }
    }
}
