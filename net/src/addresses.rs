//! The addresses at which other nodes reach this machine.

use std::net::{IpAddr, SocketAddr};

/// The addresses of a node that listens at `listen`: `listen` itself or, where its IP address is unspecified, those of
/// the machine's interfaces; loopback where the interfaces have no usable address.
pub fn reachable(listen: SocketAddr) -> Vec<SocketAddr> {
    if !listen.ip().is_unspecified() {
        return vec![listen];
    }
    let interfaces = if_addrs::get_if_addrs().unwrap_or_default();
    let is_usable = |ip: &IpAddr| match ip {
        IpAddr::V4(ip) => !ip.is_loopback() && !ip.is_link_local(),
        IpAddr::V6(ip) => listen.is_ipv6() && !ip.is_loopback() && !ip.is_unicast_link_local(),
    };
    let found: Vec<IpAddr> = interfaces.iter().map(if_addrs::Interface::ip).filter(is_usable).collect();
    match found.is_empty() {
        true => vec![SocketAddr::from(([127, 0, 0, 1], listen.port()))],
        false => found.into_iter().map(|ip| SocketAddr::new(ip, listen.port())).collect(),
    }
}
