//! The network: ports, buffers, interfaces.

use super::Check;
use crate::cluster::PORT_DEFAULT;
use std::net::{TcpListener, UdpSocket};
use std::path::Path;

const AREA: &str = "network";
/// The port of the HTTP API.
const API_PORT: u16 = 52415;
/// The buffers that a node asks for: smaller ones lose datagrams of a burst.
const SOCKET_BYTES: u64 = 4 << 20;
/// QUIC needs datagrams of 1,200 bytes (RFC 9000, section 14), and headers.
const MTU_MIN: u64 = 1280;
/// A flag of an interface: `IFF_MULTICAST`, of `linux/if.h`.
const MULTICAST: u64 = 0x1000;

/// `is_running`: whether a node of this data folder runs, which has the ports.
pub(super) fn checks(is_running: bool) -> Vec<Check> {
    let udp = || UdpSocket::bind(("0.0.0.0", PORT_DEFAULT)).map(drop);
    let tcp = || TcpListener::bind(("127.0.0.1", API_PORT)).map(drop);
    let mut checks = vec![
        port("UDP", PORT_DEFAULT, is_running, &udp, "another node takes any free port; --listen chooses one"),
        port("TCP", API_PORT, is_running, &tcp, "--api ADDR:PORT chooses another address"),
    ];
    checks.extend(buffers(Path::new("/proc/sys/net/core")));
    checks.extend(interfaces(Path::new("/sys/class/net")));
    checks
}

fn port(kind: &str, number: u16, is_running: bool, bind: &dyn Fn() -> std::io::Result<()>, remedy: &str) -> Check {
    let subject = format!("{kind} port {number}");
    if is_running {
        return Check::ok(AREA, subject, "a node of this data folder runs");
    }
    let Err(error) = bind() else { return Check::ok(AREA, subject, "free") };
    let protocol = if kind == "UDP" { listeners::Protocol::UDP } else { listeners::Protocol::TCP };
    let holder = listeners::get_process_by_port(number, protocol).ok();
    let found = holder
        .map_or_else(|| error.to_string(), |process| format!("process {} ({}) has it", process.pid, process.name));
    Check::warn(AREA, subject, found, remedy)
}

/// The largest socket buffers that the system permits.
fn buffers(folder: &Path) -> Option<Check> {
    let read = |name: &str| std::fs::read_to_string(folder.join(name)).ok()?.trim().parse::<u64>().ok();
    let (receive, send) = (read("rmem_max")?, read("wmem_max")?);
    let found = format!("at most {receive} bytes to receive, {send} to send");
    Some(match receive.min(send) < SOCKET_BYTES {
        true => Check::warn(
            AREA,
            "UDP buffers",
            found,
            format!(
                "sudo sysctl net.core.rmem_max={SOCKET_BYTES} net.core.wmem_max={SOCKET_BYTES}: bursts lose datagrams"
            ),
        ),
        false => Check::ok(AREA, "UDP buffers", found),
    })
}

/// The interfaces that are up, without loopback.
fn interfaces(folder: &Path) -> Vec<Check> {
    let text =
        |name: &str, file: &str| Some(std::fs::read_to_string(folder.join(name).join(file)).ok()?.trim().to_owned());
    let entries = std::fs::read_dir(folder).into_iter().flatten().flatten();
    let mut names: Vec<String> = entries.filter_map(|entry| entry.file_name().into_string().ok()).collect();
    names.sort();
    let up: Vec<String> = names
        .into_iter()
        .filter(|name| name != "lo" && text(name, "operstate").is_some_and(|state| state == "up" || state == "unknown"))
        .collect();
    let flags =
        |name: &String| text(name, "flags").and_then(|flags| u64::from_str_radix(flags.strip_prefix("0x")?, 16).ok());
    let has_multicast = |name: &String| flags(name).is_some_and(|flags| flags & MULTICAST != 0);
    let mut checks: Vec<Check> = Vec::new();
    for name in &up {
        let Some(mtu) = text(name, "mtu").and_then(|mtu| mtu.parse::<u64>().ok()) else { continue };
        let found = format!("MTU {mtu}{}", if has_multicast(name) { ", multicast" } else { ", no multicast" });
        checks.push(match mtu < MTU_MIN {
            true => Check::fail(AREA, name, found, format!("raise its MTU to {MTU_MIN} or more: QUIC needs that")),
            false => Check::ok(AREA, name, found),
        });
    }
    if !folder.exists() {
        return checks;
    }
    if up.is_empty() {
        let remedy = "connect this machine to a network: without one it has no other members";
        checks.push(Check::warn(AREA, "interfaces", "none is up but loopback", remedy));
    } else if !up.iter().any(has_multicast) {
        let remedy = "name the other members: --peer ADDR:PORT";
        checks.push(Check::warn(
            AREA,
            "discovery",
            "no interface has multicast, so no member is found by itself",
            remedy,
        ));
    }
    checks
}

#[cfg(test)]
mod tests {
    use super::super::Verdict;
    use super::*;

    fn write(folder: &Path, files: &[(&str, &str)]) {
        for (path, content) in files {
            let path = folder.join(path);
            std::fs::create_dir_all(path.parent().expect("a folder")).expect("created");
            std::fs::write(path, content).expect("written");
        }
    }

    /// R8.1–R8.5: small socket buffers are a warning that names the command.
    #[test]
    fn small_buffers_are_a_warning() {
        let folder = tempfile::tempdir().expect("a folder");
        write(folder.path(), &[("rmem_max", "212992\n"), ("wmem_max", "8388608\n")]);
        let check = buffers(folder.path()).expect("known");
        assert_eq!(check.verdict, Verdict::Warn);
        assert!(check.remedy.expect("a remedy").contains("net.core.rmem_max=4194304"));
        write(folder.path(), &[("rmem_max", "8388608\n")]);
        assert_eq!(buffers(folder.path()).expect("known").verdict, Verdict::Ok);
        assert_eq!(buffers(Path::new("/nowhere")), None);
    }

    /// R8.1–R8.5: interfaces without multicast, with too small an MTU, or none at all.
    #[test]
    fn interfaces_are_judged() {
        let folder = tempfile::tempdir().expect("a folder");
        let verdicts = || -> Vec<(String, Verdict)> {
            interfaces(folder.path()).into_iter().map(|check| (check.subject, check.verdict)).collect()
        };
        write(folder.path(), &[("lo/operstate", "unknown\n"), ("lo/mtu", "65536\n"), ("lo/flags", "0x9\n")]);
        assert_eq!(verdicts(), [("interfaces".to_owned(), Verdict::Warn)]);
        write(folder.path(), &[("wg0/operstate", "unknown\n"), ("wg0/mtu", "1420\n"), ("wg0/flags", "0x91\n")]);
        assert_eq!(verdicts(), [("wg0".to_owned(), Verdict::Ok), ("discovery".to_owned(), Verdict::Warn)]);
        write(folder.path(), &[("eth0/operstate", "up\n"), ("eth0/mtu", "576\n"), ("eth0/flags", "0x1003\n")]);
        assert_eq!(verdicts(), [("eth0".to_owned(), Verdict::Fail), ("wg0".to_owned(), Verdict::Ok)]);
    }

    /// R8.1–R8.5: a taken port names its holder; a node of this folder may have it.
    #[test]
    fn taken_ports_name_their_holder() {
        let held = TcpListener::bind("127.0.0.1:0").expect("a port");
        let number = held.local_addr().expect("bound").port();
        let bind = move || TcpListener::bind(("127.0.0.1", number)).map(drop);
        let check = port("TCP", number, false, &bind, "choose another");
        assert_eq!(check.verdict, Verdict::Warn);
        assert!(check.found.contains(&std::process::id().to_string()), "{}", check.found);
        assert_eq!(port("TCP", number, true, &bind, "").verdict, Verdict::Ok);
    }
}
