//! Where an actor tells what happened, without knowing who hears it.
//!
//! Actors know those that they supervise or ask; news travel the other way, through outlets.

use crate::core::view::Fact;
use ractor::ActorRef;
use std::sync::Arc;

/// Takes news of one kind. Never blocks; who has gone hears nothing.
pub(crate) struct Outlet<T>(Arc<dyn Fn(T) + Send + Sync>);

/// Where facts go: to the node, and from there to subscribers.
pub(crate) type Facts = Outlet<Fact>;

impl<T: 'static> Outlet<T> {
    /// To `actor`, as the message that `wrap` makes of the news.
    pub(crate) fn to<M: ractor::Message>(actor: &ActorRef<M>, wrap: impl Fn(T) -> M + Send + Sync + 'static) -> Self {
        let actor = actor.clone();
        Self(Arc::new(move |news| drop(actor.send_message(wrap(news)))))
    }

    /// To whatever `hear` does with it.
    pub(crate) fn new(hear: impl Fn(T) + Send + Sync + 'static) -> Self {
        Self(Arc::new(hear))
    }

    pub(crate) fn tell(&self, news: T) {
        (self.0)(news);
    }
}

impl<T> Clone for Outlet<T> {
    fn clone(&self) -> Self {
        Self(Arc::clone(&self.0))
    }
}

impl<T> std::fmt::Debug for Outlet<T> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Outlet")
    }
}
