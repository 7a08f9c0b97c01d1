//! The OpenCL devices of this machine, and the runtimes that list them.

use super::device::{Division, Limits};
use super::report::{gpu_report, memory, pci_address};
use super::tier::Tier;
use crate::device::{DeviceId, DeviceKind, DeviceReport};
use crate::error::EngineError;
use crate::hardware::{self, Gpu, PciAddress, PciId, PlatformDevice, PlatformReport, Runtime, SystemRoot};
use opencl3::device::{CL_DEVICE_TYPE_ALL, CL_DEVICE_TYPE_CPU, CL_DEVICE_TYPE_GPU, Device};
use opencl3::error_codes::{DLOPEN_FUNCTION_NOT_AVAILABLE, DLOPEN_RUNTIME_LOAD_FAILED};
use opencl3::platform::{Platform, get_platforms};
use parking_lot::Mutex;
use std::collections::BTreeMap;

/// Whose devices an engine computes on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Family {
    /// GPUs of Intel.
    Intel,
    /// GPUs of other vendors.
    OtherGpus,
    /// Runtimes for the CPU.
    CpuRuntimes,
}

impl Family {
    /// The name of the engine, and the first part of the ids of its devices.
    pub(super) fn engine(self) -> &'static str {
        match self {
            Self::Intel => "intel",
            Self::OtherGpus => "opencl",
            Self::CpuRuntimes => "opencl-cpu",
        }
    }

    fn of(device: &Device) -> Option<Self> {
        let kinds = device.dev_type().ok()?;
        if kinds & CL_DEVICE_TYPE_GPU != 0 {
            let is_intel = device.vendor_id() == Ok(u32::from(PciId::INTEL));
            return Some(if is_intel { Self::Intel } else { Self::OtherGpus });
        }
        (kinds & CL_DEVICE_TYPE_CPU != 0).then_some(Self::CpuRuntimes)
    }
}

/// A device, and its report.
#[derive(Debug, Clone)]
pub(super) struct Found {
    pub(super) device: Device,
    pub(super) tier: Tier,
    pub(super) report: DeviceReport,
}

impl Found {
    /// The device with another tier.
    pub(super) fn with_tier(self, tier: Tier) -> Self {
        let report = DeviceReport { tier: tier.name().to_owned(), ..self.report };
        Self { tier, report, ..self }
    }
}

/// Taken while platforms are asked: some runtimes fail when two threads start them at once.
static PLATFORM_LOCK: Mutex<()> = Mutex::new(());

/// Lists the devices of a family that can compute what engines need. A GPU that several platforms list is one device:
/// that of its vendor's own platform. Devices are numbered by PCI address.
pub(super) fn find(family: Family) -> Vec<Found> {
    let _asking = PLATFORM_LOCK.lock();
    let gpus = hardware::gpus(&SystemRoot::default());
    let platforms = get_platforms().unwrap_or_else(|error| {
        tracing::debug!(%error, "no OpenCL platform");
        Vec::new()
    });
    let listed: Vec<(Platform, Device)> = platforms
        .into_iter()
        .flat_map(|platform| devices_of(&platform).into_iter().map(move |device| (platform, device)))
        .filter(|(_, device)| Family::of(device) == Some(family))
        .filter(|(_, device)| match refusal(device) {
            None => true,
            Some(why) => {
                tracing::info!(device = device.name().unwrap_or_default(), why, "an OpenCL device is left out");
                false
            }
        })
        .collect();
    let place = |(platform, device): &(Platform, Device)| Place {
        address: pci_address(device),
        is_of_its_vendor: is_of_its_vendor(platform, device),
        platform: platform.id() as usize,
    };
    let places: Vec<Place> = listed.iter().map(place).collect();
    let numbered = in_order(&places).into_iter().map(|index| listed[index]).enumerate();
    numbered.map(|(number, (platform, device))| found(family, number, &platform, device, &gpus)).collect()
}

/// What decides the number of a device.
#[derive(Debug, Clone, Copy)]
struct Place {
    address: Option<PciAddress>,
    /// Whether its platform is that of its vendor.
    is_of_its_vendor: bool,
    platform: usize,
}

/// The order of devices: by PCI address, and those without one last. A device that an earlier platform lists at the
/// same address is left out; one platform may list several parts of a card.
fn in_order(places: &[Place]) -> Vec<usize> {
    let mut order: Vec<usize> = (0..places.len()).collect();
    order.sort_by_key(|&index| {
        let Place { address, is_of_its_vendor, .. } = places[index];
        (address.is_none(), address, !is_of_its_vendor)
    });
    let mut listed_by = BTreeMap::new();
    order.retain(|&index| {
        let Place { address, platform, .. } = places[index];
        address.is_none_or(|address| *listed_by.entry(address).or_insert(platform) == platform)
    });
    order
}

fn devices_of(platform: &Platform) -> Vec<Device> {
    // A platform that cannot be asked has none.
    platform.get_devices(CL_DEVICE_TYPE_ALL).unwrap_or_default().into_iter().map(Device::new).collect()
}

/// Whether a platform is that of the device's vendor, not one for the GPUs of many vendors, such as Rusticl.
fn is_of_its_vendor(platform: &Platform, device: &Device) -> bool {
    let vendors = device.vendor().ok().zip(platform.vendor().ok());
    vendors.is_some_and(|(of_device, of_platform)| of_device == of_platform)
}

fn found(family: Family, number: usize, platform: &Platform, device: Device, gpus: &[Gpu]) -> Found {
    let kind = if family == Family::CpuRuntimes { DeviceKind::Cpu } else { DeviceKind::Gpu };
    let address = pci_address(&device);
    let gpu = gpus.iter().find(|gpu| Some(gpu.address) == address);
    let tier = Tier::of(&device);
    let report = DeviceReport {
        id: DeviceId(format!("{}:{number}", family.engine())),
        kind,
        engine: family.engine().to_owned(),
        name: device.name().unwrap_or_default().trim().to_owned(),
        compute_units: device.max_compute_units().ok(),
        tier: tier.name().to_owned(),
        memory: if kind == DeviceKind::Cpu { crate::device::DeviceMemory::Shared } else { memory(&device) },
        gpu: (kind == DeviceKind::Gpu).then(|| Box::new(gpu_report(&device, platform, gpu))),
    };
    Found { device, tier, report }
}

/// Why engines cannot use a device; `None` if they can.
fn refusal(device: &Device) -> Option<String> {
    let name = device.name().unwrap_or_default();
    let checked = Division::of(device, &name).and(Limits::of(device, &name));
    checked.err().map(|error| match error {
        EngineError::Device { what, .. } | EngineError::Unsupported { what, .. } => what,
        other => other.to_string(),
    })
}

/// The runtimes that are installed, with all their devices.
pub(super) fn runtime() -> Runtime {
    let _asking = PLATFORM_LOCK.lock();
    let platforms = match get_platforms() {
        Ok(platforms) if platforms.is_empty() => return Runtime::NoPlatform,
        Ok(platforms) => platforms,
        Err(error) if [DLOPEN_RUNTIME_LOAD_FAILED, DLOPEN_FUNCTION_NOT_AVAILABLE].contains(&error.0) => {
            return Runtime::NoLoader;
        }
        // CL_PLATFORM_NOT_FOUND_KHR, of the extension cl_khr_icd.
        Err(error) if error.0 == -1001 => return Runtime::NoPlatform,
        Err(error) => return Runtime::Failed { what: error.to_string() },
    };
    Runtime::Platforms(platforms.iter().map(platform_report).collect())
}

fn platform_report(platform: &Platform) -> PlatformReport {
    let text = |text: Result<String, _>| text.unwrap_or_default().trim().to_owned();
    let devices = devices_of(platform).into_iter().map(|device| PlatformDevice {
        name: text(device.name()),
        pci_address: pci_address(&device),
        refused: refusal(&device),
    });
    PlatformReport {
        name: text(platform.name()),
        vendor: text(platform.vendor()),
        version: text(platform.version()),
        devices: devices.collect(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// R1.1, R1.5: devices are numbered by PCI address, and a card that two platforms list is that of its vendor's.
    #[test]
    fn devices_are_numbered_by_address() {
        let place = |address: Option<u8>, is_of_its_vendor, platform| Place {
            address: address.map(|bus| PciAddress { domain: 0, bus, device: 0, function: 0 }),
            is_of_its_vendor,
            platform,
        };
        let rusticl = [place(Some(7), false, 1), place(Some(3), false, 1)];
        let own = [place(Some(7), true, 2), place(None, true, 2), place(Some(3), true, 2), place(Some(3), true, 2)];
        assert_eq!(in_order(&[rusticl, [own[0], own[1]], [own[2], own[3]]].concat()), [4, 5, 2, 3]);
    }

    /// R1.1, R1.3: runtimes for the CPU are listed under an id of their own.
    #[test]
    fn runtimes_and_their_devices_are_listed() {
        let devices = find(Family::CpuRuntimes);
        for (number, found) in devices.iter().enumerate() {
            assert_eq!(found.report.id.0, format!("opencl-cpu:{number}"));
            assert_eq!((found.report.kind, &found.report.gpu), (DeviceKind::Cpu, &None));
        }
        match runtime() {
            Runtime::Platforms(platforms) => {
                let usable = platforms.iter().flat_map(|platform| &platform.devices);
                assert!(usable.filter(|device| device.refused.is_none()).count() >= devices.len());
            }
            _ => assert!(devices.is_empty(), "devices without a runtime"),
        }
    }
}
