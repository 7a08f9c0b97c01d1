//! A bad network between two members: a seeded relay that delays, reorders and drops datagrams.

use crate::SMOLLM2;
use crate::cluster::alone_with;
use crate::hosts::members_with;
use crate::lan::Lan;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;
use tokio::net::UdpSocket;

/// The one-way delay, without jitter.
const LATENCY: Duration = Duration::from_millis(20);
const JITTER_MS: u64 = 8;
const LOSS_PERCENT: u64 = 2;

/// The network conditions of the relay: random by a seed, with outages.
#[derive(Clone)]
struct Conditions {
    state: Arc<AtomicU64>,
    is_down: Arc<AtomicBool>,
}

impl Conditions {
    fn of(seed: u64) -> Self {
        let state = Arc::new(AtomicU64::new(seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1));
        Self { state, is_down: Arc::default() }
    }

    /// A random number below `limit` (xorshift64*). Only one thread calls this.
    fn below(&self, limit: u64) -> u64 {
        let mut state = self.state.load(Ordering::Relaxed);
        state ^= state >> 12;
        state ^= state << 25;
        state ^= state >> 27;
        self.state.store(state, Ordering::Relaxed);
        (state.wrapping_mul(0x2545_F491_4F6C_DD1D) >> 33) % limit
    }

    /// Forwards a datagram after a delay, or drops it.
    fn pass(&self, socket: &Arc<UdpSocket>, datagram: &[u8], to: Option<SocketAddr>) {
        if self.is_down.load(Ordering::Relaxed) || self.below(100) < LOSS_PERCENT {
            return;
        }
        let (socket, datagram) = (Arc::clone(socket), datagram.to_vec());
        let delay = LATENCY + Duration::from_millis(self.below(JITTER_MS));
        tokio::spawn(async move {
            tokio::time::sleep(delay).await;
            // A send to a member that has ended fails.
            let _ = match to {
                Some(to) => socket.send_to(&datagram, to).await,
                None => socket.send(&datagram).await,
            };
        });
    }

    /// Relays datagrams between `target` and all senders to `listen`.
    async fn relay(self, listen: SocketAddr, target: SocketAddr) -> std::io::Result<()> {
        let near = Arc::new(UdpSocket::bind(listen).await?);
        let mut far: Vec<(SocketAddr, Arc<UdpSocket>)> = Vec::new();
        let mut datagram = vec![0; 65_536];
        loop {
            let (length, from) = near.recv_from(&mut datagram).await?;
            let known = far.iter().find(|(client, _)| *client == from).map(|(_, socket)| Arc::clone(socket));
            let socket = match known {
                Some(socket) => socket,
                None => {
                    let socket = Arc::new(UdpSocket::bind((listen.ip(), 0)).await?);
                    socket.connect(target).await?;
                    far.push((from, Arc::clone(&socket)));
                    tokio::spawn(self.clone().back(Arc::clone(&socket), Arc::clone(&near), from));
                    socket
                }
            };
            self.pass(&socket, &datagram[..length], None);
        }
    }

    async fn back(self, far: Arc<UdpSocket>, near: Arc<UdpSocket>, to: SocketAddr) {
        let mut datagram = vec![0; 65_536];
        loop {
            // An error means that no process took an earlier datagram; one may take the next.
            if let Ok(length) = far.recv(&mut datagram).await {
                self.pass(&near, &datagram[..length], Some(to));
            }
        }
    }
}

/// R7.1–R7.5: over a link of 20 ms one way, with jitter and 2 % loss, tokens are those of one process. An outage of one
/// second is no death, and answers survive a longer one.
#[test]
fn a_bad_link_changes_no_token() {
    let Some(lan) = Lan::of(3) else { return };
    let expected = alone_with(SMOLLM2);
    // a and b reach the relay on the third host, and not each other.
    lan.isolate(0, 2);
    lan.isolate(1, 2);
    let address = |host, port| SocketAddr::new(Lan::address(host).parse().expect("an address"), port);
    let conditions = Conditions::of(7);
    let (relaying, to_b) = (conditions.clone(), address(1, 52416));
    let (at_relay, lan_of_relay) = (address(2, 7000), Arc::new(lan));
    let lan = Arc::clone(&lan_of_relay);
    std::thread::spawn(move || {
        lan.enter(2);
        drop(lan);
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
        // The relay ends with the test's process.
        runtime.block_on(relaying.relay(at_relay, to_b)).expect("a relay");
    });
    let cluster = members_with(&lan_of_relay, 2, &["--no-discovery", "--peer", &at_relay.to_string()]);
    // Members report their links every second.
    std::thread::sleep(Duration::from_secs(3));
    let rtt = cluster.nodes[0].state()["members"].clone();
    let rtts = rtt
        .as_object()
        .expect("members")
        .values()
        .flat_map(|member| member["links"].as_object().expect("links").values());
    let rtts: Vec<f64> = rtts.filter_map(|link| link["rtt_s"].as_f64()).collect();
    assert!(
        !rtts.is_empty() && rtts.iter().all(|&rtt| rtt > 0.03),
        "the links are shorter than the relay makes them: {rtts:?}"
    );
    let split = "a:0-14,b:15-29";
    assert_eq!(cluster.ask(0, split), expected);
    assert_eq!(cluster.ask(1, split), expected);
    for dark in [Duration::from_secs(1), Duration::from_secs(4)] {
        let asking = cluster.asking(0, split);
        std::thread::sleep(Duration::from_secs(2));
        conditions.is_down.store(true, Ordering::Relaxed);
        std::thread::sleep(dark);
        conditions.is_down.store(false, Ordering::Relaxed);
        assert_eq!(crate::cluster::answer(asking), expected, "an outage of {dark:?}");
        for node in &cluster.nodes {
            cluster.wait_for(node, 1);
        }
    }
    assert_eq!(cluster.ask(1, split), expected);
}
