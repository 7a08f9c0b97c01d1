//! The factory of OpenCL engines.

use super::exactness;
use super::fault::unsupported;
use super::listing::{self, Family, Found};
use super::tier::{MatrixUnit, Tier};
use crate::decoder::DecoderEngine;
use crate::engine::{DeviceId, DeviceReport, Engine, EngineFactory, ProcessNeed, Runtime};
use crate::error::{DeviceFault, EngineError};

/// A factory of engines on the OpenCL devices of one family.
#[derive(Debug, Clone, Copy)]
pub struct OpenClFactory {
    family: Family,
    /// The tier of all devices; `None`: the best of each.
    tier: Option<Tier>,
}

impl OpenClFactory {
    /// Creates a factory of engines on Intel's GPUs: `intel:0`, …
    pub fn intel() -> Self {
        Self { family: Family::Intel, tier: None }
    }

    /// Creates a factory of engines on GPUs of other vendors: `opencl:0`, …
    pub fn other_gpus() -> Self {
        Self { family: Family::OtherGpus, tier: None }
    }

    /// Creates a factory of engines on OpenCL runtimes for the CPU: `opencl-cpu:0`, … They are slow, and serve tests.
    pub fn cpu_runtimes() -> Self {
        Self { family: Family::CpuRuntimes, tier: None }
    }

    /// Creates a factory of engines on OpenCL runtimes for the CPU that emulate the instructions of the matrix tier,
    /// for its tests.
    pub fn emulated_matrices() -> Self {
        Self { family: Family::CpuRuntimes, tier: Some(Tier::Matrix(MatrixUnit::Emulated)) }
    }

    fn find(self) -> Vec<Found> {
        let found = listing::find(self.family).into_iter();
        found.map(|found| if let Some(tier) = self.tier { found.with_tier(tier) } else { found }).collect()
    }
}

impl EngineFactory for OpenClFactory {
    fn name(&self) -> &'static str {
        self.family.engine()
    }

    fn process_need(&self) -> ProcessNeed {
        ProcessNeed::Required
    }

    fn probe(&self) -> Vec<DeviceReport> {
        self.find().into_iter().map(|found| found.report).collect()
    }

    fn runtime(&self) -> Runtime {
        listing::runtime()
    }

    fn open(&self, device: &DeviceId) -> Result<Box<dyn Engine>, EngineError> {
        // It was listed when the node started.
        let no_device = || EngineError::Device {
            device: device.0.clone(),
            fault: DeviceFault::Lost,
            what: "its driver does not list it".to_owned(),
        };
        let is_it = |found: &Found| found.report.id == *device;
        let found = self.find().into_iter().find(is_it).ok_or_else(no_device)?;
        let backend = exactness::open(found)?;
        match self.tier.filter(|wanted| *wanted != backend.tier) {
            None => Ok(Box::new(DecoderEngine::new(backend))),
            Some(wanted) => Err(unsupported(format!("the tier `{}` on {device}", wanted.name()))),
        }
    }
}
