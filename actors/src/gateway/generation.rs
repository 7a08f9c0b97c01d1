//! The stream of an answer, for the caller.

use crate::core::request::{Generated, RequestError};
use futures_core::Stream;
use std::pin::Pin;
use std::task::{Context, Poll};
use tokio::sync::mpsc;
use tokio_util::sync::DropGuard;

/// The stream of an answer's events. Dropping it cancels the request within one step.
#[derive(Debug)]
pub struct Generation {
    events: mpsc::Receiver<Result<Generated, RequestError>>,
    is_over: bool,
    _cancel: DropGuard,
}

impl Generation {
    pub(crate) fn new(events: mpsc::Receiver<Result<Generated, RequestError>>, cancel: DropGuard) -> Self {
        Self { events, is_over: false, _cancel: cancel }
    }

    /// The next event; `None` after the last one, which is [`Generated::Finished`] or an error.
    pub async fn next(&mut self) -> Option<Result<Generated, RequestError>> {
        std::future::poll_fn(|context| Pin::new(&mut *self).poll_next(context)).await
    }
}

impl Stream for Generation {
    type Item = Result<Generated, RequestError>;

    fn poll_next(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        if self.is_over {
            return Poll::Ready(None);
        }
        let event = match self.events.poll_recv(context) {
            Poll::Pending => return Poll::Pending,
            Poll::Ready(Some(event)) => event,
            // The request's task ended without a last event.
            Poll::Ready(None) => Err(RequestError::ShuttingDown),
        };
        self.is_over = matches!(event, Err(_) | Ok(Generated::Finished { .. }));
        Poll::Ready(Some(event))
    }
}
