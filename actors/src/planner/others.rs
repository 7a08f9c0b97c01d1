//! What other members say, and what they are told.

use super::PlannerState;
use crate::core::desired::{Entry, Want};
use crate::core::lead::Ask;
use crate::core::spec::InstanceId;
use crate::core::view::Fact;
use crate::protocol::ControlMessage;
use exo_net::NodeId;

impl PlannerState {
    pub(super) fn on_heard(&mut self, from: NodeId, message: ControlMessage) {
        match message {
            ControlMessage::Report(report) if report.is_plausible() => {
                self.args.facts.tell(Fact::MemberReported { node: from, report: report.clone() });
                if report.list != self.desired.digest() {
                    // What was written while somebody between us was away may not have come everywhere.
                    self.tell_list(from);
                }
                self.members.0.insert(from, *report);
            }
            ControlMessage::Report(_) => tracing::warn!(peer = %from, "a report that cannot be"),
            ControlMessage::Desired(entries) => self.merge(entries),
            ControlMessage::Want(ask) => self.on_ask(from, *ask),
            ControlMessage::Refused { spec, error } => self.refuse_here(&spec, &error),
            ControlMessage::Broken { instance, stamp, node, device, error } => {
                // Who tells the wrong one tells again, and another one.
                if self.is_leader() {
                    let (of, device) = ((instance, stamp), (node, device));
                    self.decide(|leader, world| leader.handle_broken(world, from, of, device, error));
                }
            }
            // For heads, for those who keep shards, and for those who let members in.
            ControlMessage::News { .. } | ControlMessage::Stage(_) | ControlMessage::Evicted(_) => {}
        }
    }

    fn merge(&mut self, entries: Vec<(InstanceId, Entry)>) {
        let now = self.now();
        for (id, entry) in &entries {
            if self.desired.get(*id).is_none_or(|known| entry.stamp > known.stamp) {
                self.note_end(*id, &entry.want);
            }
        }
        let changed = self.desired.merge(entries, now);
        for id in changed {
            self.leader.handle_placed(id, now);
        }
    }

    pub(super) fn on_node_up(&mut self, node: NodeId) {
        self.renew_report();
        if let Some(report) = self.members.0.get(&self.args.node) {
            self.args.post.tell(node, ControlMessage::Report(Box::new(report.clone())));
        }
        self.tell_list(node);
        self.tell_owned_of_meeting(node);
    }

    fn tell_list(&self, to: NodeId) {
        let entries: Vec<_> = self.desired.entries().map(|(id, entry)| (id, entry.clone())).collect();
        self.args.post.tell(to, ControlMessage::Desired(entries));
    }

    pub(super) fn on_node_down(&mut self, node: NodeId) {
        self.members.0.remove(&node);
        self.leader.handle_loss(self.now(), self.members.0.len());
        self.args.facts.tell(Fact::MemberGone { node });
        self.tell_owned_of_loss(node);
        for wanting in self.wanting.values_mut() {
            wanting.ask_again();
        }
    }

    /// Where an instance is over because it failed, whoever waits for it hears why, and does not ask anew.
    fn note_end(&mut self, id: InstanceId, want: &Want) {
        let Want::Gone { error: Some(error) } = want else { return };
        let spec = self.desired.get(id).and_then(Entry::wanted).map(|wanted| wanted.spec.clone());
        if let Some(spec) = spec {
            self.refuse_here(&spec, error);
        }
    }

    /// Tells whoever leads.
    pub(super) fn tell_leader(&self, message: ControlMessage) {
        if let Some(leader) = self.members.leader() {
            self.args.post.tell(leader, message);
        }
    }

    fn on_ask(&mut self, from: NodeId, ask: Ask) {
        // Who asks the wrong one asks again, and another one.
        if self.is_leader() {
            self.leader.handle_ask(from, ask);
        }
    }
}
