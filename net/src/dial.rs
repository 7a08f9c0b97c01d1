//! Which addresses to dial, and when.
//!
//! A state machine without I/O. Time is an argument, counted from any fixed start. Methods come in families:
//! - `handle_*`: an address was found, a dial ended, a peer connected or disconnected;
//! - [`DialPolicy::poll_dial`]: the next address to dial now;
//! - [`DialPolicy::next_due`]: when to poll again.
//!
//! An address has one dial at a time. Failed dials are repeated after growing waits with jitter. The addresses of a
//! connected peer are not dialled. A peer that flaps, so disconnects soon, waits as if its dials had failed.

use crate::identity::NodeId;
use std::collections::{BTreeMap, BTreeSet};
use std::net::SocketAddr;
use std::time::Duration;

/// The most known addresses; named addresses may exceed it. Home clusters have dozens of members with a handful each.
const ADDRESSES_MAX: usize = 512;
/// The most dials at once: many false addresses from one peer are tried a few at a time.
const DIALS_MAX: usize = 16;
/// The most remembered addresses of this node itself; a forgotten one costs one more dial to find out.
const OWN_MAX: usize = 64;
/// The wait after the first failure; each further failure doubles the wait.
const WAIT_FIRST: Duration = Duration::from_millis(250);
/// The longest wait before jitter: a machine that is switched on should connect soon.
const WAIT_MAX: Duration = Duration::from_secs(15);
/// A peer that stays connected for less time flaps.
const STAYS_MIN: Duration = Duration::from_secs(10);
/// The failures in a row, over minutes, after which an address that the user did not name is forgotten.
const FAILURES_MAX: u32 = 24;
/// The wait after a member refused this node because another node has its key, or because this node was evicted: only a
/// user can change that.
const SAME_KEY_WAIT: Duration = Duration::from_secs(60);

/// The source of an address.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Source {
    /// Discovery or a peer: may be wrong or out of date.
    Heard,
    /// The token that this node joined with: never forgotten.
    Token,
    /// The user: never forgotten.
    Named,
}

#[derive(Debug)]
struct Address {
    source: Source,
    /// The node that was last found there.
    id: Option<NodeId>,
    is_dialling: bool,
    failures: u32,
    due: Duration,
    /// Whether a peer reported a node there during the current dial.
    is_sighted: bool,
    /// Whether the node there last stayed connected for less than [`STAYS_MIN`].
    is_flapping: bool,
}

/// The state machine that decides which addresses to dial.
#[derive(Debug)]
pub struct DialPolicy {
    local: NodeId,
    random: fastrand::Rng,
    addresses: BTreeMap<SocketAddr, Address>,
    /// Addresses of this node itself.
    own: BTreeSet<SocketAddr>,
    /// The connected peers, with the time of each connection.
    up: BTreeMap<NodeId, Duration>,
}

impl DialPolicy {
    /// A policy without addresses; `seed` is for jitter.
    pub fn new(local: NodeId, seed: u64) -> Self {
        Self {
            local,
            random: fastrand::Rng::with_seed(seed),
            addresses: BTreeMap::new(),
            own: BTreeSet::new(),
            up: BTreeMap::new(),
        }
    }

    /// Adds `address`, where a member may be.
    pub fn handle_address(&mut self, address: SocketAddr, source: Source, now: Duration) {
        if self.own.contains(&address) || address.port() == 0 {
            return;
        }
        if let Some(known) = self.addresses.get_mut(&address) {
            known.source = known.source.max(source);
            return;
        }
        if self.addresses.len() >= ADDRESSES_MAX && source == Source::Heard {
            return;
        }
        let fresh = Address {
            source,
            id: None,
            is_dialling: false,
            failures: 0,
            due: now,
            is_sighted: false,
            is_flapping: false,
        };
        self.addresses.insert(address, fresh);
    }

    /// Handles a peer's report that it has just connected to a node at `address`: the address is due at once, whatever
    /// failed before. A node that flaps waits all the same.
    pub fn handle_sight(&mut self, address: SocketAddr, now: Duration) {
        self.handle_address(address, Source::Heard, now);
        if let Some(known) = self.addresses.get_mut(&address).filter(|known| !known.is_flapping) {
            known.due = known.due.min(now);
            known.is_sighted = known.is_dialling;
        }
    }

    /// Handles a dial that reached `id`.
    pub fn handle_dialled(&mut self, address: SocketAddr, id: NodeId) {
        if id == self.local {
            self.addresses.remove(&address);
            if self.own.len() >= OWN_MAX {
                self.own.pop_first();
            }
            self.own.insert(address);
            return;
        }
        if let Some(known) = self.addresses.get_mut(&address) {
            known.id = Some(id);
            (known.is_dialling, known.is_sighted) = (false, false);
        }
    }

    /// Handles a failed dial.
    pub fn handle_failed(&mut self, address: SocketAddr, now: Duration) {
        let Some(known) = self.addresses.get_mut(&address) else { return };
        // A node that cannot be reached does not flap.
        (known.is_dialling, known.is_flapping) = (false, false);
        known.failures = known.failures.saturating_add(1);
        if known.source == Source::Heard && known.failures >= FAILURES_MAX {
            self.addresses.remove(&address);
            return;
        }
        let wait = wait(known.failures, &mut self.random);
        // The node may have started during the dial.
        known.due = if std::mem::take(&mut known.is_sighted) { now } else { now + wait };
    }

    /// Handles the refusal of a member there to admit a second node with this node's key.
    pub fn handle_same_key(&mut self, address: SocketAddr, now: Duration) {
        let Some(known) = self.addresses.get_mut(&address) else { return };
        (known.is_dialling, known.is_sighted) = (false, false);
        known.due = now + SAME_KEY_WAIT;
    }

    /// Handles a change of this machine's addresses, or its return from sleep: all addresses are due, since failures
    /// from before say nothing about now.
    pub fn handle_network_changed(&mut self, now: Duration) {
        self.own.clear();
        for known in self.addresses.values_mut().filter(|known| !known.is_flapping) {
            known.failures = 0;
            known.due = known.due.min(now);
        }
    }

    /// Where an address comes from; `None` for an unknown one.
    pub fn source(&self, address: SocketAddr) -> Option<Source> {
        self.addresses.get(&address).map(|known| known.source)
    }

    /// Handles the connection of `id` at `address`.
    pub fn handle_up(&mut self, id: NodeId, address: SocketAddr, now: Duration) {
        self.up.insert(id, now);
        self.handle_address(address, Source::Heard, now);
        if let Some(known) = self.addresses.get_mut(&address) {
            known.id = Some(id);
        }
    }

    /// Handles the disconnection of `id`.
    pub fn handle_down(&mut self, id: NodeId, now: Duration) {
        let Some(since) = self.up.remove(&id) else { return };
        let flapped = now.saturating_sub(since) < STAYS_MIN;
        for known in self.addresses.values_mut().filter(|known| known.id == Some(id)) {
            known.failures = if flapped { known.failures.saturating_add(1) } else { 0 };
            known.is_flapping = flapped;
            known.due = now + wait(known.failures.max(1), &mut self.random);
        }
    }

    /// The next address to dial now; its dial counts as running until the dial's result is handled.
    pub fn poll_dial(&mut self, now: Duration) -> Option<SocketAddr> {
        let (address, due) = self.next()?;
        if due > now {
            return None;
        }
        self.addresses.get_mut(&address)?.is_dialling = true;
        Some(address)
    }

    /// When the next address is due.
    pub fn next_due(&self) -> Option<Duration> {
        self.next().map(|(_, due)| due)
    }

    /// The address that is due first, and when. Skips the addresses of peers that are connected or being dialled.
    fn next(&self) -> Option<(SocketAddr, Duration)> {
        let dialling = || self.addresses.values().filter(|known| known.is_dialling);
        if dialling().count() >= DIALS_MAX {
            return None;
        }
        let busy: BTreeSet<NodeId> = dialling().filter_map(|known| known.id).collect();
        let is_free = |known: &Address| known.id.is_none_or(|id| !self.up.contains_key(&id) && !busy.contains(&id));
        let idle = self.addresses.iter().filter(|(_, known)| !known.is_dialling && is_free(known));
        idle.map(|(&address, known)| (address, known.due)).min_by_key(|(_, due)| *due)
    }
}

/// The wait after `failures` failures, times a random factor between 0.5 and 1.5.
fn wait(failures: u32, random: &mut fastrand::Rng) -> Duration {
    let doubled = WAIT_FIRST.saturating_mul(1 << failures.saturating_sub(1).min(16));
    doubled.min(WAIT_MAX).mul_f64(0.5 + random.f64())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Identity;

    const SECOND: Duration = Duration::from_secs(1);

    fn id() -> NodeId {
        Identity::ephemeral().expect("random bytes").node_id()
    }

    fn address(port: u16) -> SocketAddr {
        SocketAddr::from(([127, 0, 0, 1], port))
    }

    #[test]
    fn a_connected_peer_is_not_dialled() {
        let (mut policy, peer) = (DialPolicy::new(id(), 1), id());
        policy.handle_address(address(1), Source::Named, Duration::ZERO);
        policy.handle_address(address(1), Source::Heard, Duration::ZERO);
        assert_eq!(policy.poll_dial(Duration::ZERO), Some(address(1)));
        assert_eq!(policy.poll_dial(Duration::ZERO), None, "one dial at a time");
        policy.handle_dialled(address(1), peer);
        policy.handle_up(peer, address(1), Duration::ZERO);
        assert_eq!(policy.poll_dial(100 * SECOND), None);
        assert_eq!(policy.next_due(), None);
        policy.handle_down(peer, 100 * SECOND);
        assert_eq!(policy.poll_dial(101 * SECOND), Some(address(1)));
    }

    #[test]
    fn own_addresses_are_dialled_once() {
        let local = id();
        let mut policy = DialPolicy::new(local, 1);
        policy.handle_address(address(1), Source::Named, Duration::ZERO);
        assert_eq!(policy.poll_dial(Duration::ZERO), Some(address(1)));
        policy.handle_dialled(address(1), local);
        policy.handle_address(address(1), Source::Heard, SECOND);
        assert_eq!(policy.poll_dial(100 * SECOND), None);
    }

    /// The number of dials within `seconds` if every dial fails.
    fn dials(policy: &mut DialPolicy, seconds: u64) -> usize {
        let mut dials = 0;
        for tick in 0..seconds * 100 {
            let now = Duration::from_millis(tick * 10);
            if let Some(address) = policy.poll_dial(now) {
                dials += 1;
                policy.handle_failed(address, now);
            }
        }
        dials
    }

    #[test]
    fn failing_addresses_are_dialled_less_often_and_forgotten_unless_named() {
        let mut policy = DialPolicy::new(id(), 7);
        policy.handle_address(address(1), Source::Named, Duration::ZERO);
        let named = dials(&mut policy, 600);
        assert!((30..120).contains(&named), "{named}");
        let mut policy = DialPolicy::new(id(), 7);
        policy.handle_address(address(1), Source::Heard, Duration::ZERO);
        assert_eq!(dials(&mut policy, 3600), FAILURES_MAX as usize);
    }

    #[test]
    fn all_addresses_are_due_when_the_network_has_changed() {
        let mut policy = DialPolicy::new(id(), 5);
        policy.handle_address(address(1), Source::Heard, Duration::ZERO);
        for _ in 0..12 {
            let now = policy.next_due().expect("another dial is due");
            assert_eq!(policy.poll_dial(now), Some(address(1)));
            policy.handle_failed(address(1), now);
        }
        let before = policy.next_due().expect("another dial is due");
        let now = before.saturating_sub(3 * SECOND);
        policy.handle_network_changed(now);
        assert_eq!(policy.poll_dial(now), Some(address(1)));
        policy.handle_failed(address(1), now);
        assert!(policy.next_due().expect("another dial is due") < now + SECOND, "earlier failures do not count");
    }

    #[test]
    fn a_member_that_knows_this_key_from_elsewhere_is_left_alone() {
        let mut policy = DialPolicy::new(id(), 5);
        policy.handle_address(address(1), Source::Named, Duration::ZERO);
        assert_eq!(policy.poll_dial(Duration::ZERO), Some(address(1)));
        policy.handle_same_key(address(1), SECOND);
        assert_eq!(policy.next_due(), Some(SECOND + SAME_KEY_WAIT));
    }

    #[test]
    fn a_sighted_address_is_dialled_at_once() {
        let mut policy = DialPolicy::new(id(), 5);
        policy.handle_address(address(1), Source::Heard, Duration::ZERO);
        let mut now = Duration::ZERO;
        for _ in 0..12 {
            now = policy.next_due().expect("another dial is due");
            assert_eq!(policy.poll_dial(now), Some(address(1)));
            policy.handle_failed(address(1), now);
        }
        assert!(policy.next_due().expect("another dial is due") > now + 5 * SECOND);
        policy.handle_sight(address(1), now + SECOND);
        assert_eq!(policy.poll_dial(now + SECOND), Some(address(1)));
        policy.handle_sight(address(1), now + SECOND);
        assert_eq!(policy.poll_dial(now + SECOND), None, "one dial at a time");
        policy.handle_failed(address(1), now + SECOND);
        assert_eq!(policy.poll_dial(now + SECOND), Some(address(1)), "the sighting during the dial makes it due");
        policy.handle_failed(address(1), now + SECOND);
        assert!(policy.next_due().expect("another dial is due") > now + 5 * SECOND, "earlier failures still count");
    }

    /// The wait is the same with and without sightings by other peers.
    #[test]
    fn a_flapping_peer_is_dialled_less_often() {
        for is_sighted in [false, true] {
            let (mut policy, peer) = (DialPolicy::new(id(), 3), id());
            policy.handle_address(address(1), Source::Named, Duration::ZERO);
            let mut ups = 0;
            for tick in 0..60_000 {
                let now = Duration::from_millis(tick * 10);
                if is_sighted {
                    policy.handle_sight(address(1), now);
                }
                if policy.poll_dial(now).is_some() {
                    ups += 1;
                    policy.handle_dialled(address(1), peer);
                    policy.handle_up(peer, address(1), now);
                    policy.handle_down(peer, now + Duration::from_millis(5));
                }
            }
            assert!((30..120).contains(&ups), "{ups} in ten minutes");
        }
    }

    /// The policy gives no due time while it has nothing to dial: a due time of "now" would make the driver spin.
    #[test]
    fn a_second_address_waits_for_the_dial_of_the_first() {
        let (mut policy, peer) = (DialPolicy::new(id(), 1), id());
        for port in [1, 2] {
            policy.handle_address(address(port), Source::Named, Duration::ZERO);
            assert_eq!(policy.poll_dial(Duration::ZERO), Some(address(port)));
        }
        for port in [1, 2] {
            policy.handle_dialled(address(port), peer);
        }
        policy.handle_up(peer, address(1), Duration::ZERO);
        policy.handle_down(peer, 100 * SECOND);
        let now = 110 * SECOND;
        assert!(policy.poll_dial(now).is_some());
        assert_eq!((policy.poll_dial(now), policy.next_due()), (None, None), "its other address waits for the dial");
    }

    #[test]
    fn many_addresses_are_tried_a_few_at_a_time() {
        let mut policy = DialPolicy::new(id(), 3);
        (1..=200).for_each(|port| policy.handle_address(address(port), Source::Heard, Duration::ZERO));
        let dialled: Vec<_> = std::iter::from_fn(|| policy.poll_dial(SECOND)).collect();
        assert_eq!(dialled.len(), DIALS_MAX);
        policy.handle_failed(dialled[0], SECOND);
        assert!(policy.poll_dial(SECOND).is_some());
    }

    #[test]
    fn addresses_are_bounded() {
        let mut policy = DialPolicy::new(id(), 3);
        for port in 1..=2000 {
            policy.handle_address(address(port), Source::Heard, Duration::ZERO);
        }
        assert_eq!(policy.addresses.len(), ADDRESSES_MAX);
        policy.handle_address(address(3000), Source::Named, Duration::ZERO);
        assert!(policy.addresses.contains_key(&address(3000)));
    }
}
