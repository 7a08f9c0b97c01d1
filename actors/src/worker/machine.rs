//! Measurements of this machine: memory and CPU.

use crate::core::status::Machine;
use sysinfo::{MemoryRefreshKind, Pid, ProcessRefreshKind, ProcessesToUpdate, System};

/// The machine's host name; `node` if it has none.
pub fn host_name() -> String {
    System::host_name().ok().filter(|name| !name.is_empty()).unwrap_or_else(|| "node".to_owned())
}

/// Measures the machine once.
pub(crate) fn measure_once() -> Machine {
    System::new().map(|mut system| measure(&mut system)).unwrap_or_default()
}

/// Measures the machine. The CPU utilisation is the average since the last call with this `system`.
pub(crate) fn measure(system: &mut System) -> Machine {
    system.refresh_memory_specifics(MemoryRefreshKind::nothing().with_ram());
    system.refresh_cpu_usage();
    let pid = Pid::from_u32(std::process::id());
    let memory = ProcessRefreshKind::nothing().with_memory();
    system.refresh_processes_specifics(ProcessesToUpdate::Some(&[pid]), true, memory);
    let known = |bytes: u64| Some(bytes).filter(|&bytes| bytes > 0);
    let usage = system.global_cpu_usage();
    Machine {
        memory_total_bytes: known(system.total_memory()),
        memory_free_bytes: known(system.available_memory()),
        process_bytes: system.process(pid).map(sysinfo::Process::memory).and_then(known),
        cpu_utilisation: usage.is_finite().then_some(usage / 100.0),
    }
}
