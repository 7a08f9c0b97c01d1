//! The factory of OpenCL engines.

use super::OpenClBackend;
use super::device::{self, Found};
use crate::decoder::DecoderEngine;
use crate::engine::{DeviceId, DeviceKind, DeviceReport, Engine, EngineFactory, ProcessNeed};
use crate::error::{DeviceFault, EngineError};

/// A factory of engines on OpenCL devices of one kind.
#[derive(Debug, Clone, Copy)]
pub struct OpenClFactory {
    kind: DeviceKind,
}

impl OpenClFactory {
    /// The name of the engine.
    pub const NAME: &'static str = "opencl";

    /// Creates a factory of engines on this machine's GPUs.
    pub fn gpus() -> Self {
        Self { kind: DeviceKind::Gpu }
    }

    /// Creates a factory of engines on OpenCL runtimes for the CPU. They are slow, and serve tests.
    pub fn cpu_runtimes() -> Self {
        Self { kind: DeviceKind::Cpu }
    }
}

impl EngineFactory for OpenClFactory {
    fn name(&self) -> &'static str {
        Self::NAME
    }

    fn process_need(&self) -> ProcessNeed {
        ProcessNeed::Required
    }

    fn probe(&self) -> Vec<DeviceReport> {
        device::find(self.kind).into_iter().map(|found| found.report).collect()
    }

    fn open(&self, device: &DeviceId) -> Result<Box<dyn Engine>, EngineError> {
        // It was listed when the node started.
        let no_device = || EngineError::Device {
            device: device.0.clone(),
            fault: DeviceFault::Lost,
            what: "its driver does not list it".to_owned(),
        };
        let is_it = |found: &Found| found.report.id == *device;
        let found = device::find(self.kind).into_iter().find(is_it).ok_or_else(no_device)?;
        Ok(Box::new(DecoderEngine::new(OpenClBackend::new(&found)?)))
    }
}
