//! The clock of a GPU, and what slows it: files of the drivers `xe` and `i915`.
//!
//! `xe` (Linux 6.8 and later): `tile*/gt*/freq0/` of the PCI device. `i915`: `gt/gt*/` of the card, or before Linux
//! 5.19 `gt_*_freq_mhz` there. All are in MHz. The graphics engines are `gt0`.

use super::{names, number, text};
use std::path::Path;

/// The clock of the graphics engines.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct Clocks {
    pub(super) clock_mhz: Option<u32>,
    pub(super) clock_max_mhz: Option<u32>,
    pub(super) throttle_reasons: Option<Vec<String>>,
    /// Milliseconds in which the graphics engines were off, counted since the driver started.
    pub(super) idle_ms: Option<u64>,
}

/// Reads the files of the driver `xe` in the folder of a PCI device.
pub(super) fn of_xe(folder: &Path) -> Clocks {
    let tile = names(folder).into_iter().find(|name| name.starts_with("tile"));
    let Some(gt) = tile.map(|tile| folder.join(tile).join("gt0")) else { return Clocks::default() };
    let frequency = gt.join("freq0");
    let throttle = frequency.join("throttle");
    let files = names(&throttle);
    let reasons = files.iter().filter_map(|name| Some((name, name.strip_prefix("reason_")?)));
    Clocks {
        clock_mhz: mhz(&frequency.join("act_freq")),
        clock_max_mhz: mhz(&frequency.join("rp0_freq")),
        throttle_reasons: (!files.is_empty()).then(|| {
            let active = reasons.filter(|(file, _)| number(&throttle.join(file)) == Some(1));
            active.map(|(_, reason)| reason.to_owned()).collect()
        }),
        idle_ms: number(&gt.join("gtidle/idle_residency_ms")),
    }
}

/// Reads the files of the driver `i915` in the folder of a card, such as `drm/card0`.
pub(super) fn of_i915(card: &Path) -> Clocks {
    let gt = card.join("gt/gt0");
    let either = |new: &str, old: &str| mhz(&gt.join(new)).or_else(|| mhz(&card.join(old)));
    let files = names(&gt);
    let prefix = "throttle_reason_";
    let reasons: Vec<&str> = files.iter().filter_map(|name| name.strip_prefix(prefix)).collect();
    Clocks {
        clock_mhz: either("rps_act_freq_mhz", "gt_act_freq_mhz"),
        clock_max_mhz: either("rps_RP0_freq_mhz", "gt_RP0_freq_mhz"),
        throttle_reasons: (!reasons.is_empty()).then(|| {
            let is_active =
                |reason: &&&str| **reason != "status" && number(&gt.join(format!("{prefix}{reason}"))) == Some(1);
            reasons.iter().filter(is_active).map(|reason| (*reason).to_owned()).collect()
        }),
        idle_ms: number(&gt.join("rc6_residency_ms")).or_else(|| number(&card.join("power/rc6_residency_ms"))),
    }
}

/// A clock; 0 while the engines are off.
fn mhz(path: &Path) -> Option<u32> {
    text(path)?.parse().ok()
}
