//! The devices and GPUs of this machine: what the engines find, and what keeps them from a GPU.

use crate::core::status::{GpuStatus, Unused};
use exo_engines::engine::{DeviceReport, EngineFactory, Runtime};
use exo_engines::hardware::{Distribution, Gpu, Root, access, gpus, missing};
use std::collections::BTreeSet;
use std::sync::Arc;

/// What was found.
#[derive(Debug)]
pub struct Discovery {
    /// The devices of all engines, best first, each with its factory.
    pub devices: Vec<(DeviceReport, Arc<dyn EngineFactory>)>,
    /// The GPUs of this machine.
    pub gpus: Vec<GpuStatus>,
}

/// Finds the devices of all factories, which are asked at once, and the machine's GPUs. `disabled` names devices that
/// are not used: by id, engine or PCI address. This takes as long as drivers take to start.
pub fn discover(factories: &[Arc<dyn EngineFactory>], disabled: &[String]) -> Discovery {
    let probes: Vec<Vec<DeviceReport>> = std::thread::scope(|scope| {
        let started: Vec<_> = factories.iter().map(|factory| scope.spawn(|| factory.probe())).collect();
        // A factory that panics has no devices.
        started.into_iter().map(|probe| probe.join().unwrap_or_default()).collect()
    });
    let found = probes.into_iter().zip(factories);
    let found: Vec<_> =
        found.flat_map(|(reports, factory)| reports.into_iter().map(|report| (report, Arc::clone(factory)))).collect();
    let root = Root::default();
    let gpus = gpus(&root);
    warn_of_unknown(disabled, &found, &gpus);
    let (off, devices): (Vec<_>, Vec<_>) = found.into_iter().partition(|(report, _)| is_disabled(report, disabled));
    let used: Vec<DeviceReport> = devices.iter().map(|(report, _)| report.clone()).collect();
    let off: Vec<DeviceReport> = off.into_iter().map(|(report, _)| report).collect();
    let is_seen =
        |gpu: &Gpu, reports: &[DeviceReport]| reports.iter().any(|report| report.pci_address() == Some(gpu.address));
    // The runtimes are asked only where a GPU is not used.
    let mut runtime = None;
    let unused = |gpu: &Gpu| -> Option<Unused> {
        if is_seen(gpu, &used) {
            return None;
        }
        if is_seen(gpu, &off) || disabled.contains(&gpu.address.to_string()) {
            return Some(Unused {
                error: "it is disabled".to_owned(),
                remedy: "take it out of EXO_DISABLE_DEVICES, and start the node again".to_owned(),
            });
        }
        let runtime = runtime.get_or_insert_with(|| ask_runtime(factories));
        let missing = missing(gpu, &access(&root, gpu), runtime)?;
        Some(Unused { error: missing.to_string(), remedy: missing.remedy(gpu, Distribution::of(&root)) })
    };
    let reasons: Vec<Option<Unused>> = gpus.iter().map(unused).collect();
    let gpus = gpus.into_iter().zip(reasons).map(|(gpu, unused)| GpuStatus { gpu, unused, sample: None }).collect();
    Discovery { devices, gpus }
}

/// Asks the engines that need libraries for what they found of them.
fn ask_runtime(factories: &[Arc<dyn EngineFactory>]) -> Runtime {
    let needs_libraries =
        factories.iter().map(|factory| factory.runtime()).find(|runtime| *runtime != Runtime::BuiltIn);
    needs_libraries.unwrap_or(Runtime::BuiltIn)
}

/// Whether a device is named: by its id, its engine or its PCI address.
fn is_disabled(report: &DeviceReport, disabled: &[String]) -> bool {
    let address = report.pci_address().map(|address| address.to_string());
    let names = [Some(&report.id.0), Some(&report.engine), address.as_ref()];
    names.into_iter().flatten().any(|name| disabled.contains(name))
}

fn warn_of_unknown(disabled: &[String], found: &[(DeviceReport, Arc<dyn EngineFactory>)], gpus: &[Gpu]) {
    let addresses: BTreeSet<String> = gpus.iter().map(|gpu| gpu.address.to_string()).collect();
    for name in disabled {
        let is_known = found.iter().any(|(report, _)| is_disabled(report, std::slice::from_ref(name)));
        if !is_known && !addresses.contains(name) {
            tracing::warn!(name, "EXO_DISABLE_DEVICES names a device that is not here: `exo-node doctor` lists them");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use exo_engines::EngineError;
    use exo_engines::engine::{DeviceId, Engine};

    #[derive(Debug)]
    struct Factory(&'static str, Vec<&'static str>);

    impl EngineFactory for Factory {
        fn name(&self) -> &'static str {
            self.0
        }

        fn probe(&self) -> Vec<DeviceReport> {
            assert!(!self.1.is_empty(), "planned");
            self.1.iter().map(|id| DeviceReport::of_cpu(id, self.0, "")).collect()
        }

        fn open(&self, device: &DeviceId) -> Result<Box<dyn Engine>, EngineError> {
            Err(EngineError::NoDevice { engine: self.0.to_owned(), device: device.to_string() })
        }
    }

    fn found(disabled: &[&str]) -> Vec<String> {
        let factories: [Arc<dyn EngineFactory>; 3] = [
            Arc::new(Factory("intel", vec!["intel:0", "intel:1"])),
            Arc::new(Factory("panics", vec![])),
            Arc::new(Factory("cpu", vec!["cpu"])),
        ];
        let disabled: Vec<String> = disabled.iter().map(|name| (*name).to_owned()).collect();
        discover(&factories, &disabled).devices.into_iter().map(|(report, _)| report.id.0).collect()
    }

    /// R1.1, R1.2: devices keep the order of their engines; those that the user disables are not used.
    #[test]
    fn disabled_devices_are_left_out() {
        assert_eq!(found(&[]), ["intel:0", "intel:1", "cpu"]);
        assert_eq!(found(&["intel:0"]), ["intel:1", "cpu"]);
        assert_eq!(found(&["intel", "nonsense"]), ["cpu"]);
        assert_eq!(found(&["cpu", "intel"]), [""; 0]);
    }
}
