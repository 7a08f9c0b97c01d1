//! Measurements of this machine: memory and CPU.

use crate::core::status::Machine;
use exo_engines::worker::live_processes;
use sysinfo::{MemoryRefreshKind, Pid, ProcessRefreshKind, ProcessesToUpdate, System};

/// The machine's host name; `node` if it has none.
pub fn host_name() -> String {
    System::host_name().ok().filter(|name| !name.is_empty()).unwrap_or_else(|| "node".to_owned())
}

/// This process, and those of its engines.
pub(crate) fn own_processes() -> Vec<u32> {
    [std::process::id()].into_iter().chain(live_processes()).collect()
}

/// Measures the machine once. A value that cannot be read is `None`.
pub fn measure_machine() -> Machine {
    System::new().map(|mut system| measure(&mut system)).unwrap_or_default()
}

/// Measures the machine. The CPU utilisation is the average since the last call with this `system`.
pub(crate) fn measure(system: &mut System) -> Machine {
    system.refresh_memory_specifics(MemoryRefreshKind::nothing().with_ram());
    system.refresh_cpu_usage();
    let processes: Vec<Pid> = own_processes().into_iter().map(Pid::from_u32).collect();
    let memory = ProcessRefreshKind::nothing().with_memory();
    system.refresh_processes_specifics(ProcessesToUpdate::Some(&processes), true, memory);
    let resident = processes.iter().filter_map(|pid| system.process(*pid)).map(sysinfo::Process::memory);
    let known = |bytes: u64| Some(bytes).filter(|&bytes| bytes > 0);
    let process_bytes = known(resident.sum());
    let usage = system.global_cpu_usage();
    Machine {
        memory_total_bytes: known(system.total_memory()),
        memory_free_bytes: known(system.available_memory()),
        process_bytes,
        unaccounted_bytes: unaccounted_bytes(),
        cpu_utilisation: usage.is_finite().then_some(usage / 100.0),
    }
}

/// The machine's memory that programs can still use; `None` if it cannot be read.
pub(crate) fn available_bytes() -> Option<u64> {
    let mut system = System::new().ok()?;
    system.refresh_memory_specifics(MemoryRefreshKind::nothing().with_ram());
    Some(system.available_memory())
}

/// The memory of a process that the system cannot drop, in bytes; `None` if it cannot be read. Where the system tells,
/// swapped memory counts, and mapped files do not: memory that moves between disk and RAM neither grows nor shrinks.
pub(crate) fn held_bytes(process: u32) -> Option<u64> {
    let status = std::fs::read_to_string(format!("/proc/{process}/status")).ok();
    status.and_then(|status| held_in(&status)).or_else(|| resident_bytes(process))
}

/// Reads the text of Linux's `/proc/PID/status`, which the manual page `proc_pid_status(5)` describes.
fn held_in(status: &str) -> Option<u64> {
    let anonymous = kilobytes(status, "RssAnon")?;
    let others = ["RssShmem", "VmSwap"].iter().filter_map(|name| kilobytes(status, name)).sum::<u64>();
    Some((anonymous + others) * 1024)
}

fn resident_bytes(process: u32) -> Option<u64> {
    let mut system = System::new().ok()?;
    let pid = Pid::from_u32(process);
    let memory = ProcessRefreshKind::nothing().with_memory();
    system.refresh_processes_specifics(ProcessesToUpdate::Some(&[pid]), true, memory);
    system.process(pid).map(sysinfo::Process::memory)
}

/// The memory of the machine that neither processes nor caches nor the kernel's tables account for, such as that of
/// drivers. `None` where the system does not tell.
fn unaccounted_bytes() -> Option<u64> {
    unaccounted_in(&std::fs::read_to_string("/proc/meminfo").ok()?)
}

/// Reads the text of Linux's `/proc/meminfo`, which the kernel's `Documentation/filesystems/proc.rst` describes.
fn unaccounted_in(meminfo: &str) -> Option<u64> {
    let accounted =
        ["MemFree", "Buffers", "Cached", "SwapCached", "AnonPages", "Slab", "KernelStack", "PageTables", "Percpu"];
    let accounted: u64 = accounted.iter().filter_map(|name| kilobytes(meminfo, name)).sum();
    Some(kilobytes(meminfo, "MemTotal")?.saturating_sub(accounted) * 1024)
}

/// The value of a line such as `VmSwap:    12 kB`.
fn kilobytes(text: &str, name: &str) -> Option<u64> {
    let value = text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'))?;
    value.trim().strip_suffix("kB")?.trim().parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_that_nothing_accounts_for_is_what_is_left() {
        let meminfo = "MemTotal:       1000 kB\nMemFree:         400 kB\nMemAvailable:    600 kB\n\
                       Buffers:          10 kB\nCached:          190 kB\nAnonPages:       250 kB\n\
                       Slab:             50 kB\n";
        assert_eq!(unaccounted_in(meminfo), Some(100 * 1024));
        assert_eq!(unaccounted_in("something else"), None);
    }

    #[test]
    fn a_process_holds_its_swapped_memory_and_no_mapped_file() {
        let status = "Name:\texo-node\nVmRSS:\t  900 kB\nRssAnon:\t  300 kB\nRssFile:\t  500 kB\n\
                      RssShmem:\t  100 kB\nVmSwap:\t   40 kB\n";
        assert_eq!(held_in(status), Some(440 * 1024));
        assert_eq!(held_in("Name:\tzombie\n"), None);
    }
}
