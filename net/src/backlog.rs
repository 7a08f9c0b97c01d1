//! Bounds on the queues between a peer and this node: the peer's messages that wait to be handled, and the bytes that
//! wait to be sent to the peer. ractor_cluster's own queues, which lie between, are unbounded.

use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::task::{Context, Poll};
use tokio::io::AsyncWrite;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

/// The most messages of one peer that may wait to be handled.
pub(crate) const MESSAGES_MAX: usize = 256;
/// The most bytes that may wait for one peer: minutes of members' reports, and more than the longest lists.
const OUTBOX_BYTES_MAX: u64 = 32 << 20;

/// The permits for messages of one peer that wait to be handled.
#[derive(Debug, Clone)]
pub struct Inbox(Arc<Semaphore>);

/// The slot of a waiting message. Dropping the slot lets another message in.
#[derive(Debug)]
pub struct InboxSlot(Arc<Semaphore>);

impl Inbox {
    pub(crate) fn new() -> Self {
        Self(Arc::new(Semaphore::new(MESSAGES_MAX)))
    }

    /// Waits for a free slot and returns its permit.
    pub(crate) async fn reserve(&self) -> Option<OwnedSemaphorePermit> {
        Arc::clone(&self.0).acquire_owned().await.ok()
    }

    /// The slot of a message that has left ractor_cluster's queues and waits for its handler.
    pub fn message(&self) -> InboxSlot {
        InboxSlot(Arc::clone(&self.0))
    }
}

impl Drop for InboxSlot {
    fn drop(&mut self) {
        if self.0.available_permits() < MESSAGES_MAX {
            self.0.add_permits(1);
        }
    }
}

/// The count of bytes that are queued for a peer and not yet written to its stream.
#[derive(Debug, Clone, Default)]
pub struct Outbox(Arc<AtomicU64>);

impl Outbox {
    /// Counts `bytes` more as queued. `false`: too many are queued, so the peer does not read its messages.
    #[must_use]
    pub fn put(&self, bytes: usize) -> bool {
        self.0.fetch_add(bytes as u64, Ordering::Relaxed) + bytes as u64 <= OUTBOX_BYTES_MAX
    }

    fn taken(&self, bytes: usize) {
        // The frames' overhead is written, too, but never put: the count must not fall below zero.
        let less = |waiting: u64| Some(waiting.saturating_sub(bytes as u64));
        // The closure always returns `Some`, so the update cannot fail.
        let _ = self.0.fetch_update(Ordering::Relaxed, Ordering::Relaxed, less);
    }
}

/// A stream to a peer that takes the written bytes off the peer's outbox.
#[derive(Debug)]
pub(crate) struct Emptying<W> {
    stream: W,
    outbox: Outbox,
}

impl<W> Emptying<W> {
    pub(crate) fn new(stream: W, outbox: Outbox) -> Self {
        Self { stream, outbox }
    }
}

impl<W: AsyncWrite + Unpin> AsyncWrite for Emptying<W> {
    fn poll_write(mut self: Pin<&mut Self>, context: &mut Context<'_>, bytes: &[u8]) -> Poll<std::io::Result<usize>> {
        let written = Pin::new(&mut self.stream).poll_write(context, bytes);
        if let Poll::Ready(Ok(count)) = written {
            self.outbox.taken(count);
        }
        written
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<std::io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<std::io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(context)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::io::{AsyncReadExt, AsyncWriteExt};

    /// A peer that reads nothing exceeds the bound after `OUTBOX_BYTES_MAX` bytes; a peer that reads never does.
    #[tokio::test]
    async fn unread_bytes_are_counted() {
        let outbox = Outbox::default();
        let (near, mut far) = tokio::io::duplex(1 << 10);
        let mut stream = Emptying::new(near, outbox.clone());
        let message = vec![7; 1 << 10];
        for _ in 0..OUTBOX_BYTES_MAX >> 9 {
            assert!(outbox.put(message.len()), "the peer reads its messages");
            stream.write_all(&message).await.expect("written");
            far.read_exact(&mut vec![0; message.len()]).await.expect("read");
        }
        let told = (0..).take_while(|_| outbox.put(message.len())).count() as u64;
        assert_eq!(told, OUTBOX_BYTES_MAX >> 10);
    }
}
