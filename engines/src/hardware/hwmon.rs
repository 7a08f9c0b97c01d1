//! Sensors of a GPU: the files of the kernel's `hwmon` class, chosen by their labels.
//!
//! Formats: the kernel's `Documentation/hwmon/sysfs-interface.rst`, and `Documentation/ABI/testing/` of `xe`, `i915`
//! and `amdgpu`. Temperatures are in thousandths of a degree, power in microwatts, energy in microjoules, frequency in
//! hertz. Numbers in names differ between products and kernels, and labels do not; `i915` has no labels.

use super::{names, number, text};
use std::path::{Path, PathBuf};

/// What the sensors show.
#[derive(Debug, Clone, Default, PartialEq)]
pub(super) struct Sensors {
    pub(super) temperature_celsius: Option<f32>,
    pub(super) memory_temperature_celsius: Option<f32>,
    pub(super) power_watts: Option<f32>,
    pub(super) power_limit_watts: Option<f32>,
    /// Counters of energy, that of the card first.
    pub(super) energy_microjoules: Vec<(PathBuf, u64)>,
    pub(super) clock_mhz: Option<u32>,
    pub(super) fan_rpm: Option<u32>,
}

/// Labels of what is measured, best first. A file without a label has the label "".
const CHIP: [&str; 3] = ["pkg", "edge", ""];
const MEMORY: [&str; 2] = ["vram", "mem"];
const POWER: [&str; 5] = ["card", "PPT", "slowPPT", "pkg", ""];

/// Reads the sensors of the PCI device in `folder`.
pub(super) fn read(folder: &Path) -> Sensors {
    let hwmon = folder.join("hwmon");
    // A device of several tiles has a folder for each, whose names end in `_gt` and a number.
    let whole = names(&hwmon).into_iter().map(|name| hwmon.join(name)).find(|folder| {
        let name = text(&folder.join("name"));
        name.is_some_and(|name| !name.contains("_gt"))
    });
    let Some(folder) = whole else { return Sensors::default() };
    let thousandths = |labels: &[&str]| Some(value(&folder, "temp", labels, "input")? as f32 / 1e3);
    let watts = |file: &str| value(&folder, "power", &POWER, file).map(|power| power as f32 / 1e6);
    let fans = channels(&folder, "fan").into_iter().filter_map(|channel| number(&channel.file("input")));
    let clock = value(&folder, "freq", &["sclk"], "input").map(|hertz| hertz / 1_000_000);
    let mut energy: Vec<(usize, PathBuf)> = channels(&folder, "energy")
        .into_iter()
        .filter_map(|channel| Some((channel.rank(&POWER)?, channel.file("input"))))
        .collect();
    energy.sort();
    Sensors {
        temperature_celsius: thousandths(&CHIP),
        memory_temperature_celsius: thousandths(&MEMORY),
        power_watts: watts("average").or_else(|| watts("input")),
        // `crit` is where the card cuts its power off, not what it may take.
        power_limit_watts: watts("max").or_else(|| watts("cap")).or_else(|| watts("rated_max")),
        energy_microjoules: energy.into_iter().filter_map(|(_, file)| Some((file.clone(), number(&file)?))).collect(),
        clock_mhz: clock.and_then(|clock| u32::try_from(clock).ok()),
        fan_rpm: fans.max().and_then(|rpm| u32::try_from(rpm).ok()),
    }
}

/// A numbered sensor, such as `temp2`, with its label.
#[derive(Debug)]
struct Channel {
    prefix: PathBuf,
    label: String,
}

impl Channel {
    fn file(&self, name: &str) -> PathBuf {
        let mut file = self.prefix.clone().into_os_string();
        file.push(format!("_{name}"));
        file.into()
    }

    /// The place of its label among `labels`.
    fn rank(&self, labels: &[&str]) -> Option<usize> {
        labels.iter().position(|label| *label == self.label)
    }
}

/// The sensors of a kind: those that have any file.
fn channels(folder: &Path, kind: &str) -> Vec<Channel> {
    let number = |name: &str| -> Option<u32> { name.strip_prefix(kind)?.split_once('_')?.0.parse().ok() };
    let mut numbers: Vec<u32> = names(folder).iter().filter_map(|name| number(name)).collect();
    numbers.sort_unstable();
    numbers.dedup();
    let channel = |number: u32| {
        let prefix = folder.join(format!("{kind}{number}"));
        let label = text(&folder.join(format!("{kind}{number}_label"))).unwrap_or_default();
        Channel { prefix, label }
    };
    numbers.into_iter().map(channel).collect()
}

/// The value of a sensor's file, of the first of `labels` that has it.
fn value(folder: &Path, kind: &str, labels: &[&str], file: &str) -> Option<i64> {
    let mut channels: Vec<(usize, Channel)> =
        channels(folder, kind).into_iter().filter_map(|channel| Some((channel.rank(labels)?, channel))).collect();
    channels.sort_by_key(|(rank, _)| *rank);
    channels.iter().find_map(|(_, channel)| {
        let value: i64 = text(&channel.file(file))?.parse().ok()?;
        // A power of 0 is that of a limit that is not set.
        Some(value).filter(|&value| value > 0 || kind != "power")
    })
}
