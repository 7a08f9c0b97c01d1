//! The GPUs of this machine, as the kernel lists them on the PCI bus.

use super::{PciAddress, PciId, SystemRoot, names, number, text};
use serde::{Deserialize, Serialize};
use std::path::{Path, PathBuf};

/// The kernel's driver of a GPU.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct KernelDriver {
    /// Its name, such as `xe`, `i915`, `amdgpu` or `nvidia`.
    pub name: String,
    /// Its version; that of the kernel if it is part of it.
    pub version: Option<String>,
}

/// A GPU on the PCI bus.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Gpu {
    /// Where it is plugged in.
    pub address: PciAddress,
    /// Its vendor and product.
    pub id: PciId,
    /// Its name, where the machine has the list of PCI ids.
    pub name: Option<String>,
    /// The driver that is bound to it.
    pub driver: Option<KernelDriver>,
    /// The file through which programs compute on it, such as `/dev/dri/renderD128`.
    pub render_node: Option<PathBuf>,
    /// Whether it is a part of the processor, and uses the machine's memory. `None`: unknown.
    pub is_integrated: Option<bool>,
    /// Its own memory.
    pub memory_bytes: Option<u64>,
}

impl Gpu {
    /// Its name, or what is known instead.
    pub fn shown_name(&self) -> String {
        self.name.clone().unwrap_or_else(|| format!("{} GPU {}", self.id.vendor_name(), self.id))
    }
}

/// Where the kernel lists PCI devices.
const PCI_DEVICES: &str = "sys/bus/pci/devices";

/// Base classes of the PCI Code and ID Assignment Specification, revision 1.4 and later.
const DISPLAY: u32 = 0x03;
const ACCELERATOR: u32 = 0x12;

/// Lists the GPUs of Intel, AMD and NVIDIA, by address. Display adapters of servers and virtual machines do not
/// compute.
pub fn gpus(root: &SystemRoot) -> Vec<Gpu> {
    let folder = root.path(PCI_DEVICES);
    let mut gpus: Vec<Gpu> = names(&folder).iter().filter_map(|name| gpu(root, name)).collect();
    gpus.sort_by_key(|gpu| gpu.address);
    gpus
}

fn gpu(root: &SystemRoot, name: &str) -> Option<Gpu> {
    let address: PciAddress = name.parse().ok()?;
    let folder = root.path(PCI_DEVICES).join(name);
    let class = hexadecimal(&folder.join("class"))? >> 16;
    let half = |file: &str| u16::try_from(hexadecimal(&folder.join(file))?).ok();
    let id = PciId { vendor: half("vendor")?, product: half("device")? };
    let is_gpu = match id.vendor {
        PciId::INTEL | PciId::NVIDIA => class == DISPLAY,
        // Cards for servers alone are accelerators.
        PciId::AMD => class == DISPLAY || class == ACCELERATOR,
        _ => false,
    };
    if !is_gpu {
        return None;
    }
    let driver = std::fs::read_link(folder.join("driver")).ok();
    let driver = driver.and_then(|path| Some(path.file_name()?.to_str()?.to_owned()));
    let render = names(&folder.join("drm")).into_iter().find(|name| name.starts_with("renderD"));
    Some(Gpu {
        address,
        id,
        name: product_name(root, id),
        driver: driver.map(|name| KernelDriver { version: driver_version(root, &name), name }),
        render_node: render.map(|name| Path::new("/dev/dri").join(name)),
        is_integrated: is_integrated(id, address, &folder),
        memory_bytes: number(&folder.join("mem_info_vram_total")),
    })
}

/// Whether a GPU is a part of the processor. Intel's integrated GPUs are device 2 of the root bus, and its cards are
/// not. AMD's have a sensor for the voltage of the northbridge, `vddnb`.
fn is_integrated(id: PciId, address: PciAddress, folder: &Path) -> Option<bool> {
    match id.vendor {
        PciId::INTEL => Some((address.bus, address.device) == (0, 2)),
        PciId::AMD => {
            let sensors = names(&folder.join("hwmon")).into_iter().map(|name| folder.join("hwmon").join(name));
            let labels = sensors.flat_map(|sensors| {
                let labels =
                    names(&sensors).into_iter().filter(|name| name.starts_with("in") && name.ends_with("_label"));
                labels.filter_map(move |label| text(&sensors.join(label))).collect::<Vec<_>>()
            });
            let labels: Vec<String> = labels.collect();
            (!labels.is_empty()).then(|| labels.iter().any(|label| label == "vddnb"))
        }
        _ => None,
    }
}

/// A number such as `0x8086`.
fn hexadecimal(path: &Path) -> Option<u32> {
    u32::from_str_radix(text(path)?.strip_prefix("0x")?, 16).ok()
}

fn driver_version(root: &SystemRoot, driver: &str) -> Option<String> {
    let own = root.text(format!("sys/module/{driver}/version"));
    own.or_else(|| Some(format!("Linux {}", root.text("proc/sys/kernel/osrelease")?)))
}

/// Where distributions put the list of PCI ids: Debian, then Fedora and Arch.
const PCI_IDS: [&str; 2] = ["usr/share/misc/pci.ids", "usr/share/hwdata/pci.ids"];

/// The product's name in the list of PCI ids. The text in brackets is what it is sold as.
fn product_name(root: &SystemRoot, id: PciId) -> Option<String> {
    let list = PCI_IDS.iter().find_map(|path| std::fs::read(root.path(path)).ok())?;
    let list = String::from_utf8_lossy(&list);
    let vendor = format!("{:04x}  ", id.vendor);
    let product = format!("\t{:04x}  ", id.product);
    let of_vendor = list.lines().skip_while(|line| !line.starts_with(&vendor)).skip(1);
    let mut products = of_vendor.take_while(|line| line.starts_with('\t') || line.starts_with('#'));
    let name = products.find_map(|line| line.strip_prefix(&product))?.trim();
    let sold_as = name.split_once('[').and_then(|(_, rest)| Some(rest.rsplit_once(']')?.0));
    let (vendor, name) = (id.vendor_name(), sold_as.unwrap_or(name));
    Some(if name.starts_with(&vendor) { name.to_owned() } else { format!("{vendor} {name}") })
}

#[cfg(test)]
mod tests {
    use super::super::recorded::Tree;
    use super::*;

    /// R1.1, R1.3: GPUs are found without any vendor's library, with driver, PCI id, and whether they are integrated.
    #[test]
    fn gpus_are_found_on_the_pci_bus() {
        let tree = Tree::open("battlemage-and-raptor-lake");
        let found = gpus(&tree.root);
        assert_eq!(found.len(), 2, "the network card and the server's display adapter are no GPUs");
        let (integrated, card) = (&found[0], &found[1]);
        assert_eq!((integrated.address.to_string().as_str(), integrated.is_integrated), ("0000:00:02.0", Some(true)));
        assert_eq!(integrated.driver.as_ref().map(|driver| driver.name.as_str()), Some("i915"));
        assert_eq!((card.id.to_string().as_str(), card.is_integrated), ("8086:e20b", Some(false)));
        assert_eq!(card.render_node.as_deref(), Some(Path::new("/dev/dri/renderD129")));
        assert_eq!(card.shown_name(), "Intel Arc B580");
        let version = card.driver.as_ref().and_then(|driver| driver.version.as_deref());
        assert_eq!(version, Some("Linux 6.16.3"));
    }

    #[test]
    fn names_do_not_repeat_the_vendor() {
        let tree = Tree::open("battlemage-and-raptor-lake");
        let list = "8086  Intel Corporation\n\te20b  Lunar Lake [Intel Arc Graphics 130V / 140V]";
        tree.write("usr/share/misc/pci.ids", list);
        assert_eq!(gpus(&tree.root)[1].shown_name(), "Intel Arc Graphics 130V / 140V");
    }

    #[test]
    fn a_gpu_without_a_name_shows_its_numbers() {
        let tree = Tree::open("nvidia-without-driver");
        let found = gpus(&tree.root);
        assert_eq!(found[0].shown_name(), "NVIDIA GPU 10de:2684");
        assert_eq!((found[0].driver.as_ref(), found[0].is_integrated), (None, None));
    }

    #[test]
    fn a_machine_without_pci_has_no_gpu() {
        assert_eq!(gpus(&SystemRoot::at("/nowhere")), []);
    }
}
