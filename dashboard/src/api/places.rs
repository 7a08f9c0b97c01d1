//! The bound on connections: in all, and of each client.

use parking_lot::Mutex;
use std::collections::{BTreeSet, HashMap};
use std::net::IpAddr;
use std::sync::Arc;

/// The places for connections of one listener.
#[derive(Debug)]
pub(super) struct Places {
    /// Connections in all.
    total_max: usize,
    /// Connections of one address, unless it is loopback or a proxy.
    client_max: usize,
    /// Addresses behind which there are many clients.
    proxies: BTreeSet<IpAddr>,
    taken: Mutex<Taken>,
}

#[derive(Debug, Default)]
struct Taken {
    total: usize,
    clients: HashMap<IpAddr, usize>,
}

/// A place. Dropping it gives it back.
#[derive(Debug)]
pub(super) struct Place {
    places: Arc<Places>,
    client: Option<IpAddr>,
}

impl Places {
    /// Free places. Each address may take `client_max` of them; loopback and `proxies` may take all.
    pub(super) fn new(total_max: usize, client_max: usize, proxies: BTreeSet<IpAddr>) -> Arc<Self> {
        Arc::new(Self { total_max, client_max, proxies, taken: Mutex::default() })
    }

    /// A place for a connection of this client, if one is free.
    pub(super) fn take(self: &Arc<Self>, client: Option<IpAddr>) -> Option<Place> {
        let client = client.filter(|client| !client.is_loopback() && !self.proxies.contains(client)).map(network_of);
        let mut taken = self.taken.lock();
        if taken.total >= self.total_max {
            return None;
        }
        if let Some(client) = client {
            let of_client = taken.clients.get(&client).copied().unwrap_or(0);
            if of_client >= self.client_max {
                return None;
            }
            taken.clients.insert(client, of_client + 1);
        }
        taken.total += 1;
        Some(Place { places: Arc::clone(self), client })
    }
}

/// The network that counts as one client: a /64 of IPv6, of which one machine can have many addresses.
fn network_of(client: IpAddr) -> IpAddr {
    match client {
        IpAddr::V6(address) => IpAddr::V6((address.to_bits() & (u128::MAX << 64)).into()),
        address => address,
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let mut taken = self.places.taken.lock();
        taken.total -= 1;
        let Some(client) = self.client else { return };
        match taken.clients.get_mut(&client) {
            Some(of_client) if *of_client > 1 => *of_client -= 1,
            _ => drop(taken.clients.remove(&client)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ip(text: &str) -> Option<IpAddr> {
        Some(text.parse().expect("an address"))
    }

    #[test]
    fn places_are_bounded_and_given_back() {
        let proxies = BTreeSet::from(["10.0.0.9".parse().expect("an address")]);
        let places = Places::new(5, 2, proxies);
        let one = ip("10.0.0.1");
        let first = places.take(one).expect("free");
        let _second = places.take(one).expect("free");
        assert!(places.take(one).is_none(), "one client takes two places at most");
        drop(first);
        let _third = places.take(one).expect("a place was given back");
        let _proxied = [places.take(ip("10.0.0.9")), places.take(ip("10.0.0.9")), places.take(ip("10.0.0.9"))]
            .map(|place| place.expect("a proxy may take all"));
        assert!(
            places.take(ip("10.0.0.2")).is_none() && places.take(ip("::1")).is_none() && places.take(None).is_none()
        );
        drop(_proxied);
        let _of_one_network = ["fd00::1", "fd00::2"].map(|address| places.take(ip(address)).expect("free"));
        assert!(places.take(ip("fd00::3")).is_none(), "a /64 counts as one client");
        drop(_of_one_network);
        let _loopback: Vec<Place> = (0..3).map(|_| places.take(ip("127.0.0.1")).expect("loopback may")).collect();
        assert!(places.take(None).is_none());
    }
}
