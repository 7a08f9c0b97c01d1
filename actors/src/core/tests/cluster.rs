//! Members that plan together while they die, return and disconnect. Each has its desired list, its view of the others,
//! a leader's state, heads and shards. Messages between members take time, and are lost with their link.
//!
//! After any trouble all members hold the same list, each model that can run runs once, on nodes with memory for it,
//! and no instance moves any more.

mod checks;
mod node;
mod shards;
mod trouble;

use super::{Random, seeds};
use crate::core::desired::{Deployment, Stamp};
use crate::core::leader::{BrokenShard, Effect, Leader, RoundContext};
use crate::core::pipeline::Pipeline;
use crate::core::spec::InstanceId;
use crate::core::stage::StageEvent;
use exo_net::NodeId;
use node::{Head, Message, Node};
use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::sync::Arc;
use std::time::Duration;

const TICK: Duration = Duration::from_millis(50);
/// How long a cut pair takes to notice: QUIC's idle timeout.
const NOTICED_AFTER: Duration = Duration::from_secs(2);
const GB: u64 = 1 << 30;
const TICKS_OF_TROUBLE: u32 = 1200;
/// Ticks without trouble, enough for exclusions of failed devices to end.
const TICKS_OF_CALM: u32 = 1800;
const TICKS_OF_REST: u32 = 600;

struct Cluster {
    random: Random,
    now: Duration,
    ids: Vec<NodeId>,
    memory: Vec<(u64, f64)>,
    nodes: Vec<Option<Node>>,
    /// Pairs that cannot exchange messages, and since when.
    cut: BTreeMap<(usize, usize), Duration>,
    /// Pairs of a node and a peer that the node counts as connected.
    sees: BTreeSet<(usize, usize)>,
    in_transit: VecDeque<(Duration, usize, usize, Message)>,
    next_seed: u64,
}

impl Cluster {
    fn new(seed: u64) -> Self {
        let mut random = Random::of(seed);
        let count = 2 + random.below(4) as usize;
        let ids: BTreeSet<NodeId> = (0..count)
            .map(|_| {
                format!("{:032x}{:032x}", u128::from(random.below(u64::MAX >> 33)) << 96, 0).parse().expect("an id")
            })
            .collect();
        let ids: Vec<NodeId> = ids.into_iter().collect();
        let memory: Vec<(u64, f64)> =
            ids.iter().map(|_| ((2 + random.below(14)) * GB, (1 + random.below(8)) as f64 * 1e10)).collect();
        let nodes = ids.iter().zip(&memory).map(|(&id, &memory)| Some(Node::new(id, memory))).collect();
        Self {
            random,
            now: Duration::from_secs(1),
            ids,
            memory,
            nodes,
            cut: BTreeMap::new(),
            sees: BTreeSet::new(),
            in_transit: VecDeque::new(),
            next_seed: seed,
        }
    }

    fn pairs(&self) -> impl Iterator<Item = (usize, usize)> + use<> {
        let count = self.ids.len();
        (0..count).flat_map(move |a| (a + 1..count).map(move |b| (a, b)))
    }

    fn is_connected(&self, a: usize, b: usize) -> bool {
        let pair = (a.min(b), a.max(b));
        a == b || self.nodes[a].is_some() && self.nodes[b].is_some() && !self.cut.contains_key(&pair)
    }

    /// The peers that a member counts as connected.
    fn seen(&self, index: usize) -> BTreeSet<NodeId> {
        self.sees.iter().filter(|(one, _)| *one == index).map(|(_, other)| self.ids[*other]).collect()
    }

    /// The connected peers inside the member's clique, and the member itself.
    fn connected(&self, index: usize) -> BTreeSet<NodeId> {
        let mut here = self.seen(index);
        here.retain(|other| self.nodes[index].as_ref().is_none_or(|node| !node.clique.is_outside(*other)));
        here.insert(self.ids[index]);
        here
    }

    fn send(&mut self, from: usize, to: NodeId, message: Message) {
        let Some(to) = self.ids.iter().position(|id| *id == to) else { return };
        let is_outside = |node: &Node| node.clique.is_outside(self.ids[to]) && !matches!(message, Message::Report(_));
        if from != to && !self.sees.contains(&(from, to)) || self.nodes[from].as_ref().is_some_and(is_outside) {
            return;
        }
        let takes = if from == to { 0 } else { 1 + self.random.below(60) };
        // Messages arrive in order, as on a stream.
        let before = self.in_transit.iter().filter(|(_, f, t, _)| (*f, *t) == (from, to)).map(|(due, ..)| *due).max();
        let due = (self.now + Duration::from_millis(takes)).max(before.unwrap_or_default());
        self.in_transit.push_back((due, from, to, message));
    }

    fn broadcast(&mut self, from: usize, message: &Message) {
        for to in 0..self.ids.len() {
            if to != from {
                self.send(from, self.ids[to], message.clone());
            }
        }
    }

    /// One step of time, with random failures if `trouble` allows them.
    fn tick(&mut self, trouble: Trouble) {
        self.now += TICK;
        if trouble == Trouble::Any {
            self.disturb();
        }
        self.notice();
        self.deliver();
        for index in 0..self.nodes.len() {
            self.run(index);
        }
    }

    fn deliver(&mut self) {
        let (due, later): (VecDeque<_>, VecDeque<_>) =
            std::mem::take(&mut self.in_transit).into_iter().partition(|(due, ..)| *due <= self.now);
        self.in_transit = later;
        for (_, from, to, message) in due {
            if from != to && self.sees.contains(&(to, from)) && !self.is_connected(from, to) {
                // QUIC retransmits until the connection times out.
                self.in_transit.push_back((self.now + TICK, from, to, message));
            } else if self.nodes[to].is_some() && (from == to || self.sees.contains(&(to, from))) {
                self.receive(to, from, message);
            }
        }
    }

    fn receive(&mut self, index: usize, from: usize, message: Message) {
        let (from_id, now) = (self.ids[from], self.now);
        let Some(node) = &mut self.nodes[index] else { return };
        let is_outside = node.clique.is_outside(from_id);
        match message {
            Message::Report(report) => {
                let differs = report.list != node.desired.digest() && !is_outside;
                node.clique.handle_report(&mut node.members, from_id, *report);
                if differs {
                    let entries = node.desired.entries().map(|(id, entry)| (id, entry.clone())).collect();
                    self.send(index, from_id, Message::Desired(entries));
                }
            }
            // Only the reports of a peer outside the clique count.
            _ if is_outside => {}
            Message::Desired(entries) => {
                for id in node.desired.merge(entries, now) {
                    node.leader.handle_placed(id, now);
                }
            }
            Message::Target(ask) if node.members.leader() == Some(node.id) => node.leader.handle_request(from_id, *ask),
            Message::Target(_) => {}
            Message::Refused(spec, error) => {
                if let Some(want) = node.wants.get_mut(&spec.model) {
                    want.2 = Some(error);
                }
            }
            Message::Broken(broken) => {
                if node.members.leader() == Some(node.id) {
                    self.as_leader(index, |leader, round| leader.handle_broken(round, from_id, broken));
                }
            }
            Message::Start(task) => self.start(index, from_id, *task),
            Message::Wire { id, stage, incarnation } => self.wire(index, from_id, id, stage, incarnation),
            Message::Clear { id, below } => {
                node.shards.retain(|(of, _), shard| *of != id || shard.task.stamp >= below);
            }
            Message::StageEvent { id, stamp, event } => self.on_stage_event(index, from_id, id, stamp, &event),
        }
    }

    /// The periodic work of a member.
    fn run(&mut self, index: usize) {
        let (now, seen) = (self.now, self.seen(index));
        let Some(node) = &mut self.nodes[index] else { return };
        let report = node.report(&seen);
        node.members.0.insert(node.id, report.clone());
        // Each member reports at its own point of the second.
        let is_second = (now + TICK * (7 * index as u32)).as_millis().is_multiple_of(1000);
        if node.members.leader() == Some(node.id) {
            self.as_leader(index, Leader::round);
        }
        self.apply_desired(index);
        self.report_shards(index);
        self.drive_heads(index, is_second);
        self.request_model(index);
        if is_second {
            self.update_clique(index);
            self.broadcast(index, &Message::Report(Box::new(report)));
        }
    }

    fn update_clique(&mut self, index: usize) {
        let now = self.now;
        let Some(node) = &mut self.nodes[index] else { return };
        let change = node.clique.update(node.id, &mut node.members, now);
        change.left.iter().for_each(|(left, _)| node.lose(*left, now));
        change.joined.into_iter().for_each(|joined| self.join(index, joined));
    }

    fn as_leader(&mut self, index: usize, decide: impl FnOnce(&mut Leader, &mut RoundContext<'_>)) {
        self.next_seed += 1;
        let Some(node) = &mut self.nodes[index] else { return };
        let mut round = RoundContext {
            own: node.id,
            now: self.now,
            members: &node.members,
            desired: &mut node.desired,
            idle: Some(Duration::from_secs(20)),
            seed: self.next_seed,
            effects: Vec::new(),
        };
        decide(&mut node.leader, &mut round);
        let effects = round.effects;
        for effect in effects {
            match effect {
                Effect::Written { id, entry, .. } => {
                    if let Some(node) = &mut self.nodes[index] {
                        node.written += 1;
                    }
                    self.broadcast(index, &Message::Desired(vec![(id, entry)]));
                }
                Effect::Refused { to, spec, error } => self.send(index, to, Message::Refused(spec, error)),
            }
        }
    }

    fn apply_desired(&mut self, index: usize) {
        let (now, here) = (self.now, self.connected(index));
        let Some(node) = &mut self.nodes[index] else { return };
        let deployment: Vec<(InstanceId, Stamp, Deployment)> =
            node.desired.running().map(|(id, stamp, deployment)| (id, stamp, deployment.clone())).collect();
        let own = node.id;
        // The list as of the last tick, since orders to the worker can overtake the list.
        let snapshot = std::mem::replace(&mut node.snapshot, node.desired.snapshot());
        let is_here = |other| here.contains(&other);
        node.shards
            .retain(|(id, _), shard| snapshot.keeps(*id, shard.task.stamp, now.saturating_sub(shard.ordered), is_here));
        node.heads
            .retain(|id, _| deployment.iter().any(|(of, _, deployment)| of == id && deployment.owner() == Some(own)));
        let mut orders = Vec::new();
        for (id, stamp, deployment) in deployment.into_iter().filter(|(.., deployment)| deployment.owner() == Some(own))
        {
            if node.heads.get(&id).is_none_or(|head| head.pipeline.stamp() < stamp) {
                let pipeline = Pipeline::new(stamp, Arc::new(deployment), now);
                orders.extend(pipeline.tasks(id));
                node.heads.insert(id, Head { pipeline, rewire: None });
            }
        }
        for (to, task) in orders {
            self.send(index, to, Message::Start(Box::new(task)));
        }
    }

    fn report_shards(&mut self, index: usize) {
        let now = self.now;
        let Some(node) = &mut self.nodes[index] else { return };
        let mut told = Vec::new();
        for ((id, stage), shard) in node.shards.iter_mut().filter(|(_, shard)| !shard.is_up && shard.up <= now) {
            shard.is_up = true;
            told.push((shard.owner, *id, shard.task.stamp, *stage, shard.task.device.clone()));
        }
        for (to, id, stamp, stage, device) in told {
            self.send(index, to, Message::StageEvent { id, stamp, event: StageEvent::Up { stage, device, load: 1 } });
        }
    }

    fn drive_heads(&mut self, index: usize, is_second: bool) {
        let (now, here) = (self.now, self.connected(index));
        let Some(node) = &mut self.nodes[index] else { return };
        let (own, leader) = (node.id, node.members.leader());
        let (mut message, mut late, mut cleared) = (Vec::new(), Vec::new(), Vec::new());
        for (&id, head) in &mut node.heads {
            for lost in head.pipeline.unreachable(now, |other| here.contains(&other)) {
                let _ = head.pipeline.on_node_lost(lost);
            }
            let again = head.pipeline.silent(id, now).into_iter();
            message.extend(again.map(|(to, task)| (to, Message::Start(Box::new(task)))));
            if head.pipeline.is_loaded() && !head.pipeline.is_running() && head.rewire.is_some_and(|due| due <= now) {
                head.rewire = None;
                let incarnation = head.pipeline.next_incarnation(own, now);
                for (stage, placed) in head.pipeline.deployment().placement.stages.iter().enumerate() {
                    message.push((placed.node, Message::Wire { id, stage, incarnation }));
                }
            }
            if head.pipeline.is_running() && is_second && now.as_secs().is_multiple_of(5) {
                cleared.push((id, head.pipeline.stamp()));
            }
            if let Some(stage) = head.pipeline.overdue(now).filter(|_| is_second) {
                late.push((id, head.pipeline.cut(stage, "late".to_owned(), now)));
            }
            for (stage, error) in if is_second { head.pipeline.lost() } else { Vec::new() } {
                let placed = &head.pipeline.deployment().placement.stages[stage];
                let (node, device) = (placed.node, placed.device.clone());
                let (stamp, has_run) = (head.pipeline.stamp(), head.pipeline.has_run());
                let broken = Message::Broken(BrokenShard { instance: id, stamp, node, device, has_run, error });
                message.extend(leader.map(|leader| (leader, broken)));
            }
        }
        for (to, message) in message {
            self.send(index, to, message);
        }
        for (id, step) in late {
            self.on_pipeline_event(index, id, step);
        }
        for (id, below) in cleared {
            self.clear(index, id, below);
        }
    }

    fn request_model(&mut self, index: usize) {
        let now = self.now;
        let Some(node) = &mut self.nodes[index] else { return };
        let leader = node.members.leader();
        let mut asks = Vec::new();
        for (ask, asked, _) in node.wants.values_mut() {
            let is_due = asked.is_none_or(|asked| now > asked + Duration::from_secs(2));
            if is_due && node.desired.find(&ask.spec).is_none() {
                *asked = Some(now);
                asks.push(ask.clone());
            }
        }
        for ask in asks {
            if let Some(leader) = leader {
                self.send(index, leader, Message::Target(Box::new(ask)));
            }
        }
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Trouble {
    Any,
    None,
}

/// R7.1–R7.5: members die, return, disconnect and lose shards at random. Afterwards all hold the same list, each model
/// that can run runs once, and nothing moves without need. If a pair never connects, this holds for each clique; and
/// for all members once the pair connects.
#[test]
fn members_agree_when_trouble_is_over() {
    let (mut steps, mut ran) = (0_u64, 0);
    for seed in seeds(150) {
        println!("seed {seed}");
        let mut cluster = Cluster::new(seed);
        for _ in 0..TICKS_OF_TROUBLE {
            cluster.tick(Trouble::Any);
            cluster.check();
        }
        if seed.is_multiple_of(3) {
            let pairs: Vec<_> = cluster.pairs().collect();
            let pair = pairs[cluster.random.below(pairs.len() as u64) as usize];
            cluster.calm(Some(pair));
            assert_eq!(cluster.cliques().len(), 2, "a cut pair divides the members into two cliques");
            cluster.flap_outside_pairs();
            steps += u64::from(TICKS_OF_CALM + TICKS_OF_REST);
        }
        cluster.calm(None);
        assert_eq!(cluster.cliques().len(), 1, "all members are in one clique");
        steps += u64::from(TICKS_OF_TROUBLE + TICKS_OF_CALM + TICKS_OF_REST);
        ran += cluster.nodes[0].as_ref().map_or(0, |node| node.desired.running().count());
    }
    println!("{steps} steps, {ran} instances running at the end");
    assert!(ran > 0);
}
