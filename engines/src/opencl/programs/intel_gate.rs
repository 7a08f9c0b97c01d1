//! The kernels as Intel's own driver compiles them for its GPUs, without a GPU.
//!
//! With `EXO_GPU_TOOLS=1`, `engines/tests/intel/fetch.sh` fetches the driver (300 MB), and this test starts itself
//! again with the driver for each platform. The driver tells of each kernel what it takes from memory for lack of
//! registers.

use super::super::coded::Coded;
use super::super::device::Limits;
use super::super::listing::{Family, Found, find};
use super::*;
use crate::device::DeviceMemory;
use crate::format::ElementType;
use opencl3::kernel::create_program_kernels;
use std::path::PathBuf;
use std::process::Command;

/// Queries of the extensions `cl_intel_required_subgroup_size` (`CL_KERNEL_SPILL_MEM_SIZE_INTEL`) and of OpenCL 1.1.
const SPILLED_BYTES: u32 = 0x4109;
const PRIVATE_BYTES: u32 = 0x11B4;

/// What a platform is.
struct Platform {
    name: &'static str,
    is_integrated: bool,
    has_matrices: bool,
    /// Whether a buffer has 4 GiB at most.
    has_small_buffers: bool,
}

const fn platform(name: &'static str, is_integrated: bool, has_matrices: bool, has_small_buffers: bool) -> Platform {
    Platform { name, is_integrated, has_matrices, has_small_buffers }
}

/// Alchemist, Ponte Vecchio, Meteor Lake, Arrow Lake H, Battlemage, Lunar Lake, Panther Lake.
const PLATFORMS: [Platform; 7] = [
    platform("dg2", false, true, true),
    platform("pvc", false, true, false),
    platform("mtl", true, false, true),
    platform("arl", true, true, true),
    platform("bmg", false, true, false),
    platform("lnl", true, true, false),
    platform("ptl", true, true, false),
];

/// The name of the test that runs under the driver, and the variable that tells it its platform.
const UNDER_DRIVER: &str = "opencl::programs::intel_gate::kernels_compile_under_the_driver";
const PLATFORM: &str = "EXO_TEST_PLATFORM";

/// R1.1, R1.3, R6.1–R6.5: on every platform of Intel all kernels compile, and none spills registers; memory, buffers
/// and matrix units are those of the platform.
#[test]
fn kernels_compile_for_intels_gpus() {
    if std::env::var_os("EXO_GPU_TOOLS").is_none() {
        return println!("SKIPPED: EXO_GPU_TOOLS=1 fetches Intel's driver, and compiles the kernels for Intel's GPUs");
    }
    let fetch = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/intel/fetch.sh");
    let test = std::env::current_exe().expect("this program");
    let folder: PathBuf = test.ancestors().nth(3).expect("the build folder").join("intel-driver");
    assert!(Command::new(fetch).arg(&folder).status().expect("started").success(), "the driver was not fetched");
    for Platform { name, .. } in PLATFORMS {
        let mut run = Command::new("timeout");
        run.arg("300").arg(folder.join("neo")).arg(name).arg(&test).env(PLATFORM, name);
        let output = run.args(["--exact", UNDER_DRIVER, "--ignored", "--nocapture"]).output().expect("started");
        let text = String::from_utf8_lossy(&output.stdout);
        print!("{text}");
        let is_done = text.contains("1 passed");
        assert!(output.status.success() && is_done, "{name}: {}", String::from_utf8_lossy(&output.stderr));
    }
}

/// Runs under the driver, which executes nothing: it must wait for no kernel.
#[test]
#[ignore = "it runs under Intel's driver, which another test fetches"]
fn kernels_compile_under_the_driver() {
    let name = std::env::var(PLATFORM).expect("a platform");
    let platform = PLATFORMS.iter().find(|platform| platform.name == name).expect("a known platform");
    let found = find(Family::Intel);
    let [found] = &found[..] else { panic!("{name}: {} devices", found.len()) };
    let gpu = found.report.gpu.as_ref().expect("a GPU");
    println!("{name}: {}, {:?} Xe cores, sub-groups of {:?}", found.report.name, gpu.xe_cores, gpu.sub_group_sizes);
    assert_eq!(found.report.memory == DeviceMemory::Shared, platform.is_integrated);
    assert_eq!((gpu.units.matrix, gpu.units.int8_dot), (Some(platform.has_matrices), Some(true)));
    let limits = Limits::of(&found.device, &name).expect("told");
    assert_eq!(limits.buffer_max_bytes < 1 << 32, platform.has_small_buffers);
    let division = Division::of(&found.device, &name).expect("it divides");
    assert_eq!(division, Division::Native, "no Intel GPU needs double precision");
    compile_all(found, Programs::new(name.clone(), division));
}

fn compile_all(found: &Found, programs: Programs) {
    let context = Context::from_device(&found.device).expect("a context");
    let caches = [KvElement::F16, KvElement::F32, KvElement::Q8_0].map(KernelSet::Attention);
    let products = ElementType::ALL.iter().map(|&element| Coded::new(element));
    let products = products.flat_map(|coded| [1, 4].map(|rows| KernelSet::Products(coded, rows)));
    let mut count = 0;
    for set in [KernelSet::Rows, KernelSet::Limits].into_iter().chain(caches).chain(products) {
        let program = programs.build(&context, set).unwrap_or_else(|error| panic!("{set:?}: {error}"));
        for kernel in create_program_kernels(&program).expect("kernels") {
            let name = kernel.function_name().expect("a name");
            let bytes = |query| -> u64 {
                let value = kernel.get_work_group_data(found.device.id(), query).expect("told");
                u64::from_ne_bytes(value.try_into().expect("eight bytes"))
            };
            assert_eq!(bytes(SPILLED_BYTES), 0, "{set:?} {name} spills registers");
            // These keep sums in memory, so that no compiler changes their order.
            let private_max = if matches!(name.as_str(), "route" | "attend") { 128 } else { 0 };
            assert!(bytes(PRIVATE_BYTES) <= private_max, "{set:?} {name}: {} private bytes", bytes(PRIVATE_BYTES));
            count += 1;
        }
    }
    println!("{count} kernels compile, and none spills registers");
}
