//! What an engine still needs to use a GPU, and how to get it.

use super::{Gpu, PciId, PlatformDevice, PlatformReport, Runtime, SystemRoot};
use serde::{Deserialize, Serialize};
use std::path::{Path, PathBuf};

/// Whether this user may compute on a GPU.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Access {
    /// Yes.
    Granted,
    /// The file of the GPU belongs to others.
    Denied {
        /// The file.
        render_node: PathBuf,
        /// The group whose members may use it.
        group: Option<String>,
    },
    /// The driver has such a file, and this program does not see it: it runs in a container.
    Hidden {
        /// The file.
        render_node: PathBuf,
    },
    /// The driver has no file for programs that compute.
    NoRenderNode,
}

/// The first thing that is missing, in the order in which a user would mend it.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error, Serialize, Deserialize)]
pub enum Missing {
    /// No driver is bound.
    #[error("the kernel has no driver for it")]
    KernelDriver,
    /// It is reserved for a virtual machine.
    #[error("it is reserved for a virtual machine (vfio-pci)")]
    ReservedForVirtualMachine,
    /// The bound driver is not one that the vendor's runtime works with.
    #[error("its kernel driver is {driver}, and the vendor's OpenCL runtime needs {}", needed.join(" or "))]
    OtherDriver {
        /// The driver.
        driver: String,
        /// Those that the runtime works with.
        needed: Vec<String>,
    },
    /// The driver offers no file for programs that compute.
    #[error("its driver offers no render node in /dev/dri")]
    RenderNode,
    /// The file through which programs compute is not there for this program.
    #[error("{} does not exist here", render_node.display())]
    HiddenRenderNode {
        /// The file.
        render_node: PathBuf,
    },
    /// This user may not open the file.
    #[error("this user may not open {}", render_node.display())]
    Permission {
        /// The file.
        render_node: PathBuf,
        /// The group whose members may open it.
        group: Option<String>,
    },
    /// `libOpenCL.so.1` is not installed.
    #[error("the OpenCL loader, libOpenCL.so.1, is not installed")]
    Loader,
    /// The vendor's runtime is not installed.
    #[error("no OpenCL runtime for GPUs of {vendor} is installed")]
    VendorRuntime {
        /// The vendor.
        vendor: String,
    },
    /// The vendor's runtime is installed, and does not list the GPU.
    #[error("the OpenCL runtime {runtime} does not list it")]
    NotListed {
        /// The runtime and its version.
        runtime: String,
    },
    /// The GPU cannot compute what engines need.
    #[error("{why}")]
    Unsuitable {
        /// What it lacks.
        why: String,
    },
    /// The runtimes could not be asked.
    #[error("the OpenCL runtimes could not be asked: {what}")]
    RuntimeFailed {
        /// What happened.
        what: String,
    },
}

/// A family of Linux distributions, which share names of packages.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Distribution {
    /// Debian, Ubuntu and their derivatives.
    Debian,
    /// Fedora and its derivatives.
    Fedora,
    /// Arch and its derivatives.
    Arch,
    /// NixOS.
    NixOs,
    /// Any other.
    Other,
}

impl Distribution {
    /// The distribution of this machine, by `etc/os-release` (the manual page `os-release(5)`).
    pub fn of(root: &SystemRoot) -> Self {
        let release = root.text("etc/os-release").unwrap_or_default();
        let values =
            ["ID=", "ID_LIKE="].iter().filter_map(|key| release.lines().find_map(|line| line.strip_prefix(key)));
        let families = values.flat_map(|value| value.trim_matches('"').split_whitespace());
        let known = families.filter_map(|family| match family {
            "debian" | "ubuntu" => Some(Self::Debian),
            "fedora" | "rhel" => Some(Self::Fedora),
            "arch" => Some(Self::Arch),
            "nixos" => Some(Self::NixOs),
            _ => None,
        });
        known.into_iter().next().unwrap_or(Self::Other)
    }
}

/// Whether this user may open the render node of a GPU.
pub fn access(root: &SystemRoot, gpu: &Gpu) -> Access {
    let Some(render_node) = gpu.render_node.clone() else { return Access::NoRenderNode };
    let path = root.path(render_node.strip_prefix("/").unwrap_or(&render_node));
    match path.exists() {
        false => Access::Hidden { render_node },
        true if may_open(&path) => Access::Granted,
        true => Access::Denied { group: group_of(root, &path), render_node },
    }
}

#[cfg(unix)]
fn may_open(path: &Path) -> bool {
    use rustix::fs::Access;
    rustix::fs::access(path, Access::READ_OK | Access::WRITE_OK).is_ok()
}

#[cfg(not(unix))]
fn may_open(_: &Path) -> bool {
    true
}

/// The group whose members may read and write a file; `None` if there is none but root's.
#[cfg(unix)]
fn group_of(root: &SystemRoot, path: &Path) -> Option<String> {
    use std::os::unix::fs::MetadataExt;
    let metadata = path.metadata().ok()?;
    if metadata.gid() == 0 || metadata.mode() & 0o060 != 0o060 {
        return None;
    }
    let groups = root.text("etc/group")?;
    groups.lines().find_map(|line| {
        let mut fields = line.split(':');
        let name = fields.next()?;
        (fields.nth(1)? == metadata.gid().to_string()).then(|| name.to_owned())
    })
}

#[cfg(not(unix))]
fn group_of(_: &SystemRoot, _: &Path) -> Option<String> {
    None
}

/// Kernel drivers with which a vendor's OpenCL runtime works.
fn drivers(vendor: u16) -> &'static [&'static str] {
    match vendor {
        PciId::INTEL => &["xe", "i915"],
        PciId::AMD => &["amdgpu"],
        _ => &["nvidia"],
    }
}

/// What is missing between a GPU and an engine that does not list it. `None` if the runtime lists it as usable.
pub fn missing(gpu: &Gpu, access: &Access, runtime: &Runtime) -> Option<Missing> {
    let Some(driver) = &gpu.driver else { return Some(Missing::KernelDriver) };
    let driver = driver.name.as_str();
    if driver == "vfio-pci" {
        return Some(Missing::ReservedForVirtualMachine);
    }
    if !drivers(gpu.id.vendor).contains(&driver) {
        let needed = drivers(gpu.id.vendor).iter().map(|&name| name.to_owned()).collect();
        return Some(Missing::OtherDriver { driver: driver.to_owned(), needed });
    }
    // NVIDIA's runtime uses device files of its own.
    if gpu.id.vendor != PciId::NVIDIA {
        match access {
            Access::Granted => {}
            Access::NoRenderNode => return Some(Missing::RenderNode),
            Access::Hidden { render_node } => {
                return Some(Missing::HiddenRenderNode { render_node: render_node.clone() });
            }
            Access::Denied { render_node, group } => {
                return Some(Missing::Permission { render_node: render_node.clone(), group: group.clone() });
            }
        }
    }
    let vendor = gpu.id.vendor_name();
    let platforms = match runtime {
        Runtime::BuiltIn => return None,
        Runtime::NoLoader => return Some(Missing::Loader),
        Runtime::NoPlatform => return Some(Missing::VendorRuntime { vendor }),
        Runtime::Failed { what } => return Some(Missing::RuntimeFailed { what: what.clone() }),
        Runtime::Platforms(platforms) => platforms,
    };
    let is_it = |device: &&PlatformDevice| device.pci_address == Some(gpu.address);
    let mut listed = platforms.iter().flat_map(|platform| &platform.devices).filter(is_it);
    if listed.any(|device| device.refused.is_none()) {
        return None;
    }
    // A platform for the GPUs of many vendors may refuse what the vendor's own one does not.
    let Some(own) = platforms.iter().find(|platform| is_of(platform, &vendor)) else {
        return Some(Missing::VendorRuntime { vendor });
    };
    let refused = own.devices.iter().filter(is_it).find_map(|device| device.refused.clone());
    let runtime = format!("{} ({})", own.name, own.version);
    Some(refused.map_or(Missing::NotListed { runtime }, |why| Missing::Unsuitable { why }))
}

/// Whether a platform is the vendor's own one for GPUs.
fn is_of(platform: &PlatformReport, vendor: &str) -> bool {
    let names_vendor = |text: &str| text.contains(vendor) || vendor == "AMD" && text.contains("Advanced Micro Devices");
    // Intel's runtime for the CPU and its emulator of FPGAs.
    let is_for_gpus =
        !platform.name.contains("CPU") && !platform.name.contains("FPGA") && platform.name != "Intel(R) OpenCL";
    is_for_gpus && (names_vendor(&platform.vendor) || names_vendor(&platform.name))
}

impl Missing {
    /// What the user can do about it on this distribution.
    pub fn remedy(&self, gpu: &Gpu, distribution: Distribution) -> String {
        let vendor = gpu.id.vendor;
        match self {
            Self::KernelDriver => match vendor {
                PciId::NVIDIA => format!("install NVIDIA's driver{}", with_command(nvidia_driver(distribution))),
                _ => "install a newer kernel and its firmware packages (linux-firmware)".to_owned(),
            },
            Self::ReservedForVirtualMachine => "give it back to this machine: unbind vfio-pci".to_owned(),
            Self::OtherDriver { .. } => match vendor {
                PciId::NVIDIA => format!("install NVIDIA's own driver{}", with_command(nvidia_driver(distribution))),
                PciId::AMD => "boot with the driver amdgpu; GPUs before 2012 do not have it".to_owned(),
                _ => "boot with the driver xe or i915".to_owned(),
            },
            Self::RenderNode => "see the kernel's log (`dmesg`) for why the driver did not start the GPU".to_owned(),
            Self::HiddenRenderNode { .. } => {
                "in a container, pass the GPU in: `docker run --device /dev/dri`; elsewhere, restart udev".to_owned()
            }
            Self::Permission { group: Some(group), .. } => join_group_command(group, distribution),
            Self::Permission { group: None, render_node } => {
                format!("let this user read and write {}", render_node.display())
            }
            Self::Loader => format!("install the OpenCL loader{}", with_command(loader(distribution))),
            Self::VendorRuntime { vendor: name } => {
                format!("install the OpenCL runtime of {name}{}", with_command(runtime_package(vendor, distribution)))
            }
            Self::NotListed { .. } => format!(
                "install a newer version of the runtime{}, which supports this GPU",
                with_command(runtime_package(vendor, distribution))
            ),
            Self::Unsuitable { .. } => "use the CPU on this machine".to_owned(),
            Self::RuntimeFailed { .. } => "reinstall or update the OpenCL runtimes, and look at `clinfo`".to_owned(),
        }
    }
}

fn with_command(package: Option<&str>) -> String {
    package.map_or(String::new(), |package| format!(": {package}"))
}

fn join_group_command(group: &str, distribution: Distribution) -> String {
    match distribution {
        Distribution::NixOs => format!("add \"{group}\" to users.users.<name>.extraGroups, and log in again"),
        _ => format!("sudo usermod -aG {group} \"$USER\", and log in again"),
    }
}

fn loader(distribution: Distribution) -> Option<&'static str> {
    Some(match distribution {
        Distribution::Debian => "sudo apt install ocl-icd-libopencl1",
        Distribution::Fedora => "sudo dnf install OpenCL-ICD-Loader",
        Distribution::Arch => "sudo pacman -S ocl-icd",
        Distribution::NixOs => "hardware.graphics.enable = true, and pkgs.ocl-icd in the service's library path",
        Distribution::Other => return None,
    })
}

fn runtime_package(vendor: u16, distribution: Distribution) -> Option<&'static str> {
    Some(match (vendor, distribution) {
        (PciId::INTEL, Distribution::Debian) => "sudo apt install intel-opencl-icd",
        (PciId::INTEL, Distribution::Fedora) => "sudo dnf install intel-compute-runtime",
        (PciId::INTEL, Distribution::Arch) => "sudo pacman -S intel-compute-runtime",
        (PciId::INTEL, Distribution::NixOs) => "hardware.graphics.extraPackages = [ pkgs.intel-compute-runtime ]",
        (PciId::AMD, Distribution::Debian) => "rocm-opencl-runtime, from AMD's ROCm repository",
        (PciId::AMD, Distribution::Fedora) => "sudo dnf install rocm-opencl",
        (PciId::AMD, Distribution::Arch) => "sudo pacman -S rocm-opencl-runtime",
        (PciId::AMD, Distribution::NixOs) => "hardware.graphics.extraPackages = [ pkgs.rocmPackages.clr.icd ]",
        (PciId::NVIDIA, Distribution::Debian) => {
            "sudo apt install nvidia-opencl-icd on Debian; Ubuntu has it in libnvidia-compute of the driver's version"
        }
        (PciId::NVIDIA, Distribution::Fedora) => "sudo dnf install xorg-x11-drv-nvidia-cuda-libs, of RPM Fusion",
        (PciId::NVIDIA, Distribution::Arch) => "sudo pacman -S opencl-nvidia",
        _ => return None,
    })
}

fn nvidia_driver(distribution: Distribution) -> Option<&'static str> {
    Some(match distribution {
        Distribution::Debian => "sudo apt install nvidia-driver on Debian, sudo ubuntu-drivers install on Ubuntu",
        Distribution::Fedora => "sudo dnf install akmod-nvidia, of RPM Fusion",
        Distribution::Arch => "sudo pacman -S nvidia-open",
        Distribution::NixOs => "services.xserver.videoDrivers = [ \"nvidia\" ]",
        Distribution::Other => return None,
    })
}

#[cfg(test)]
mod tests;
