//! Compute devices, as engines report them.

use crate::hardware::{KernelDriver, PciAddress, PciId};
use serde::{Deserialize, Serialize};

/// A compute device of this machine, such as `cpu`, `intel:0` or `opencl:0`. Numbers count the devices of an engine.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct DeviceId(pub String);

impl std::fmt::Display for DeviceId {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.0)
    }
}

/// The kind of a compute device.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum DeviceKind {
    /// The machine's CPU.
    Cpu,
    /// A graphics processor.
    Gpu,
}

/// The memory of a device.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum DeviceMemory {
    /// The machine's, which CPUs and integrated GPUs share.
    #[default]
    Shared,
    /// Its own.
    Dedicated {
        /// Its size.
        total_bytes: u64,
    },
}

/// A device on which an engine can be opened.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct DeviceReport {
    /// The device's id, unique on this machine.
    pub id: DeviceId,
    /// The kind of the device.
    pub kind: DeviceKind,
    /// The engine's name.
    pub engine: String,
    /// The vendor's name of the device, or the architecture of the CPU, such as `x86_64`.
    pub name: String,
    /// Number of logical CPU cores, or of the vendor's equivalent units (Intel: vector engines); `None` if unknown.
    pub compute_units: Option<u32>,
    /// The name of the kernel tier in use, such as `avx2`.
    pub tier: String,
    /// The device's memory.
    #[serde(default)]
    pub memory: DeviceMemory,
    /// More about a GPU.
    #[serde(default)]
    pub gpu: Option<Box<GpuReport>>,
}

impl DeviceReport {
    /// The report of an engine's CPU device.
    pub fn of_cpu(id: &str, engine: &str, tier: &str) -> Self {
        let units = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
        Self {
            id: DeviceId(id.to_owned()),
            kind: DeviceKind::Cpu,
            engine: engine.to_owned(),
            name: std::env::consts::ARCH.to_owned(),
            compute_units: u32::try_from(units).ok(),
            tier: tier.to_owned(),
            memory: DeviceMemory::Shared,
            gpu: None,
        }
    }

    /// The PCI address of a GPU; `None` if its driver does not tell, and of other devices.
    pub fn pci_address(&self) -> Option<PciAddress> {
        self.gpu.as_ref()?.pci_address
    }
}

/// What a GPU's driver tells about it. `None`: it does not tell.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct GpuReport {
    /// The vendor.
    pub vendor: String,
    /// Where it is plugged in: equal for all engines that see the same GPU.
    pub pci_address: Option<PciAddress>,
    /// The numbers of vendor and product.
    pub pci_id: Option<PciId>,
    /// Intel's Xe cores, which have several vector engines each.
    pub xe_cores: Option<u32>,
    /// The highest clock.
    pub clock_mhz: Option<u32>,
    /// The work-items of a sub-group, all sizes that kernels may choose; empty if unknown.
    pub sub_group_sizes: Vec<u32>,
    /// The local memory of a work-group.
    pub local_memory_bytes: Option<u64>,
    /// The memory that kernels can use.
    pub memory_bytes: Option<u64>,
    /// The largest buffer.
    pub buffer_max_bytes: Option<u64>,
    /// The number formats and units it has.
    pub units: ComputeUnits,
    /// The OpenCL platform that lists it.
    pub platform: String,
    /// The version of OpenCL.
    pub opencl_version: String,
    /// The version of the runtime, as its vendor numbers it.
    pub runtime_version: String,
    /// The kernel's driver.
    pub kernel_driver: Option<KernelDriver>,
}

/// The number formats that a GPU computes with.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ComputeUnits {
    /// Double precision.
    pub fp64: Option<bool>,
    /// Half precision.
    pub fp16: Option<bool>,
    /// Conversions of bfloat16.
    pub bf16: Option<bool>,
    /// Dot products of four bytes.
    pub int8_dot: Option<bool>,
    /// Matrix units: Intel's XMX, NVIDIA's tensor cores.
    pub matrix: Option<bool>,
}
