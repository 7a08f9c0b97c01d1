//! Probe: measures the bandwidth of a link, in bytes per second, with little traffic.
//!
//! A measurement asks the peer for a few frames at low priority. Each link is measured seldom, and measurements of
//! several links begin one after the other. The first frames open the congestion window, and are not counted.

use super::{ClusterMsg, ClusterRef, ClusterState, ConnectedPeer};
use crate::core::plan::Link;
use crate::transport::protocol::DataHello;
use exo_net::{Announced, DataConnection, DataStream, FrameError, NodeId, Payload, Priority};
use std::time::{Duration, Instant};

/// Frames of a measurement, 2 MiB in all: 1/50 s on a home network, and less than 1/2 s on a slow one.
const FRAMES: u32 = 8;
const FRAME_BYTES: usize = 256 << 10;
/// The first frames, which open the congestion window.
const NOT_COUNTED: u32 = 3;
/// The time limit of a measurement, and of the sending of one frame. A slower link is measured by the bytes that arrive
/// in this time.
const DEADLINE: Duration = Duration::from_secs(10);

/// The time between two round-trip times that count.
const RTT_EVERY: Duration = Duration::from_secs(5);
/// The time from a peer's connection to the first measurement of its link: an earlier one would compete with the first
/// messages.
const PROBE_AFTER: Duration = Duration::from_secs(2);
/// The time between two of the first measurements of one link: several make an estimate that one disturbance does not
/// change.
const PROBE_AGAIN: Duration = Duration::from_secs(10);
/// The time between two later measurements.
const PROBE_EVERY: Duration = Duration::from_secs(600);

impl ConnectedPeer {
    /// Takes the round-trip time, if it is due.
    pub(super) fn take_rtt(&mut self) {
        if self.rtt_taken.is_none_or(|taken| taken.elapsed() > RTT_EVERY) {
            self.rtt_taken = Some(Instant::now());
            self.rtt.add(self.data.rtt().as_secs_f64());
        }
    }

    /// The link to the peer, as measured so far.
    pub(super) fn link(&self) -> Link {
        let (rtt, bandwidth) = (self.rtt.median(), self.bandwidth.median());
        let spreads = [rtt, bandwidth].into_iter().flatten().map(|median| median.spread);
        Link {
            rtt_s: rtt.map_or(0.0, |rtt| rtt.value),
            bytes_per_s: bandwidth.map(|bandwidth| bandwidth.value),
            spread: spreads.fold(1.0, f64::max),
        }
    }
}

impl ClusterState {
    pub(super) fn on_probed(&mut self, id: NodeId, session: u64, bytes_per_s: f64) {
        if let Some(peer) = self.peers.get_mut(&id).filter(|peer| peer.session == session) {
            peer.bandwidth.add(bytes_per_s);
        }
    }

    /// Measures the bandwidth of the link whose last measurement is the oldest, if it is due.
    pub(super) fn probe(&mut self, myself: &ClusterRef) {
        let is_due = |peer: &ConnectedPeer| match peer.probed {
            None => peer.since.elapsed() > PROBE_AFTER,
            Some(probed) if peer.bandwidth.is_early() => probed.elapsed() > PROBE_AGAIN,
            Some(probed) => probed.elapsed() > PROBE_EVERY,
        };
        let due = self.peers.iter_mut().filter(|(_, peer)| peer.is_ready && is_due(peer));
        let Some((&id, peer)) = due.min_by_key(|(_, peer)| peer.probed) else { return };
        peer.probed = Some(Instant::now());
        let (data, session, cluster) = (peer.data.clone(), peer.session, myself.clone());
        peer.data.spawn(async move {
            if let Some(bytes_per_s) = measure(&data).await {
                // The cluster actor may have stopped.
                let _ = cluster.send_message(ClusterMsg::Probed { id, session, bytes_per_s });
            }
        });
    }
}

/// Measures the bandwidth from a peer to this node, in bytes per second; `None` if the stream breaks, or no counted
/// frame arrives in time.
async fn measure(data: &DataConnection) -> Option<f64> {
    let (mut counted, mut begun) = (0, Instant::now());
    let receiving = async {
        let mut stream = data.open(Priority::Low).await?;
        stream.writer.send(&DataHello::Probe, Payload::Nothing).await?;
        for frame in 0..FRAMES {
            let fits = |_: &(), announced| match announced {
                Announced::Bytes { count: FRAME_BYTES } => Ok(()),
                _ => Err("a probe frame of another size".to_owned()),
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

/// Sends a peer the frames of its measurement.
pub(super) async fn serve(mut stream: DataStream) {
    stream.set_priority(Priority::Low);
    let bytes = vec![0; FRAME_BYTES];
    for _ in 0..FRAMES {
        // A peer that disconnects or does not read ends its measurement.
        let sending = tokio::time::timeout(DEADLINE, stream.writer.send(&(), Payload::Bytes(&bytes)));
        if !matches!(sending.await, Ok(Ok(()))) {
            return stream.give_up();
        }
    }
}
