//! The addresses at which other nodes reach this machine, and changes of them.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, UdpSocket};
use std::time::{Duration, Instant, SystemTime};

/// The clock of the day runs ahead of the process's by this much only while the machine sleeps.
const SLEPT_MIN: Duration = Duration::from_secs(5);

/// The addresses of a node that listens at `listen`: `listen` itself or, where its IP address is unspecified, those of
/// the machine's interfaces; loopback where the interfaces have no usable address. A node that listens at `::` has
/// addresses of both families.
pub fn reachable(listen: SocketAddr) -> Vec<SocketAddr> {
    if !listen.ip().is_unspecified() {
        return vec![listen];
    }
    let is_usable = |ip: &IpAddr| match ip {
        IpAddr::V4(ip) => !ip.is_loopback() && !ip.is_link_local(),
        // A link-local address needs a scope, which differs from machine to machine.
        IpAddr::V6(ip) => listen.is_ipv6() && !ip.is_loopback() && !ip.is_unicast_link_local(),
    };
    let found: Vec<IpAddr> = interface_ips().into_iter().filter(is_usable).collect();
    match found.is_empty() {
        true => vec![SocketAddr::from(([127, 0, 0, 1], listen.port()))],
        false => found.into_iter().map(|ip| SocketAddr::new(ip, listen.port())).collect(),
    }
}

fn interface_ips() -> Vec<IpAddr> {
    if_addrs::get_if_addrs().unwrap_or_default().iter().map(if_addrs::Interface::ip).collect()
}

/// Whether another machine can use the address as it is: a link-local IPv6 address means another machine there.
pub fn is_shareable(address: SocketAddr) -> bool {
    !matches!(address.ip(), IpAddr::V6(ip) if ip.is_unicast_link_local())
}

/// The address as its own family writes it: a socket of both families shows IPv4 peers as `::ffff:a.b.c.d`.
pub(crate) fn canonical(address: SocketAddr) -> SocketAddr {
    match address.ip().to_canonical() {
        IpAddr::V4(ip) => SocketAddr::from((ip, address.port())),
        // Keeps the scope.
        IpAddr::V6(_) => address,
    }
}

/// Why no packet can be sent to an address, such as "network is unreachable"; `None` where there is a route.
pub(crate) fn no_route(address: SocketAddr) -> Option<std::io::Error> {
    let any = match address {
        SocketAddr::V4(_) => IpAddr::V4(Ipv4Addr::UNSPECIFIED),
        SocketAddr::V6(_) => IpAddr::V6(Ipv6Addr::UNSPECIFIED),
    };
    // Connecting a UDP socket looks up the route, and sends nothing.
    UdpSocket::bind((any, 0)).and_then(|socket| socket.connect(address)).err()
}

/// Notices when the machine has other addresses than before, or has slept.
#[derive(Debug)]
pub(crate) struct AddressWatch {
    listen: SocketAddr,
    addresses: Vec<SocketAddr>,
    looked: (Instant, SystemTime),
}

/// What has changed since the last look.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum NetworkChange {
    Nothing,
    /// The machine has slept, with the same addresses.
    Slept,
    /// The machine has these addresses now.
    Addresses(Vec<SocketAddr>),
}

impl AddressWatch {
    pub(crate) fn new(listen: SocketAddr) -> Self {
        Self { listen, addresses: reachable(listen), looked: (Instant::now(), SystemTime::now()) }
    }

    /// The addresses at the last look.
    pub(crate) fn addresses(&self) -> &[SocketAddr] {
        &self.addresses
    }

    /// Looks at the machine's interfaces and clocks.
    pub(crate) fn look(&mut self) -> NetworkChange {
        let (instant, time) = (Instant::now(), SystemTime::now());
        let slept = time.duration_since(self.looked.1).unwrap_or_default();
        let slept = slept.saturating_sub(instant.duration_since(self.looked.0)) > SLEPT_MIN;
        self.looked = (instant, time);
        let addresses = reachable(self.listen);
        if addresses != self.addresses {
            self.addresses.clone_from(&addresses);
            return NetworkChange::Addresses(addresses);
        }
        if slept { NetworkChange::Slept } else { NetworkChange::Nothing }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn address(text: &str) -> SocketAddr {
        text.parse().expect("an address")
    }

    #[test]
    fn mapped_addresses_are_written_as_ipv4() {
        assert_eq!(canonical(address("[::ffff:10.0.0.2]:7")), address("10.0.0.2:7"));
        for same in ["10.0.0.2:7", "[fd00::2]:7", "[fe80::1%3]:7"] {
            assert_eq!(canonical(address(same)), address(same));
        }
    }

    #[test]
    fn an_address_without_a_route_is_told() {
        assert!(no_route(address("127.0.0.1:9")).is_none());
        // A link-local address whose scope names an interface that does not exist.
        assert!(no_route(address("[fe80::1%999999]:9")).is_some());
    }

    #[test]
    fn a_node_on_all_interfaces_has_their_addresses() {
        for listen in ["0.0.0.0:7", "[::]:7"] {
            let found = reachable(address(listen));
            assert!(
                !found.is_empty() && found.iter().all(|found| found.port() == 7 && is_shareable(*found)),
                "{found:?}"
            );
            assert!(listen.starts_with('[') || found.iter().all(SocketAddr::is_ipv4));
        }
        assert_eq!(reachable(address("[::1]:7")), [address("[::1]:7")]);
    }
}
