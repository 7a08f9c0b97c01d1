//! OpenCL's error codes as engine errors.

use crate::error::{DeviceFault, EngineError};
use opencl3::error_codes::{
    CL_BUILD_PROGRAM_FAILURE, CL_COMPILER_NOT_AVAILABLE, CL_DEVICE_NOT_AVAILABLE, CL_MEM_OBJECT_ALLOCATION_FAILURE,
    CL_OUT_OF_HOST_MEMORY, CL_OUT_OF_RESOURCES, ClError, DLOPEN_FUNCTION_NOT_AVAILABLE, DLOPEN_RUNTIME_LOAD_FAILED,
};

/// The error of a call that failed while the engine did `what`, on the device with the id `device`.
pub(super) fn fault(device: &str, what: &str, error: ClError) -> EngineError {
    let fault = match error.0 {
        CL_MEM_OBJECT_ALLOCATION_FAILURE | CL_OUT_OF_HOST_MEMORY => {
            // OpenCL does not tell how much is free.
            return EngineError::OutOfMemory { what: what.to_owned(), needed_bytes: u64::MAX, free_bytes: 0 };
        }
        CL_DEVICE_NOT_AVAILABLE | CL_OUT_OF_RESOURCES => DeviceFault::Lost,
        CL_BUILD_PROGRAM_FAILURE | CL_COMPILER_NOT_AVAILABLE => DeviceFault::Compile,
        DLOPEN_RUNTIME_LOAD_FAILED | DLOPEN_FUNCTION_NOT_AVAILABLE => DeviceFault::Runtime,
        _ => DeviceFault::Driver,
    };
    EngineError::Device { device: device.to_owned(), fault, what: format!("{what}: {error} ({})", error.0) }
}

/// The error of something that the engine cannot do.
pub(super) fn unsupported(what: String) -> EngineError {
    EngineError::Unsupported { engine: "opencl".to_owned(), what }
}
