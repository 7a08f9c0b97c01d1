//! The machine: CPU, memory, GPUs, their drivers and runtimes.

use super::super::gpu::{gigabytes, readings, slowed_by, title};
use super::Check;
use exo_actors::core::status::{GpuStatus, Unused};
use exo_engines::cpu::Tier;
use exo_engines::engine::Runtime;
use exo_engines::hardware::{GpuMonitor, GpuSample, SystemRoot};
use std::time::{Duration, Instant};

/// Less free memory than this holds no model of use.
const MEMORY_MIN: u64 = 1 << 30;
/// GPUs slow down above about this.
const HOT_CELSIUS: f32 = 95.0;
/// The time over which power and utilisation are averaged.
const SAMPLED: Duration = Duration::from_secs(1);

/// Measures the GPUs.
pub(super) fn sample(gpus: &mut [GpuStatus]) {
    let mut monitor = GpuMonitor::new(SystemRoot::default(), gpus.iter().map(|status| status.gpu.clone()).collect());
    let started = Instant::now();
    monitor.sample(started.elapsed(), &[]);
    if !gpus.is_empty() {
        std::thread::sleep(SAMPLED);
    }
    let samples = monitor.sample_all(started.elapsed(), &[]);
    for status in gpus {
        status.sample = samples.get(&status.gpu.address).cloned();
    }
}

pub(super) fn checks(gpus: &[GpuStatus], runtime: Runtime) -> Vec<Check> {
    let mut checks = vec![system(), cpu()];
    checks.extend(memory());
    checks.extend(gpus.iter().map(gpu));
    checks.extend(gpus.iter().filter_map(|status| sensors(status, status.sample.as_ref()?)));
    checks.extend(runtimes(runtime));
    checks
}

/// What runs here: the first line of any report of an error.
fn system() -> Check {
    let read = |path: &str| std::fs::read_to_string(path).ok();
    let name = read("/etc/os-release").and_then(|release| {
        let name = release.lines().find_map(|line| line.strip_prefix("PRETTY_NAME="))?;
        Some(name.trim_matches('"').to_owned())
    });
    let kernel = read("/proc/sys/kernel/osrelease").map(|release| format!("kernel {}", release.trim()));
    let program = format!("exo-node {}", env!("CARGO_PKG_VERSION"));
    let system = name.unwrap_or_else(|| std::env::consts::OS.to_owned());
    let parts: Vec<String> = [Some(program), Some(system), kernel].into_iter().flatten().collect();
    Check::ok("hardware.system", "system", parts.join(", "))
}

fn cpu() -> Check {
    let cores = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
    let (architecture, tier) = (std::env::consts::ARCH, Tier::best());
    let found = format!("{architecture}, {cores} cores, kernels for {}", tier.name());
    match tier {
        Tier::Portable if architecture == "x86_64" => {
            Check::warn("hardware.cpu", "CPU", found, "a processor with AVX2 computes several times as fast")
        }
        _ => Check::ok("hardware.cpu", "CPU", found),
    }
}

fn memory() -> Option<Check> {
    let machine = exo_actors::measure_machine();
    let (free, total) = (machine.memory_free_bytes?, machine.memory_total_bytes?);
    let found = format!("{} of {} free", gigabytes(free), gigabytes(total));
    Some(match free < MEMORY_MIN {
        true => Check::warn("hardware.memory", "memory", found, "close other programs: models need memory"),
        false => Check::ok("hardware.memory", "memory", found),
    })
}

fn gpu(status: &GpuStatus) -> Check {
    let (subject, found) = (format!("GPU {}", status.gpu.address), title(status));
    match &status.unused {
        None => Check::ok("hardware.gpu", subject, found),
        Some(Unused { error, remedy }) => Check::warn("hardware.gpu", subject, format!("{found}: {error}"), remedy),
    }
}

/// What the sensors of a GPU show; `None` if they show nothing.
fn sensors(status: &GpuStatus, sample: &GpuSample) -> Option<Check> {
    let subject = format!("sensors {}", status.gpu.address);
    if (GpuSample { utilisation: Some(0.0), memory_total_bytes: sample.memory_total_bytes, ..GpuSample::default() })
        == *sample
    {
        return Some(Check::ok("hardware.sensors", subject, "asleep, and not woken for this"));
    }
    let parts = readings(sample);
    let mut troubles = Vec::new();
    if sample.temperature_celsius.is_some_and(|celsius| celsius >= HOT_CELSIUS) {
        troubles.push("hot".to_owned());
    }
    troubles.extend(slowed_by(sample));
    let found = parts.join(", ");
    if troubles.is_empty() {
        return (!parts.is_empty()).then(|| Check::ok("hardware.sensors", subject, found));
    }
    let remedy = "look at its cooling and its power limit";
    Some(Check::warn("hardware.sensors", subject, format!("{found}: {}", troubles.join(", ")), remedy))
}

/// The runtimes of GPUs that are installed.
fn runtimes(runtime: Runtime) -> Vec<Check> {
    let id = "hardware.opencl";
    // Only a machine with a GPU needs them, and its check says so.
    let none = |what: &str| vec![Check::ok(id, "OpenCL", what)];
    match runtime {
        Runtime::BuiltIn => Vec::new(),
        Runtime::NoLoader => none("the loader is not installed"),
        Runtime::NoPlatform => none("the loader is installed, and no runtime"),
        Runtime::Failed { what } => {
            let remedy = "reinstall or update the OpenCL runtimes, and look at `clinfo`";
            vec![Check::warn(id, "OpenCL", format!("the runtimes could not be asked: {what}"), remedy)]
        }
        Runtime::Platforms(platforms) => platforms
            .into_iter()
            .map(|platform| {
                let devices = platform.devices.into_iter().map(|device| match device.refused {
                    None => device.name,
                    Some(why) => format!("{} (not used: {why})", device.name),
                });
                let devices: Vec<String> = devices.collect();
                let devices = if devices.is_empty() { "no device".to_owned() } else { devices.join(", ") };
                // Some append the options that they were built with.
                let version = platform.version.split(',').next().unwrap_or_default();
                Check::ok(id, "OpenCL", format!("{}, {version}: {devices}", platform.name))
            })
            .collect(),
    }
}

#[cfg(test)]
mod tests {
    use super::super::Verdict;
    use super::*;
    use crate::cli::gpu::tests::card;

    /// R1.2, R8.1–R8.5: a GPU that cannot be used is a warning with the remedy.
    #[test]
    fn a_gpu_without_a_driver_is_a_warning() {
        let check = gpu(&card());
        assert_eq!((check.verdict, check.remedy.as_deref()), (Verdict::Warn, Some("install a newer kernel")));
        assert!(check.found.contains("Intel Arc B580 [8086:e20b], a card"), "{}", check.found);
    }

    /// R8.1–R8.5: a hot or slowed GPU is a warning; unknown values are left out.
    #[test]
    fn sensors_tell_heat_and_throttling() {
        let of = |sample: GpuSample| sensors(&card(), &sample);
        assert_eq!(of(GpuSample::default()), None);
        let cool =
            GpuSample { temperature_celsius: Some(50.0), power_limit_watts: Some(190.0), ..GpuSample::default() };
        let check = of(cool.clone()).expect("known");
        assert_eq!((check.verdict, check.found.as_str()), (Verdict::Ok, "50 °C"));
        let hot = GpuSample { temperature_celsius: Some(97.0), ..cool.clone() };
        assert_eq!(of(hot).expect("known").verdict, Verdict::Warn);
        let asleep = GpuSample { utilisation: Some(0.0), ..GpuSample::default() };
        assert!(of(asleep).expect("known").found.contains("asleep"));
        let slowed = GpuSample { throttle_reasons: Some(vec!["pl1".to_owned()]), ..cool };
        assert!(of(slowed).expect("known").found.contains("slowed by pl1"));
    }
}
