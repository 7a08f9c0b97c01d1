//! Each engine's device: whether it computes right, and how fast.

use super::{Check, gigabytes};
use exo_engines::engine::{DeviceMemory, DeviceRates, DeviceReport, EngineFactory};
use serde::Serialize;
use std::sync::Arc;

const AREA: &str = "devices";

/// What is known of a device.
#[derive(Debug, Serialize)]
pub(super) struct DeviceDiagnosis {
    #[serde(flatten)]
    report: DeviceReport,
    /// Whether its numbers are right; `None`: not tested.
    self_test: Option<SelfTest>,
    rates: DeviceRates,
}

#[derive(Debug, Serialize)]
struct SelfTest {
    /// The error; `None`: its numbers are right.
    error: Option<String>,
    remedy: Option<String>,
}

/// Tests and measures the devices, one after the other.
pub(super) fn diagnose(found: Vec<(DeviceReport, Arc<dyn EngineFactory>)>, is_measured: bool) -> Vec<DeviceDiagnosis> {
    let of_one = |(report, factory): (DeviceReport, Arc<dyn EngineFactory>)| {
        if !is_measured {
            return DeviceDiagnosis { report, self_test: None, rates: DeviceRates::default() };
        }
        let tested = factory.open(&report.id).and_then(|mut engine| {
            engine.self_test()?;
            engine.measure()
        });
        let (self_test, rates) = match tested {
            Ok(rates) => (SelfTest { error: None, remedy: None }, rates),
            Err(error) => {
                let remedy = Some(error.remedy().to_owned());
                (SelfTest { error: Some(error.to_string()), remedy }, DeviceRates::default())
            }
        };
        DeviceDiagnosis { report, self_test: Some(self_test), rates }
    };
    found.into_iter().map(of_one).collect()
}

/// A check for each device. Without any device, a node computes nothing.
pub(super) fn checks(devices: &[DeviceDiagnosis]) -> Vec<Check> {
    if devices.is_empty() {
        let remedy = "take devices out of EXO_DISABLE_DEVICES";
        return vec![Check::fail(AREA, "devices", "no engine has a device", remedy)];
    }
    devices.iter().map(check).collect()
}

fn check(device: &DeviceDiagnosis) -> Check {
    let DeviceDiagnosis { report, self_test, rates } = device;
    let id = report.id.to_string();
    if let Some(SelfTest { error: Some(error), remedy }) = self_test {
        let remedy = remedy.clone().unwrap_or_default();
        return Check::fail(AREA, id, format!("{}: {error}", report.name), remedy);
    }
    let mut parts = vec![format!("{}, {}", report.name, report.tier)];
    if let DeviceMemory::Dedicated { total_bytes } = report.memory {
        parts.push(gigabytes(total_bytes));
    }
    if self_test.is_some() {
        parts.push("computes right".to_owned());
    }
    parts.extend(rates.read_bytes_per_s.map(|rate| format!("reads {:.1} GB/s", rate / 1e9)));
    parts.extend(rates.multiplications_per_s.map(|rate| format!("{:.1} G products/s", rate / 1e9)));
    if let Some(gpu) = &report.gpu {
        parts.push(format!("{} ({})", gpu.platform, gpu.runtime_version));
    }
    Check::ok(AREA, id, parts.join(", "))
}
