//! What the kernel tells about this machine's GPUs, without any vendor's library.
//!
//! ```text
//! /sys, /proc, /dev ─gpus.rs─► Gpu ─missing.rs─► what an engine still needs to use it, with the remedy
//!                      └─telemetry.rs─► GpuSample: temperature, power, memory, …, of each second
//! ```
//! All paths begin at a [`SystemRoot`], so tests read recorded trees. A value that cannot be read is `None`, never 0.

mod clocks;
mod fdinfo;
mod gpus;
mod hwmon;
mod missing;
#[cfg(target_os = "linux")]
mod nvidia;
mod pci;
#[cfg(test)]
mod recorded;
mod runtime;
mod sample;
mod telemetry;
mod vram;

pub use gpus::{Gpu, KernelDriver, gpus};
pub use missing::{Access, Distribution, Missing, access, missing};
pub use pci::{NotAPciAddress, NotAPciId, PciAddress, PciId};
pub use runtime::{PlatformDevice, PlatformReport, Runtime};
pub use sample::GpuSample;
pub use telemetry::GpuMonitor;

use std::path::{Path, PathBuf};

/// The folder that has `sys`, `proc`, `dev`, `etc` and `usr`: `/`, or a recorded tree.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SystemRoot(PathBuf);

impl Default for SystemRoot {
    fn default() -> Self {
        Self(PathBuf::from("/"))
    }
}

impl SystemRoot {
    /// The tree below `folder`.
    pub fn at(folder: impl Into<PathBuf>) -> Self {
        Self(folder.into())
    }

    /// The path of a file or folder, given without a leading slash.
    fn path(&self, path: impl AsRef<Path>) -> PathBuf {
        self.0.join(path)
    }

    /// The text of a file without the space around it; `None` if it cannot be read.
    fn text(&self, path: impl AsRef<Path>) -> Option<String> {
        text(&self.path(path))
    }
}

/// The text of a file without the space around it; `None` if it cannot be read or is empty.
fn text(path: &Path) -> Option<String> {
    let text = std::fs::read_to_string(path).ok()?;
    Some(text.trim().to_owned()).filter(|text| !text.is_empty())
}

/// A decimal number in a file.
fn number(path: &Path) -> Option<u64> {
    text(path)?.parse().ok()
}

/// The names in a folder, in order; none if it cannot be read.
fn names(folder: &Path) -> Vec<String> {
    let entries = std::fs::read_dir(folder).into_iter().flatten().flatten();
    let mut names: Vec<String> = entries.filter_map(|entry| entry.file_name().into_string().ok()).collect();
    names.sort();
    names
}
