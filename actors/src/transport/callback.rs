//! Callbacks, by which an actor reports events to its creator without a dependency on the creator's type.
//!
//! An actor has references to the actors that it starts or asks. Events go the opposite way, through callbacks.

use crate::core::node_status::Fact;
use ractor::ActorRef;
use std::sync::Arc;

/// A callback for events of one kind. It never blocks; if the receiver has stopped, the event is dropped.
pub(crate) struct EventCallback<T>(Arc<dyn Fn(T) + Send + Sync>);

/// A callback for facts, which go to the node, and from there to subscribers.
pub(crate) type Facts = EventCallback<Fact>;

impl<T: 'static> EventCallback<T> {
    /// Returns a callback that wraps each event by `wrap`, and sends the result to `actor`.
    pub(crate) fn to<M: ractor::Message>(actor: &ActorRef<M>, wrap: impl Fn(T) -> M + Send + Sync + 'static) -> Self {
        let actor = actor.clone();
        Self(Arc::new(move |event| drop(actor.send_message(wrap(event)))))
    }

    /// Returns a callback that calls `handle` with each event.
    pub(crate) fn new(handle: impl Fn(T) + Send + Sync + 'static) -> Self {
        Self(Arc::new(handle))
    }

    /// Returns a callback that drops every event.
    pub(crate) fn ignore() -> Self {
        Self(Arc::new(drop))
    }

    pub(crate) fn tell(&self, event: T) {
        (self.0)(event);
    }
}

impl<T> Clone for EventCallback<T> {
    fn clone(&self) -> Self {
        Self(Arc::clone(&self.0))
    }
}

impl<T> std::fmt::Debug for EventCallback<T> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("EventCallback")
    }
}
