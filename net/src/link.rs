//! Streams of the data connection: activations between two shards, requests and answers, weights.
//!
//! ```text
//! LinkSender ─frames─► LinkReceiver
//!      ▲──── credits ──────┘   one byte per consumed frame, in batches
//! ```
//! A sender has at most as many frames in flight as it has credits: a receiver that does not keep up stops the sender,
//! and never holds more than [`CREDITS`] frames. When the peer is lost, sending fails and does not wait for ever: QUIC
//! notices within its idle timeout.

use crate::frame::{Announced, FrameError, FrameReader, FrameWriter, Payload, Received};
use quinn::{RecvStream, SendStream, VarInt};
use serde::Serialize;
use serde::de::DeserializeOwned;
use std::sync::Arc;
use tokio::sync::{Semaphore, watch};

/// The most frames of a link in flight: more than the steps in flight of a pipeline of any useful depth.
pub const CREDITS: usize = 64;
/// Credits return in batches of this many: one each would cost a datagram per frame, at the moment when the frame's
/// receiver is about to compute. A batch is less than all credits, so no sender waits for held-back ones.
pub(crate) const RETURNED_AT_ONCE: usize = CREDITS / 4;
/// The error code of any stream that is given up: the reason is sent over the control stream.
const GIVEN_UP: VarInt = VarInt::from_u32(1);

/// The sending end of a link, over a data stream that this node opened.
#[derive(Debug)]
pub struct LinkSender {
    writer: FrameWriter<SendStream>,
    credits: Arc<Semaphore>,
    returns: tokio::task::AbortHandle,
    /// Closes when the peer is lost or accepts no more frames.
    end: watch::Receiver<()>,
}

impl Drop for LinkSender {
    fn drop(&mut self) {
        self.returns.abort();
    }
}

impl LinkSender {
    /// A sender over both halves of a newly opened bidirectional stream. Called on the network's runtime.
    pub(crate) fn new(sender: SendStream, mut receiver: RecvStream) -> Self {
        let credits = Arc::new(Semaphore::new(CREDITS));
        let returned = Arc::clone(&credits);
        let (until_end, end) = watch::channel(());
        let returns = tokio::spawn(async move {
            let _until_end = until_end;
            let mut taken = [0; CREDITS];
            while let Ok(Some(count)) = receiver.read(&mut taken).await {
                // A peer that returns credits which it never had gains nothing.
                let missing = CREDITS.saturating_sub(returned.available_permits());
                returned.add_permits(count.min(missing));
            }
            // The peer accepts no more frames.
            returned.close();
        });
        Self { writer: FrameWriter::new(sender), credits, returns: returns.abort_handle(), end }
    }

    /// Waits until the peer is lost or accepts no more frames: frames that it has not consumed are lost then, even if
    /// no more are to be sent. Cancel-safe.
    pub async fn closed(&mut self) {
        while self.end.changed().await.is_ok() {}
    }

    /// Sends a frame, after it waits for a credit.
    ///
    /// # Errors
    /// [`FrameError`] where the peer is lost or accepts no more frames.
    pub async fn send<H: Serialize>(&mut self, header: &H, payload: Payload<'_>) -> Result<(), FrameError> {
        match self.credits.acquire().await {
            Ok(credit) => credit.forget(),
            Err(_) => return Err(std::io::Error::from(std::io::ErrorKind::BrokenPipe).into()),
        }
        self.writer.send(header, payload).await
    }
}

/// The receiving end of a link.
#[derive(Debug)]
pub struct LinkReceiver {
    reader: FrameReader<RecvStream>,
    credits: SendStream,
    /// Consumed frames whose credits are not returned yet.
    taken: usize,
}

impl LinkReceiver {
    /// A receiver over a stream whose first frame has been read.
    pub fn new(stream: DataStream) -> Self {
        Self { reader: stream.reader, credits: stream.writer.into_stream(), taken: 0 }
    }

    /// The next frame; `None` where the sender has ended the link. See [`FrameReader::receive`].
    ///
    /// # Errors
    /// [`FrameError`]; the link is unusable then.
    pub async fn receive<H: DeserializeOwned>(
        &mut self,
        admit: impl FnOnce(&H, Announced) -> Result<(), String>,
    ) -> Result<Option<(H, Received)>, FrameError> {
        self.reader.receive(admit).await
    }

    /// Marks a frame as consumed: its credit returns with the next batch.
    ///
    /// # Errors
    /// [`FrameError::Io`] where the link is closed.
    pub async fn taken(&mut self) -> Result<(), FrameError> {
        self.taken += 1;
        if self.taken < RETURNED_AT_ONCE {
            return Ok(());
        }
        self.taken = 0;
        Ok(self.credits.write_all(&[1; RETURNED_AT_ONCE]).await.map_err(std::io::Error::from)?)
    }
}

/// The priority of a stream.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Priority {
    /// Streams of which each byte is waited for.
    Normal,
    /// Weights: all other streams go first.
    Low,
}

impl Priority {
    /// The priority of a QUIC stream: higher numbers go first.
    pub(crate) fn number(self) -> i32 {
        match self {
            Self::Normal => 0,
            Self::Low => -10,
        }
    }
}

/// A bidirectional stream of frames.
#[derive(Debug)]
pub struct DataStream {
    /// The sending half.
    pub writer: FrameWriter<SendStream>,
    /// The receiving half.
    pub reader: FrameReader<RecvStream>,
}

impl DataStream {
    pub(crate) fn new((sender, receiver): (SendStream, RecvStream)) -> Self {
        Self { writer: FrameWriter::new(sender), reader: FrameReader::new(receiver) }
    }

    /// Sets the priority of the bytes that are sent from now on.
    pub fn set_priority(&mut self, priority: Priority) {
        // A stream that has ended needs no priority.
        let _ = self.writer.stream().set_priority(priority.number());
    }

    /// Ends the stream at once, in both directions; the peer gets an error code that says so.
    pub fn give_up(mut self) {
        // An error means that the stream has ended already.
        let _ = self.writer.stream().reset(GIVEN_UP);
        let _ = self.reader.stream().stop(GIVEN_UP);
    }
}
