//! How many bytes a link carries in a second, measured with few of them.
//!
//! A peer is asked for some frames, at low priority, seldom, and one peer at a time. The first frames open the
//! congestion window, and are not counted.

use crate::transport::protocol::DataHello;
use exo_net::{Announced, DataConnection, DataStream, FrameError, Payload, Priority};
use std::time::{Duration, Instant};

/// 2 MiB: a fiftieth of a second on a home's network, and less than half a second on a slow one.
const FRAMES: u32 = 8;
const FRAME_BYTES: usize = 256 << 10;
const NOT_COUNTED: u32 = 3;
/// Slower links count as that slow.
const DEADLINE: Duration = Duration::from_secs(10);

/// Measures the way from a peer to here; `None` where it goes meanwhile.
pub(super) async fn measure(data: &DataConnection) -> Option<f64> {
    let (mut counted, mut begun) = (0, Instant::now());
    let receiving = async {
        let mut stream = data.open(Priority::Low).await?;
        stream.writer.send(&DataHello::Probe, Payload::Nothing).await?;
        for frame in 0..FRAMES {
            let fits = |_: &(), announced| match announced {
                Announced::Bytes { count: FRAME_BYTES } => Ok(()),
                _ => Err("a probe of another size".to_owned()),
            };
            if stream.reader.receive(fits).await?.is_none() {
                break;
            }
            if frame < NOT_COUNTED {
                begun = Instant::now();
            } else {
                counted += FRAME_BYTES;
            }
        }
        Ok::<_, FrameError>(())
    };
    match tokio::time::timeout(DEADLINE, receiving).await {
        Ok(Err(_)) => None,
        _ if counted == 0 => None,
        _ => Some(counted as f64 / begun.elapsed().as_secs_f64().max(1e-6)),
    }
}

/// Gives a peer what it measures with.
pub(super) async fn serve(mut stream: DataStream) {
    stream.set_priority(Priority::Low);
    let bytes = vec![0; FRAME_BYTES];
    for _ in 0..FRAMES {
        // A peer that goes, or does not take it, measures nothing.
        let sending = tokio::time::timeout(DEADLINE, stream.writer.send(&(), Payload::Bytes(&bytes)));
        if !matches!(sending.await, Ok(Ok(()))) {
            return stream.give_up();
        }
    }
}
