//! A measurement of a GPU.

use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;

/// A measurement of a GPU. A value that cannot be read is `None`, never 0.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct GpuSample {
    /// The share of time in which the busiest class of its engines works, 0 to 1, since the last sample.
    pub utilisation: Option<f32>,
    /// The same of each class of engines, under the driver's name, such as `render`, `ccs` or `video`. Classes that
    /// cannot be read are not listed.
    pub utilisation_by_class: BTreeMap<String, f32>,
    /// Its own memory.
    pub memory_total_bytes: Option<u64>,
    /// What of its own memory is in use, by all programs.
    pub memory_used_bytes: Option<u64>,
    /// What of its own memory the processes of this node use.
    pub memory_own_bytes: Option<u64>,
    /// The temperature of the chip.
    pub temperature_celsius: Option<f32>,
    /// The temperature of its memory.
    pub memory_temperature_celsius: Option<f32>,
    /// The power of the card, or of the chip where only that is known, on average since the last sample.
    pub power_watts: Option<f32>,
    /// The limit on its power.
    pub power_limit_watts: Option<f32>,
    /// Its present clock.
    pub clock_mhz: Option<u32>,
    /// Its highest clock.
    pub clock_max_mhz: Option<u32>,
    /// The speed of its fastest fan, in turns a minute.
    pub fan_rpm: Option<u32>,
    /// Why it is slower than it could be, in the driver's words; empty: nothing slows it.
    pub throttle_reasons: Option<Vec<String>>,
}

impl GpuSample {
    /// What of its own memory is free.
    pub fn memory_free_bytes(&self) -> Option<u64> {
        Some(self.memory_total_bytes?.saturating_sub(self.memory_used_bytes?))
    }

    /// Whether all numbers are possible: samples come from other nodes, too.
    pub fn is_plausible(&self) -> bool {
        let shares = self.utilisation_by_class.values().copied().chain(self.utilisation);
        let others =
            [self.temperature_celsius, self.memory_temperature_celsius, self.power_watts, self.power_limit_watts];
        shares.chain(others.into_iter().flatten()).all(f32::is_finite)
    }
}
