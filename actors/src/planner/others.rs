//! What other members say, and what they are told.

use super::PlannerState;
use crate::core::desired::{Entry, Want, is_short};
use crate::core::lead::Ask;
use crate::core::members::MemberReport;
use crate::core::spec::InstanceId;
use crate::core::view::Fact;
use crate::protocol::ControlMessage;
use exo_net::NodeId;
use std::time::Duration;

/// Entries of a message: each is at most a twenty-fifth of what a message may be.
const ENTRIES_AT_ONCE: usize = 24;
/// Members report every second.
const LIST_EVERY: Duration = Duration::from_millis(900);

impl PlannerState {
    pub(super) fn on_heard(&mut self, from: NodeId, message: ControlMessage) {
        match message {
            ControlMessage::Report(report) if report.is_plausible() => self.on_report(from, *report),
            ControlMessage::Report(_) => tracing::warn!(peer = %from, "a report that cannot be"),
            // Whom it sees is all that counts of it.
            _ if self.circle.is_apart(from) => {}
            ControlMessage::Desired(entries) => self.merge(entries),
            ControlMessage::Want(ask) => self.on_ask(from, *ask),
            // Of one that leads no more: whoever waits asks again.
            ControlMessage::Refused { spec, error } if self.members.leader() == Some(from) => {
                self.refuse_here(&spec, &error)
            }
            ControlMessage::Refused { .. } => {}
            // Who tells the wrong one tells again, and another one.
            ControlMessage::Broken(broken) if self.is_leader() => {
                self.decide(|leader, world| leader.handle_broken(world, from, *broken));
            }
            ControlMessage::Broken(_) => {}
            // For heads, for those who keep shards, and for those who let members in.
            ControlMessage::News { .. } | ControlMessage::Stage(_) | ControlMessage::Evicted(_) => {}
        }
    }

    fn on_report(&mut self, from: NodeId, report: MemberReport) {
        if !self.circle.is_apart(from) {
            self.args.facts.tell(Fact::MemberReported { node: from, report: Box::new(report.clone()) });
            if report.list != self.desired.digest() && self.may_tell_list(from) {
                // What was written while somebody between us was away may not have come everywhere.
                self.tell_list(from);
            }
        }
        self.circle.handle_report(&mut self.members, from, report);
    }

    /// Who is here may not all reach each other.
    pub(super) fn look_around(&mut self) {
        let now = self.now();
        let change = self.circle.look(self.args.node, &mut self.members, now);
        for (node, apart) in change.parted {
            let (name, between) = (&apart.name, apart.between.map(|(one, other)| [one.short(), other.short()]));
            tracing::warn!(
                peer = %node, name, ?between,
                "a peer is apart, for not all reach each other: open UDP port 52416, or what --listen says, between the two"
            );
            self.args.facts.tell(Fact::MemberApart { node, apart });
            self.args.post.part(node);
            self.lose(node);
        }
        change.forgotten.iter().for_each(|&node| self.args.post.join(node));
        for node in change.joined {
            self.args.post.join(node);
            self.meet(node);
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
        if let Some(apart) = self.circle.handle_return(node) {
            self.args.facts.tell(Fact::MemberApart { node, apart });
            self.renew_report();
            return self.introduce_to(node);
        }
        self.meet(node);
    }

    /// One is a member now.
    fn meet(&mut self, node: NodeId) {
        self.leader.handle_meeting(self.now());
        self.renew_report();
        self.introduce_to(node);
        self.tell_list(node);
        self.tell_owned_of_meeting(node);
    }

    fn introduce_to(&self, node: NodeId) {
        if let Some(report) = self.members.0.get(&self.args.node) {
            self.args.post.tell(node, ControlMessage::Report(Box::new(report.clone())));
        }
    }

    fn tell_list(&self, to: NodeId) {
        let entries: Vec<_> = self.desired.entries().map(|(id, entry)| (id, entry.clone())).collect();
        for part in entries.chunks(ENTRIES_AT_ONCE) {
            self.args.post.tell(to, ControlMessage::Desired(part.to_vec()));
        }
    }

    /// Whoever reports often is told no more often.
    fn may_tell_list(&mut self, to: NodeId) -> bool {
        let now = self.now();
        let is_due = self.listed.get(&to).is_none_or(|&told| now.saturating_sub(told) >= LIST_EVERY);
        if is_due {
            self.listed.insert(to, now);
        }
        is_due
    }

    pub(super) fn on_node_down(&mut self, node: NodeId) {
        let was_apart = self.forget(node);
        // The others are not to take it for one that only they see.
        self.links.remove(&node);
        self.renew_report();
        self.tell_report();
        if !was_apart {
            self.lose(node);
        }
    }

    /// What a peer that is gone has said of itself counts no more; whether it was apart.
    pub(super) fn forget(&mut self, node: NodeId) -> bool {
        self.listed.remove(&node);
        self.args.facts.tell(Fact::MemberGone { node });
        let now = self.now();
        self.circle.handle_loss(&mut self.members, node, now)
    }

    /// A member is one no more.
    fn lose(&mut self, node: NodeId) {
        self.leader.handle_loss(node, self.now(), self.members.0.len());
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
        if self.is_leader() && is_short(&ask) {
            self.leader.handle_ask(from, ask);
        }
    }
}
