//! A device for tests: the native CPU engine under the name of a GPU, so that it has a fallback with the same bits.

use exo_engines::EngineError;
use exo_engines::cpu::CpuFactory;
use exo_engines::engine::{DeviceId, DeviceKind, DeviceReport, Engine, EngineFactory};

#[derive(Debug)]
pub(crate) struct GpuFactory(CpuFactory);

impl GpuFactory {
    pub(crate) const DEVICE: &'static str = "gpu:0";

    pub(crate) fn new() -> Self {
        Self(CpuFactory::new(1))
    }
}

impl EngineFactory for GpuFactory {
    fn name(&self) -> &'static str {
        "gpu"
    }

    fn probe(&self) -> Vec<DeviceReport> {
        let of_cpu = self.0.probe().into_iter();
        let id = DeviceId(Self::DEVICE.to_owned());
        of_cpu.map(|report| DeviceReport { id: id.clone(), kind: DeviceKind::Gpu, ..report }).collect()
    }

    fn open(&self, _: &DeviceId) -> Result<Box<dyn Engine>, EngineError> {
        self.0.open(&DeviceId(CpuFactory::DEVICE.to_owned()))
    }
}
