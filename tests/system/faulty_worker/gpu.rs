//! A device for tests: an engine on the CPU under the name of a GPU, so that it has a fallback with the same bits.

use exo_engines::EngineError;
use exo_engines::cpu::CpuFactory;
use exo_engines::engine::{DeviceId, DeviceKind, DeviceReport, Engine, EngineFactory};
use exo_engines::opencl::OpenClFactory;
use std::sync::Arc;

/// What computes under the name of a GPU.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Computes {
    NativeCpu,
    /// An OpenCL runtime for the CPU.
    OpenCl,
}

#[derive(Debug)]
pub(crate) struct GpuFactory(Arc<dyn EngineFactory>);

impl GpuFactory {
    pub(crate) const DEVICE: &'static str = "gpu:0";

    pub(crate) fn new(computes: Computes) -> Self {
        match computes {
            Computes::NativeCpu => Self(Arc::new(CpuFactory::new(1))),
            Computes::OpenCl => Self(Arc::new(OpenClFactory::cpu_runtimes())),
        }
    }
}

impl EngineFactory for GpuFactory {
    fn name(&self) -> &'static str {
        "gpu"
    }

    fn probe(&self) -> Vec<DeviceReport> {
        let first = self.0.probe().into_iter().take(1);
        let id = DeviceId(Self::DEVICE.to_owned());
        first.map(|report| DeviceReport { id: id.clone(), kind: DeviceKind::Gpu, ..report }).collect()
    }

    fn open(&self, device: &DeviceId) -> Result<Box<dyn Engine>, EngineError> {
        let first = self.0.probe().into_iter().next();
        let missing = || EngineError::NoDevice { engine: self.name().to_owned(), device: device.to_string() };
        self.0.open(&first.ok_or_else(missing)?.id)
    }
}
