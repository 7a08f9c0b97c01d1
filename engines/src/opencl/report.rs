//! A device's report, from what its runtime tells.

use crate::device::{ComputeUnits, DeviceMemory, GpuReport};
use crate::hardware::{Gpu, PciAddress};
use opencl3::device::{
    CL_DEVICE_PCI_BUS_ID_NV, CL_DEVICE_PCI_BUS_INFO_KHR, CL_DEVICE_PCI_SLOT_ID_NV, CL_DEVICE_TOPOLOGY_AMD, Device,
};
use opencl3::platform::Platform;

/// Queries of Intel's extensions `cl_intel_required_subgroup_size` and `cl_intel_device_attribute_query`.
const SUB_GROUP_SIZES_INTEL: u32 = 0x4108;
const SLICES_INTEL: u32 = 0x4252;
const SUB_SLICES_PER_SLICE_INTEL: u32 = 0x4253;
const FEATURES_INTEL: u32 = 0x4256;
/// The bits of the features: `CL_DEVICE_FEATURE_FLAG_DP4A_INTEL` and `CL_DEVICE_FEATURE_FLAG_DPAS_INTEL`.
const DP4A_INTEL: u32 = 1;
const DPAS_INTEL: u32 = 2;
/// The domain of a GPU of NVIDIA: `CL_DEVICE_PCI_DOMAIN_ID_NV`.
const PCI_DOMAIN_ID_NV: u32 = 0x400A;

/// What a runtime tells about a GPU. `gpu` is what the kernel tells.
pub(super) fn gpu_report(device: &Device, platform: &Platform, gpu: Option<&Gpu>) -> GpuReport {
    let text = |text: Result<String, _>| text.unwrap_or_default().trim().to_owned();
    GpuReport {
        vendor: gpu.map_or_else(|| text(device.vendor()), |gpu| gpu.id.vendor_name()),
        pci_address: pci_address(device),
        pci_id: gpu.map(|gpu| gpu.id),
        xe_cores: xe_cores(device),
        clock_mhz: device.max_clock_frequency().ok().filter(|&clock| clock > 0),
        sub_group_sizes: sub_group_sizes(device),
        local_memory_bytes: device.local_mem_size().ok(),
        memory_bytes: device.global_mem_size().ok(),
        buffer_max_bytes: device.max_mem_alloc_size().ok(),
        units: units(device),
        platform: text(platform.name()),
        opencl_version: text(device.version()),
        runtime_version: text(device.driver_version()),
        kernel_driver: gpu.and_then(|gpu| gpu.driver.clone()),
    }
}

/// The memory of a device.
pub(super) fn memory(device: &Device) -> DeviceMemory {
    // NVIDIA tells it by an attribute of its own, too.
    let is_shared = device.host_unified_memory().unwrap_or_default() || device.integrated_memory_nv() == Ok(1);
    match device.global_mem_size() {
        Ok(total_bytes) if !is_shared => DeviceMemory::Dedicated { total_bytes },
        _ => DeviceMemory::Shared,
    }
}

/// The PCI address, by the extension of Khronos, or the attributes of NVIDIA or AMD.
pub(super) fn pci_address(device: &Device) -> Option<PciAddress> {
    khronos_address(&device.get_data(CL_DEVICE_PCI_BUS_INFO_KHR).unwrap_or_default())
        .or_else(|| nvidia_address(device))
        .or_else(|| amd_address(&device.get_data(CL_DEVICE_TOPOLOGY_AMD).unwrap_or_default()))
        // A driver may tell anything.
        .filter(|address| address.device < 32 && address.function < 8)
}

/// Reads `cl_device_pci_bus_info_khr`: domain, bus, device and function, of 32 bits each.
fn khronos_address(bytes: &[u8]) -> Option<PciAddress> {
    let words = words(bytes);
    let &[domain, bus, device, function] = words.as_slice() else { return None };
    let byte = |word: u32| u8::try_from(word).ok();
    Some(PciAddress { domain, bus: byte(bus)?, device: byte(device)?, function: byte(function)? })
}

/// NVIDIA numbers device and function together.
fn nvidia_address(device: &Device) -> Option<PciAddress> {
    let word = |query| words(&device.get_data(query).ok()?).first().copied();
    let (bus, slot) = (word(CL_DEVICE_PCI_BUS_ID_NV)?, word(CL_DEVICE_PCI_SLOT_ID_NV)?);
    let (device_number, function) = (u8::try_from(slot >> 3).ok()?, (slot & 7) as u8);
    let domain = word(PCI_DOMAIN_ID_NV).unwrap_or_default();
    Some(PciAddress { domain, bus: u8::try_from(bus).ok()?, device: device_number, function })
}

/// Reads `cl_device_topology_amd`: a type, which is 1 for PCI Express, and at the end bus, device and function.
fn amd_address(bytes: &[u8]) -> Option<PciAddress> {
    match (words(bytes).first(), bytes) {
        (Some(1), &[.., bus, device, function]) => Some(PciAddress { domain: 0, bus, device, function }),
        _ => None,
    }
}

fn words(bytes: &[u8]) -> Vec<u32> {
    let (words, _) = bytes.as_chunks::<4>();
    words.iter().map(|&word| u32::from_ne_bytes(word)).collect()
}

fn intel_word(device: &Device, query: u32) -> Option<u32> {
    words(&device.get_data(query).ok()?).first().copied()
}

fn xe_cores(device: &Device) -> Option<u32> {
    let cores = intel_word(device, SLICES_INTEL)?.checked_mul(intel_word(device, SUB_SLICES_PER_SLICE_INTEL)?)?;
    Some(cores).filter(|&cores| cores > 0)
}

fn sub_group_sizes(device: &Device) -> Vec<u32> {
    let intel = device.get_data(SUB_GROUP_SIZES_INTEL).unwrap_or_default();
    let (sizes, _) = intel.as_chunks::<{ size_of::<usize>() }>();
    let sizes: Vec<u32> = sizes.iter().filter_map(|&size| u32::try_from(usize::from_ne_bytes(size)).ok()).collect();
    if !sizes.is_empty() {
        return sizes;
    }
    let others = device.wrap_size_nv().or_else(|_| device.wavefront_width_amd());
    others.ok().filter(|&size| size > 0).into_iter().collect()
}

fn units(device: &Device) -> ComputeUnits {
    let extensions = device.extensions().unwrap_or_default();
    let has = |name: &str| extensions.split_whitespace().any(|extension| extension == name);
    let features = intel_word(device, FEATURES_INTEL);
    // CUDA C++ Programming Guide, "Compute Capabilities": dp4a since 6.1, tensor cores since 7.0, bfloat16 since 8.0.
    let capability = device.compute_capability_major_nv().ok().zip(device.compute_capability_minor_nv().ok());
    let since = |version| capability.map(|has| has >= version);
    let feature = |bit: u32| features.map(|features| features & bit != 0);
    let is_intel = features.is_some();
    ComputeUnits {
        fp64: device.double_fp_config().ok().map(|config| config != 0),
        fp16: since((6, 0)).or(Some(has("cl_khr_fp16"))),
        bf16: since((8, 0)).or(is_intel.then(|| has("cl_intel_bfloat16_conversions"))),
        int8_dot: since((6, 1)).or_else(|| feature(DP4A_INTEL)),
        matrix: since((7, 0)).or_else(|| feature(DPAS_INTEL)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn bytes(words: &[u32]) -> Vec<u8> {
        words.iter().flat_map(|word| word.to_ne_bytes()).collect()
    }

    /// R1.3: the address that a runtime tells is the one that the kernel writes.
    #[test]
    fn addresses_are_read() {
        let address = |address: Option<PciAddress>| address.map(|address| address.to_string());
        assert_eq!(address(khronos_address(&bytes(&[0, 3, 0, 0]))).as_deref(), Some("0000:03:00.0"));
        assert_eq!(khronos_address(&bytes(&[0, 300, 0, 0])), None);
        assert_eq!(khronos_address(&[]), None);
        let mut topology = bytes(&[1, 0, 0, 0, 0]);
        topology.extend([0, 0x0b, 0, 1]);
        assert_eq!(address(amd_address(&topology)).as_deref(), Some("0000:0b:00.1"));
        assert_eq!(amd_address(&bytes(&[2, 0])), None);
    }
}
