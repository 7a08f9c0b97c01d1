//! The other members: their reports and requests, changes of the clique, and what this node sends to them.

use super::{PlannerState, Reconcile, StageUpdate};
use crate::core::desired::{DesiredEntry, Target, fits_entry};
use crate::core::leader::PlacementRequest;
use crate::core::members::MemberReport;
use crate::core::node_status::Fact;
use crate::core::spec::InstanceId;
use crate::transport::control::ReceivedMessage;
use crate::transport::protocol::ControlMessage;
use exo_net::{Departure, NodeId};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

/// Entries in one message: an entry takes at most a twenty-fifth of the largest message.
const ENTRIES_PER_MESSAGE: usize = 24;
/// The least time between two copies of the whole desired list for one member. Members report every second.
const LIST_EVERY: Duration = Duration::from_millis(900);

impl PlannerState {
    pub(super) fn on_received(&mut self, received: ReceivedMessage) -> Reconcile {
        // The inbox slot is held until the message has been handled.
        let ReceivedMessage { from, message, slot } = received;
        match message {
            ControlMessage::Report(report) if report.is_plausible() => self.on_report(from, *report),
            ControlMessage::Report(_) => tracing::warn!(peer = %from, "ignored a report with impossible values"),
            // Nothing but the reports of a peer outside the clique counts.
            _ if self.clique.is_outside(from) => return Reconcile::No,
            // A stage sends many events while it loads, and only its head acts on them.
            ControlMessage::StageEvent { instance, stamp, event } => {
                self.on_stage_update(instance, StageUpdate { from, stamp, event, slot });
                return Reconcile::No;
            }
            ControlMessage::Desired(entries) => self.merge(entries),
            ControlMessage::Want(request) => self.on_placement_request(from, *request),
            ControlMessage::Refused { spec, error } if self.members.leader() == Some(from) => {
                self.refuse_here(&spec, &error)
            }
            // A former leader refuses the model: this node asks the present leader.
            ControlMessage::Refused { .. } => {}
            ControlMessage::Broken(broken) if self.is_leader() => {
                self.lead(|leader, round| leader.handle_broken(round, from, *broken));
            }
            // This node does not lead: the sender repeats the report to the leader.
            ControlMessage::Broken(_) => {}
            // The worker handles stage orders, and the cluster actor handles evictions.
            ControlMessage::Stage(_) | ControlMessage::Evicted(_) => {}
        }
        Reconcile::Yes
    }

    fn on_report(&mut self, from: NodeId, report: MemberReport) {
        if !self.clique.is_outside(from) {
            self.args.facts.tell(Fact::MemberReported { node: from, report: Box::new(report.clone()) });
            // Entries that were written while a connection was down may not have reached every member.
            if report.list != self.desired.digest() && self.may_send_list(from) {
                self.send_list(from);
            }
        }
        self.clique.handle_report(&mut self.members, from, report);
    }

    /// Computes the clique anew, and handles the members that left and joined.
    pub(super) fn update_clique(&mut self) {
        let now = self.now();
        let change = self.clique.update(self.args.node, &mut self.members, now);
        for (node, outside) in change.left {
            let (name, between) = (&outside.name, outside.between.map(|(one, other)| [one.short(), other.short()]));
            tracing::info!(
                peer = %node, name, ?between,
                "a peer is outside this node's clique, because two nodes cannot connect: open exo's UDP port between them"
            );
            self.args.facts.tell(Fact::PeerOutside { node, outside });
            self.args.router.exclude(node);
            self.leader.handle_lost(node, now, self.members.0.len());
            self.on_member_left(node);
        }
        change.forgotten.iter().for_each(|&node| self.args.router.include(node));
        for node in change.joined {
            self.args.router.include(node);
            self.on_member_joined(node);
        }
    }

    fn merge(&mut self, entries: Vec<(InstanceId, DesiredEntry)>) {
        let now = self.now();
        for (id, entry) in &entries {
            if self.desired.get(*id).is_none_or(|known| entry.stamp > known.stamp) {
                self.refuse_failed(*id, &entry.target);
            }
        }
        for id in self.desired.merge(entries, now) {
            self.leader.handle_placed(id, now);
        }
    }

    pub(super) fn on_node_up(&mut self, node: NodeId) -> Reconcile {
        if let Some(outside) = self.clique.handle_return(node) {
            self.args.facts.tell(Fact::PeerOutside { node, outside });
            self.renew_report();
            self.send_report(node);
        } else {
            self.on_member_joined(node);
        }
        Reconcile::Yes
    }

    fn on_member_joined(&mut self, node: NodeId) {
        self.leader.handle_joined(self.now());
        self.renew_report();
        self.send_report(node);
        self.send_list(node);
        self.tell_heads_of_joined(node);
    }

    fn send_report(&self, node: NodeId) {
        if let Some(report) = self.members.0.get(&self.args.node) {
            self.args.router.tell(node, ControlMessage::Report(Box::new(report.clone())));
        }
    }

    fn send_list(&self, to: NodeId) {
        let entries: Vec<_> = self.desired.entries().map(|(id, entry)| (id, entry.clone())).collect();
        for part in entries.chunks(ENTRIES_PER_MESSAGE) {
            self.args.router.tell(to, ControlMessage::Desired(part.to_vec()));
        }
    }

    /// Whether the list may be sent to `to` now; if so, notes the time. Frequent reports do not cause frequent lists.
    fn may_send_list(&mut self, to: NodeId) -> bool {
        let now = self.now();
        let is_due = self.list_sent.get(&to).is_none_or(|&sent| now.saturating_sub(sent) >= LIST_EVERY);
        if is_due {
            self.list_sent.insert(to, now);
        }
        is_due
    }

    pub(super) fn on_node_down(&mut self, node: NodeId, departure: Departure) -> Reconcile {
        let was_outside = self.forget(node, departure.to_string());
        // The other members wait for a node that some member still sees, so this report must not name the lost one.
        self.links.remove(&node);
        self.renew_report();
        self.tell_report();
        if !was_outside {
            match departure {
                Departure::Stopped | Departure::Died => self.leader.handle_ended(node, self.now()),
                Departure::Lost { .. } => self.leader.handle_lost(node, self.now(), self.members.0.len()),
            }
            self.on_member_left(node);
        }
        Reconcile::Yes
    }

    pub(super) fn on_node_missed(&mut self, node: NodeId) -> Reconcile {
        self.forget(node, "it did not introduce itself".to_owned());
        Reconcile::Yes
    }

    /// Drops the report of a lost peer. Returns whether the peer was outside the clique.
    fn forget(&mut self, node: NodeId, reason: String) -> bool {
        self.list_sent.remove(&node);
        let at_s = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs();
        self.args.facts.tell(Fact::MemberLost { node, reason, at_s });
        let now = self.now();
        self.clique.handle_lost(&mut self.members, node, now)
    }

    fn on_member_left(&mut self, node: NodeId) {
        self.tell_heads_of_lost(node);
        // The lost member may have been the leader, which knew this node's placement requests.
        self.pending.values_mut().for_each(super::PendingModel::ask_again);
    }

    /// Refuses this node's requests for an instance that stopped because it failed, with the reason.
    fn refuse_failed(&mut self, id: InstanceId, target: &Target) {
        let Target::Stopped { error: Some(error) } = target else { return };
        let spec = self.desired.get(id).and_then(DesiredEntry::deployment).map(|deployment| deployment.spec.clone());
        if let Some(spec) = spec {
            self.refuse_here(&spec, error);
        }
    }

    pub(super) fn tell_leader(&self, message: ControlMessage) {
        if let Some(leader) = self.members.leader() {
            self.args.router.tell(leader, message);
        }
    }

    fn on_placement_request(&mut self, from: NodeId, request: PlacementRequest) {
        // A node that asked a member other than the leader asks again.
        if self.is_leader() && fits_entry(&request) {
            self.leader.handle_request(from, request);
        }
    }
}
