//! Measurements of recorded trees.

use super::super::gpus;
use super::super::recorded::Tree;
use super::*;

const SECOND: Duration = Duration::from_secs(1);
/// A process of this node, and one of another program.
const OWN: u32 = 4711;
const OTHER: u32 = 815;

fn monitor(tree: &Tree) -> GpuMonitor {
    GpuMonitor::new(tree.root.clone(), gpus(&tree.root))
}

/// The only GPU's sample.
fn first(tree: &Tree) -> GpuSample {
    let samples = monitor(tree).sample(SECOND, &[]);
    samples.into_values().next_back().expect("a GPU")
}

/// Lets a process have an open file of a GPU.
fn open(tree: &Tree, process: u32, file: u32, fdinfo: &str) {
    let link = format!("proc/{process}/fd/{file}");
    if std::fs::symlink_metadata(tree.root.path(&link)).is_err() {
        tree.link(&link, "/dev/dri/renderD129");
    }
    tree.write(&format!("proc/{process}/fdinfo/{file}"), fdinfo);
}

fn client(number: u64, cycles: u64, total: u64, memory: &str) -> String {
    format!(
        "pos:\t0\ndrm-driver:\txe\ndrm-client-id:\t{number}\ndrm-pdev:\t0000:03:00.0\ndrm-total-system:\t1 GiB\n\
         drm-resident-vram0:\t{memory}\ndrm-cycles-ccs:\t{cycles}\ndrm-total-cycles-ccs:\t{total}\n\
         drm-engine-capacity-ccs:\t4\ndrm-cycles-rcs:\t0\ndrm-total-cycles-rcs:\t{total}"
    )
}

/// R2.1–R2.5: a card on xe, before and since Linux 7.0: sensors are chosen by their labels, and what is not told is
/// unknown.
#[test]
fn cards_on_xe_are_measured() {
    let sample = first(&Tree::open("battlemage-and-raptor-lake"));
    let expected = GpuSample {
        memory_own_bytes: Some(0),
        temperature_celsius: Some(46.0),
        memory_temperature_celsius: Some(48.0),
        clock_mhz: Some(400),
        clock_max_mhz: Some(2850),
        fan_rpm: Some(418),
        throttle_reasons: Some(Vec::new()),
        ..GpuSample::default()
    };
    assert_eq!(sample, expected, "the point at which the card cuts power is no limit, and there is no average yet");

    let sample = first(&Tree::open("battlemage-on-linux-7"));
    assert_eq!((sample.temperature_celsius, sample.memory_temperature_celsius), (Some(54.0), Some(56.0)));
    assert_eq!((sample.power_limit_watts, sample.fan_rpm), (Some(190.0), Some(1235)));

    let sample = first(&Tree::open("alchemist-on-xe"));
    assert_eq!((sample.temperature_celsius, sample.power_limit_watts), (Some(56.0), Some(55.0)));
}

/// R2.1–R2.5: i915, with and without a card's sensors, and with the names of old kernels.
#[test]
fn gpus_on_i915_are_measured() {
    let sample = first(&Tree::open("alchemist-on-i915"));
    assert_eq!((sample.temperature_celsius, sample.power_limit_watts), (Some(55.0), Some(55.0)));
    assert_eq!((sample.clock_mhz, sample.clock_max_mhz), (Some(600), Some(2450)));

    let tree = Tree::open("battlemage-and-raptor-lake");
    let samples = monitor(&tree).sample(SECOND, &[]);
    let integrated = samples.values().next().expect("the integrated GPU");
    assert_eq!((integrated.temperature_celsius, integrated.power_watts), (None, None));
    assert_eq!(integrated.throttle_reasons, Some(vec!["pl1".to_owned()]));

    let old = first(&Tree::open("comet-lake-on-i915"));
    assert_eq!((old.clock_mhz, old.clock_max_mhz, old.throttle_reasons), (Some(300), Some(1150), None));
    let idle = first(&Tree::open("tiger-lake-on-xe"));
    assert_eq!((idle.clock_mhz, idle.clock_max_mhz), (Some(0), Some(1300)), "the engines are off");
}

/// R2.1–R2.5: amdgpu tells more, and the generic part reads it.
#[test]
fn gpus_on_amdgpu_are_measured() {
    let sample = first(&Tree::open("radeon-6900"));
    assert_eq!((sample.utilisation, sample.power_watts), (Some(0.03), Some(36.0)));
    assert_eq!((sample.power_limit_watts, sample.clock_mhz), (Some(289.0), Some(500)));
    assert_eq!((sample.temperature_celsius, sample.memory_temperature_celsius), (Some(56.0), Some(54.0)));
    assert_eq!((sample.memory_total_bytes, sample.memory_used_bytes), (Some(17_163_091_968), Some(668_274_688)));
    let phoenix = Tree::open("phoenix");
    assert_eq!(gpus(&phoenix.root)[0].is_integrated, Some(true));
    assert_eq!(first(&phoenix).memory_total_bytes, None, "its memory is the machine's");
}

/// R2.1–R2.5: power is energy over time: that of the card, or of the chip where the card's counter stands still.
#[test]
fn power_is_energy_over_time() {
    let tree = Tree::open("battlemage-and-raptor-lake");
    let energy = |channel: u32, value: u64| {
        tree.write(&format!("sys/bus/pci/devices/0000:03:00.0/hwmon/hwmon4/energy{channel}_input"), &value.to_string());
    };
    let mut monitor = monitor(&tree);
    let mut watts = |at: u32| monitor.sample(at * SECOND, &[]).into_values().next_back().expect("a GPU").power_watts;
    assert_eq!(watts(0), None);
    energy(2, 29_523_753_173 + 1_200_000_000);
    assert_eq!(watts(10), Some(120.0));
    energy(1, 1_500_000_000);
    energy(2, 29_523_753_173 + 2_400_000_000);
    assert_eq!(watts(20), Some(150.0), "the card's counter goes, and includes the chip's");
    energy(1, 7);
    energy(2, 7);
    assert_eq!(watts(30), None, "the counters began anew");
    energy(1, 1_000_000_007);
    assert_eq!(watts(200), None, "the counter may have wrapped meanwhile");
}

/// R2.1–R2.5: work and memory of clients, each once, by class of engines; this node's own memory apart.
#[test]
fn clients_are_counted_once() {
    let tree = Tree::open("battlemage-and-raptor-lake");
    let mut monitor = monitor(&tree);
    open(&tree, OWN, 5, &client(1, 0, 1000, "2 GiB"));
    open(&tree, OWN, 6, &client(1, 0, 1000, "2 GiB"));
    open(&tree, OTHER, 3, &client(2, 500, 1000, "512 MiB"));
    monitor.sample(SECOND, &[OWN]);
    open(&tree, OWN, 5, &client(1, 3000, 2000, "3 GiB"));
    open(&tree, OWN, 6, &client(1, 3000, 2000, "3 GiB"));
    open(&tree, OTHER, 3, &client(2, 900, 2000, "512 MiB"));
    let sample = monitor.sample(2 * SECOND, &[OWN]).into_values().next_back().expect("a GPU");
    let shares: Vec<(&str, f32)> =
        sample.utilisation_by_class.iter().map(|(class, share)| (class.as_str(), *share)).collect();
    assert_eq!(shares, [("ccs", 0.85), ("rcs", 0.0)], "3,400 of 4,000 cycles");
    assert_eq!((sample.utilisation, sample.memory_own_bytes), (Some(0.85), Some(3 << 30)));
}

/// R2.1–R2.5: without clients that may be read, the time in which the engines were off tells.
#[test]
fn idle_time_tells_the_utilisation() {
    let tree = Tree::open("battlemage-and-raptor-lake");
    let mut monitor = monitor(&tree);
    monitor.sample(Duration::ZERO, &[]);
    let idle = "sys/bus/pci/devices/0000:03:00.0/tile0/gt0/gtidle/idle_residency_ms";
    tree.write(idle, &(848_095 + 7500).to_string());
    let utilisation =
        |samples: BTreeMap<PciAddress, GpuSample>| samples.into_values().next_back().expect("a GPU").utilisation;
    assert_eq!(utilisation(monitor.sample(5 * SECOND, &[])), None, "a GPU without use is left alone for ten seconds");
    assert_eq!(utilisation(monitor.sample(10 * SECOND, &[])), Some(0.25));
}

/// R7.1–R7.5: memory that a process of this node has released is free at once, not ten seconds later.
#[test]
fn released_memory_shows_at_once() {
    let tree = Tree::open("battlemage-and-raptor-lake");
    let mut monitor = monitor(&tree);
    open(&tree, OWN, 5, &client(1, 0, 1000, "2 GiB"));
    let mut own_bytes = |at: u32, own: &[u32]| {
        monitor.sample(at * SECOND, own).into_values().next_back().expect("a GPU").memory_own_bytes
    };
    assert_eq!(own_bytes(1, &[OWN]), Some(2 << 30));
    assert_eq!(own_bytes(2, &[]), Some(0));
}

/// A card that sleeps is not woken, not even by reading its clients.
#[test]
fn a_sleeping_card_is_left_alone() {
    let tree = Tree::open("battlemage-and-raptor-lake");
    tree.write("sys/bus/pci/devices/0000:03:00.0/power/runtime_status", "suspended");
    open(&tree, OWN, 5, &client(1, 0, 1000, "2 GiB"));
    let sample = monitor(&tree).sample(SECOND, &[OWN]).into_values().next_back().expect("a GPU");
    assert_eq!(sample, GpuSample { utilisation: Some(0.0), ..GpuSample::default() });
}

/// Any content of any file gives a sample.
#[test]
fn garbage_in_files_is_unknown() {
    let tree = Tree::open("battlemage-on-linux-7");
    let folder = tree.root.path("sys/bus/pci/devices/0000:03:00.0/hwmon/hwmon2");
    for (index, name) in super::super::names(&folder).into_iter().filter(|name| name != "name").enumerate() {
        let garbage = ["", "-", "99999999999999999999", "N/A", "\u{0}", "-5"][index % 6];
        tree.write(&format!("sys/bus/pci/devices/0000:03:00.0/hwmon/hwmon2/{name}"), garbage);
    }
    let sample = first(&tree);
    assert!(sample.is_plausible());
    assert_eq!((sample.power_limit_watts, sample.power_watts), (None, None), "{sample:?}");
    for channel in 1..=17 {
        tree.write(&format!("sys/bus/pci/devices/0000:03:00.0/hwmon/hwmon2/temp{channel}_input"), "N/A");
    }
    let sample = first(&tree);
    assert_eq!((sample.temperature_celsius, sample.memory_temperature_celsius), (None, None));
}
