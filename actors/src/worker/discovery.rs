//! The devices and GPUs of this machine: what the engines find, and what keeps them from a GPU.

use crate::core::status::{GpuStatus, Unused};
use exo_engines::engine::{DeviceKind, DeviceReport, EngineFactory, Runtime};
use exo_engines::hardware::{Distribution, Gpu, PciAddress, SystemRoot, access, gpus, missing};
use std::sync::Arc;

/// What was found.
#[derive(Debug)]
pub struct Discovery {
    /// The devices of all engines that are used, best first, each with its factory.
    pub devices: Vec<(DeviceReport, Arc<dyn EngineFactory>)>,
    /// The devices that the user has disabled.
    pub disabled: Vec<DeviceReport>,
    /// Names of disabled devices that match no device.
    pub unknown: Vec<String>,
    /// The GPUs of this machine.
    pub gpus: Vec<GpuStatus>,
    /// The runtimes that engines need, if they were asked: that is so where a GPU is not used.
    pub runtime: Option<Runtime>,
}

/// Finds the devices of all factories, which are asked at once, and the GPUs below `root`. `disabled` names devices
/// that are not used: by id, engine or PCI address. This takes as long as drivers take to start.
pub fn discover(factories: &[Arc<dyn EngineFactory>], disabled: &[String], root: &SystemRoot) -> Discovery {
    let probes: Vec<Vec<DeviceReport>> = std::thread::scope(|scope| {
        let started: Vec<_> = factories.iter().map(|factory| scope.spawn(|| factory.probe())).collect();
        // A factory that panics has no devices.
        started.into_iter().map(|probe| probe.join().unwrap_or_default()).collect()
    });
    let found = probes.into_iter().zip(factories);
    let found: Vec<_> =
        found.flat_map(|(reports, factory)| reports.into_iter().map(|report| (report, Arc::clone(factory)))).collect();
    let hardware = gpus(root);
    let is_known = |name: &&String| {
        let is_gpu = |gpu: &Gpu| address(name) == Some(gpu.address);
        found.iter().any(|(report, _)| is_named(report, name)) || hardware.iter().any(is_gpu)
    };
    let unknown = disabled.iter().filter(|name| !is_known(name)).cloned().collect();
    let is_disabled = |report: &DeviceReport| disabled.iter().any(|name| is_named(report, name));
    let (off, devices): (Vec<_>, Vec<_>) = found.into_iter().partition(|(report, _)| is_disabled(report));
    let used: Vec<DeviceReport> = devices.iter().map(|(report, _)| report.clone()).collect();
    let off: Vec<DeviceReport> = off.into_iter().map(|(report, _)| report).collect();
    let mut runtime = None;
    let unused = |gpu: &Gpu| -> Option<Unused> {
        let is_its = |report: &DeviceReport| is_device_of(report, gpu, &hardware);
        if used.iter().any(is_its) {
            return None;
        }
        if off.iter().any(is_its) || disabled.iter().any(|name| address(name) == Some(gpu.address)) {
            return Some(Unused { error: "it is disabled".to_owned(), remedy: "enable it again".to_owned() });
        }
        let runtime = runtime.get_or_insert_with(|| ask_runtime(factories));
        let missing = missing(gpu, &access(root, gpu), runtime)?;
        Some(Unused { error: missing.to_string(), remedy: missing.remedy(gpu, Distribution::of(root)) })
    };
    let reasons: Vec<Option<Unused>> = hardware.iter().map(unused).collect();
    let named = |gpu: &Gpu| {
        // Its runtime knows its name where the machine has no list of PCI ids.
        let device = used.iter().find(|report| is_device_of(report, gpu, &hardware));
        Gpu { name: gpu.name.clone().or_else(|| Some(device?.name.clone())), ..gpu.clone() }
    };
    let gpus = hardware.iter().map(named).zip(reasons);
    let gpus = gpus.map(|(gpu, unused)| GpuStatus { gpu, unused, sample: None }).collect();
    Discovery { devices, disabled: off, unknown, gpus, runtime }
}

/// Asks the engines that need libraries for what they found of them.
pub fn ask_runtime(factories: &[Arc<dyn EngineFactory>]) -> Runtime {
    let runtimes = factories.iter().map(|factory| factory.runtime());
    runtimes.into_iter().find(|runtime| *runtime != Runtime::BuiltIn).unwrap_or(Runtime::BuiltIn)
}

/// Whether a device is that GPU: by its address, or where its driver tells none, as the only GPU of its vendor.
fn is_device_of(report: &DeviceReport, gpu: &Gpu, all: &[Gpu]) -> bool {
    if report.kind != DeviceKind::Gpu {
        return false;
    }
    let of_vendor = || all.iter().filter(|other| other.id.vendor == gpu.id.vendor).count();
    let has_its_vendor = || report.gpu.as_ref().is_some_and(|of| of.vendor.contains(&gpu.id.vendor_name()));
    match report.pci_address() {
        Some(address) => address == gpu.address,
        None => has_its_vendor() && of_vendor() == 1,
    }
}

/// Whether `name` names a device: by its id, its engine or its PCI address.
fn is_named(report: &DeviceReport, name: &str) -> bool {
    report.id.0 == name || report.engine == name || address(name).is_some_and(|name| report.pci_address() == Some(name))
}

/// A PCI address, of domain 0 if it has none, as `lspci` writes it.
fn address(name: &str) -> Option<PciAddress> {
    name.parse().or_else(|_| format!("0000:{name}").parse()).ok()
}

#[cfg(test)]
mod tests {
    use super::*;
    use exo_engines::EngineError;
    use exo_engines::engine::{DeviceId, DeviceMemory, Engine, GpuReport};
    use std::path::Path;

    #[derive(Debug)]
    struct Factory {
        engine: &'static str,
        devices: Vec<DeviceReport>,
        runtime: Runtime,
    }

    impl EngineFactory for Factory {
        fn name(&self) -> &'static str {
            self.engine
        }

        fn probe(&self) -> Vec<DeviceReport> {
            assert!(!self.engine.is_empty(), "planned");
            self.devices.clone()
        }

        fn runtime(&self) -> Runtime {
            self.runtime.clone()
        }

        fn open(&self, device: &DeviceId) -> Result<Box<dyn Engine>, EngineError> {
            Err(EngineError::NoDevice { engine: self.engine.to_owned(), device: device.to_string() })
        }
    }

    fn card(number: usize, address: Option<&str>) -> DeviceReport {
        let pci_address = address.map(|address| address.parse().expect("an address"));
        let gpu = GpuReport { vendor: "Intel(R) Corporation".to_owned(), pci_address, ..GpuReport::default() };
        DeviceReport {
            kind: DeviceKind::Gpu,
            memory: DeviceMemory::Dedicated { total_bytes: 1 << 30 },
            gpu: Some(Box::new(gpu)),
            name: "Arc of a test".to_owned(),
            ..DeviceReport::of_cpu(&format!("intel:{number}"), "intel", "")
        }
    }

    /// A machine with a card of Intel at 0000:03:00.0, whose driver runs.
    fn machine() -> (tempfile::TempDir, SystemRoot) {
        let folder = tempfile::tempdir().expect("a folder");
        let write = |path: &str, content: &str| {
            let file = folder.path().join(path);
            std::fs::create_dir_all(file.parent().expect("a folder")).expect("created");
            std::fs::write(file, content).expect("written");
        };
        let pci = "sys/bus/pci/devices/0000:03:00.0";
        write(&format!("{pci}/class"), "0x030000\n");
        write(&format!("{pci}/vendor"), "0x8086\n");
        write(&format!("{pci}/device"), "0xe20b\n");
        write(&format!("{pci}/drm/renderD128/dev"), "226:128\n");
        write("dev/dri/renderD128", "");
        write("etc/os-release", "ID=debian\n");
        std::os::unix::fs::symlink(Path::new("../drivers/xe"), folder.path().join(pci).join("driver")).expect("linked");
        let root = SystemRoot::at(folder.path());
        (folder, root)
    }

    fn discovered(devices: Vec<DeviceReport>, runtime: Runtime, disabled: &[&str]) -> Discovery {
        let cpu = DeviceReport::of_cpu("cpu", "cpu", "");
        let built_in = Runtime::BuiltIn;
        let factories: [Arc<dyn EngineFactory>; 3] = [
            Arc::new(Factory { engine: "intel", devices, runtime }),
            Arc::new(Factory { engine: "", devices: Vec::new(), runtime: built_in.clone() }),
            Arc::new(Factory { engine: "cpu", devices: vec![cpu], runtime: built_in }),
        ];
        let disabled: Vec<String> = disabled.iter().map(|name| (*name).to_owned()).collect();
        discover(&factories, &disabled, &machine().1)
    }

    fn ids(found: &Discovery) -> Vec<&str> {
        found.devices.iter().map(|(report, _)| report.id.0.as_str()).collect()
    }

    /// R1.1, R1.2: devices keep the order of their engines; those that the user disables are not used, and names that
    /// match none are told.
    #[test]
    fn disabled_devices_are_left_out() {
        let cards = || vec![card(0, Some("0000:03:00.0")), card(1, Some("0000:04:00.0"))];
        let found = |disabled: &[&str]| discovered(cards(), Runtime::BuiltIn, disabled);
        assert_eq!(ids(&found(&[])), ["intel:0", "intel:1", "cpu"]);
        assert_eq!(ids(&found(&["intel:0"])), ["intel:1", "cpu"]);
        assert_eq!(ids(&found(&["03:00.0"])), ["intel:1", "cpu"]);
        let without = found(&["intel", "intel:7"]);
        assert_eq!((ids(&without), &without.unknown), (vec!["cpu"], &vec!["intel:7".to_owned()]));
        assert_eq!(without.gpus[0].unused.as_ref().map(|unused| unused.error.as_str()), Some("it is disabled"));
        assert_eq!(ids(&found(&["cpu", "intel"])), [""; 0]);
    }

    /// R1.2: a GPU that no engine uses tells what is missing, with the remedy of this distribution; one that an engine
    /// uses needs nothing, also where its driver tells no address.
    #[test]
    fn a_gpu_without_an_engine_tells_what_is_missing() {
        let found = discovered(Vec::new(), Runtime::NoPlatform, &[]);
        let unused = found.gpus[0].unused.clone().expect("no engine uses it");
        assert_eq!(unused.error, "no OpenCL runtime for GPUs of Intel is installed");
        assert!(unused.remedy.contains("sudo apt install intel-opencl-icd"), "{}", unused.remedy);
        assert_eq!(found.runtime, Some(Runtime::NoPlatform));
        for address in [Some("0000:03:00.0"), None] {
            let found = discovered(vec![card(0, address)], Runtime::NoPlatform, &[]);
            assert_eq!((&found.gpus[0].unused, found.runtime), (&None, None), "{address:?}");
            assert_eq!(found.gpus[0].gpu.shown_name(), "Arc of a test");
        }
    }
}
