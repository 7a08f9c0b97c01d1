//! Members that plan together while they die, come back and are cut off from each other: each with its list, its view of
//! the others, a leader's memory, heads and shards; messages between them take time, and are lost with a link.
//!
//! Whatever happened, when it is over all hold the same list, what can run runs once, where its memory is, and nothing
//! moves any more.

use super::{Random, seeds};
use crate::core::desired::{Desired, Entry, Stamp, Wanted};
use crate::core::lead::{Ask, Effect, Leader, World};
use crate::core::line::{Line, StageNews, StageTask, Step};
use crate::core::members::{DeviceOffer, MemberReport, Members, OwnedInstance};
use crate::core::plan::{Demand, Link};
use crate::core::spec::{FilesId, ModelSpec};
use crate::core::view::{InstanceId, Machine, Model};
use crate::request::RequestError;
use exo_engines::EngineError;
use exo_engines::engine::{DeviceId, DeviceKind, DeviceReport, Incarnation};
use exo_net::NodeId;
use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::sync::Arc;
use std::time::Duration;

const TICK: Duration = Duration::from_millis(50);
/// As QUIC's idle timeout.
const NOTICED_AFTER: Duration = Duration::from_secs(2);
const GB: u64 = 1 << 30;
const TICKS_OF_TROUBLE: u32 = 1200;
/// Long enough for exclusions to end.
const TICKS_OF_PEACE: u32 = 1800;
const TICKS_OF_REST: u32 = 600;

#[derive(Debug, Clone)]
enum Said {
    Report(Box<MemberReport>),
    Desired(Vec<(InstanceId, Entry)>),
    Want(Box<Ask>),
    Refused(ModelSpec, RequestError),
    Broken { id: InstanceId, stamp: Stamp, node: NodeId, device: DeviceId, error: RequestError },
    Start(Box<StageTask>),
    Wire { id: InstanceId, stage: usize, incarnation: Incarnation },
    Clear { id: InstanceId, below: Stamp },
    News { id: InstanceId, stamp: Stamp, news: StageNews },
}

/// A shard of a node.
struct Shard {
    owner: NodeId,
    task: StageTask,
    up: Duration,
    is_up: bool,
    seen: Option<Incarnation>,
}

/// The head of an instance.
struct Head {
    line: Line,
    rewire: Option<Duration>,
}

/// A member, while it lives.
struct Node {
    id: NodeId,
    memory_bytes: u64,
    bytes_per_s: f64,
    desired: Desired,
    members: Members,
    leader: Leader,
    heads: BTreeMap<InstanceId, Head>,
    shards: BTreeMap<(InstanceId, usize), Shard>,
    /// What its clients want, when it was last asked for, and what they were told.
    wants: BTreeMap<String, (Ask, Option<Duration>, Option<RequestError>)>,
    /// Entries that it has written.
    written: u64,
}

struct Cluster {
    random: Random,
    now: Duration,
    ids: Vec<NodeId>,
    memory: Vec<(u64, f64)>,
    nodes: Vec<Option<Node>>,
    /// Which pairs can talk, and since when they cannot.
    cut: BTreeMap<(usize, usize), Duration>,
    /// Who sees whom.
    sees: BTreeSet<(usize, usize)>,
    on_the_way: VecDeque<(Duration, usize, usize, Said)>,
    next_seed: u64,
}

fn demand(layers: u64, layer_bytes: u64) -> Demand {
    Demand {
        layer_bytes: vec![layer_bytes; layers as usize],
        kv_bytes: vec![layer_bytes / 16; layers as usize],
        embedding_bytes: layer_bytes / 4,
        head_bytes: layer_bytes / 4,
        ties_embeddings: true,
        row_bytes: 4096,
    }
}

fn ask(number: u64) -> Ask {
    let name = format!("model-{number}");
    let model = Model {
        name: name.clone(),
        family: String::new(),
        quantization: String::new(),
        context_tokens: 4096,
        files: FilesId([number as u8; 32]),
    };
    // The last one fits nobody, and not all together either.
    let demand = if number == 3 { demand(8, 100 * GB) } else { demand(4 + number * 2, GB / 4 * (1 + number)) };
    Ask { spec: ModelSpec::new(name), model, kv_pages: 16, demand }
}

impl Node {
    fn new(id: NodeId, (memory_bytes, bytes_per_s): (u64, f64)) -> Self {
        Self {
            id,
            memory_bytes,
            bytes_per_s,
            desired: Desired::new(id),
            members: Members::default(),
            leader: Leader::default(),
            heads: BTreeMap::new(),
            shards: BTreeMap::new(),
            wants: BTreeMap::new(),
            written: 0,
        }
    }

    fn report(&self) -> MemberReport {
        let held: u64 = self.shards.values().map(|shard| shard.task.memory_bytes).sum();
        let report = DeviceReport {
            id: DeviceId("cpu".to_owned()),
            kind: DeviceKind::Cpu,
            engine: "cpu".to_owned(),
            name: String::new(),
            compute_units: None,
            tier: String::new(),
        };
        let machine = Machine {
            memory_total_bytes: Some(self.memory_bytes),
            memory_free_bytes: Some(self.memory_bytes.saturating_sub(held)),
            ..Machine::default()
        };
        let owned = self.heads.iter().map(|(&id, head)| {
            let (stamp, is_ready) = (head.line.stamp(), head.line.is_running());
            (id, OwnedInstance { stamp, is_ready, is_in_use: false, state: None })
        });
        let used = self.wants.values().filter_map(|(ask, ..)| Some(self.desired.find(&ask.spec)?.0));
        MemberReport {
            name: self.id.short(),
            addresses: Vec::new(),
            devices: vec![DeviceOffer { report, bytes_per_s: Some(self.bytes_per_s) }],
            machine,
            memory_limit_bytes: None,
            leaving_bytes: 0,
            is_draining: false,
            owned: owned.collect(),
            in_use: used.collect(),
            links: self.members.0.keys().map(|&id| (id, Link { rtt_s: 1e-3, bytes_per_s: Some(1e8) })).collect(),
            peers: Vec::new(),
        }
    }
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
            on_the_way: VecDeque::new(),
            next_seed: seed,
        }
    }

    fn pairs(&self) -> impl Iterator<Item = (usize, usize)> + use<> {
        let count = self.ids.len();
        (0..count).flat_map(move |a| (a + 1..count).map(move |b| (a, b)))
    }

    fn can_talk(&self, a: usize, b: usize) -> bool {
        let pair = (a.min(b), a.max(b));
        a == b || self.nodes[a].is_some() && self.nodes[b].is_some() && !self.cut.contains_key(&pair)
    }

    fn say(&mut self, from: usize, to: NodeId, said: Said) {
        let Some(to) = self.ids.iter().position(|id| *id == to) else { return };
        if from != to && !self.sees.contains(&(from, to)) {
            return;
        }
        let takes = if from == to { 0 } else { 1 + self.random.below(60) };
        // In order, as streams are.
        let before = self.on_the_way.iter().filter(|(_, f, t, _)| (*f, *t) == (from, to)).map(|(due, ..)| *due).max();
        let due = (self.now + Duration::from_millis(takes)).max(before.unwrap_or_default());
        self.on_the_way.push_back((due, from, to, said));
    }

    fn say_to_others(&mut self, from: usize, said: &Said) {
        for to in 0..self.ids.len() {
            if to != from {
                self.say(from, self.ids[to], said.clone());
            }
        }
    }

    /// One step of time; `is_troubled`: something may happen.
    fn tick(&mut self, trouble: Trouble) {
        self.now += TICK;
        if trouble == Trouble::Any {
            self.disturb();
        }
        self.notice();
        self.deliver();
        for index in 0..self.nodes.len() {
            self.live(index);
        }
    }

    fn disturb(&mut self) {
        let count = self.nodes.len() as u64;
        match self.random.below(400) {
            0..4 => {
                let victim = self.random.below(count) as usize;
                self.nodes[victim] = None;
                if self.random.below(2) == 0 {
                    // Nobody notices at once.
                    let pairs = self.pairs().filter(|(a, b)| *a == victim || *b == victim);
                    self.cut.extend(pairs.map(|pair| (pair, self.now)).collect::<Vec<_>>());
                }
                self.on_the_way.retain(|(_, from, to, _)| *from != victim && *to != victim);
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
                    node.wants.insert(format!("model-{number}"), (ask(number), None, None));
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

    fn revive(&mut self, at: usize) {
        let count = self.nodes.len();
        let dead = (0..count).map(|index| (at + index) % count).find(|&index| self.nodes[index].is_none());
        if let Some(index) = dead {
            // Its new connections tell the others that it was gone.
            for other in 0..count {
                if self.sees.contains(&(other, index)) {
                    self.lose(other, index);
                }
                self.sees.remove(&(index, other));
            }
            self.nodes[index] = Some(Node::new(self.ids[index], self.memory[index]));
        }
    }

    fn fail_a_shard(&mut self) {
        let index = self.random.below(self.nodes.len() as u64) as usize;
        let (is_lost, takes) = (self.random.below(3) == 0, 100 + self.random.below(2000));
        let Some(node) = &mut self.nodes[index] else { return };
        let Some((&(id, stage), shard)) = node.shards.iter_mut().next() else { return };
        let error = EngineError::NoDevice { engine: "cpu".to_owned(), device: "cpu".to_owned() };
        let (owner, stamp) = (shard.owner, shard.task.stamp);
        shard.is_up = false;
        shard.up = self.now + Duration::from_millis(takes);
        let news = if is_lost { StageNews::Lost { stage, error } } else { StageNews::Down { stage, error } };
        if is_lost {
            node.shards.remove(&(id, stage));
        }
        self.say(index, owner, Said::News { id, stamp, news });
    }

    /// Members see that others came or are gone.
    fn notice(&mut self) {
        for (a, b) in self.pairs() {
            for (one, other) in [(a, b), (b, a)] {
                let is_gone = !self.can_talk(a, b)
                    && self
                        .cut
                        .get(&(a, b))
                        .is_none_or(|since| self.now > *since + NOTICED_AFTER || self.nodes[other].is_none());
                if self.can_talk(a, b) && !self.sees.contains(&(one, other)) {
                    self.sees.insert((one, other));
                    let Some(node) = &mut self.nodes[one] else { continue };
                    let (report, entries) =
                        (node.report(), node.desired.entries().map(|(id, e)| (id, e.clone())).collect());
                    self.say(one, self.ids[other], Said::Report(Box::new(report)));
                    self.say(one, self.ids[other], Said::Desired(entries));
                    self.order_again(one, self.ids[other]);
                } else if is_gone && self.sees.contains(&(one, other)) {
                    self.lose(one, other);
                    self.lose(other, one);
                }
            }
        }
    }

    fn order_again(&mut self, one: usize, met: NodeId) {
        let Some(node) = &self.nodes[one] else { return };
        let heads = node.heads.iter().filter(|(_, head)| !head.line.is_loaded());
        let tasks: Vec<_> = heads.flat_map(|(&id, head)| head.line.tasks(id)).filter(|(to, _)| *to == met).collect();
        let running = node.heads.iter().filter(|(_, head)| head.line.is_running());
        let clears: Vec<_> = running.map(|(&id, head)| Said::Clear { id, below: head.line.stamp() }).collect();
        for clear in clears {
            self.say(one, met, clear);
        }
        for (to, task) in tasks {
            self.say(one, to, Said::Start(Box::new(task)));
        }
    }

    fn lose(&mut self, one: usize, other: usize) {
        self.sees.remove(&(one, other));
        self.on_the_way.retain(|(_, from, to, _)| (*from, *to) != (one, other));
        let (gone, now) = (self.ids[other], self.now);
        let Some(node) = &mut self.nodes[one] else { return };
        node.members.0.remove(&gone);
        node.leader.handle_loss(now, node.members.0.len());
        for head in node.heads.values_mut() {
            let _ = head.line.on_node_lost(gone);
        }
        for (_, asked, _) in node.wants.values_mut() {
            *asked = None;
        }
    }

    fn deliver(&mut self) {
        let (due, later): (VecDeque<_>, VecDeque<_>) =
            std::mem::take(&mut self.on_the_way).into_iter().partition(|(due, ..)| *due <= self.now);
        self.on_the_way = later;
        for (_, from, to, said) in due {
            if from != to && self.sees.contains(&(to, from)) && !self.can_talk(from, to) {
                // It is sent again until the connection is given up.
                self.on_the_way.push_back((self.now + TICK, from, to, said));
            } else if self.nodes[to].is_some() && (from == to || self.sees.contains(&(to, from))) {
                self.hear(to, from, said);
            }
        }
    }

    fn hear(&mut self, index: usize, from: usize, said: Said) {
        let (from_id, now) = (self.ids[from], self.now);
        let Some(node) = &mut self.nodes[index] else { return };
        match said {
            Said::Report(report) => drop(node.members.0.insert(from_id, *report)),
            Said::Desired(entries) => {
                for id in node.desired.merge(entries, now) {
                    node.leader.handle_placed(id, now);
                }
            }
            Said::Want(ask) if node.members.leader() == Some(node.id) => node.leader.handle_ask(from_id, *ask),
            Said::Want(_) => {}
            Said::Refused(spec, error) => {
                if let Some(want) = node.wants.get_mut(&spec.model) {
                    want.2 = Some(error);
                }
            }
            Said::Broken { id, stamp, node: at, device, error } => {
                if node.members.leader() == Some(node.id) {
                    let of = (id, stamp);
                    self.as_leader(index, |leader, world| {
                        leader.handle_broken(world, from_id, of, (at, device), error)
                    });
                }
            }
            Said::Start(task) => self.start(index, from_id, *task),
            Said::Wire { id, stage, incarnation } => self.wire(index, from_id, id, stage, incarnation),
            Said::Clear { id, below } => {
                node.shards.retain(|(of, _), shard| *of != id || shard.task.stamp >= below);
            }
            Said::News { id, stamp, news } => self.on_news(index, from_id, id, stamp, &news),
        }
    }

    fn start(&mut self, index: usize, owner: NodeId, task: StageTask) {
        let loads = Duration::from_millis(200 + self.random.below(1500));
        let now = self.now;
        let Some(node) = &mut self.nodes[index] else { return };
        let key = (task.instance, task.stage);
        let latest =
            node.shards.values().filter(|shard| shard.task.instance == task.instance).map(|shard| shard.task.stamp);
        if latest.max().is_some_and(|latest| task.stamp < latest) {
            return;
        }
        let held =
            node.shards.get_mut(&key).filter(|held| StageTask { stamp: task.stamp, ..held.task.clone() } == task);
        match held {
            Some(held) => {
                (held.owner, held.task) = (owner, task);
                if held.is_up {
                    held.is_up = false;
                    held.up = now;
                }
            }
            None => {
                let seen = None;
                node.shards.insert(key, Shard { owner, task, up: now + loads, is_up: false, seen });
            }
        }
    }

    fn wire(&mut self, index: usize, from: NodeId, id: InstanceId, stage: usize, incarnation: Incarnation) {
        let Some(node) = &mut self.nodes[index] else { return };
        let Some(shard) = node.shards.get_mut(&(id, stage)).filter(|shard| shard.is_up && shard.owner == from) else {
            return;
        };
        // An engine refuses a life that is not later than what it has seen.
        if shard.seen.is_some_and(|seen| incarnation <= seen) {
            return;
        }
        shard.seen = Some(incarnation);
        let stamp = shard.task.stamp;
        self.say(index, from, Said::News { id, stamp, news: StageNews::Wired { stage, incarnation } });
    }

    fn on_news(&mut self, index: usize, from: NodeId, id: InstanceId, stamp: Stamp, news: &StageNews) {
        let now = self.now;
        let Some(node) = &mut self.nodes[index] else { return };
        let Some(head) = node.heads.get_mut(&id).filter(|head| head.line.stamp() == stamp) else { return };
        let step = head.line.on_news(from, news, now);
        self.take(index, id, step);
    }

    fn take(&mut self, index: usize, id: InstanceId, step: Step) {
        let now = self.now;
        let Some(head) = self.nodes[index].as_mut().and_then(|node| node.heads.get_mut(&id)) else { return };
        match step {
            Step::Loaded => head.rewire = Some(now),
            Step::Cut(.., wait) => head.rewire = Some(now + wait),
            Step::Running => {
                let clear = Said::Clear { id, below: head.line.stamp() };
                self.say(index, self.ids[index], clear.clone());
                self.say_to_others(index, &clear);
            }
            Step::Nothing | Step::Down(..) | Step::Lost(..) => {}
        }
    }

    /// What a member does by itself.
    fn live(&mut self, index: usize) {
        let now = self.now;
        let Some(node) = &mut self.nodes[index] else { return };
        let report = node.report();
        node.members.0.insert(node.id, report.clone());
        let is_second = now.as_millis().is_multiple_of(1000);
        if node.members.leader() == Some(node.id) {
            self.as_leader(index, Leader::round);
        }
        self.follow_the_list(index);
        self.tell_of_shards(index);
        self.look_after_heads(index, is_second);
        self.ask(index);
        if is_second {
            self.say_to_others(index, &Said::Report(Box::new(report)));
        }
    }

    fn as_leader(&mut self, index: usize, decide: impl FnOnce(&mut Leader, &mut World<'_>)) {
        self.next_seed += 1;
        let Some(node) = &mut self.nodes[index] else { return };
        let mut world = World {
            own: node.id,
            now: self.now,
            members: &node.members,
            desired: &mut node.desired,
            idle: Some(Duration::from_secs(20)),
            seed: self.next_seed,
            effects: Vec::new(),
        };
        decide(&mut node.leader, &mut world);
        let effects = world.effects;
        for effect in effects {
            match effect {
                Effect::Written { id, entry, .. } => {
                    if let Some(node) = &mut self.nodes[index] {
                        node.written += 1;
                    }
                    self.say_to_others(index, &Said::Desired(vec![(id, entry)]));
                }
                Effect::Refused { to, spec, error } => self.say(index, to, Said::Refused(spec, error)),
            }
        }
    }

    fn follow_the_list(&mut self, index: usize) {
        let now = self.now;
        let Some(node) = &mut self.nodes[index] else { return };
        let wanted: Vec<(InstanceId, Stamp, Wanted)> =
            node.desired.running().map(|(id, stamp, wanted)| (id, stamp, wanted.clone())).collect();
        let own = node.id;
        node.shards.retain(|(id, _), _| wanted.iter().any(|(wanted, ..)| wanted == id));
        node.heads.retain(|id, _| wanted.iter().any(|(of, _, wanted)| of == id && wanted.owner() == Some(own)));
        let mut orders = Vec::new();
        for (id, stamp, wanted) in wanted.into_iter().filter(|(.., wanted)| wanted.owner() == Some(own)) {
            if node.heads.get(&id).is_none_or(|head| head.line.stamp() < stamp) {
                let line = Line::new(stamp, Arc::new(wanted), now);
                orders.extend(line.tasks(id));
                node.heads.insert(id, Head { line, rewire: None });
            }
        }
        for (to, task) in orders {
            self.say(index, to, Said::Start(Box::new(task)));
        }
    }

    fn tell_of_shards(&mut self, index: usize) {
        let now = self.now;
        let Some(node) = &mut self.nodes[index] else { return };
        let mut told = Vec::new();
        for ((id, stage), shard) in node.shards.iter_mut().filter(|(_, shard)| !shard.is_up && shard.up <= now) {
            shard.is_up = true;
            told.push((shard.owner, *id, shard.task.stamp, *stage));
        }
        for (to, id, stamp, stage) in told {
            self.say(index, to, Said::News { id, stamp, news: StageNews::Up { stage } });
        }
    }

    fn look_after_heads(&mut self, index: usize, is_second: bool) {
        let now = self.now;
        let Some(node) = &mut self.nodes[index] else { return };
        let (own, leader) = (node.id, node.members.leader());
        let (mut said, mut late) = (Vec::new(), Vec::new());
        let (sees, ids) = (&self.sees, &self.ids);
        for (&id, head) in &mut node.heads {
            let is_here = |other| other == own || sees.iter().any(|(a, b)| *a == index && ids[*b] == other);
            for lost in head.line.out_of_reach(now, is_here) {
                let _ = head.line.on_node_lost(lost);
            }
            if head.line.is_loaded() && !head.line.is_running() && head.rewire.is_some_and(|due| due <= now) {
                head.rewire = None;
                let incarnation = head.line.next_life(own, now);
                for (stage, placed) in head.line.wanted().placement.stages.iter().enumerate() {
                    said.push((placed.node, Said::Wire { id, stage, incarnation }));
                }
            }
            if let Some(stage) = head.line.is_overdue(now).filter(|_| is_second) {
                late.push((id, head.line.cut(stage, "late".to_owned(), now)));
            }
            for (stage, error) in if is_second { head.line.lost() } else { Vec::new() } {
                let placed = &head.line.wanted().placement.stages[stage];
                let (node, device) = (placed.node, placed.device.clone());
                let broken = Said::Broken { id, stamp: head.line.stamp(), node, device, error };
                said.extend(leader.map(|leader| (leader, broken)));
            }
        }
        for (to, said) in said {
            self.say(index, to, said);
        }
        for (id, step) in late {
            self.take(index, id, step);
        }
    }

    fn ask(&mut self, index: usize) {
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
                self.say(index, leader, Said::Want(Box::new(ask)));
            }
        }
    }

    /// What holds at every moment.
    fn check(&self) {
        for node in self.nodes.iter().flatten() {
            for (id, _, wanted) in node.desired.running() {
                let mut end = 0;
                for stage in &wanted.placement.stages {
                    assert_eq!(stage.layers.start, end, "{id}: each layer once, in order");
                    end = stage.layers.end;
                }
                assert_eq!(end, wanted.demand.layer_bytes.len(), "{id}: all layers");
            }
        }
    }

    /// What holds when all is well again.
    fn check_peace(&self) {
        let nodes: Vec<&Node> = self.nodes.iter().flatten().collect();
        let first = nodes[0];
        for node in &nodes {
            assert_eq!(node.members.0.len(), nodes.len(), "all see all");
            assert!(first.desired.running().eq(node.desired.running()), "all hold the same list");
        }
        let mut specs = BTreeSet::new();
        for (id, stamp, wanted) in first.desired.running() {
            assert!(specs.insert(wanted.spec.model.clone()), "{id}: once");
            let owner = nodes.iter().find(|node| Some(node.id) == wanted.owner()).expect("its owner is here");
            let head = &owner.heads[&id];
            assert!(head.line.is_running() && head.line.stamp() == stamp, "{id} runs: {:?}", head.line);
        }
        for node in &nodes {
            let held: u64 = node.shards.values().map(|shard| shard.task.memory_bytes).sum();
            let shards = node.shards.values().map(|shard| &shard.task).collect::<Vec<_>>();
            assert!(held <= node.memory_bytes, "{} has room for what it holds: {shards:?}", node.id.short());
            for (name, (_, _, told)) in &node.wants {
                // Others need the room, or nobody has it.
                let is_told = matches!(told, Some(RequestError::Plan(_) | RequestError::Crowded { .. }));
                assert!(
                    specs.contains(name) || is_told,
                    "{name} runs, or its client knows why not: {told:?} {} {:?} wants {:?} leader {:?} running {:?}",
                    node.id.short(),
                    self.memory,
                    nodes
                        .iter()
                        .map(|n| n.wants.iter().map(|(k, v)| (k.clone(), v.1, v.2.clone())).collect::<Vec<_>>())
                        .collect::<Vec<_>>(),
                    node.members.leader().map(|l| l.short()),
                    first
                        .desired
                        .running()
                        .map(|(id, _, w)| (id, w.spec.model.clone(), w.placement.stages.len()))
                        .collect::<Vec<_>>()
                );
                assert!(name != "model-3" || !specs.contains(name), "what fits nobody does not run");
            }
        }
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Trouble {
    Any,
    None,
}

/// R7.4, R7.5: members die, come back, are cut off from each other and lose shards at random; whatever happened, when it
/// is over all hold the same list, what can run runs once, and nothing moves without need.
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
        cluster.cut.clear();
        for _ in 0..cluster.nodes.len() {
            cluster.revive(0);
        }
        for _ in 0..TICKS_OF_PEACE {
            cluster.tick(Trouble::None);
        }
        cluster.check_peace();
        let written = |cluster: &Cluster| -> u64 { cluster.nodes.iter().flatten().map(|node| node.written).sum() };
        let before = written(&cluster);
        for _ in 0..TICKS_OF_REST {
            cluster.tick(Trouble::None);
        }
        cluster.check_peace();
        assert_eq!(written(&cluster), before, "nothing moves without need");
        steps += u64::from(TICKS_OF_TROUBLE + TICKS_OF_PEACE + TICKS_OF_REST);
        ran += cluster.nodes[0].as_ref().map_or(0, |node| node.desired.running().count());
    }
    println!("{steps} steps, {ran} instances at their ends");
    assert!(ran > 0);
}
