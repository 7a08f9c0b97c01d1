//! Who is here or is being met, so that a peer with several addresses is met by one of them.
//!
//! A dial learns whom it has reached only from the handshake. One that reaches a peer that is here already, or that another
//! dial has just reached, ends there, before either side takes it for a peer that comes anew.

use crate::identity::NodeId;
use std::collections::BTreeSet;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

#[derive(Debug, Default)]
struct Met {
    here: BTreeSet<NodeId>,
    dialled: BTreeSet<NodeId>,
}

/// Peers that are here, and peers that a dial has reached.
#[derive(Debug, Clone, Default)]
pub(crate) struct Meetings(Arc<Mutex<Met>>);

/// A dial has reached a peer; others do not go on while this is held.
#[derive(Debug)]
pub(crate) struct Meeting {
    of: Meetings,
    id: NodeId,
}

impl Meetings {
    fn met(&self) -> MutexGuard<'_, Met> {
        // Two sets are whole between two statements, whatever panicked.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A dial has reached `id`; `None` where it need not go on.
    pub(crate) fn begin(&self, id: NodeId) -> Option<Meeting> {
        let mut met = self.met();
        (!met.here.contains(&id) && met.dialled.insert(id)).then(|| Meeting { of: self.clone(), id })
    }

    /// Whether `id` is here changes.
    pub(crate) fn set_here(&self, id: NodeId, is_here: bool) {
        let mut met = self.met();
        match is_here {
            true => met.here.insert(id),
            false => met.here.remove(&id),
        };
    }
}

impl Drop for Meeting {
    fn drop(&mut self) {
        self.of.met().dialled.remove(&self.id);
    }
}
