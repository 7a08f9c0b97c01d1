//! What waits between a peer and this node: messages of the peer that nobody has handled, and bytes of ours that the peer
//! has not taken. ractor_cluster's queues, which lie between, have no bounds of their own.

use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::task::{Context, Poll};
use tokio::io::AsyncWrite;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

/// Messages of one peer that may wait to be handled.
pub(crate) const MESSAGES_MAX: usize = 256;
/// Bytes to one peer that may wait: minutes of what members tell each other, and more than the longest lists.
const OUTBOX_BYTES_MAX: u64 = 32 << 20;

/// Messages of a peer that wait to be handled.
#[derive(Debug, Clone)]
pub struct Inbox(Arc<Semaphore>);

/// A message that waits. It makes room for another one when it is dropped.
#[derive(Debug)]
pub struct InboxSlot(Arc<Semaphore>);

impl Inbox {
    pub(crate) fn new() -> Self {
        Self(Arc::new(Semaphore::new(MESSAGES_MAX)))
    }

    /// Room for a message, as soon as there is some.
    pub(crate) async fn room(&self) -> Option<OwnedSemaphorePermit> {
        Arc::clone(&self.0).acquire_owned().await.ok()
    }

    /// A message has come out of ractor_cluster's queues, and waits to be handled by whom it concerns.
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

/// Bytes that a peer was told and has not taken.
#[derive(Debug, Clone, Default)]
pub struct Outbox(Arc<AtomicU64>);

impl Outbox {
    /// So many bytes more are on their way. `false`: the peer does not take what it is told.
    #[must_use]
    pub fn put(&self, bytes: usize) -> bool {
        self.0.fetch_add(bytes as u64, Ordering::Relaxed) + bytes as u64 <= OUTBOX_BYTES_MAX
    }

    fn taken(&self, bytes: usize) {
        // What frames add to messages is taken, too, and was not put.
        let less = |waiting: u64| Some(waiting.saturating_sub(bytes as u64));
        // It always gives a number.
        let _ = self.0.fetch_update(Ordering::Relaxed, Ordering::Relaxed, less);
    }
}

/// A stream to a peer, by which its outbox is emptied.
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

    /// Who takes nothing is noticed before much waits; who takes is never.
    #[tokio::test]
    async fn bytes_that_are_not_taken_are_counted() {
        let outbox = Outbox::default();
        let (near, mut far) = tokio::io::duplex(1 << 10);
        let mut stream = Emptying::new(near, outbox.clone());
        let message = vec![7; 1 << 10];
        for _ in 0..OUTBOX_BYTES_MAX >> 9 {
            assert!(outbox.put(message.len()), "the peer takes what it is told");
            stream.write_all(&message).await.expect("there is room");
            far.read_exact(&mut vec![0; message.len()]).await.expect("it came");
        }
        let told = (0..).take_while(|_| outbox.put(message.len())).count() as u64;
        assert_eq!(told, OUTBOX_BYTES_MAX >> 10);
    }
}
