//! What kernels need of a device.

use super::fault::fault;
use crate::error::{DeviceFault, EngineError};
use opencl3::device::{CL_FP_CORRECTLY_ROUNDED_DIVIDE_SQRT, CL_FP_DENORM, CL_FP_ROUND_TO_NEAREST, Device};

/// The work-items of a work-group of all kernels but those of tiles, which have 32 for each warp: `WORK_GROUP_SIZE` in
/// `functions.cl`.
pub(super) const WORK_GROUP_SIZE: usize = 64;

/// What single precision has to have for the arithmetic of the engines. `fma` rounds correctly on every device, even on
/// one that computes it in software, and so has no bit `CL_FP_FMA` (OpenCL C, relative error of math functions).
const NEEDED: [(u64, &str); 2] = [(CL_FP_DENORM, "denormal numbers"), (CL_FP_ROUND_TO_NEAREST, "rounding to nearest")];

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
    /// Chooses the division of a device, which errors call `id`.
    pub(super) fn of(device: &Device, id: &str) -> Result<Self, EngineError> {
        let ask = |error| fault(id, "asking for its arithmetic", error);
        let single = device.single_fp_config().map_err(ask)?;
        let double = device.double_fp_config().map_err(ask)?;
        let refused = |what: &str| EngineError::Device {
            device: id.to_owned(),
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
    /// All memory, in bytes.
    pub(super) memory_bytes: u64,
    /// The largest buffer, in bytes.
    pub(super) buffer_max_bytes: u64,
    /// The local memory of a work-group, in bytes.
    pub(super) local_bytes: u64,
}

impl Limits {
    /// Asks a device, which errors call `id`.
    pub(super) fn of(device: &Device, id: &str) -> Result<Self, EngineError> {
        let ask = |error| fault(id, "asking for its limits", error);
        let size = device.max_work_group_size().map_err(ask)?;
        if size < WORK_GROUP_SIZE {
            let what =
                format!("its work-groups hold at most {size} work-items, and the kernels need {WORK_GROUP_SIZE}");
            return Err(EngineError::Device { device: id.to_owned(), fault: DeviceFault::Driver, what });
        }
        let buffer_max_bytes = device.max_mem_alloc_size().map_err(ask)?;
        Ok(Self {
            memory_bytes: device.global_mem_size().map_err(ask)?,
            buffer_max_bytes,
            local_bytes: device.local_mem_size().map_err(ask)?,
        })
    }
}
