//! Each engine's device: whether it computes right, and how fast.

use super::super::gpu::gigabytes;
use super::Check;
use exo_engines::EngineError;
use exo_engines::engine::{DeviceKind, DeviceMemory, DeviceRates, DeviceReport, EngineFactory};
use serde::Serialize;
use std::sync::Arc;
use std::sync::mpsc::sync_channel;
use std::time::Duration;

/// How long a device may take for its self-test and its measurements.
pub(super) const TESTED_WITHIN: Duration = Duration::from_secs(60);

/// Whether devices compute for the diagnosis.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Measuring {
    Measure,
    Skip,
}

/// What is known of a device.
#[derive(Debug, Serialize)]
pub(super) struct DeviceDiagnosis {
    #[serde(flatten)]
    report: DeviceReport,
    self_test: SelfTest,
    /// The error of the self-test, or of the measurement behind it.
    error: Option<String>,
    remedy: Option<String>,
    rates: DeviceRates,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
enum SelfTest {
    Passed,
    Failed,
    NotRun,
}

/// Tests and measures the devices, one after the other.
pub(super) fn diagnose(
    found: Vec<(DeviceReport, Arc<dyn EngineFactory>)>,
    measuring: Measuring,
    within: Duration,
) -> Vec<DeviceDiagnosis> {
    let of_one = |(report, factory): (DeviceReport, Arc<dyn EngineFactory>)| {
        let (self_test, outcome) = match measuring {
            Measuring::Skip => (SelfTest::NotRun, Ok(DeviceRates::default())),
            Measuring::Measure => test(&report, factory, within),
        };
        let (error, remedy) = match &outcome {
            Ok(_) => (None, None),
            Err(error) => (Some(error.to_string()), Some(error.remedy().to_owned())),
        };
        DeviceDiagnosis { report, self_test, error, remedy, rates: outcome.unwrap_or_default() }
    };
    found.into_iter().map(of_one).collect()
}

/// Lets a device compute, on a thread: a driver that hangs never returns.
fn test(
    report: &DeviceReport,
    factory: Arc<dyn EngineFactory>,
    within: Duration,
) -> (SelfTest, Result<DeviceRates, EngineError>) {
    let (device, (told, outcome)) = (report.id.clone(), sync_channel(2));
    let started = std::thread::Builder::new().name("device-test".to_owned()).spawn(move || {
        let mut engine = match factory.open(&device).and_then(|mut engine| engine.self_test().map(|_| engine)) {
            Ok(engine) => engine,
            Err(error) => return drop(told.send((SelfTest::Failed, Err(error)))),
        };
        let _ = told.send((SelfTest::Passed, engine.measure()));
    });
    let silent = || EngineError::Killed { from: report.id.to_string(), seconds: within.as_secs() };
    match started {
        Ok(_) => outcome.recv_timeout(within).unwrap_or_else(|_| (SelfTest::Failed, Err(silent()))),
        Err(_) => (SelfTest::NotRun, Ok(DeviceRates::default())),
    }
}

/// A check for each device. A node without any that computes right computes nothing.
pub(super) fn checks(devices: &[DeviceDiagnosis], disabled: &[DeviceReport], unknown: &[String]) -> Vec<Check> {
    let is_well = |device: &DeviceDiagnosis| device.self_test != SelfTest::Failed;
    // Models run on the devices of the first engine, unless another device is named.
    let chosen = devices.first().map(|device| device.report.engine.as_str());
    let mut checks: Vec<Check> = devices.iter().map(|device| check(device, chosen)).collect();
    checks.extend(disabled.iter().map(|report| {
        let found = format!("{}: disabled by EXO_DISABLE_DEVICES", report.name);
        Check::ok("devices.device", report.id.to_string(), found)
    }));
    checks.extend(unknown.iter().map(|name| {
        let found = "EXO_DISABLE_DEVICES names a device that is not here";
        Check::warn("devices.unknown", name.clone(), found, "name it by id, engine or PCI address, as above")
    }));
    if !devices.iter().any(is_well) {
        let remedy = "enable a device, or mend one of those above";
        checks.push(Check::fail("devices.none", "devices", "no engine has a device that computes right", remedy));
    }
    checks
}

fn check(device: &DeviceDiagnosis, chosen: Option<&str>) -> Check {
    let DeviceDiagnosis { report, self_test, error, remedy, rates } = device;
    let mut parts = vec![format!("{}, {}", report.name, report.tier)];
    if let DeviceMemory::Dedicated { total_bytes } = report.memory {
        parts.push(gigabytes(total_bytes));
    }
    if *self_test == SelfTest::Passed {
        parts.push("self-test passed".to_owned());
    }
    parts.extend(rates.read_bytes_per_s.map(|rate| format!("reads {:.1} GB/s", rate / 1e9)));
    parts.extend(rates.multiplications_per_s.map(|rate| format!("{:.1} G multiplications/s", rate / 1e9)));
    if let Some(gpu) = &report.gpu {
        parts.push(format!("{} ({})", gpu.platform, gpu.runtime_version));
    }
    parts.push(match chosen == Some(report.engine.as_str()) {
        true => "models run here".to_owned(),
        false => format!("used with --device {}", report.id),
    });
    let (id, found) = (report.id.to_string(), parts.join(", "));
    let Some(error) = error else { return Check::ok("devices.device", id, found) };
    let found = match self_test {
        SelfTest::Failed => format!("{found}: self-test failed: {error}"),
        SelfTest::Passed | SelfTest::NotRun => format!("{found}: not measured: {error}"),
    };
    let remedy = match report.kind {
        DeviceKind::Gpu => remedy.clone().unwrap_or_default(),
        DeviceKind::Cpu => "run another version of exo-node, and report this error".to_owned(),
    };
    Check::warn("devices.device", id, found, remedy)
}

#[cfg(test)]
mod tests {
    use super::super::Verdict;
    use super::*;
    use exo_engines::engine::{DeviceId, Engine};
    use exo_engines::reference::ReferenceFactory;

    /// How a device of a test fails.
    #[derive(Debug, Clone, Copy)]
    enum Fails {
        ToOpen,
        ToReturn,
    }

    #[derive(Debug)]
    struct Failing(Fails);

    impl EngineFactory for Failing {
        fn name(&self) -> &'static str {
            "failing"
        }

        fn probe(&self) -> Vec<DeviceReport> {
            vec![DeviceReport::of_cpu("failing:0", "failing", "none")]
        }

        fn open(&self, device: &DeviceId) -> Result<Box<dyn Engine>, EngineError> {
            if matches!(self.0, Fails::ToReturn) {
                std::thread::sleep(Duration::from_secs(5));
            }
            Err(EngineError::SelfTest { what: format!("{device} gave 3 in place of 4") })
        }
    }

    fn found(factory: impl EngineFactory + 'static) -> (DeviceReport, Arc<dyn EngineFactory>) {
        (factory.probe().remove(0), Arc::new(factory))
    }

    fn diagnosed(found: Vec<(DeviceReport, Arc<dyn EngineFactory>)>, measuring: Measuring) -> Vec<Check> {
        checks(&diagnose(found, measuring, Duration::from_millis(300)), &[], &[])
    }

    /// R8.1–R8.5: a device that fails or hangs is a warning as long as another one computes; without any it is a
    /// failure.
    #[test]
    fn a_device_that_fails_is_told() {
        for fails in [Fails::ToOpen, Fails::ToReturn] {
            let both = diagnosed(vec![found(Failing(fails)), found(ReferenceFactory)], Measuring::Measure);
            let verdicts: Vec<Verdict> = both.iter().map(|check| check.verdict).collect();
            assert_eq!(verdicts, [Verdict::Warn, Verdict::Ok], "{both:?}");
            let alone = diagnosed(vec![found(Failing(fails))], Measuring::Measure);
            assert_eq!(alone.last().map(|check| check.verdict), Some(Verdict::Fail));
        }
        let failed = diagnosed(vec![found(Failing(Fails::ToOpen))], Measuring::Measure);
        assert!(failed[0].found.contains("3 in place of 4"), "{}", failed[0].found);
    }

    #[test]
    fn devices_that_do_not_compute_are_not_judged() {
        let skipped = diagnosed(vec![found(Failing(Fails::ToOpen))], Measuring::Skip);
        assert_eq!((skipped.len(), skipped[0].verdict), (1, Verdict::Ok));
        assert!(!skipped[0].found.contains("self-test"), "{}", skipped[0].found);
        assert_eq!(diagnosed(Vec::new(), Measuring::Skip)[0].verdict, Verdict::Fail);
    }

    /// R1.2: disabled devices stay in the list, and a name that matches none is told.
    #[test]
    fn disabled_devices_are_listed() {
        let cpu = DeviceReport::of_cpu("cpu", "cpu", "avx2");
        let devices = diagnose(vec![found(ReferenceFactory)], Measuring::Skip, Duration::ZERO);
        let checks = checks(&devices, &[cpu], &["intel:9".to_owned()]);
        assert!(checks[1].found.contains("disabled by EXO_DISABLE_DEVICES"));
        assert_eq!((checks[2].subject.as_str(), checks[2].verdict), ("intel:9", Verdict::Warn));
    }
}
