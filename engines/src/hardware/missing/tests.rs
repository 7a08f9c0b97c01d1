//! What is missing, its remedies, and what they are found by.

use super::super::recorded::Tree;
use super::super::{KernelDriver, PciAddress, gpus};
use super::*;

fn arc() -> Gpu {
    Gpu {
        address: PciAddress { domain: 0, bus: 3, device: 0, function: 0 },
        id: PciId { vendor: PciId::INTEL, product: 0xe20b },
        name: Some("Intel Arc B580".to_owned()),
        driver: Some(KernelDriver { name: "xe".to_owned(), version: None }),
        render_node: Some("/dev/dri/renderD128".into()),
        is_integrated: Some(false),
        memory_bytes: None,
    }
}

fn intel_platform(devices: Vec<PlatformDevice>) -> PlatformReport {
    PlatformReport {
        name: "Intel(R) OpenCL Graphics".to_owned(),
        vendor: "Intel(R) Corporation".to_owned(),
        version: "OpenCL 3.0".to_owned(),
        devices,
    }
}

fn listed(refused: Option<&str>) -> PlatformDevice {
    let refused = refused.map(str::to_owned);
    PlatformDevice { name: "Intel(R) Arc(TM) B580".to_owned(), pci_address: Some(arc().address), refused }
}

fn denied() -> Access {
    Access::Denied { node: "/dev/dri/renderD128".into(), group: Some("render".to_owned()) }
}

/// R1.2: each missing piece is told apart, the first one first, with its remedy.
#[test]
fn each_missing_piece_is_named_with_its_remedy() {
    let with_driver = |name: &str| Gpu { driver: Some(KernelDriver { name: name.to_owned(), version: None }), ..arc() };
    let cpu_runtime = PlatformReport { name: "Intel(R) OpenCL".to_owned(), ..intel_platform(Vec::new()) };
    let platforms = |platforms: Vec<PlatformReport>| Runtime::Platforms(platforms);
    let cases = [
        (Gpu { driver: None, ..arc() }, Access::NoNode, Runtime::NoLoader, "no driver", "newer kernel"),
        (with_driver("vfio-pci"), Access::NoNode, Runtime::NoLoader, "virtual machine", "unbind"),
        (with_driver("simpledrm"), Access::Granted, Runtime::NoLoader, "simpledrm", "xe or i915"),
        (arc(), Access::NoNode, Runtime::NoLoader, "render node", "dmesg"),
        (arc(), denied(), Runtime::NoLoader, "may not open /dev/dri/renderD128", "usermod -aG render"),
        (arc(), Access::Granted, Runtime::NoLoader, "libOpenCL.so.1", "ocl-icd-libopencl1"),
        (arc(), Access::Granted, Runtime::NoPlatform, "no OpenCL runtime for GPUs of Intel", "intel-opencl-icd"),
        (arc(), Access::Granted, platforms(vec![cpu_runtime]), "no OpenCL runtime for GPUs", "intel-opencl-icd"),
        (arc(), Access::Granted, platforms(vec![intel_platform(vec![])]), "does not list it", "newer version"),
        (
            arc(),
            Access::Granted,
            platforms(vec![intel_platform(vec![listed(Some("it has no denormal numbers"))])]),
            "no denormal numbers",
            "CPU",
        ),
        (arc(), Access::Granted, Runtime::Failed { what: "killed".to_owned() }, "killed", "clinfo"),
    ];
    for (gpu, access, runtime, what, remedy) in cases {
        let missing = missing(&gpu, &access, &runtime).expect("something is missing");
        assert!(missing.to_string().contains(what), "{missing}: {what}");
        let text = missing.remedy(&gpu, Distribution::Debian);
        assert!(text.contains(remedy), "{missing}: {text}");
    }
    let usable = Runtime::Platforms(vec![intel_platform(vec![listed(None)])]);
    assert_eq!(missing(&arc(), &Access::Granted, &usable), None);
}

/// R1.2: on every distribution the remedy names its own package.
#[test]
fn remedies_name_packages_of_the_distribution() {
    let missing = Missing::VendorRuntime { vendor: "Intel".to_owned() };
    let remedy = |distribution| missing.remedy(&arc(), distribution);
    assert!(remedy(Distribution::Fedora).contains("dnf install intel-compute-runtime"));
    assert!(remedy(Distribution::Arch).contains("pacman -S intel-compute-runtime"));
    assert!(remedy(Distribution::NixOs).contains("pkgs.intel-compute-runtime"));
    assert_eq!(remedy(Distribution::Other), "install the OpenCL runtime of Intel");
}

#[test]
fn distributions_are_told_by_their_families() {
    let of = |text: &str| {
        let tree = Tree::empty();
        tree.write("etc/os-release", text);
        Distribution::of(&tree.root)
    };
    assert_eq!(of("ID=debian"), Distribution::Debian);
    assert_eq!(of("NAME=x\nID=linuxmint\nID_LIKE=\"ubuntu debian\""), Distribution::Debian);
    assert_eq!(of("ID=\"rocky\"\nID_LIKE=\"rhel centos fedora\""), Distribution::Fedora);
    assert_eq!(of("ID=nixos"), Distribution::NixOs);
    assert_eq!(of("ID=plan9"), Distribution::Other);
    assert_eq!(Distribution::of(&Root::at("/nowhere")), Distribution::Other);
}

/// R1.2: a render node that does not exist, or that others own, is told apart from one that may be used.
#[test]
fn access_follows_the_render_node() {
    let tree = Tree::open("battlemage-and-raptor-lake");
    let card = gpus(&tree.root).pop().expect("a card");
    assert_eq!(access(&tree.root, &card), Access::Granted);
    tree.remove("dev/dri/renderD129");
    assert_eq!(access(&tree.root, &card), Access::NoNode);
    let without = Gpu { render_node: None, ..card };
    assert_eq!(access(&tree.root, &without), Access::NoNode);
}
