//! Streams of the data connection: activations between two shards, requests and answers, weights.
//!
//! ```text
//! LinkSender ─frames─► LinkReceiver
//!      ▲──── credits ──────┘   one byte for each frame that was taken, some at a time
//! ```
//! A sender has as many frames on their way as it has credits: a receiver that does not keep up stops it, and never
//! holds more than [`CREDITS`] frames. Sending fails, and does not wait for ever, when the peer is gone: QUIC notices
//! within its idle timeout.

use crate::frame::{Announced, FrameError, FrameReader, FrameWriter, Payload, Received};
use quinn::{RecvStream, SendStream, VarInt};
use serde::Serialize;
use serde::de::DeserializeOwned;
use std::sync::Arc;
use tokio::sync::{Semaphore, watch};

/// Frames of a link on their way at once: more than a pipeline of any depth that is of use has steps in flight.
pub const CREDITS: usize = 64;
/// Credits go back so many at once: one by one each would cost a datagram, in the moment in which the frame's receiver is to
/// run. Fewer than the others are never held back, so no sender waits for them.
pub(crate) const RETURNED_AT_ONCE: usize = CREDITS / 4;
/// The code of a stream that is given up, whatever the reason: the reason goes over the control stream.
const GIVEN_UP: VarInt = VarInt::from_u32(1);

/// One direction of a data stream that was opened for frames.
#[derive(Debug)]
pub struct LinkSender {
    writer: FrameWriter<SendStream>,
    credits: Arc<Semaphore>,
    returns: tokio::task::AbortHandle,
    /// Its other end goes with the peer.
    end: watch::Receiver<()>,
}

impl Drop for LinkSender {
    fn drop(&mut self) {
        self.returns.abort();
    }
}

impl LinkSender {
    /// Over the two halves of a bidirectional stream that was just opened; called on the network's runtime.
    pub(crate) fn new(sender: SendStream, mut receiver: RecvStream) -> Self {
        let credits = Arc::new(Semaphore::new(CREDITS));
        let returned = Arc::clone(&credits);
        let (until_end, end) = watch::channel(());
        let returns = tokio::spawn(async move {
            let _until_end = until_end;
            let mut taken = [0; CREDITS];
            while let Ok(Some(count)) = receiver.read(&mut taken).await {
                // A peer that returns what it never had gains nothing by it.
                let missing = CREDITS.saturating_sub(returned.available_permits());
                returned.add_permits(count.min(missing));
            }
            // The peer takes no more.
            returned.close();
        });
        Self { writer: FrameWriter::new(sender), credits, returns: returns.abort_handle(), end }
    }

    /// Waits until the peer is gone or takes no more: what was sent and not taken is lost then, whether or not more is to be
    /// sent. May be dropped and called again.
    pub async fn closed(&mut self) {
        while self.end.changed().await.is_ok() {}
    }

    /// Sends a frame, when there is a credit for it.
    ///
    /// # Errors
    /// [`FrameError`] where the peer is gone or takes no more.
    pub async fn send<H: Serialize>(&mut self, header: &H, payload: Payload<'_>) -> Result<(), FrameError> {
        match self.credits.acquire().await {
            Ok(credit) => credit.forget(),
            Err(_) => return Err(std::io::Error::from(std::io::ErrorKind::BrokenPipe).into()),
        }
        self.writer.send(header, payload).await
    }
}

/// The other end.
#[derive(Debug)]
pub struct LinkReceiver {
    reader: FrameReader<RecvStream>,
    credits: SendStream,
    /// Frames that were taken, and whose credits have not gone back yet.
    taken: usize,
}

impl LinkReceiver {
    /// Over a stream whose first frame has been read.
    pub fn new(stream: DataStream) -> Self {
        Self { reader: stream.reader, credits: stream.writer.into_stream(), taken: 0 }
    }

    /// The next frame; `None` where the sender has ended the link. See [`FrameReader::receive`].
    ///
    /// # Errors
    /// [`FrameError`]; the link is of no more use.
    pub async fn receive<H: DeserializeOwned>(
        &mut self,
        admit: impl FnOnce(&H, Announced) -> Result<(), String>,
    ) -> Result<Option<(H, Received)>, FrameError> {
        self.reader.receive(admit).await
    }

    /// The frame was taken: its credit goes back, soon.
    ///
    /// # Errors
    /// [`FrameError::Io`] where the peer is gone.
    pub async fn taken(&mut self) -> Result<(), FrameError> {
        self.taken += 1;
        if self.taken < RETURNED_AT_ONCE {
            return Ok(());
        }
        self.taken = 0;
        Ok(self.credits.write_all(&[1; RETURNED_AT_ONCE]).await.map_err(std::io::Error::from)?)
    }
}

/// How much a stream gives way.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Priority {
    /// Somebody waits for each byte.
    Normal,
    /// Weights: whatever else there is goes first.
    Low,
}

impl Priority {
    /// As QUIC streams have it: the higher goes first.
    pub(crate) fn number(self) -> i32 {
        match self {
            Self::Normal => 0,
            Self::Low => -10,
        }
    }
}

/// A bidirectional stream with frames both ways.
#[derive(Debug)]
pub struct DataStream {
    pub writer: FrameWriter<SendStream>,
    pub reader: FrameReader<RecvStream>,
}

impl DataStream {
    pub(crate) fn new((sender, receiver): (SendStream, RecvStream)) -> Self {
        Self { writer: FrameWriter::new(sender), reader: FrameReader::new(receiver) }
    }

    /// How much what is sent from now on gives way.
    pub fn set_priority(&mut self, priority: Priority) {
        // A stream that has ended needs no priority.
        let _ = self.writer.stream().set_priority(priority.number());
    }

    /// Ends the stream at once, both ways; the peer sees that it was given up.
    pub fn give_up(mut self) {
        // A stream that has ended already needs no end.
        let _ = self.writer.stream().reset(GIVEN_UP);
        let _ = self.reader.stream().stop(GIVEN_UP);
    }
}
