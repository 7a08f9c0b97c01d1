//! The OpenCL devices of this machine.

use super::fault::{fault, unsupported};
use crate::engine::{DeviceId, DeviceKind, DeviceReport};
use crate::error::{DeviceFault, EngineError};
use opencl3::device::{
    CL_DEVICE_TYPE_ALL, CL_DEVICE_TYPE_CPU, CL_DEVICE_TYPE_GPU, CL_FP_CORRECTLY_ROUNDED_DIVIDE_SQRT, CL_FP_DENORM,
    CL_FP_ROUND_TO_NEAREST, Device,
};
use opencl3::platform::get_platforms;
use parking_lot::Mutex;

/// The work-items of a work-group of all kernels: `WORK_GROUP_SIZE` in `functions.cl`.
pub(super) const WORK_GROUP_SIZE: usize = 64;

/// A device, and its report.
#[derive(Debug, Clone)]
pub(super) struct Found {
    pub(super) device: Device,
    pub(super) report: DeviceReport,
}

/// What single precision has to have for the arithmetic of the engines. `fma` rounds correctly on every device, even on
/// one that computes it in software, and so has no bit `CL_FP_FMA` (OpenCL C, relative error of math functions).
const NEEDED: [(u64, &str); 2] = [(CL_FP_DENORM, "denormal numbers"), (CL_FP_ROUND_TO_NEAREST, "rounding to nearest")];

/// Taken while platforms are asked: some runtimes fail when two threads start them at once.
static ASKING: Mutex<()> = Mutex::new(());

/// How kernels divide and take roots with the right rounding.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Division {
    /// The device's own division rounds correctly.
    Native,
    /// In double precision. The quotient of two floats, rounded to double and then to single precision, is rounded
    /// correctly, and so is a root (Figueroa 1995: 53 bits are at least 2 · 24 + 2).
    Double,
}

impl Division {
    /// Chooses the division of a device.
    pub(super) fn of(found: &Found) -> Result<Self, EngineError> {
        let id = &found.report.id.0;
        let ask = |error| fault(id, "asking for its arithmetic", error);
        let single = found.device.single_fp_config().map_err(ask)?;
        let double = found.device.double_fp_config().map_err(ask)?;
        let refused = |what: &str| EngineError::Device {
            device: id.clone(),
            fault: DeviceFault::Driver,
            what: format!("it has no {what}, which exact results need"),
        };
        if let Some((_, what)) = NEEDED.iter().find(|(bit, _)| single & bit == 0) {
            return Err(refused(what));
        }
        match (single & CL_FP_CORRECTLY_ROUNDED_DIVIDE_SQRT != 0, double != 0) {
            (true, _) => Ok(Self::Native),
            (false, true) => Ok(Self::Double),
            (false, false) => Err(refused("correctly rounded division")),
        }
    }

    /// The compiler's option for it.
    pub(super) fn option(self) -> &'static str {
        match self {
            Self::Native => "-cl-fp32-correctly-rounded-divide-sqrt",
            Self::Double => "-DDIVIDE_IN_DOUBLE",
        }
    }
}

/// What a device can hold and start.
#[derive(Debug, Clone, Copy)]
pub(super) struct Limits {
    /// The largest buffer, in bytes.
    pub(super) buffer_max_bytes: u64,
    /// The local memory of a work-group, in bytes.
    pub(super) local_bytes: u64,
}

impl Limits {
    pub(super) fn of(found: &Found) -> Result<Self, EngineError> {
        let ask = |error| fault(&found.report.id.0, "asking for its limits", error);
        let size = found.device.max_work_group_size().map_err(ask)?;
        if size < WORK_GROUP_SIZE {
            let what = format!("a device with work-groups of {size} work-items");
            return Err(unsupported(what));
        }
        let buffer_max_bytes = found.device.max_mem_alloc_size().map_err(ask)?;
        Ok(Self { buffer_max_bytes, local_bytes: found.device.local_mem_size().map_err(ask)? })
    }
}

/// Lists the GPUs of all platforms, or the CPU devices, which serve tests. A platform that cannot be asked has none.
pub(super) fn find(kind: DeviceKind) -> Vec<Found> {
    let _asking = ASKING.lock();
    let platforms = get_platforms().unwrap_or_else(|error| {
        tracing::debug!(%error, "no OpenCL platform");
        Vec::new()
    });
    let wanted = match kind {
        DeviceKind::Gpu => CL_DEVICE_TYPE_GPU,
        DeviceKind::Cpu => CL_DEVICE_TYPE_CPU,
    };
    let ids = platforms.iter().flat_map(|platform| platform.get_devices(CL_DEVICE_TYPE_ALL).unwrap_or_default());
    let devices = ids.map(Device::new).filter(|device| device.dev_type().is_ok_and(|kinds| kinds & wanted != 0));
    let report = |(number, device): (usize, Device)| {
        let report = DeviceReport {
            id: DeviceId(format!("{}:{number}", super::OpenClFactory::NAME)),
            kind,
            engine: super::OpenClFactory::NAME.to_owned(),
            name: device.name().unwrap_or_default().trim().to_owned(),
            compute_units: device.max_compute_units().ok(),
            tier: "portable".to_owned(),
        };
        Found { device, report }
    };
    devices.enumerate().map(report).collect()
}
