//! Limits on what a worker says of devices and runtimes: texts of drivers may be anything.

use crate::engine::{DeviceReport, GpuReport, PlatformDevice, PlatformReport, Runtime};
use crate::hardware::KernelDriver;

/// The most devices of one engine, runtimes, and devices of one runtime.
const LISTED_MAX: usize = 64;
/// The most characters of a text from a worker.
pub(super) const TEXT_MAX: usize = 2000;

fn text(text: &mut String) {
    *text = text.chars().filter(|c| !c.is_control()).take(TEXT_MAX).collect();
}

/// Shortens a list of devices.
pub(super) fn devices(devices: &mut Vec<DeviceReport>) {
    devices.truncate(LISTED_MAX);
    for DeviceReport { id, engine, name, tier, gpu, .. } in devices {
        [&mut id.0, engine, name, tier].into_iter().for_each(text);
        let Some(gpu) = gpu.as_deref_mut() else { continue };
        let GpuReport { vendor, sub_group_sizes, platform, opencl_version, runtime_version, kernel_driver, .. } = gpu;
        [vendor, platform, opencl_version, runtime_version].into_iter().for_each(text);
        sub_group_sizes.truncate(LISTED_MAX);
        if let Some(KernelDriver { name, version }) = kernel_driver {
            text(name);
            version.iter_mut().for_each(text);
        }
    }
}

/// Shortens a list of runtimes.
pub(super) fn runtime(runtime: &mut Runtime) {
    match runtime {
        Runtime::BuiltIn | Runtime::NoLoader | Runtime::NoPlatform => {}
        Runtime::Failed { what } => text(what),
        Runtime::Platforms(platforms) => {
            platforms.truncate(LISTED_MAX);
            for PlatformReport { name, vendor, version, devices } in platforms {
                [name, vendor, version].into_iter().for_each(text);
                devices.truncate(LISTED_MAX);
                for PlatformDevice { name, refused, .. } in devices {
                    text(name);
                    refused.iter_mut().for_each(text);
                }
            }
        }
    }
}
