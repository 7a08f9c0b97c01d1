//! The vendors' libraries that compute on GPUs, and the devices that they list.

use super::PciAddress;
use serde::{Deserialize, Serialize};

/// The libraries that an engine needs at run time, and what they found.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Runtime {
    /// The engine needs none.
    BuiltIn,
    /// The library that finds the vendors' runtimes is not installed.
    NoLoader,
    /// The library finds no vendor's runtime.
    NoPlatform,
    /// The runtimes that are installed.
    Platforms(Vec<PlatformReport>),
    /// Asking failed, or ended the process that asked.
    Failed {
        /// What happened.
        what: String,
    },
}

/// A vendor's runtime.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PlatformReport {
    /// Its name.
    pub name: String,
    /// Its vendor.
    pub vendor: String,
    /// Its version.
    pub version: String,
    /// The devices that it lists.
    pub devices: Vec<PlatformDevice>,
}

/// A device that a runtime lists.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PlatformDevice {
    /// Its name.
    pub name: String,
    /// Its PCI address, if the runtime tells.
    pub pci_address: Option<PciAddress>,
    /// Why the engine cannot use it; `None`: it can.
    pub refused: Option<String>,
}
