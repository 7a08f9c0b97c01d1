//! Invariants of simulated members: at every tick, and after trouble has ended.

use super::node::Node;
use super::{Cluster, TICKS_OF_CALM, TICKS_OF_REST, Trouble};
use crate::core::request::RequestError;
use exo_net::NodeId;
use std::collections::BTreeSet;

impl Cluster {
    /// Checks that every placement in every list covers each layer once.
    pub(super) fn check(&self) {
        for node in self.nodes.iter().flatten() {
            for (id, _, deployment) in node.desired.running() {
                let mut end = 0;
                for stage in &deployment.placement.stages {
                    assert_eq!(stage.layers.start, end, "{id}: each layer once, in order");
                    end = stage.layers.end;
                }
                assert_eq!(end, deployment.demand.layer_bytes.len(), "{id}: all layers");
            }
        }
    }

    /// The cliques, as each member sees its own.
    pub(super) fn cliques(&self) -> BTreeSet<BTreeSet<NodeId>> {
        self.nodes.iter().flatten().map(|node| node.members.0.keys().copied().collect()).collect()
    }

    /// Revives all nodes and reconnects all pairs but `cut`. Checks that the cluster settles, and then stays unchanged.
    pub(super) fn calm(&mut self, cut: Option<(usize, usize)>) {
        self.cut.clear();
        self.cut.extend(cut.map(|pair| (pair, self.now)));
        for _ in 0..self.nodes.len() {
            self.revive(0);
        }
        for _ in 0..TICKS_OF_CALM {
            self.tick(Trouble::None);
        }
        self.check_peace();
        let before = self.written();
        for _ in 0..TICKS_OF_REST {
            self.tick(Trouble::None);
        }
        self.check_peace();
        assert_eq!(self.written(), before, "nothing moves without need");
    }

    /// The number of entries that all members have written.
    fn written(&self) -> u64 {
        self.nodes.iter().flatten().map(|node| node.written).sum()
    }

    /// Disconnects and reconnects each connected pair with one node outside the other's clique: no clique and no entry
    /// changes.
    pub(super) fn flap_outside_pairs(&mut self) {
        let is_outside = |cluster: &Self, (a, b): (usize, usize)| {
            cluster.is_connected(a, b)
                && cluster.nodes[a].as_ref().is_some_and(|node| node.clique.is_outside(cluster.ids[b]))
        };
        for pair in self.pairs().filter(|&pair| is_outside(self, pair)).collect::<Vec<_>>() {
            let (before, cliques) = (self.written(), self.cliques());
            self.cut.insert(pair, self.now);
            for tick in 0..TICKS_OF_REST {
                if tick == TICKS_OF_REST / 4 {
                    self.cut.remove(&pair);
                }
                self.tick(Trouble::None);
                assert_eq!(self.cliques(), cliques, "the cliques do not change");
            }
            assert_eq!(self.written(), before, "no entry is written");
            self.check_peace();
        }
    }

    /// Checks each clique after trouble has ended.
    fn check_peace(&self) {
        for clique in self.cliques() {
            self.check_clique(&clique);
        }
    }

    fn check_clique(&self, clique: &BTreeSet<NodeId>) {
        let nodes: Vec<&Node> = self.nodes.iter().flatten().filter(|node| clique.contains(&node.id)).collect();
        let first = nodes[0];
        for node in &nodes {
            assert!(node.members.0.keys().eq(clique), "every member has the same members");
            assert!(first.desired.running().eq(node.desired.running()), "every member holds the same list");
        }
        let mut specs = BTreeSet::new();
        for (id, stamp, deployment) in first.desired.running() {
            assert!(specs.insert(deployment.spec.model.clone()), "{id}: a model runs once");
            let owner = nodes.iter().find(|node| Some(node.id) == deployment.owner()).expect("the owner is a member");
            let head = &owner.heads[&id];
            assert!(head.pipeline.is_running() && head.pipeline.stamp() == stamp, "{id} is down: {:?}", head.pipeline);
        }
        for node in &nodes {
            for ((id, stage), shard) in &node.shards {
                let entry = first.desired.get(*id).filter(|entry| entry.stamp == shard.task.stamp);
                let placed = entry.and_then(|entry| entry.deployment()?.placement.stages.get(*stage));
                assert_eq!(placed.map(|placed| placed.node), Some(node.id), "{id}: a shard is not in the list");
            }
            let held: u64 = node.shards.values().map(|shard| shard.task.memory_bytes).sum();
            let shards = node.shards.values().map(|shard| &shard.task).collect::<Vec<_>>();
            assert!(held <= node.memory_bytes, "{}: the shards exceed the memory: {shards:?}", node.id.short());
            for (name, (_, _, told)) in &node.wants {
                // Other models need the memory, or the cluster has too little.
                let is_told = matches!(told, Some(RequestError::Plan(_) | RequestError::MemoryBusy { .. }));
                assert!(
                    specs.contains(name) || is_told,
                    "{name} neither runs nor was refused: {told:?} {} {:?} wants {:?} leader {:?} running {:?}",
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
                assert!(name != "model-3" || !specs.contains(name), "a model larger than all memory does not run");
            }
        }
    }
}
