//! Hostile members: garbage on an admitted member's connections ends those connections, and no other member's.

use super::loopback::{connected, network, resident_bytes, secret};
use crate::dial_guard::DialRegistry;
use crate::endpoint::{Endpoint, Local, Purpose};
use crate::frame::{FrameWriter, Payload};
use crate::link::Priority;
use crate::peer::{DataConnection, Hello, OwnHello, dial, hello};
use crate::{Identity, NodeId};
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

/// Bytes that end the control connection: noise, too long a length, too long a frame, 0xff bytes, an empty frame.
fn noises() -> Vec<Vec<u8>> {
    let noise: Vec<u8> = (0..65_536_u32).map(|number| (number.wrapping_mul(2_654_435_761) >> 13) as u8).collect();
    let too_long = u64::MAX.to_be_bytes().to_vec();
    let long = [(1_u64 << 40).to_be_bytes().to_vec(), vec![7; 1 << 20]].concat();
    vec![noise, too_long, long, vec![0xff; 4096], 0_u64.to_be_bytes().to_vec()]
}

/// Accepts a peer's streams as a node does: reads the first frame of each stream, or its end.
async fn take_streams(data: DataConnection) {
    while let Ok(mut stream) = data.accept().await {
        tokio::spawn(async move {
            let first = stream.reader.receive::<(u64, String)>(|_, announced| match announced {
                crate::Announced::Nothing => Ok(()),
                _ => Err("the first frame has a payload".to_owned()),
            });
            // Whatever the first frame is, the stream is given up.
            let _ = tokio::time::timeout(Duration::from_secs(5), first).await;
            stream.give_up();
        });
    }
}

/// R7.1–R7.5: noise on the control connection, and hundreds of streams of noise and of absurd sizes on the data
/// connection, end only the sender's connections; another member's connections stay open, and memory does not grow.
#[tokio::test(flavor = "multi_thread")]
async fn noise_of_a_member_harms_no_other_member() {
    let (victim, mut of_victim, _) = network(1, Vec::new());
    let address = victim.address().expect("an address");
    let (honest, mut of_honest, _) = network(1, vec![address]);
    let (at_victim, at_honest) = (connected(&mut of_victim).await, connected(&mut of_honest).await);
    let before = resident_bytes();
    let local = Local { identity: Arc::new(Identity::ephemeral().expect("random bytes")), secret: secret(1) };
    let own = local.identity.node_id();
    let (endpoint, _accepted) = Endpoint::open(local, SocketAddr::from(([127, 0, 0, 1], 0))).expect("started");
    for noise in noises() {
        let mut met =
            dial(&endpoint, address, &own_hello(own), &DialRegistry::default()).await.expect("a member is admitted");
        let peer = loop {
            let peer = connected(&mut of_victim).await;
            if peer.id == own {
                break peer;
            }
        };
        // ractor_cluster does not run here: the bytes that pass the filter are read and dropped.
        let mut control = peer.control.reader;
        tokio::spawn(async move { drop(tokio::io::copy(&mut control, &mut tokio::io::sink()).await) });
        tokio::spawn(take_streams(peer.data));
        for round in 0..300_u32 {
            let (mut sender, _receiver) = met.data.open_bi().await.expect("a stream");
            let prelude = match round % 3 {
                0 => [0xff; 16].to_vec(),
                // A frame that announces a payload of absurd length.
                1 => [16_u32.to_le_bytes().to_vec(), vec![4, 0, 0, 0], u64::MAX.to_le_bytes().to_vec()].concat(),
                _ => noise.iter().copied().cycle().take(4096).collect(),
            };
            // Writing fails where the stream is given up already.
            let _ = sender.write_all(&prelude).await;
        }
        let _ = met.introduced.streams.0.write_all(&noise).await;
        let _ = met.introduced.streams.0.finish();
        let closed = tokio::time::timeout(Duration::from_secs(10), met.introduced.control.closed());
        closed.await.expect("a member that sends noise is disconnected");
    }
    let grown = resident_bytes().saturating_sub(before);
    println!("{grown} bytes more");
    assert!(grown < 64 << 20, "{grown} bytes more");
    let mut stream = at_honest.data.open(Priority::Normal).await.expect("a stream");
    stream.writer.send(&7_u64, Payload::Nothing).await.expect("sent");
    let mut taken = at_victim.data.accept().await.expect("the honest member's connection is open");
    assert!(matches!(taken.reader.receive::<u64>(|_, _| Ok(())).await, Ok(Some((7, _)))));
    tokio::task::spawn_blocking(move || drop((victim, honest, endpoint))).await.expect("dropped");
}

fn own_hello(id: NodeId) -> OwnHello {
    OwnHello { id, name: "hostile".into(), run: 1 }
}

/// A member of another protocol version does not connect, and is sent the reason.
#[tokio::test(flavor = "multi_thread")]
async fn another_protocol_version_is_refused_with_the_reason() {
    let (victim, mut of_victim, _) = network(1, Vec::new());
    let local = Local { identity: Arc::new(Identity::ephemeral().expect("random bytes")), secret: secret(1) };
    let (endpoint, _accepted) = Endpoint::open(local, SocketAddr::from(([127, 0, 0, 1], 0))).expect("started");
    let address = victim.address().expect("an address");
    let control = endpoint.dial(address, Purpose::Control).await.expect("a member").connection;
    let (sender, _receiver) = control.open_bi().await.expect("a stream");
    let own = own_hello(Identity::ephemeral().expect("random bytes").node_id());
    let other = Hello { protocol: 99, ..hello(&own).expect("random bytes") };
    FrameWriter::new(sender).send(&other, Payload::Nothing).await.expect("sent");
    let closed = tokio::time::timeout(Duration::from_secs(5), control.closed()).await.expect("in time").to_string();
    assert!(closed.contains("protocol 99") && closed.contains("same version"), "{closed}");
    assert!(of_victim.try_recv().is_err(), "nobody became a peer");
    tokio::task::spawn_blocking(move || drop((victim, endpoint))).await.expect("dropped");
}
