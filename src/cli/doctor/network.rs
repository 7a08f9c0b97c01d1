//! The network: ports, buffers, interfaces.

use super::super::up::API_DEFAULT;
use super::Check;
use crate::cluster::PORT_DEFAULT;
use exo_net::SOCKET_BYTES;
use listeners::Protocol;
use std::net::{SocketAddr, TcpListener, UdpSocket};
use std::path::Path;

/// QUIC needs datagrams of 1,200 bytes (RFC 9000, section 14), and headers.
const MTU_MIN: u64 = 1280;
/// A flag of an interface: `IFF_MULTICAST`, of `linux/if.h`.
const MULTICAST: u64 = 0x1000;

pub(super) fn checks() -> Vec<Check> {
    let udp = Port { id: "network.udp_port", name: "UDP port", protocol: Protocol::UDP, number: PORT_DEFAULT };
    let api = API_DEFAULT.parse::<SocketAddr>().map_or(0, |address| address.port());
    let tcp = Port { id: "network.tcp_port", name: "TCP port", protocol: Protocol::TCP, number: api };
    // As a node listens, on both families if the system has them.
    let bind_udp = UdpSocket::bind(("::", PORT_DEFAULT)).or_else(|_| UdpSocket::bind(("0.0.0.0", PORT_DEFAULT)));
    let mut checks = vec![
        udp.check(bind_udp.err(), "none needed: exo-node up takes a free port, and --listen ADDR:PORT sets one"),
        tcp.check(TcpListener::bind(API_DEFAULT).err(), "--api ADDR:PORT chooses another address"),
    ];
    checks.extend(buffers(Path::new("/proc/sys/net/core")));
    checks.extend(interfaces(Path::new("/sys/class/net")));
    checks
}

/// A port that a node listens on.
#[derive(Debug, Clone, Copy)]
struct Port {
    id: &'static str,
    name: &'static str,
    protocol: Protocol,
    number: u16,
}

impl Port {
    /// `refused` is why it cannot be listened on; `None`: it is free. Another node may have it.
    fn check(self, refused: Option<std::io::Error>, remedy: &str) -> Check {
        let subject = format!("{} {}", self.name, self.number);
        let Some(error) = refused else { return Check::ok(self.id, subject, "free") };
        let Ok(holder) = listeners::get_process_by_port(self.number, self.protocol) else {
            return Check::warn(self.id, subject, error.to_string(), remedy);
        };
        let found = format!("process {} ({}) has it", holder.pid, holder.name);
        match holder.name.starts_with("exo-node") {
            true => Check::ok(self.id, subject, found),
            false => Check::warn(self.id, subject, found, remedy),
        }
    }
}

/// The largest socket buffers that the system permits.
fn buffers(folder: &Path) -> Option<Check> {
    let read = |name: &str| std::fs::read_to_string(folder.join(name)).ok()?.trim().parse::<u64>().ok();
    let (receive, send) = (read("rmem_max")?, read("wmem_max")?);
    let found = format!("at most {receive} bytes to receive, {send} to send");
    let (id, subject, needed) = ("network.buffers", "UDP buffers", SOCKET_BYTES as u64);
    if receive.min(send) >= needed {
        return Some(Check::ok(id, subject, found));
    }
    let remedy = format!("sudo sysctl -w net.core.rmem_max={needed} net.core.wmem_max={needed}, until the next boot");
    Some(Check::warn(id, subject, format!("{found}: bursts may lose datagrams"), remedy))
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
        let multicast = flags(name).map_or("", |_| if has_multicast(name) { ", multicast" } else { ", no multicast" });
        let (id, found) = ("network.interface", format!("MTU {mtu}{multicast}"));
        checks.push(match mtu < MTU_MIN {
            true => Check::warn(id, name, found, format!("raise its MTU to {MTU_MIN} or more: QUIC needs that")),
            false => Check::ok(id, name, found),
        });
    }
    if !folder.exists() {
        return checks;
    }
    if up.is_empty() {
        let remedy = "connect this machine to a network: without one it has no other members";
        checks.push(Check::warn("network.interfaces", "interfaces", "none is up but loopback", remedy));
    } else if !up.iter().any(|name| flags(name).is_none() || has_multicast(name)) {
        let found = "no interface supports multicast, so discovery finds no members";
        checks.push(Check::warn("network.discovery", "discovery", found, "name the other members: --peer ADDR:PORT"));
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
        assert_eq!(verdicts(), [("eth0".to_owned(), Verdict::Warn), ("wg0".to_owned(), Verdict::Ok)]);
    }

    /// R8.1–R8.5: a taken port names its holder.
    #[test]
    fn taken_ports_name_their_holder() {
        let held = TcpListener::bind("127.0.0.1:0").expect("a port");
        let number = held.local_addr().expect("bound").port();
        let port = Port { id: "network.tcp_port", name: "TCP port", protocol: Protocol::TCP, number };
        let check = port.check(TcpListener::bind(("127.0.0.1", number)).err(), "choose another");
        assert_eq!(check.verdict, Verdict::Warn);
        assert!(check.found.contains(&std::process::id().to_string()), "{}", check.found);
        drop(held);
        assert_eq!(port.check(TcpListener::bind(("127.0.0.1", number)).err(), "").verdict, Verdict::Ok);
    }
}
