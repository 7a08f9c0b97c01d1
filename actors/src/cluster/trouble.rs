//! What the user should know of the network: failed dials, copies of a key, new addresses.

use super::ClusterState;
use crate::core::members::MemberReport;
use crate::core::node_status::Fact;
use crate::core::status::KeyClash;
use crate::planner::PlannerMsg;
use exo_net::NetworkEvent;
use std::time::{Duration, Instant};

/// How long after its last sign a pair of nodes with the same key is reported to other members.
const CLASH_KEPT: Duration = Duration::from_secs(150);
/// The most pairs that are kept.
const CLASHES_MAX: usize = 16;

impl ClusterState {
    pub(super) fn on_trouble(&mut self, event: NetworkEvent) {
        match event {
            NetworkEvent::Dialled { address, failure: None } => {
                self.facts.tell(Fact::AddressTried { address, failure: None });
            }
            NetworkEvent::Dialled { address, failure: Some(failure) } => {
                tracing::info!(%address, %failure, "dial failed");
                let failure = Some(format!("{failure}: {}", failure.remedy()));
                self.facts.tell(Fact::AddressTried { address, failure });
            }
            NetworkEvent::SameKey { id, first, second } => self.note_clash(KeyClash { node: id, first, second }),
            NetworkEvent::AddressesChanged(addresses) => {
                self.facts.tell(Fact::AddressesChanged(addresses.clone()));
                let _ = self.planner.send_message(PlannerMsg::AddressesChanged(addresses));
            }
            NetworkEvent::PeerUp(_) | NetworkEvent::PeerDown { .. } => {}
        }
    }

    /// Takes over the pairs with this node's own key that another member has seen: the node that stays connected does
    /// not see its copy itself.
    pub(super) fn note_reported_clashes(&mut self, report: &MemberReport) {
        let own = self.own;
        report
            .clashes
            .iter()
            .filter(|clash| clash.node == own)
            .take(CLASHES_MAX)
            .for_each(|&clash| self.note_clash(clash));
    }

    /// Forgets the pairs of which there was no sign for [`CLASH_KEPT`].
    pub(super) fn forget_old_clashes(&mut self) {
        let is_old = |told: &Instant| told.elapsed() >= CLASH_KEPT;
        let old: Vec<KeyClash> =
            self.clashes.iter().filter(|(_, told)| is_old(told)).map(|(&clash, _)| clash).collect();
        for clash in old {
            self.clashes.remove(&clash);
            self.facts.tell(Fact::SameKeyOver(clash));
        }
    }

    fn note_clash(&mut self, clash: KeyClash) {
        let is_known = self.clashes.contains_key(&clash);
        if !is_known && self.clashes.len() >= CLASHES_MAX {
            return;
        }
        self.clashes.insert(clash, Instant::now());
        if is_known {
            return;
        }
        tracing::info!(node = %clash.node, first = %clash.first, second = %clash.second, "two nodes have the same key");
        self.facts.tell(Fact::SameKey(clash));
    }
}
