//! Single decisions of the leader. `core/tests/cluster.rs` simulates members that plan together.

mod memory;

use super::*;
use crate::core::context::{Context, ContextLimit};
use crate::core::desired::{Desired, DesiredEntry};
use crate::core::members::MemberReport;
use crate::core::plan::Demand;
use crate::core::plan::{Link, Placement, Split};
use crate::core::spec::FilesId;
use crate::core::spec::Model;

const GB: u64 = 1 << 30;
const SECOND: Duration = Duration::from_secs(1);
const LAYERS: u64 = 8;

fn id(number: u64) -> NodeId {
    format!("{number:064x}").parse().expect("an id")
}

fn cpu() -> DeviceId {
    DeviceId("cpu".to_owned())
}

/// A member with `gigabytes` for models, the speed `bytes_per_s`, and links to the nodes `links`.
fn member(gigabytes: u64, bytes_per_s: f64, links: &[u64]) -> MemberReport {
    MemberReport {
        memory_limit_bytes: Some(gigabytes * GB),
        links: links.iter().map(|&to| (id(to), Link { rtt_s: 1e-4, bytes_per_s: Some(1e9), spread: 1.0 })).collect(),
        ..MemberReport::of_cpu((gigabytes + 1) * GB, bytes_per_s)
    }
}

/// A request for a model of eight layers of a gigabyte each.
fn ask(spec: ModelSpec) -> PlacementRequest {
    let model = Model {
        name: spec.model.clone(),
        family: String::new(),
        quantization: String::new(),
        context: Context::largest(None, 4096, None),
        vocabulary: 256,
        files: FilesId([0; 32]),
    };
    let demand = Demand {
        layer_bytes: vec![GB; LAYERS as usize],
        layer_cost_bytes: vec![GB; LAYERS as usize],
        head_cost_bytes: 0,
        kv_pages: model.context.cache_pages(),
        kv_bytes: vec![1 << 20; LAYERS as usize],
        embedding_bytes: 0,
        head_bytes: 0,
        ties_embeddings: false,
        row_bytes: 4096,
    };
    PlacementRequest { spec, model, demand }
}

/// The leader, node 1, and its view of the cluster.
struct Cluster {
    leader: Leader,
    members: Members,
    desired: Desired,
    now: Duration,
}

impl Cluster {
    fn of(members: Vec<(u64, MemberReport)>) -> Self {
        let members = Members(members.into_iter().map(|(number, report)| (id(number), report)).collect());
        Self { leader: Leader::default(), members, desired: Desired::new(id(1)), now: SECOND }
    }

    fn decide(&mut self, decide: impl FnOnce(&mut Leader, &mut RoundContext<'_>)) -> Vec<Effect> {
        let mut round = RoundContext {
            own: id(1),
            now: self.now,
            members: &self.members,
            desired: &mut self.desired,
            idle: None,
            seed: self.now.as_nanos() as u64,
            effects: Vec::new(),
        };
        decide(&mut self.leader, &mut round);
        round.effects
    }

    /// The effects of so many seconds of rounds, four a second.
    fn rounds(&mut self, seconds: u64) -> Vec<Effect> {
        let mut effects = Vec::new();
        for _ in 0..seconds * 4 {
            self.now += SECOND / 4;
            effects.extend(self.decide(Leader::round));
        }
        effects
    }

    fn run(&mut self, spec: ModelSpec) -> InstanceId {
        self.leader.handle_request(id(1), ask(spec.clone()));
        self.rounds(1);
        let mut running = self.desired.running();
        running.find(|(.., deployment)| deployment.spec == spec).expect("the model is placed").0
    }

    /// Removes all members' links to a node.
    fn lose_links(&mut self, number: u64) {
        for report in self.members.0.values_mut() {
            report.links.remove(&id(number));
        }
    }

    fn placement(&self, instance: InstanceId) -> &Placement {
        &self.desired.get(instance).and_then(DesiredEntry::deployment).expect("the instance runs").placement
    }

    /// The node's number and the layer count of each stage.
    fn split(&self, instance: InstanceId) -> Vec<(u64, usize)> {
        let number = |node: NodeId| u64::from(node.as_bytes()[31]);
        let stages = &self.placement(instance).stages;
        stages.iter().map(|stage| (number(stage.node), stage.layers.len())).collect()
    }
}

/// A request for the model of [`ask`] whose own context is `tokens`. Each 16,384 tokens of it take 4 GB.
fn ask_long(spec: ModelSpec, tokens: u32) -> PlacementRequest {
    let mut ask = ask(spec);
    ask.demand.kv_bytes = vec![GB / 2; LAYERS as usize];
    ask.model.context = Context::largest(ask.spec.context_tokens, tokens, None);
    ask.demand = ask.demand.with_pages(ask.model.context.cache_pages());
    ask
}

impl Cluster {
    /// Requests a model with a long context, and returns its instance if the model is placed.
    fn run_long(&mut self, spec: &ModelSpec, tokens: u32) -> Option<InstanceId> {
        self.leader.handle_request(id(1), ask_long(spec.clone(), tokens));
        self.rounds(5);
        self.desired.find(spec).map(|(id, ..)| id)
    }

    fn context(&self, instance: InstanceId) -> (u32, ContextLimit) {
        let deployment = self.desired.get(instance).and_then(DesiredEntry::deployment).expect("the instance runs");
        let Context { tokens, limit, .. } = deployment.model.context;
        assert!(deployment.demand.kv_pages * exo_engines::engine::PAGE_TOKENS >= tokens, "the cache holds a context");
        (tokens, limit)
    }
}

/// R7.1–R7.5: a model gets the largest context that needs no more devices than a short one would. It gets more of them
/// only for a context that the request demands.
#[test]
fn a_context_is_as_long_as_memory_allows() {
    let own = 65_536;
    for (gigabytes, context) in [
        // 8 GB of weights and 4 GB of cache are the least.
        (12, (16_384, ContextLimit::Memory)),
        (16, (32_768, ContextLimit::Memory)),
        (18, (40_960, ContextLimit::Memory)),
        (24, (own, ContextLimit::Model)),
        (100, (own, ContextLimit::Model)),
    ] {
        let members = || vec![(1, member(gigabytes, 1e10, &[2])), (2, member(gigabytes, 1e10, &[1]))];
        let mut cluster = Cluster::of(members());
        let instance = cluster.run_long(&ModelSpec::new("m"), own).expect("the model fits");
        assert_eq!((cluster.context(instance), cluster.placement(instance).devices()), (context, 1), "{gigabytes} GB");
        let mut cluster = Cluster::of(members());
        let demand = ModelSpec { context_tokens: Some(own), ..ModelSpec::new("m") };
        let instance = cluster.run_long(&demand, own).expect("the model fits two machines");
        let machines = if gigabytes < 24 { 2 } else { 1 };
        let found = (cluster.context(instance), cluster.placement(instance).devices());
        assert_eq!(found, ((own, ContextLimit::Request), machines), "{gigabytes} GB");
    }
}

/// R7.1–R7.5: memory that a model has only for a longer context goes to another model, before a model is unloaded or
/// refused. A context that a request demanded stays.
#[test]
fn a_long_context_gives_way_to_another_model() {
    let mut cluster = Cluster::of(vec![(1, member(24, 1e10, &[]))]);
    let (long, other) = (ModelSpec::new("m"), ModelSpec::new("n"));
    let first = cluster.run_long(&long, 65_536).expect("the model fits");
    assert_eq!(cluster.context(first), (65_536, ContextLimit::Model));
    let second = cluster.run_long(&other, 65_536).expect("the model fits beside a short context");
    assert_eq!(cluster.context(first), (4096, ContextLimit::Memory));
    assert_eq!(cluster.context(second), (16_384, ContextLimit::Memory));
    let mut cluster = Cluster::of(vec![(1, member(24, 1e10, &[]))]);
    let demand = ModelSpec { context_tokens: Some(65_536), ..ModelSpec::new("m") };
    let first = cluster.run_long(&demand, 65_536).expect("the model fits");
    let second = cluster.run_long(&other, 65_536).expect("the idle model is unloaded");
    assert!(cluster.desired.get(first).and_then(DesiredEntry::deployment).is_none());
    assert_eq!(cluster.context(second).1, ContextLimit::Model);
}

/// R7.1–R7.5: a model survives the loss of a machine with a shorter context, if the machines that are left hold no
/// more.
#[test]
fn a_model_keeps_running_with_a_shorter_context() {
    let members = vec![(1, member(13, 1e10, &[2])), (2, member(24, 2e10, &[1]))];
    let mut cluster = Cluster::of(members);
    let instance = cluster.run_long(&ModelSpec::new("m"), 65_536).expect("the model fits");
    assert_eq!(cluster.split(instance), [(2, 8)]);
    assert_eq!(cluster.context(instance), (65_536, ContextLimit::Model));
    cluster.members.0.remove(&id(2));
    cluster.lose_links(2);
    cluster.leader.handle_lost(id(2), cluster.now, 1);
    cluster.rounds(30);
    assert_eq!(cluster.split(instance), [(1, 8)]);
    assert_eq!(cluster.context(instance), (20_480, ContextLimit::Memory));
}

/// R7.1–R7.5: uneven machines get uneven layers: in proportion to their speeds, as far as their memory allows.
#[test]
fn uneven_machines_get_uneven_layers() {
    let throughput = ModelSpec { policy: Policy::Throughput, ..ModelSpec::new("m") };
    let mut cluster = Cluster::of(vec![(1, member(20, 1e10, &[2])), (2, member(20, 3e10, &[1]))]);
    let instance = cluster.run(throughput.clone());
    let mut split = cluster.split(instance);
    split.sort_unstable();
    assert_eq!(split, [(1, 2), (2, 6)], "one to three");
    let mut cluster = Cluster::of(vec![(1, member(7, 1e10, &[2])), (2, member(4, 3e10, &[1]))]);
    let instance = cluster.run(throughput);
    let mut split = cluster.split(instance);
    split.sort_unstable();
    assert_eq!(split, [(1, 5), (2, 3)], "the faster machine has no memory for more");
}

/// R7.1–R7.5: a machine that returns is used again: with one move, and not before the members have stayed the same for
/// a while. A small gain is not worth the move.
#[test]
fn a_machine_that_returns_is_used_again_if_that_pays() {
    for (speed, moves) in [(3e10, 1), (1.2e10, 0)] {
        let mut cluster = Cluster::of(vec![(1, member(20, 1e10, &[2])), (2, member(20, speed, &[1]))]);
        let instance = cluster.run(ModelSpec::new("m"));
        assert_eq!(cluster.split(instance), [(2, 8)]);
        let away = cluster.members.0.remove(&id(2)).expect("a member");
        cluster.members.0.get_mut(&id(1)).expect("a member").links.clear();
        cluster.rounds(5);
        assert_eq!(cluster.split(instance), [(1, 8)]);
        cluster.members.0.insert(id(2), away);
        assert_eq!(cluster.rounds(9), [], "not at once");
        assert_eq!(cluster.rounds(60).len(), moves, "{speed}");
        assert_eq!(cluster.split(instance), [(1 + moves as u64, 8)]);
    }
}

/// R7.1–R7.5: likewise under the throughput policy, and with a split by hand or a requested number of shards: an
/// instance that moved because a node was lost returns to its requested placement.
#[test]
fn an_instance_returns_to_its_requested_placement() {
    let by_hand = Split(vec![("a".to_owned(), 0..3), ("b".to_owned(), 3..8)]);
    let specs = [
        ModelSpec { policy: Policy::Throughput, ..ModelSpec::new("m") },
        ModelSpec { split: Some(by_hand), ..ModelSpec::new("m") },
        ModelSpec { shards: Some(2), ..ModelSpec::new("m") },
    ];
    for spec in specs {
        let named = |name: &str, report| MemberReport { name: name.to_owned(), ..report };
        let a = named("a", member(20, 2e10, &[2]));
        let b = named("b", member(20, 2e10, &[1]));
        let mut cluster = Cluster::of(vec![(1, a), (2, b)]);
        let instance = cluster.run(spec.clone());
        let deployment = cluster.placement(instance).clone();
        let away = cluster.members.0.remove(&id(2)).expect("a member");
        cluster.members.0.get_mut(&id(1)).expect("a member").links.clear();
        cluster.rounds(5);
        assert!(cluster.placement(instance).stages.iter().all(|stage| stage.node == id(1)), "{spec:?}");
        cluster.members.0.insert(id(2), away);
        assert_eq!(cluster.rounds(60).len(), 1, "{spec:?}");
        assert_eq!(*cluster.placement(instance), deployment, "{spec:?}");
    }
}

/// R7.1–R7.5: a new leader that is not connected to every node that other members see moves no shard of such a node. A
/// node that no member sees is replaced at once.
#[test]
fn a_node_that_is_not_connected_yet_is_not_lost() {
    let mut cluster = Cluster::of(vec![(1, member(20, 1e10, &[2])), (2, member(9, 1e10, &[1, 3]))]);
    let placed = Cluster::of(vec![(1, member(20, 1e10, &[])), (3, member(20, 9e10, &[]))]).entry_on_node_3();
    cluster.desired.merge(vec![placed], cluster.now);
    let instance = cluster.desired.running().next().expect("the instance runs").0;
    // The desired list may arrive before any report.
    let second = cluster.members.0.remove(&id(2)).expect("a member");
    assert_eq!(cluster.rounds(1), [], "other members may connect");
    cluster.members.0.insert(id(2), second);
    assert_eq!(cluster.rounds(5), [], "node 2 sees node 3");
    cluster.members.0.insert(id(3), member(20, 9e10, &[1, 2]));
    assert_eq!(cluster.rounds(5), []);
    cluster.members.0.remove(&id(3));
    cluster.leader.handle_lost(id(3), cluster.now, 2);
    cluster.lose_links(3);
    assert_eq!(cluster.rounds(1).len(), 1, "no member sees node 3 any more");
    assert_eq!(cluster.split(instance), [(1, 8)]);
}

/// R7.1–R7.5: a node whose peers all fall silent was probably disconnected itself, and repairs nothing for a while. If
/// their hosts say that the processes have ended, it repairs at once.
#[test]
fn most_members_at_once_are_dead_only_if_their_hosts_say_so() {
    for are_dead in [true, false] {
        let (mut cluster, instance) = Cluster::on_node_3_of_3();
        for (number, left) in [(2, 2), (3, 1)] {
            cluster.members.0.remove(&id(number));
            cluster.lose_links(number);
            match are_dead {
                true => cluster.leader.handle_ended(id(number), cluster.now),
                false => cluster.leader.handle_lost(id(number), cluster.now, left),
            }
        }
        cluster.rounds(1);
        let on = if are_dead { 1 } else { 3 };
        assert_eq!(cluster.split(instance), [(on, 8)]);
        cluster.rounds(5);
        assert_eq!(cluster.split(instance), [(1, 8)]);
    }
}

impl Cluster {
    /// Three members that see each other, and a model on the third, which is the fastest.
    fn on_node_3_of_3() -> (Self, InstanceId) {
        let mut cluster = Self::of(vec![
            (1, member(20, 1e10, &[2, 3])),
            (2, member(20, 1e10, &[1, 3])),
            (3, member(20, 4e10, &[1, 2])),
        ]);
        let instance = cluster.run(ModelSpec::new("m"));
        assert_eq!(cluster.split(instance), [(3, 8)]);
        (cluster, instance)
    }

    /// The entry of a model that runs on node 3.
    fn entry_on_node_3(mut self) -> (InstanceId, DesiredEntry) {
        let instance = self.run(ModelSpec::new("m"));
        assert_eq!(self.split(instance), [(3, 8)]);
        (instance, self.desired.get(instance).expect("the instance runs").clone())
    }
}

/// A node that another member excludes is not about to connect: its shards are placed anew at once.
#[test]
fn a_node_outside_the_clique_is_lost() {
    let (mut cluster, instance) = Cluster::on_node_3_of_3();
    cluster.rounds(5);
    cluster.members.0.remove(&id(3));
    cluster.leader.handle_lost(id(3), cluster.now, 2);
    assert_eq!(cluster.rounds(5), [], "node 2 sees node 3");
    for report in cluster.members.0.values_mut() {
        report.outside.push(id(3));
    }
    cluster.rounds(1);
    assert_ne!(cluster.split(instance), [(3, 8)]);
}

/// R8.1–R8.5: a draining machine keeps its model while other machines have no memory for it; once they have, the model
/// moves.
#[test]
fn a_draining_machine_keeps_a_model_that_fits_nowhere_else() {
    let mut cluster = Cluster::of(vec![(1, member(9, 1e10, &[2])), (2, member(9, 1e10, &[1]))]);
    cluster.members.0.get_mut(&id(2)).expect("a member").memory_limit_bytes = Some(4 * GB);
    let instance = cluster.run(ModelSpec::new("m"));
    assert_eq!(cluster.split(instance), [(1, 8)]);
    cluster.members.0.get_mut(&id(1)).expect("a member").is_draining = true;
    assert_eq!(cluster.rounds(60), []);
    cluster.members.0.get_mut(&id(2)).expect("a member").memory_limit_bytes = Some(9 * GB);
    assert_eq!(cluster.rounds(1).len(), 1);
    assert_eq!(cluster.split(instance), [(2, 8)]);
    let there = id(1).to_string();
    let split = Split(vec![(there.clone(), 0..8)]);
    cluster.leader.handle_request(id(2), ask(ModelSpec { split: Some(split), ..ModelSpec::new("other") }));
    let told = cluster.rounds(1);
    let releasing = RequestError::Plan(PlanError::Leaving { node: there });
    assert!(matches!(&told[..], [Effect::Refused { error, .. }] if *error == releasing), "{told:?}");
}

/// R8.1–R8.5: a failed move returns the model to its earlier placement; a device that fails after the move does not.
#[test]
fn a_failed_move_returns_to_the_earlier_placement() {
    for has_run in [false, true] {
        let mut cluster = Cluster::of(vec![(1, member(20, 1e10, &[2]))]);
        let instance = cluster.run(ModelSpec::new("m"));
        cluster.members.0.insert(id(2), member(20, 9e10, &[1]));
        cluster.members.0.insert(id(3), member(20, 8e10, &[1]));
        assert_eq!(cluster.rounds(60).len(), 1);
        assert_eq!(cluster.split(instance), [(2, 8)]);
        let stamp = cluster.desired.get(instance).expect("the instance runs").stamp;
        let (node, device, error) = (id(2), cpu(), RequestError::NotReady);
        let broken = BrokenShard { instance, stamp, node, device, has_run, error };
        cluster.decide(|leader, round| leader.handle_broken(round, id(2), broken));
        assert_eq!(cluster.split(instance), [(if has_run { 3 } else { 1 }, 8)]);
    }
}

/// R6.1–R6.5: if memory suffices, the new shards of an instance load beside the old ones; if not, the old shards stop
/// first, and the entry says so.
#[test]
fn old_shards_stop_first_if_memory_does_not_suffice_for_both() {
    let three = || vec![(1, member(5, 1e10, &[2, 3])), (2, member(5, 1e10, &[1, 3])), (3, member(5, 1e10, &[1, 2]))];
    let spec = ModelSpec { shards: Some(3), ..ModelSpec::new("m") };
    let mut cluster = Cluster::of(three());
    let instance = cluster.run(spec);
    cluster.members.0.remove(&id(3));
    cluster.lose_links(3);
    cluster.rounds(5);
    let deployment = cluster.desired.get(instance).and_then(DesiredEntry::deployment).expect("the instance runs");
    assert_eq!(deployment.strategy, MoveStrategy::InPlace, "{:?}", deployment.placement);
    assert_eq!(deployment.placement.stages.len(), 2);
    cluster.members.0.insert(id(3), member(5, 1e10, &[1, 2]));
    let mut more_room = Cluster::of(three());
    more_room.members.0.values_mut().for_each(|report| report.memory_limit_bytes = Some(9 * GB));
    let instance = more_room.run(ModelSpec { shards: Some(3), ..ModelSpec::new("m") });
    more_room.members.0.remove(&id(3));
    more_room.lose_links(3);
    more_room.rounds(5);
    let deployment = more_room.desired.get(instance).and_then(DesiredEntry::deployment).expect("the instance runs");
    assert_eq!(deployment.strategy, MoveStrategy::Beside { rollback: None }, "{:?}", deployment.placement);
}

/// R8.1–R8.5: while a stopped model releases its memory, no request is refused and no other model is stopped; but not
/// for ever.
#[test]
fn requests_wait_for_memory_that_is_being_released() {
    let mut cluster = Cluster::of(vec![(1, member(9, 1e10, &[]))]);
    let first = cluster.run(ModelSpec::new("first"));
    cluster.now += 10 * SECOND;
    cluster.leader.handle_request(id(1), ask(ModelSpec::new("second")));
    assert_eq!(cluster.rounds(1).len(), 2, "the first model is stopped, and the second gets its memory");
    assert!(cluster.desired.get(first).and_then(DesiredEntry::deployment).is_none());
    // Memory is released, and the machine is measured a moment later.
    let full = |cluster: &mut Cluster, leaving_gigabytes: u64, limit_gigabytes: u64| {
        let report = cluster.members.0.get_mut(&id(1)).expect("a member");
        report.releasing_bytes = leaving_gigabytes * GB;
        report.memory_limit_bytes = Some(limit_gigabytes * GB);
    };
    let placed: Vec<InstanceId> = cluster.desired.running().map(|(id, ..)| id).collect();
    for instance in placed {
        cluster.decide(|_, round| round.set(instance, Target::Stopped { error: None }));
    }
    cluster.leader.handle_request(id(1), ask(ModelSpec::new("third")));
    full(&mut cluster, 8, 9);
    assert_eq!(cluster.rounds(5), [], "the request waits for the memory");
    full(&mut cluster, 0, 1);
    assert_eq!(cluster.rounds(2), [], "the released memory is not measured yet");
    full(&mut cluster, 0, 9);
    assert_eq!(cluster.rounds(1).len(), 1, "the third model is placed");
    cluster.leader.handle_request(id(1), ask(ModelSpec::new("fourth")));
    full(&mut cluster, 5, 9);
    let told = cluster.rounds(40);
    assert!(
        matches!(told[..], [Effect::Written { .. }] | [Effect::Refused { .. }] | [_, Effect::Refused { .. }]),
        "{told:?}"
    );
}

/// A split that names a node that was just lost waits a moment for the node's return, and is refused after that.
#[test]
fn a_split_waits_for_a_named_node_that_was_just_lost() {
    for comes_back in [true, false] {
        let b = MemberReport { name: "b".to_owned(), ..member(20, 1e10, &[1]) };
        let mut cluster = Cluster::of(vec![(1, member(20, 1e10, &[]))]);
        cluster.leader.handle_lost(id(2), cluster.now, 1);
        let split = Split(vec![("b".to_owned(), 0..8)]);
        cluster.leader.handle_request(id(1), ask(ModelSpec { split: Some(split), ..ModelSpec::new("m") }));
        assert_eq!(cluster.rounds(2), []);
        if comes_back {
            cluster.members.0.insert(id(2), b);
        }
        let told = cluster.rounds(3);
        match comes_back {
            true => assert!(matches!(&told[..], [Effect::Written { .. }]), "{told:?}"),
            false => assert!(matches!(&told[..], [Effect::Refused { .. }]), "{told:?}"),
        }
    }
}
