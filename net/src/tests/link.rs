//! Links between two networks: what they carry, and what stops them.

use super::loopback::{connected, network};
use crate::frame::{Announced, FrameError, Payload, Received};
use crate::link::{CREDITS, LinkReceiver, Priority, RETURNED_AT_ONCE};
use crate::{Network, Peer, WireType};
use std::time::Duration;

/// In which what must not come would have come.
const MOMENT: Duration = Duration::from_millis(300);
const IN_TIME: Duration = Duration::from_secs(10);

/// Two members, as each sees the other.
async fn pair() -> ([Network; 2], [Box<Peer>; 2]) {
    let (near, mut of_near, _) = network(1, Vec::new());
    let (far, mut of_far, _) = network(1, vec![near.address().expect("it listens")]);
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

/// A sender has as many frames on their way as it has credits; those that are taken let others go.
#[tokio::test(flavor = "multi_thread")]
async fn credits_bound_what_is_on_its_way() {
    let (networks, [near, far]) = pair().await;
    let mut sender = near.data.open_link(&7_u8).await.expect("a link");
    let mut stream = far.data.accept().await.expect("it came");
    stream.reader.receive::<u8>(|_, _| Ok(())).await.expect("a greeting");
    let mut receiver = LinkReceiver::new(stream);
    let payload = Payload::Numbers(&[1.0, 2.0, 3.0, 4.0], WireType::F32);
    for number in 0..CREDITS as u64 {
        tokio::time::timeout(IN_TIME, sender.send(&number, payload)).await.expect("in time").expect("sent");
    }
    let one_more = tokio::time::timeout(MOMENT, sender.send(&999_u64, payload)).await;
    assert!(one_more.is_err(), "no credit, no frame");
    for number in 0..CREDITS as u64 {
        let (header, received) = receiver.receive::<u64>(numbers).await.expect("it came").expect("a frame");
        assert_eq!((header, received), (number, Received::Numbers(vec![1.0, 2.0, 3.0, 4.0])));
    }
    for _ in 0..RETURNED_AT_ONCE {
        receiver.taken().await.expect("it is told");
    }
    tokio::time::timeout(IN_TIME, sender.send(&64_u64, payload)).await.expect("in time").expect("sent");
    drop(receiver);
    let given_up = tokio::time::timeout(IN_TIME, async { while sender.send(&0_u64, payload).await.is_ok() {} });
    given_up.await.expect("a receiver that is gone is noticed");
    drop_all(networks).await;
}

/// Who has sent all, and waits for what comes of it, hears that its peer is gone.
#[tokio::test(flavor = "multi_thread")]
async fn a_link_that_is_idle_tells_that_it_is_closed() {
    let (networks, [near, far]) = pair().await;
    for is_given_up in [true, false] {
        let mut sender = near.data.open_link(&7_u8).await.expect("a link");
        sender.send(&1_u64, Payload::Nothing).await.expect("sent");
        let mut stream = far.data.accept().await.expect("it came");
        stream.reader.receive::<u8>(|_, _| Ok(())).await.expect("a greeting");
        let open = tokio::time::timeout(MOMENT, sender.closed()).await;
        assert!(open.is_err(), "nothing has happened");
        match is_given_up {
            true => stream.give_up(),
            false => far.data.close("it goes"),
        }
        for _ in 0..2 {
            tokio::time::timeout(IN_TIME, sender.closed()).await.expect("in time");
        }
    }
    drop_all(networks).await;
}

/// Weights that nobody reads, more of them than a stream holds, stop no activations.
#[tokio::test(flavor = "multi_thread")]
async fn weights_that_are_not_read_stop_nothing_else() {
    let (networks, [near, far]) = pair().await;
    let mut weights = near.data.open(Priority::Low).await.expect("a stream");
    let sending = tokio::spawn(async move {
        let piece = vec![7; 8 << 20];
        for number in 0_u64..16 {
            weights.writer.send(&number, Payload::Bytes(&piece)).await?;
        }
        Ok::<_, FrameError>(())
    });
    let unread = far.data.accept().await.expect("it came");
    tokio::time::sleep(MOMENT).await;
    assert!(!sending.is_finished(), "they wait for their reader");
    let mut activations = near.data.open(Priority::Normal).await.expect("a stream");
    let rows = vec![0.5; 1 << 20];
    let sent = activations.writer.send(&7_u64, Payload::Numbers(&rows, WireType::F32));
    let taken = async {
        let mut stream = far.data.accept().await.expect("it came");
        stream.reader.receive::<u64>(|_, _| Ok(())).await.expect("it came").expect("a frame")
    };
    let (sent, (header, received)) =
        tokio::time::timeout(IN_TIME, async { tokio::join!(sent, taken) }).await.expect("in time");
    sent.expect("sent");
    assert_eq!((header, received), (7, Received::Numbers(rows)));
    drop(unread);
    drop_all(networks).await;
}
