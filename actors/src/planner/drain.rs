//! Taking this node out of the cluster.

use super::{PlannerState, Reconcile};
use crate::core::leader::RELEASE_TIMEOUT;
use ractor::RpcReplyPort;
use std::time::Duration;

/// A drain of this node, and the callers that wait for its end.
#[derive(Debug, Default)]
pub(super) struct Drain {
    waiting: Vec<RpcReplyPort<()>>,
    /// Since when no running instance has a shard here.
    unused: Option<Duration>,
}

/// What still keeps this node in its cluster.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Remaining {
    /// A running instance has a shard here, or one is placed here.
    InUse,
    /// Shards have stopped, and their memory is not released yet.
    MemoryHeld,
    Nothing,
}

impl Drain {
    /// Whether the drain is complete at `now`.
    fn is_complete(&mut self, remaining: Remaining, now: Duration) -> bool {
        if remaining == Remaining::InUse {
            self.unused = None;
            return false;
        }
        let since = *self.unused.get_or_insert(now);
        // The thread of a hung engine keeps its memory until the process ends.
        remaining == Remaining::Nothing || now.saturating_sub(since) > RELEASE_TIMEOUT
    }
}

impl PlannerState {
    pub(super) fn drain(&mut self, reply: RpcReplyPort<()>) -> Reconcile {
        self.draining.get_or_insert_default().waiting.push(reply);
        self.renew_report();
        self.tell_report();
        Reconcile::Yes
    }

    /// Replies to the callers that wait for the drain, once the drain is complete.
    pub(super) fn answer_drain(&mut self) {
        let (own, now) = (self.args.node, self.now());
        let is_only_member = self.members.0.len() == 1;
        let mut placed = self.desired.running().flat_map(|(.., deployment)| &deployment.placement.stages);
        // Shards of an earlier placement serve until the next placement does.
        let remaining = if placed.any(|stage| stage.node == own) || self.hosted_shards > 0 {
            Remaining::InUse
        } else if self.held.is_empty() {
            Remaining::Nothing
        } else {
            Remaining::MemoryHeld
        };
        let Some(drain) = &mut self.draining else { return };
        if drain.is_complete(remaining, now) || is_only_member {
            for reply in drain.waiting.drain(..) {
                // The caller may no longer wait.
                let _ = reply.send(());
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: Duration = Duration::from_secs(1);

    #[test]
    fn a_drain_ends_when_nothing_runs_and_does_not_wait_for_a_hung_engine() {
        let mut drain = Drain::default();
        assert!(!drain.is_complete(Remaining::InUse, SECOND));
        assert!(!drain.is_complete(Remaining::MemoryHeld, 2 * SECOND), "memory is being released");
        assert!(drain.is_complete(Remaining::Nothing, 3 * SECOND));
        assert!(!drain.is_complete(Remaining::InUse, 20 * SECOND), "a shard was placed here again");
        assert!(!drain.is_complete(Remaining::MemoryHeld, 40 * SECOND));
        assert!(!drain.is_complete(Remaining::MemoryHeld, 40 * SECOND + RELEASE_TIMEOUT));
        assert!(drain.is_complete(Remaining::MemoryHeld, 41 * SECOND + RELEASE_TIMEOUT), "an engine hangs");
    }
}
