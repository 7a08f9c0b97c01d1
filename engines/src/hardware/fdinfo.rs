//! What each program does on a GPU: the files of `/proc/PID/fdinfo`.
//!
//! Format: the kernel's `Documentation/gpu/drm-usage-stats.rst`. Each open file of a GPU is a client; several files may
//! be the same one. A process sees its own clients, those of its user, and as root all.

use super::{PciAddress, SystemRoot, names};
use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

/// A client of a GPU.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct Client {
    /// The card's own memory that it holds.
    pub(super) memory_bytes: Option<u64>,
    /// Its work in each class of engines.
    pub(super) engines: BTreeMap<String, Work>,
}

/// Counters of a client in a class of engines.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct Work {
    /// Nanoseconds of work, or cycles of work where `total_cycles` is known.
    pub(super) busy: u64,
    /// The cycles that passed meanwhile.
    pub(super) total_cycles: Option<u64>,
    /// The number of engines in the class; 0: not told, which means 1.
    pub(super) capacity: u64,
}

/// Who a client is: the GPU, and the client's number there.
pub(super) type ClientId = (PciAddress, u64);

/// The clients of all processes that may be read, or of `only` these, with one of `files` open.
pub(super) fn clients(
    root: &SystemRoot,
    only: Option<&[u32]>,
    files: &BTreeSet<PathBuf>,
) -> BTreeMap<ClientId, Client> {
    let processes = match only {
        Some(processes) => processes.iter().map(u32::to_string).collect(),
        None => names(&root.path("proc")),
    };
    let is_number = |name: &String| name.bytes().all(|byte| byte.is_ascii_digit());
    let is_one = |target: &Path| files.contains(target);
    let open = processes.into_iter().filter(is_number).flat_map(|process| open_files(root, &process, &is_one));
    let texts = open.filter_map(|file| std::fs::read_to_string(file).ok());
    texts.filter_map(|text| parse(&text)).collect()
}

/// Whether one of `processes` has a file open whose path begins with `path`.
pub(super) fn have_open(root: &SystemRoot, processes: &[u32], path: &str) -> bool {
    let begins = |target: &Path| target.to_str().is_some_and(|target| target.starts_with(path));
    processes.iter().any(|process| !open_files(root, &process.to_string(), &begins).is_empty())
}

/// The `fdinfo` of a process's open files that are wanted.
fn open_files(root: &SystemRoot, process: &str, is_wanted: &dyn Fn(&Path) -> bool) -> Vec<PathBuf> {
    let folder = root.path("proc").join(process);
    let open = names(&folder.join("fd")).into_iter().filter(|file| {
        let target = std::fs::read_link(folder.join("fd").join(file));
        target.is_ok_and(|target| is_wanted(&target))
    });
    open.map(|file| folder.join("fdinfo").join(file)).collect()
}

/// Regions of a card's own memory: `vram0` of xe, `local0` of i915, `vram` of amdgpu.
fn is_of_card(region: &str) -> bool {
    region.strip_prefix("vram").or_else(|| region.strip_prefix("local")).is_some_and(|rest| rest.parse::<u32>().is_ok())
        || region == "vram"
}

/// Reads the text of a file. `None`: it is not a client of a GPU on the PCI bus.
pub(super) fn parse(text: &str) -> Option<(ClientId, Client)> {
    let fields: BTreeMap<&str, &str> =
        text.lines().filter_map(|line| line.split_once(':')).map(|(key, value)| (key, value.trim())).collect();
    let address = fields.get("drm-pdev")?.parse().ok()?;
    let number = fields.get("drm-client-id")?.parse().ok()?;
    let mut client = Client::default();
    let regions = |prefix: &str| -> Option<u64> {
        let of_card = fields.iter().filter(|(key, _)| key.strip_prefix(prefix).is_some_and(is_of_card));
        of_card.map(|(_, value)| bytes(value)).reduce(|a, b| a?.checked_add(b?))?
    };
    // amdgpu before Linux 6.13 has `memory` alone.
    client.memory_bytes = regions("drm-resident-").or_else(|| regions("drm-memory-"));
    for (key, value) in &fields {
        let word = || value.split_whitespace().next()?.parse::<u64>().ok();
        let mut at = |class: &str, set: fn(&mut Work, u64)| {
            if let Some(count) = word() {
                set(client.engines.entry(class.to_owned()).or_default(), count);
            }
        };
        if let Some(class) = key.strip_prefix("drm-engine-capacity-") {
            at(class, |work, count| work.capacity = count);
        } else if let Some(class) = key.strip_prefix("drm-engine-") {
            at(class, |work, count| work.busy = count);
        } else if let Some(class) = key.strip_prefix("drm-total-cycles-") {
            at(class, |work, count| work.total_cycles = Some(count));
        } else if let Some(class) = key.strip_prefix("drm-cycles-") {
            at(class, |work, count| work.busy = count);
        }
    }
    Some(((address, number), client))
}

/// A size such as `0`, `192 KiB` or `16 MiB`.
fn bytes(value: &str) -> Option<u64> {
    let (number, unit) = value.split_once(' ').unwrap_or((value, ""));
    let factor = match unit.trim() {
        "" => 1,
        "KiB" | "kB" => 1 << 10,
        "MiB" => 1 << 20,
        "GiB" => 1 << 30,
        _ => return None,
    };
    number.parse::<u64>().ok()?.checked_mul(factor)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// Units differ by size; memory of the machine does not count.
    #[test]
    fn sizes_are_read_in_any_unit() {
        let sizes = [("0", Some(0)), ("192 KiB", Some(192 << 10)), ("16 MiB", Some(16 << 20)), ("3 apples", None)];
        for (text, expected) in sizes {
            assert_eq!(bytes(text), expected, "{text}");
        }
        assert_eq!(bytes("18446744073709551615 GiB"), None);
    }

    #[test]
    fn files_of_other_things_are_no_clients() {
        assert_eq!(parse("pos:\t0\nflags:\t02\n"), None);
        assert_eq!(parse("drm-driver:\tvc4\ndrm-client-id:\t1\n"), None, "not on the PCI bus");
    }

    proptest! {
        #[test]
        fn any_text_is_a_client_or_none(text in "(drm-[a-z0-9-]{0,20}:\t[ -~]{0,20}\n){0,10}") {
            let _ = parse(&text);
        }
    }
}
