//! Failures of simulated members, and how the other members notice them.

use super::node::{Message, Node, request_model};
use super::{Cluster, NOTICED_AFTER};
use crate::core::stage::StageEvent;
use exo_engines::EngineError;
use exo_net::NodeId;
use std::time::Duration;

impl Cluster {
    pub(super) fn disturb(&mut self) {
        let count = self.nodes.len() as u64;
        match self.random.below(400) {
            0..4 => {
                let victim = self.random.below(count) as usize;
                self.nodes[victim] = None;
                if self.random.below(2) == 0 {
                    // The other members notice only after a timeout.
                    let pairs = self.pairs().filter(|(a, b)| *a == victim || *b == victim);
                    self.cut.extend(pairs.map(|pair| (pair, self.now)).collect::<Vec<_>>());
                }
                self.in_transit.retain(|(_, from, to, _)| *from != victim && *to != victim);
            }
            4..9 => self.revive(self.now.as_millis() as usize),
            9..12 => {
                let pairs: Vec<_> = self.pairs().collect();
                let pair = pairs[self.random.below(pairs.len() as u64) as usize];
                self.cut.insert(pair, self.now);
            }
            12..17 => drop(self.cut.pop_first()),
            17..22 => {
                let (number, client) = (self.random.below(4), self.random.below(count) as usize);
                if let Some(node) = &mut self.nodes[client] {
                    node.wants.insert(format!("model-{number}"), (request_model(number), None, None));
                }
            }
            22..25 => {
                let client = self.random.below(count) as usize;
                if let Some(node) = &mut self.nodes[client] {
                    node.wants.pop_first();
                }
            }
            25..28 => self.fail_a_shard(),
            _ => {}
        }
    }

    pub(super) fn revive(&mut self, at: usize) {
        let count = self.nodes.len();
        let dead = (0..count).map(|index| (at + index) % count).find(|&index| self.nodes[index].is_none());
        if let Some(index) = dead {
            // The new connections show the others that the node was lost.
            for other in 0..count {
                if self.sees.contains(&(other, index)) {
                    self.lose(other, index);
                }
                self.sees.remove(&(index, other));
            }
            self.nodes[index] = Some(Node::new(self.ids[index], self.memory[index]));
        }
    }

    pub(super) fn fail_a_shard(&mut self) {
        let index = self.random.below(self.nodes.len() as u64) as usize;
        let (is_lost, takes) = (self.random.below(3) == 0, 100 + self.random.below(2000));
        let Some(node) = &mut self.nodes[index] else { return };
        let Some((&(id, stage), shard)) = node.shards.iter_mut().next() else { return };
        let error = EngineError::NoDevice { engine: "cpu".to_owned(), device: "cpu".to_owned() };
        let (owner, stamp) = (shard.owner, shard.task.stamp);
        shard.is_up = false;
        shard.up = self.now + Duration::from_millis(takes);
        let event = if is_lost { StageEvent::Lost { stage, error } } else { StageEvent::Down { stage, error } };
        if is_lost {
            node.shards.remove(&(id, stage));
        }
        self.send(index, owner, Message::StageEvent { id, stamp, event });
    }

    /// Members notice connections and losses.
    pub(super) fn notice(&mut self) {
        for (a, b) in self.pairs() {
            // A node that knows the address of another node dials it, sooner or later.
            let connects = self.random.below(10) == 0;
            for (one, other) in [(a, b), (b, a)] {
                let is_gone = !self.is_connected(a, b)
                    && self
                        .cut
                        .get(&(a, b))
                        .is_none_or(|since| self.now > *since + NOTICED_AFTER || self.nodes[other].is_none());
                if connects && self.is_connected(a, b) && !self.sees.contains(&(one, other)) {
                    self.sees.insert((one, other));
                    self.connect(one, self.ids[other]);
                } else if is_gone && self.sees.contains(&(one, other)) {
                    self.lose(one, other);
                    self.lose(other, one);
                }
            }
        }
    }

    /// Handles a new connection of member `one`.
    pub(super) fn connect(&mut self, one: usize, peer: NodeId) {
        let seen = self.seen(one);
        let Some(node) = &mut self.nodes[one] else { return };
        if node.clique.handle_return(peer).is_some() {
            let report = node.report(&seen);
            return self.send(one, peer, Message::Report(Box::new(report)));
        }
        self.join(one, peer);
    }

    /// Sends a new member the report, the list and the orders of member `one`.
    pub(super) fn join(&mut self, one: usize, peer: NodeId) {
        let (now, seen) = (self.now, self.seen(one));
        let Some(node) = &mut self.nodes[one] else { return };
        node.leader.handle_joined(now);
        let (report, entries) = (node.report(&seen), node.desired.entries().map(|(id, e)| (id, e.clone())).collect());
        self.send(one, peer, Message::Report(Box::new(report)));
        self.send(one, peer, Message::Desired(entries));
        self.order_again(one, peer);
    }

    pub(super) fn order_again(&mut self, one: usize, peer: NodeId) {
        let Some(node) = &self.nodes[one] else { return };
        let heads = node.heads.iter().filter(|(_, head)| !head.pipeline.is_loaded());
        let tasks: Vec<_> =
            heads.flat_map(|(&id, head)| head.pipeline.tasks(id)).filter(|(to, _)| *to == peer).collect();
        let running = node.heads.iter().filter(|(_, head)| head.pipeline.is_running());
        let clears: Vec<_> = running.map(|(&id, head)| Message::Clear { id, below: head.pipeline.stamp() }).collect();
        for clear in clears {
            self.send(one, peer, clear);
        }
        for (to, task) in tasks {
            self.send(one, to, Message::Start(Box::new(task)));
        }
    }

    pub(super) fn lose(&mut self, one: usize, other: usize) {
        self.sees.remove(&(one, other));
        self.in_transit.retain(|(_, from, to, _)| (*from, *to) != (one, other));
        let (lost, now) = (self.ids[other], self.now);
        // The host of a dead process may be silent, too.
        let is_told = self.nodes[other].is_none() && self.random.below(2) == 0;
        let Some(node) = &mut self.nodes[one] else { return };
        match node.clique.handle_lost(&mut node.members, lost, now) {
            true => {}
            false if is_told => node.end(lost, now),
            false => node.lose(lost, now),
        }
    }
}
