//! Links between two networks: flow control, closing, priorities.

use super::loopback::{connected, network};
use crate::frame::{Announced, FrameError, Payload, Received};
use crate::link::{CREDITS, LinkReceiver, Priority, RETURNED_AT_ONCE};
use crate::{Network, Peer, WireType};
use std::time::Duration;

/// Long enough for an event that must not happen to be seen.
const MOMENT: Duration = Duration::from_millis(300);
const IN_TIME: Duration = Duration::from_secs(10);

/// Two connected members, each with the peer that it sees.
async fn pair() -> ([Network; 2], [Box<Peer>; 2]) {
    let (near, mut of_near, _) = network(1, Vec::new());
    let (far, mut of_far, _) = network(1, vec![near.address().expect("an address")]);
    let peers = [connected(&mut of_near).await, connected(&mut of_far).await];
    ([near, far], peers)
}

async fn drop_all(networks: [Network; 2]) {
    tokio::task::spawn_blocking(move || drop(networks)).await.expect("dropped");
}

fn numbers(_: &u64, announced: Announced) -> Result<(), String> {
    match announced {
        Announced::Numbers { count: 4 } => Ok(()),
        other => Err(format!("{other:?}")),
    }
}

/// A sender has at most as many frames in flight as it has credits; consumed frames return credits.
#[tokio::test(flavor = "multi_thread")]
async fn credits_bound_the_frames_in_flight() {
    let (networks, [near, far]) = pair().await;
    let mut sender = near.data.open_link(&7_u8).await.expect("a link");
    let mut stream = far.data.accept().await.expect("a stream");
    stream.reader.receive::<u8>(|_, _| Ok(())).await.expect("a greeting");
    let mut receiver = LinkReceiver::new(stream);
    let payload = Payload::Numbers(&[1.0, 2.0, 3.0, 4.0], WireType::F32);
    for number in 0..CREDITS as u64 {
        tokio::time::timeout(IN_TIME, sender.send(&number, payload)).await.expect("in time").expect("sent");
    }
    let one_more = tokio::time::timeout(MOMENT, sender.send(&999_u64, payload)).await;
    assert!(one_more.is_err(), "no credit, no frame");
    for number in 0..CREDITS as u64 {
        let (header, received) = receiver.receive::<u64>(numbers).await.expect("a valid frame").expect("a frame");
        assert_eq!((header, received), (number, Received::Numbers(vec![1.0, 2.0, 3.0, 4.0])));
    }
    for _ in 0..RETURNED_AT_ONCE {
        receiver.taken().await.expect("credits returned");
    }
    tokio::time::timeout(IN_TIME, sender.send(&64_u64, payload)).await.expect("in time").expect("sent");
    drop(receiver);
    let given_up = tokio::time::timeout(IN_TIME, async { while sender.send(&0_u64, payload).await.is_ok() {} });
    given_up.await.expect("the sender notices that the receiver is dropped");
    drop_all(networks).await;
}

/// A sender that has sent all its frames, and waits for their results, notices that the link is closed.
#[tokio::test(flavor = "multi_thread")]
async fn an_idle_link_reports_that_it_is_closed() {
    let (networks, [near, far]) = pair().await;
    for is_given_up in [true, false] {
        let mut sender = near.data.open_link(&7_u8).await.expect("a link");
        sender.send(&1_u64, Payload::Nothing).await.expect("sent");
        let mut stream = far.data.accept().await.expect("a stream");
        stream.reader.receive::<u8>(|_, _| Ok(())).await.expect("a greeting");
        let open = tokio::time::timeout(MOMENT, sender.closed()).await;
        assert!(open.is_err(), "the link is open");
        match is_given_up {
            true => stream.give_up(),
            false => far.data.close("closed by the test"),
        }
        for _ in 0..2 {
            tokio::time::timeout(IN_TIME, sender.closed()).await.expect("in time");
        }
    }
    drop_all(networks).await;
}

/// Unread weights, more than a stream's window, do not block activations.
#[tokio::test(flavor = "multi_thread")]
async fn unread_weights_do_not_block_other_streams() {
    let (networks, [near, far]) = pair().await;
    let mut weights = near.data.open(Priority::Low).await.expect("a stream");
    let sending = tokio::spawn(async move {
        let piece = vec![7; 8 << 20];
        for number in 0_u64..16 {
            weights.writer.send(&number, Payload::Bytes(&piece)).await?;
        }
        Ok::<_, FrameError>(())
    });
    let unread = far.data.accept().await.expect("a stream");
    tokio::time::sleep(MOMENT).await;
    assert!(!sending.is_finished(), "the weights wait for their reader");
    let mut activations = near.data.open(Priority::Normal).await.expect("a stream");
    let rows = vec![0.5; 1 << 20];
    let sent = activations.writer.send(&7_u64, Payload::Numbers(&rows, WireType::F32));
    let taken = async {
        let mut stream = far.data.accept().await.expect("a stream");
        stream.reader.receive::<u64>(|_, _| Ok(())).await.expect("a valid frame").expect("a frame")
    };
    let (sent, (header, received)) =
        tokio::time::timeout(IN_TIME, async { tokio::join!(sent, taken) }).await.expect("in time");
    sent.expect("sent");
    assert_eq!((header, received), (7, Received::Numbers(rows)));
    drop(unread);
    drop_all(networks).await;
}
