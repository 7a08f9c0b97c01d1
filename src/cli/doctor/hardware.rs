//! The machine: CPU, memory, GPUs, their drivers and runtimes.

use super::{Check, gigabytes};
use exo_actors::core::status::{GpuStatus, Unused};
use exo_engines::cpu::Tier;
use exo_engines::engine::{EngineFactory, Runtime};
use exo_engines::hardware::{GpuMonitor, GpuSample, Root};
use std::sync::Arc;
use std::time::{Duration, Instant};

const AREA: &str = "hardware";
/// Less free memory than this holds no model of use.
const MEMORY_MIN: u64 = 1 << 30;
/// GPUs slow down above about this.
const HOT_CELSIUS: f32 = 95.0;
/// The time over which power and utilisation are averaged.
const SAMPLED: Duration = Duration::from_secs(1);

/// Measures the GPUs.
pub(super) fn sample(gpus: &mut [GpuStatus]) {
    let mut monitor = GpuMonitor::new(Root::default(), gpus.iter().map(|status| status.gpu.clone()).collect());
    let started = Instant::now();
    monitor.sample(started.elapsed(), &[]);
    if !gpus.is_empty() {
        std::thread::sleep(SAMPLED);
    }
    let samples = monitor.sample_now(started.elapsed(), &[]);
    for status in gpus {
        status.sample = samples.get(&status.gpu.address).cloned();
    }
}

pub(super) fn checks(gpus: &[GpuStatus], factories: &[Arc<dyn EngineFactory>]) -> Vec<Check> {
    let mut checks = vec![cpu()];
    checks.extend(memory());
    checks.extend(gpus.iter().map(gpu));
    checks.extend(gpus.iter().filter_map(|status| sensors(status, status.sample.as_ref()?)));
    checks.extend(runtimes(factories));
    checks
}

fn cpu() -> Check {
    let cores = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
    let (architecture, tier) = (std::env::consts::ARCH, Tier::best());
    let found = format!("{architecture}, {cores} cores, kernels for {}", tier.name());
    match tier {
        Tier::Portable => Check::warn(AREA, "CPU", found, "a processor with AVX2 computes several times as fast"),
        _ => Check::ok(AREA, "CPU", found),
    }
}

fn memory() -> Option<Check> {
    let machine = exo_actors::measure_machine();
    let (free, total) = (machine.memory_free_bytes?, machine.memory_total_bytes?);
    let found = format!("{} of {} free", gigabytes(free), gigabytes(total));
    Some(match free < MEMORY_MIN {
        true => Check::warn(AREA, "memory", found, "close other programs: models need memory"),
        false => Check::ok(AREA, "memory", found),
    })
}

fn gpu(status: &GpuStatus) -> Check {
    let GpuStatus { gpu, unused, .. } = status;
    let subject = format!("GPU {}", gpu.address);
    let driver = gpu.driver.as_ref().map_or("no driver".to_owned(), |driver| {
        format!("driver {} ({})", driver.name, driver.version.as_deref().unwrap_or("unknown version"))
    });
    let kind = match gpu.is_integrated {
        Some(true) => ", integrated",
        Some(false) => ", a card",
        None => "",
    };
    let found = format!("{} [{}]{kind}, {driver}", gpu.shown_name(), gpu.id);
    match unused {
        None => Check::ok(AREA, subject, found),
        Some(Unused { error, remedy }) => Check::warn(AREA, subject, format!("{found}: {error}"), remedy),
    }
}

/// What the sensors of a GPU show; `None` if they show nothing.
fn sensors(status: &GpuStatus, sample: &GpuSample) -> Option<Check> {
    let mut parts = Vec::new();
    parts.extend(sample.temperature_celsius.map(|celsius| format!("{celsius:.0} °C")));
    parts.extend(sample.memory_temperature_celsius.map(|celsius| format!("memory {celsius:.0} °C")));
    let limit = sample.power_limit_watts.map_or(String::new(), |limit| format!(" of {limit:.0} W"));
    parts.extend(sample.power_watts.map(|watts| format!("{watts:.0} W{limit}")));
    let clock_max = sample.clock_max_mhz.map_or(String::new(), |clock| format!(" of {clock} MHz"));
    parts.extend(sample.clock_mhz.map(|clock| format!("{clock} MHz{clock_max}")));
    parts.extend(sample.utilisation.map(|share| format!("{:.0} % busy", share * 100.0)));
    parts.extend(sample.memory_free_bytes().map(|free| format!("{} free", gigabytes(free))));
    parts.extend(sample.fan_rpm.map(|rpm| format!("fan {rpm} rpm")));
    let reasons = sample.throttle_reasons.as_deref().unwrap_or_default();
    let subject = format!("sensors {}", status.gpu.address);
    let found = parts.join(", ");
    if sample.temperature_celsius.is_some_and(|celsius| celsius >= HOT_CELSIUS) {
        return Some(Check::warn(AREA, subject, found, "give the machine more air: a hot GPU slows down"));
    }
    if !reasons.is_empty() {
        let found = format!("{found}, slowed by {}", reasons.join(", "));
        return Some(Check::warn(AREA, subject, found, "look at its cooling and its power limit"));
    }
    (!parts.is_empty()).then(|| Check::ok(AREA, subject, found))
}

/// The runtimes of GPUs that are installed.
fn runtimes(factories: &[Arc<dyn EngineFactory>]) -> Vec<Check> {
    let runtime = factories.iter().map(|factory| factory.runtime()).find(|runtime| *runtime != Runtime::BuiltIn);
    match runtime {
        None | Some(Runtime::BuiltIn) => Vec::new(),
        // Only a machine with a GPU needs them, and its check says so.
        Some(Runtime::NoLoader | Runtime::NoPlatform) => vec![Check::ok(AREA, "OpenCL", "no runtime is installed")],
        Some(Runtime::Failed { what }) => {
            let remedy = "reinstall or update the OpenCL runtimes, and look at `clinfo`";
            vec![Check::warn(AREA, "OpenCL", format!("the runtimes could not be asked: {what}"), remedy)]
        }
        Some(Runtime::Platforms(platforms)) => platforms
            .into_iter()
            .map(|platform| {
                let devices = platform.devices.into_iter().map(|device| match device.refused {
                    None => device.name,
                    Some(why) => format!("{} (not used: {why})", device.name),
                });
                let devices: Vec<String> = devices.collect();
                let devices = if devices.is_empty() { "no device".to_owned() } else { devices.join(", ") };
                Check::ok(AREA, "OpenCL", format!("{}, {}: {devices}", platform.name, platform.version))
            })
            .collect(),
    }
}

#[cfg(test)]
mod tests {
    use super::super::Verdict;
    use super::*;
    use exo_engines::hardware::{Gpu, PciId};

    fn status() -> GpuStatus {
        let gpu = Gpu {
            address: "0000:03:00.0".parse().expect("an address"),
            id: PciId { vendor: PciId::INTEL, product: 0xe20b },
            name: Some("Intel Arc B580".to_owned()),
            driver: None,
            render_node: None,
            is_integrated: Some(false),
            memory_bytes: None,
        };
        let unused =
            Unused { error: "the kernel has no driver for it".to_owned(), remedy: "a newer kernel".to_owned() };
        GpuStatus { gpu, unused: Some(unused), sample: None }
    }

    /// R1.2, R8.1–R8.5: a GPU that cannot be used is a warning with the remedy.
    #[test]
    fn a_gpu_without_a_driver_is_a_warning() {
        let check = gpu(&status());
        assert_eq!((check.verdict, check.remedy.as_deref()), (Verdict::Warn, Some("a newer kernel")));
        assert!(check.found.contains("Intel Arc B580 [8086:e20b], a card"), "{}", check.found);
    }

    /// R8.1–R8.5: a hot or slowed GPU is a warning; unknown values are left out.
    #[test]
    fn sensors_tell_heat_and_throttling() {
        let of = |sample: GpuSample| sensors(&status(), &sample);
        assert_eq!(of(GpuSample::default()), None);
        let cool =
            GpuSample { temperature_celsius: Some(50.0), power_limit_watts: Some(190.0), ..GpuSample::default() };
        let check = of(cool.clone()).expect("known");
        assert_eq!((check.verdict, check.found.as_str()), (Verdict::Ok, "50 °C"));
        let hot = GpuSample { temperature_celsius: Some(97.0), ..cool.clone() };
        assert_eq!(of(hot).expect("known").verdict, Verdict::Warn);
        let slowed = GpuSample { throttle_reasons: Some(vec!["pl1".to_owned()]), ..cool };
        assert!(of(slowed).expect("known").found.contains("slowed by pl1"));
    }
}
