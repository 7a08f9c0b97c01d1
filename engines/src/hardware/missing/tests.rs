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
    Access::Denied { render_node: "/dev/dri/renderD128".into(), group: Some("render".to_owned()) }
}

/// R1.2: each missing piece is told apart, the first one first, with its remedy.
#[test]
fn each_missing_piece_is_named_with_its_remedy() {
    let with_driver = |name: &str| Gpu { driver: Some(KernelDriver { name: name.to_owned(), version: None }), ..arc() };
    let cpu_runtime = PlatformReport { name: "Intel(R) OpenCL".to_owned(), ..intel_platform(Vec::new()) };
    let platforms = |platforms: Vec<PlatformReport>| Runtime::Platforms(platforms);
    let cases = [
        (Gpu { driver: None, ..arc() }, Access::NoRenderNode, Runtime::NoLoader, "no driver", "newer kernel"),
        (with_driver("vfio-pci"), Access::NoRenderNode, Runtime::NoLoader, "virtual machine", "unbind"),
        (with_driver("simpledrm"), Access::Granted, Runtime::NoLoader, "simpledrm", "xe or i915"),
        (arc(), Access::NoRenderNode, Runtime::NoLoader, "render node", "dmesg"),
        (
            arc(),
            Access::Hidden { render_node: "/dev/dri/renderD128".into() },
            Runtime::NoLoader,
            "does not exist here",
            "docker run --device /dev/dri",
        ),
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

/// R1.2: other vendors: NVIDIA's runtime needs no render node, and a platform for the GPUs of many vendors that refuses
/// a GPU does not stand for the vendor's own.
#[test]
fn other_vendors_have_other_needs() {
    let geforce = Gpu {
        id: PciId { vendor: PciId::NVIDIA, product: 0x2684 },
        driver: Some(KernelDriver { name: "nvidia".to_owned(), version: None }),
        ..arc()
    };
    let missing_of = |gpu: &Gpu, runtime: &Runtime| missing(gpu, &Access::NoRenderNode, runtime).expect("missing");
    let vendor = "NVIDIA".to_owned();
    assert_eq!(missing_of(&geforce, &Runtime::NoPlatform), Missing::VendorRuntime { vendor });
    let nouveau = Gpu { driver: Some(KernelDriver { name: "nouveau".to_owned(), version: None }), ..geforce };
    let remedy = missing_of(&nouveau, &Runtime::NoPlatform).remedy(&nouveau, Distribution::Arch);
    assert!(remedy.contains("pacman -S nvidia-open"), "{remedy}");

    let rusticl = PlatformReport {
        name: "rusticl".to_owned(),
        vendor: "Mesa/X.org".to_owned(),
        ..intel_platform(vec![listed(Some("it has no denormal numbers"))])
    };
    let alone = missing(&arc(), &Access::Granted, &Runtime::Platforms(vec![rusticl.clone()]));
    assert_eq!(alone, Some(Missing::VendorRuntime { vendor: "Intel".to_owned() }));
    let both = Runtime::Platforms(vec![rusticl, intel_platform(vec![listed(None)])]);
    assert_eq!(missing(&arc(), &Access::Granted, &both), None);
}

/// R1.2: the group to join is that of the file, where its members may use it; nobody is told to join root's.
#[test]
fn the_group_to_join_is_that_of_the_file() {
    use std::os::unix::fs::{PermissionsExt, chown};
    let tree = Tree::empty();
    tree.write("dev/dri/renderD128", "");
    tree.write("etc/group", "root:x:0:\nrender:x:992:me\nvideo:x:44:");
    let file = tree.root.path("dev/dri/renderD128");
    let mode = |mode: u32| std::fs::set_permissions(&file, PermissionsExt::from_mode(mode)).expect("set");
    if chown(&file, None, Some(992)).is_err() {
        return println!("SKIPPED: only root gives files to other groups");
    }
    mode(0o660);
    assert_eq!(group_of(&tree.root, &file).as_deref(), Some("render"));
    mode(0o600);
    assert_eq!(group_of(&tree.root, &file), None, "its members may not use it");
    chown(&file, None, Some(0)).expect("changed");
    mode(0o660);
    assert_eq!(group_of(&tree.root, &file), None);
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
    assert_eq!(Distribution::of(&SystemRoot::at("/nowhere")), Distribution::Other);
}

/// R1.2: a render node that does not exist here is told apart from one that the driver does not have.
#[test]
fn access_follows_the_render_node() {
    let tree = Tree::open("battlemage-and-raptor-lake");
    let card = gpus(&tree.root).pop().expect("a card");
    assert_eq!(access(&tree.root, &card), Access::Granted);
    tree.remove("dev/dri/renderD129");
    let render_node = "/dev/dri/renderD129".into();
    assert_eq!(access(&tree.root, &card), Access::Hidden { render_node });
    let without = Gpu { render_node: None, ..card };
    assert_eq!(access(&tree.root, &without), Access::NoRenderNode);
}
