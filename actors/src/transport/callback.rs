//! Callbacks: how an actor reports events to its creator, without knowing it.
//!
//! Actors know the actors that they start or ask. Events go the other way, through callbacks.

use crate::core::node_status::Fact;
use ractor::ActorRef;
use std::sync::Arc;

/// Takes events of one kind. Never blocks; if the receiver has stopped, the event is dropped.
pub(crate) struct EventCallback<T>(Arc<dyn Fn(T) + Send + Sync>);

/// Takes facts: they go to the node, and from there to subscribers.
pub(crate) type Facts = EventCallback<Fact>;

impl<T: 'static> EventCallback<T> {
    /// Sends each event to `actor`, as the message that `wrap` makes of it.
    pub(crate) fn to<M: ractor::Message>(actor: &ActorRef<M>, wrap: impl Fn(T) -> M + Send + Sync + 'static) -> Self {
        let actor = actor.clone();
        Self(Arc::new(move |event| drop(actor.send_message(wrap(event)))))
    }

    /// Calls `handle` with each event.
    pub(crate) fn new(handle: impl Fn(T) + Send + Sync + 'static) -> Self {
        Self(Arc::new(handle))
    }

    /// Drops every event.
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
