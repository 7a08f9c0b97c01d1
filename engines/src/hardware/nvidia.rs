//! Measurements of NVIDIA's GPUs, by the driver's library NVML.

use super::{GpuSample, PciAddress};
use nvml_wrapper::bitmasks::device::ThrottleReasons;
use nvml_wrapper::enum_wrappers::device::{Clock, TemperatureSensor};
use nvml_wrapper::enums::device::UsedGpuMemory;
use nvml_wrapper::{Device, Nvml};
use std::collections::BTreeMap;

/// Loads the library; `None` if it is not there, or has no driver.
pub(super) fn load() -> Option<Nvml> {
    Nvml::init().map_err(|error| tracing::debug!(%error, "NVML is not available")).ok()
}

/// Measures a GPU. `own` are the processes of this node.
pub(super) fn sample(nvml: &Nvml, address: PciAddress, own: &[u32]) -> Option<GpuSample> {
    // NVML writes the domain with eight digits.
    let PciAddress { domain, bus, device, function } = address;
    let gpu = nvml.device_by_pci_bus_id(format!("{domain:08x}:{bus:02x}:{device:02x}.{function}")).ok()?;
    let memory = gpu.memory_info().ok();
    let rates = gpu.utilization_rates().ok();
    let share = |percent: u32| percent as f32 / 100.0;
    let watts = |milliwatts: u32| milliwatts as f32 / 1e3;
    let mut utilisation_by_class = BTreeMap::new();
    utilisation_by_class.extend(rates.as_ref().map(|rates| ("compute".to_owned(), share(rates.gpu))));
    utilisation_by_class
        .extend(gpu.encoder_utilization().ok().map(|used| ("encode".to_owned(), share(used.utilization))));
    utilisation_by_class
        .extend(gpu.decoder_utilization().ok().map(|used| ("decode".to_owned(), share(used.utilization))));
    let fans = (0..gpu.num_fans().unwrap_or(0)).filter_map(|fan| gpu.fan_speed_rpm(fan).ok());
    Some(GpuSample {
        utilisation: rates.as_ref().map(|rates| share(rates.gpu)),
        utilisation_by_class,
        memory_total_bytes: memory.as_ref().map(|memory| memory.total),
        // What the driver reserves is not counted as used, and is not free.
        memory_used_bytes: memory.as_ref().map(|memory| memory.total.saturating_sub(memory.free)),
        memory_own_bytes: own_bytes(&gpu, own),
        temperature_celsius: gpu.temperature(TemperatureSensor::Gpu).ok().map(|celsius| celsius as f32),
        memory_temperature_celsius: None,
        power_watts: gpu.power_usage().ok().map(watts),
        power_limit_watts: gpu.enforced_power_limit().ok().map(watts),
        clock_mhz: gpu.clock_info(Clock::Graphics).ok(),
        clock_max_mhz: gpu.max_clock_info(Clock::Graphics).ok(),
        fan_rpm: fans.max(),
        throttle_reasons: gpu.current_throttle_reasons().ok().map(reasons),
    })
}

/// The memory of this node's processes. In a container the numbers of processes are others, so none may be found.
fn own_bytes(gpu: &Device<'_>, own: &[u32]) -> Option<u64> {
    let processes = gpu.running_compute_processes().ok()?;
    let used =
        processes.iter().filter(|process| own.contains(&process.pid)).map(|process| match process.used_gpu_memory {
            UsedGpuMemory::Used(bytes) => Some(bytes),
            UsedGpuMemory::Unavailable => None,
        });
    used.reduce(|a, b| a?.checked_add(b?))?
}

/// What slows the GPU. An idle GPU is not slowed.
fn reasons(active: ThrottleReasons) -> Vec<String> {
    let ignored = ThrottleReasons::GPU_IDLE | ThrottleReasons::NONE;
    let names = (active - ignored).iter_names().map(|(name, _)| name.to_lowercase());
    names.collect()
}
