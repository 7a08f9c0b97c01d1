//! A network of hosts: network namespaces on a switch of their own, separate from this machine's network.

use std::process::Command;

/// Hosts on one switch, removed on drop.
pub(crate) struct Lan {
    name: String,
    hosts: usize,
}

#[derive(Debug, Clone, Copy)]
enum Family {
    V4,
    V6,
    /// Link-local addresses alone, which have a meaning only together with an interface.
    LinkLocal,
}

fn ip(arguments: &[&str]) -> Result<(), String> {
    let output = Command::new("ip").args(arguments).output().map_err(|error| format!("ip: {error}"))?;
    match output.status.success() {
        true => Ok(()),
        false => Err(format!("ip {}: {}", arguments.join(" "), String::from_utf8_lossy(&output.stderr).trim())),
    }
}

impl Lan {
    /// Builds a network of `hosts` hosts; `None`, with a message on stderr, if this machine does not permit it.
    pub(crate) fn of(hosts: usize) -> Option<Self> {
        Self::with(hosts, Family::V4)
    }

    /// The same network, with IPv6 alone.
    pub(crate) fn of_ipv6(hosts: usize) -> Option<Self> {
        Self::with(hosts, Family::V6)
    }

    /// The same network, with link-local addresses alone: no router, and no addresses by hand.
    pub(crate) fn of_link_local(hosts: usize) -> Option<Self> {
        Self::with(hosts, Family::LinkLocal)
    }

    fn with(hosts: usize, family: Family) -> Option<Self> {
        use std::sync::atomic::{AtomicU32, Ordering};
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let count = COUNT.fetch_add(1, Ordering::Relaxed);
        let lan = Self { name: format!("exo{}x{count}", std::process::id()), hosts };
        match lan.build(family) {
            Ok(()) => Some(lan),
            Err(error) => {
                eprintln!("SKIPPED: no network namespaces here, so nothing is tested between hosts ({error})");
                None
            }
        }
    }

    fn build(&self, family: Family) -> Result<(), String> {
        let switch = self.switch();
        ip(&["netns", "add", &switch])?;
        ip(&["-n", &switch, "link", "add", "switch", "type", "bridge", "mcast_snooping", "0"])?;
        ip(&["-n", &switch, "link", "set", "switch", "up"])?;
        for host in 0..self.hosts {
            let (namespace, port) = (self.host(host), format!("port{host}"));
            ip(&["netns", "add", &namespace])?;
            ip(&["-n", &switch, "link", "add", &port, "type", "veth", "peer", "name", "lan", "netns", &namespace])?;
            ip(&["-n", &switch, "link", "set", &port, "master", "switch", "up"])?;
            ip(&["-n", &namespace, "link", "set", "lo", "up"])?;
            let address = match family {
                Family::V4 => format!("{}/24", Self::address(host)),
                Family::V6 => format!("{}/64", Self::address_v6(host)),
                Family::LinkLocal => format!("fe80::77:{}/64", host + 1),
            };
            // Without duplicate detection, which takes a second, an address can be used at once.
            ip(&["-n", &namespace, "address", "add", &address, "dev", "lan", "nodad"])
                .or_else(|_| ip(&["-n", &namespace, "address", "add", &address, "dev", "lan"]))?;
            ip(&["-n", &namespace, "link", "set", "lan", "up"])?;
            if matches!(family, Family::V4) {
                ip(&["-n", &namespace, "route", "add", "224.0.0.0/4", "dev", "lan"])?;
            }
        }
        Ok(())
    }

    fn switch(&self) -> String {
        format!("{}s", self.name)
    }

    /// The namespace of a host.
    pub(crate) fn host(&self, host: usize) -> String {
        format!("{}h{host}", self.name)
    }

    pub(crate) fn address(host: usize) -> String {
        format!("10.77.0.{}", host + 1)
    }

    pub(crate) fn address_v6(host: usize) -> String {
        format!("fd00:77::{}", host + 1)
    }

    /// Gives a host another address, as a router does to a laptop that has moved.
    pub(crate) fn readdress(&self, host: usize, address: &str) {
        let (namespace, old) = (self.host(host), format!("{}/24", Self::address(host)));
        ip(&["-n", &namespace, "address", "delete", &old, "dev", "lan"]).expect("an address");
        ip(&["-n", &namespace, "address", "add", &format!("{address}/24"), "dev", "lan"]).expect("an address");
        // The route went with the address.
        let _ = ip(&["-n", &namespace, "route", "replace", "224.0.0.0/4", "dev", "lan"]);
    }

    /// Unplugs a host's cable (`down`), or plugs it in again (`up`).
    pub(crate) fn plug(&self, host: usize, state: &str) {
        ip(&["-n", &self.switch(), "link", "set", &format!("port{host}"), state]).expect("a cable");
    }
}

impl Lan {
    /// Lets `host` reach no host but `only`.
    pub(crate) fn isolate(&self, host: usize, only: usize) {
        let (namespace, only) = (self.host(host), format!("{}/32", Self::address(only)));
        ip(&["-n", &namespace, "route", "delete", "10.77.0.0/24"]).expect("a route");
        ip(&["-n", &namespace, "route", "add", &only, "dev", "lan"]).expect("a route");
    }

    /// Disconnects a pair of hosts from each other, as two firewalls would (`add`), or reconnects it (`delete`).
    pub(crate) fn block(&self, one: usize, other: usize, action: &str) {
        for (host, hidden) in [(one, other), (other, one)] {
            let (namespace, hidden) = (self.host(host), format!("{}/32", Self::address(hidden)));
            ip(&["-n", &namespace, "route", action, "unreachable", &hidden]).expect("a route");
        }
    }

    /// Moves the calling thread to `host`.
    pub(crate) fn enter(&self, host: usize) {
        use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};
        use std::os::fd::AsFd;
        let namespace = std::fs::File::open(format!("/run/netns/{}", self.host(host))).expect("a namespace");
        move_into_link_name_space(namespace.as_fd(), Some(LinkNameSpaceType::Network)).expect("to enter it");
    }
}

impl Drop for Lan {
    fn drop(&mut self) {
        for namespace in (0..self.hosts).map(|host| self.host(host)).chain([self.switch()]) {
            // Fails for a namespace that was not built.
            let _ = ip(&["netns", "delete", &namespace]);
        }
    }
}
