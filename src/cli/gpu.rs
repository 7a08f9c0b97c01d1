//! A GPU in words: its name, and what its sensors show.

use exo_actors::core::status::GpuStatus;
use exo_engines::hardware::GpuSample;

/// Bytes in units of 10⁹.
pub(super) fn gigabytes(bytes: u64) -> String {
    format!("{:.1} GB", bytes as f64 / 1e9)
}

/// The name of a GPU, with its PCI id, and whether it is a card.
pub(super) fn title(status: &GpuStatus) -> String {
    let gpu = &status.gpu;
    let kind = match gpu.is_integrated {
        Some(true) => ", integrated",
        Some(false) => ", a card",
        None => "",
    };
    let driver = gpu.driver.as_ref().map_or(String::new(), |driver| {
        let version = driver.version.as_ref().map_or(String::new(), |version| format!(" ({version})"));
        format!(", driver {}{version}", driver.name)
    });
    format!("{} [{}]{kind}{driver}", gpu.name.as_deref().unwrap_or("GPU"), gpu.id)
}

/// What the sensors of a GPU show, in words; unknown values are left out.
pub(super) fn readings(sample: &GpuSample) -> Vec<String> {
    let mut parts = Vec::new();
    parts.extend(sample.utilisation.map(|share| format!("{:.0} % busy", share * 100.0)));
    parts.extend(sample.memory_total_bytes.map(|total| match sample.memory_free_bytes() {
        Some(free) => format!("{} of {} free", gigabytes(free), gigabytes(total)),
        None => gigabytes(total),
    }));
    parts.extend(sample.temperature_celsius.map(|celsius| format!("{celsius:.0} °C")));
    parts.extend(sample.memory_temperature_celsius.map(|celsius| format!("memory {celsius:.0} °C")));
    let limit = sample.power_limit_watts.map_or(String::new(), |limit| format!(" of {limit:.0} W"));
    parts.extend(sample.power_watts.map(|watts| format!("{watts:.0} W{limit}")));
    let clock_max = sample.clock_max_mhz.map_or(String::new(), |clock| format!(" of {clock} MHz"));
    parts.extend(sample.clock_mhz.map(|clock| match clock {
        0 => "clock off".to_owned(),
        clock => format!("{clock} MHz{clock_max}"),
    }));
    parts.extend(sample.fan_rpm.map(|rpm| format!("fan {rpm} rpm")));
    parts
}

/// Why a GPU is slower than it could be, as its driver says; `None`: nothing slows it, or the driver does not tell.
pub(super) fn slowed_by(sample: &GpuSample) -> Option<String> {
    let reasons = sample.throttle_reasons.as_deref().unwrap_or_default().join(", ");
    (!reasons.is_empty()).then(|| format!("slowed by {reasons}"))
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;
    use exo_actors::core::status::Unused;
    use exo_engines::hardware::{Gpu, PciId};

    /// A card without a driver.
    pub(crate) fn card() -> GpuStatus {
        let gpu = Gpu {
            address: "0000:03:00.0".parse().expect("an address"),
            id: PciId { vendor: PciId::INTEL, product: 0xe20b },
            name: Some("Intel Arc B580".to_owned()),
            driver: None,
            render_node: None,
            is_integrated: Some(false),
            memory_bytes: None,
        };
        let (error, remedy) = ("the kernel has no driver for it".to_owned(), "install a newer kernel".to_owned());
        GpuStatus { gpu, unused: Some(Unused { error, remedy }), sample: None }
    }

    /// R2.1–R2.5: unknown values are left out, and a clock of 0 is one that is off.
    #[test]
    fn readings_leave_unknown_values_out() {
        assert_eq!(title(&card()), "Intel Arc B580 [8086:e20b], a card");
        assert_eq!(readings(&GpuSample::default()), [""; 0]);
        let sample = GpuSample {
            memory_total_bytes: Some(12_000_000_000),
            power_limit_watts: Some(190.0),
            clock_mhz: Some(0),
            throttle_reasons: Some(Vec::new()),
            ..GpuSample::default()
        };
        assert_eq!(readings(&sample), ["12.0 GB", "clock off"]);
        assert_eq!(slowed_by(&sample), None);
        let busy = GpuSample { memory_used_bytes: Some(4_000_000_000), power_watts: Some(95.4), ..sample };
        assert_eq!(readings(&busy), ["8.0 GB of 12.0 GB free", "95 W of 190 W", "clock off"]);
    }
}
