//! Measurements of GPUs: of those that this node uses at each call, of others every ten seconds.
//!
//! ```text
//! hwmon.rs    temperatures, power, energy, fans     ─┐
//! clocks.rs   clock, what slows it, idle time        ├─► GpuMonitor: differences to the last sample ─► GpuSample
//! fdinfo.rs   work and memory of each client         │
//! vram.rs     memory of Intel's cards               ─┘
//! nvidia.rs   all of that for NVIDIA's GPUs
//! ```

use super::clocks::{self, Clocks};
use super::fdinfo::{self, Client, ClientId};
use super::hwmon::{self, Sensors};
use super::vram::{self, Vram};
use super::{Gpu, GpuSample, PciAddress, PciId, SystemRoot, number, text};
use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::time::Duration;

/// How often a GPU is measured that this node does not use. Reading its sensors keeps a card awake, and a card goes to
/// sleep after a second without use.
const UNUSED_EVERY: Duration = Duration::from_secs(10);
/// The longest time over which energy is averaged. The hardware's counter wraps after some minutes.
const ENERGY_WITHIN: Duration = Duration::from_secs(60);

/// Measures the GPUs of this machine.
pub struct GpuMonitor {
    root: SystemRoot,
    gpus: Vec<Gpu>,
    last: BTreeMap<PciAddress, Last>,
    #[cfg(target_os = "linux")]
    nvml: Option<nvml_wrapper::Nvml>,
}

impl std::fmt::Debug for GpuMonitor {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("GpuMonitor").field("gpus", &self.gpus).finish_non_exhaustive()
    }
}

/// The last measurement of a GPU, and the counters then.
#[derive(Debug)]
struct Last {
    at: Duration,
    /// Whether a process of this node used it.
    is_used: bool,
    sample: GpuSample,
    energy_microjoules: Vec<(PathBuf, u64)>,
    idle_ms: Option<u64>,
    clients: BTreeMap<ClientId, Client>,
}

impl GpuMonitor {
    /// Creates the monitor of `gpus`, which [`gpus`](super::gpus) has found.
    pub fn new(root: SystemRoot, gpus: Vec<Gpu>) -> Self {
        #[cfg(target_os = "linux")]
        let nvml = gpus.iter().any(|gpu| has_driver(gpu, "nvidia")).then(super::nvidia::load).flatten();
        Self {
            root,
            gpus,
            last: BTreeMap::new(),
            #[cfg(target_os = "linux")]
            nvml,
        }
    }

    /// The GPUs that are measured.
    pub fn gpus(&self) -> &[Gpu] {
        &self.gpus
    }

    /// Measures all GPUs. `now` is the time since some start; `own` are the processes of this node. Rates are averages
    /// since the last call, so the first one has none.
    pub fn sample(&mut self, now: Duration, own: &[u32]) -> BTreeMap<PciAddress, GpuSample> {
        self.sample_with(now, own, UNUSED_EVERY)
    }

    /// As [`GpuMonitor::sample`], but measures GPUs that this node does not use, too, however lately that was done.
    pub fn sample_all(&mut self, now: Duration, own: &[u32]) -> BTreeMap<PciAddress, GpuSample> {
        self.sample_with(now, own, Duration::ZERO)
    }

    fn sample_with(&mut self, now: Duration, own: &[u32], every: Duration) -> BTreeMap<PciAddress, GpuSample> {
        if self.gpus.is_empty() {
            return BTreeMap::new();
        }
        // Reading the clients of a GPU wakes it, too.
        let awake: BTreeSet<PathBuf> = self
            .gpus
            .iter()
            .filter(|gpu| !is_asleep(&self.folder(gpu)))
            .flat_map(|gpu| self.device_files(gpu))
            .collect();
        let own_clients = fdinfo::clients(&self.root, Some(own), &awake);
        // The library that measures NVIDIA's GPUs has their files open in this process.
        let workers: Vec<u32> = own.iter().copied().filter(|&process| process != std::process::id()).collect();
        let mut all_clients = None;
        for gpu in self.gpus.clone() {
            // NVIDIA's driver has no clients in `fdinfo`.
            let is_used = match gpu.id.vendor {
                PciId::NVIDIA => fdinfo::have_open(&self.root, &workers, "/dev/nvidia"),
                _ => own_clients.keys().any(|(address, _)| *address == gpu.address),
            };
            let last = self.last.get(&gpu.address);
            // What a process has released shows at once.
            let was_used = last.is_some_and(|last| last.is_used);
            let is_due = last.is_none_or(|last| now.saturating_sub(last.at) >= every);
            if !is_used && !was_used && !is_due {
                continue;
            }
            let clients = all_clients.get_or_insert_with(|| fdinfo::clients(&self.root, None, &awake));
            let of_this = |clients: &BTreeMap<ClientId, Client>| -> BTreeMap<ClientId, Client> {
                let of_this = clients.iter().filter(|((address, _), _)| *address == gpu.address);
                of_this.map(|(id, client)| (*id, client.clone())).collect()
            };
            let (clients, own_clients) = (of_this(clients), of_this(&own_clients));
            let measured = self.measure(&gpu, now, own, clients, &own_clients);
            self.last.insert(gpu.address, Last { is_used, ..measured });
        }
        self.last.iter().map(|(address, last)| (*address, last.sample.clone())).collect()
    }

    fn measure(
        &self,
        gpu: &Gpu,
        now: Duration,
        own: &[u32],
        clients: BTreeMap<ClientId, Client>,
        own_clients: &BTreeMap<ClientId, Client>,
    ) -> Last {
        let alone = |sample| Last {
            at: now,
            is_used: false,
            sample,
            energy_microjoules: Vec::new(),
            idle_ms: None,
            clients: BTreeMap::new(),
        };
        let folder = self.folder(gpu);
        let last = self.last.get(&gpu.address);
        if is_asleep(&folder) {
            let memory_total_bytes = gpu.memory_bytes.or_else(|| last?.sample.memory_total_bytes);
            return alone(GpuSample { utilisation: Some(0.0), memory_total_bytes, ..GpuSample::default() });
        }
        #[cfg(target_os = "linux")]
        if let Some(sample) = self.nvml.as_ref().and_then(|nvml| super::nvidia::sample(nvml, gpu.address, own)) {
            return alone(sample);
        }
        #[cfg(not(target_os = "linux"))]
        let _ = own;
        let (sensors, clocks) = (hwmon::read(&folder), read_clocks(gpu, &folder));
        let vram = self.vram(gpu, &folder);
        let utilisation_by_class =
            last.map(|last| shares(&last.clients, &clients, now.saturating_sub(last.at))).unwrap_or_default();
        let busiest = utilisation_by_class.values().copied().reduce(f32::max);
        let not_idle = last.and_then(|last| busy_share(last.idle_ms?, clocks.idle_ms?, now.saturating_sub(last.at)));
        let reported = number(&folder.join("gpu_busy_percent")).map(|percent| (percent as f32 / 100.0).min(1.0));
        let sample = GpuSample {
            utilisation: reported.or(busiest).or(not_idle),
            utilisation_by_class,
            memory_total_bytes: vram.total_bytes,
            memory_used_bytes: vram.used_bytes,
            memory_own_bytes: own_memory(gpu, own_clients),
            temperature_celsius: sensors.temperature_celsius,
            memory_temperature_celsius: sensors.memory_temperature_celsius,
            power_watts: sensors.power_watts.or_else(|| power(last?, &sensors, now)),
            power_limit_watts: sensors.power_limit_watts,
            clock_mhz: clocks.clock_mhz.or(sensors.clock_mhz),
            clock_max_mhz: clocks.clock_max_mhz,
            fan_rpm: sensors.fan_rpm,
            throttle_reasons: clocks.throttle_reasons,
        };
        let (energy_microjoules, idle_ms) = (sensors.energy_microjoules, clocks.idle_ms);
        Last { at: now, is_used: false, sample, energy_microjoules, idle_ms, clients }
    }

    /// The folder of a GPU in the list of PCI devices.
    fn folder(&self, gpu: &Gpu) -> PathBuf {
        self.root.path(format!("sys/bus/pci/devices/{}", gpu.address))
    }

    /// The files through which programs use a GPU.
    fn device_files(&self, gpu: &Gpu) -> Vec<PathBuf> {
        let names = super::names(&self.folder(gpu).join("drm")).into_iter();
        names.map(|name| Path::new("/dev/dri").join(name)).collect()
    }

    fn vram(&self, gpu: &Gpu, folder: &Path) -> Vram {
        if gpu.is_integrated == Some(true) {
            return Vram::default();
        }
        let files = Vram { total_bytes: gpu.memory_bytes, used_bytes: number(&folder.join("mem_info_vram_used")) };
        let driver = gpu.driver.as_ref().map(|driver| driver.name.as_str());
        let asked = gpu
            .render_node
            .as_deref()
            .zip(driver)
            .and_then(|(node, driver)| vram::ask(&self.root.path(node.strip_prefix("/").unwrap_or(node)), driver));
        asked.unwrap_or(files)
    }
}

/// Whether the kernel has turned a device off. Reading its sensors would turn it on.
fn is_asleep(folder: &Path) -> bool {
    let status = text(&folder.join("power/runtime_status"));
    status.is_some_and(|status| status == "suspended" || status == "suspending")
}

/// The card's memory that this node's processes use. The driver amdgpu tells nothing of what ROCm allocates.
fn own_memory(gpu: &Gpu, clients: &BTreeMap<ClientId, Client>) -> Option<u64> {
    let sum = clients.values().map(|client| client.memory_bytes).reduce(|a, b| a?.checked_add(b?));
    match sum {
        Some(known) => known.filter(|&bytes| bytes > 0 || !has_driver(gpu, "amdgpu")),
        None => (has_driver(gpu, "xe") || has_driver(gpu, "i915")).then_some(0),
    }
}

fn has_driver(gpu: &Gpu, name: &str) -> bool {
    gpu.driver.as_ref().is_some_and(|driver| driver.name == name)
}

fn read_clocks(gpu: &Gpu, folder: &Path) -> Clocks {
    if has_driver(gpu, "xe") {
        return clocks::of_xe(folder);
    }
    let card = super::names(&folder.join("drm")).into_iter().find(|name| name.starts_with("card"));
    match card.filter(|_| has_driver(gpu, "i915")) {
        Some(card) => clocks::of_i915(&folder.join("drm").join(card)),
        None => Clocks::default(),
    }
}

/// The average power since the last sample: by the counter of the card, or of the chip where that one stands still.
fn power(last: &Last, sensors: &Sensors, now: Duration) -> Option<f32> {
    let elapsed = now.checked_sub(last.at).filter(|elapsed| !elapsed.is_zero() && *elapsed <= ENERGY_WITHIN)?;
    let used = sensors.energy_microjoules.iter().find_map(|(file, energy)| {
        let (_, before) = last.energy_microjoules.iter().find(|(other, _)| other == file)?;
        energy.checked_sub(*before).filter(|&used| used > 0)
    })?;
    Some((used as f64 / 1e6 / elapsed.as_secs_f64()) as f32)
}

/// The share of time in which the engines were not off.
fn busy_share(before_ms: u64, idle_ms: u64, elapsed: Duration) -> Option<f32> {
    // A counter that never grows is that of a driver that never turns the engines off.
    let idle = idle_ms.checked_sub(before_ms).filter(|_| idle_ms > 0)? as f64 / 1e3;
    (!elapsed.is_zero()).then(|| (1.0 - idle / elapsed.as_secs_f64()).clamp(0.0, 1.0) as f32)
}

/// The share of time in which each class of engines worked for any client. Clients that are new count from now on.
fn shares(
    before: &BTreeMap<ClientId, Client>,
    now: &BTreeMap<ClientId, Client>,
    elapsed: Duration,
) -> BTreeMap<String, f32> {
    let mut shares: BTreeMap<String, f64> = BTreeMap::new();
    for (id, client) in now {
        let Some(earlier) = before.get(id) else { continue };
        for (class, work) in &client.engines {
            let earlier = earlier.engines.get(class).copied().unwrap_or_default();
            // Counters may step back.
            let busy = work.busy.saturating_sub(earlier.busy) as f64;
            let of = match work.total_cycles {
                // The counter of cycles begins anew after a sleep.
                Some(total) => total.saturating_sub(earlier.total_cycles.unwrap_or(total)) as f64,
                None => elapsed.as_nanos() as f64,
            };
            if of > 0.0 {
                *shares.entry(class.clone()).or_default() += busy / (of * work.capacity.max(1) as f64);
            }
        }
    }
    shares.into_iter().map(|(class, share)| (class, share.min(1.0) as f32)).collect()
}

#[cfg(test)]
mod tests;
