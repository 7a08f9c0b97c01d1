//! What holds of simulated members: always, and when all is well again.

use super::node::Node;
use super::{Cluster, TICKS_OF_PEACE, TICKS_OF_REST, Trouble};
use crate::core::request::RequestError;
use exo_net::NodeId;
use std::collections::BTreeSet;

impl Cluster {
    /// What holds at every moment.
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

    /// Members that plan together, as each sees them.
    pub(super) fn cliques(&self) -> BTreeSet<BTreeSet<NodeId>> {
        self.nodes.iter().flatten().map(|node| node.members.0.keys().copied().collect()).collect()
    }

    /// All live again, and no pair but `cut` is cut: in time all is well, and stays as it is.
    pub(super) fn calm(&mut self, cut: Option<(usize, usize)>) {
        self.cut.clear();
        self.cut.extend(cut.map(|pair| (pair, self.now)));
        for _ in 0..self.nodes.len() {
            self.revive(0);
        }
        for _ in 0..TICKS_OF_PEACE {
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

    /// Entries that all have written.
    fn written(&self) -> u64 {
        self.nodes.iter().flatten().map(|node| node.written).sum()
    }

    /// Who is apart loses those it is apart from, and meets them anew: that is nothing to anyone.
    pub(super) fn flap_who_is_apart(&mut self) {
        let is_outside = |cluster: &Self, (a, b): (usize, usize)| {
            cluster.can_talk(a, b)
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
                assert_eq!(self.cliques(), cliques, "who is outside stays so");
            }
            assert_eq!(self.written(), before, "nothing passes between cliques");
            self.check_peace();
        }
    }

    /// What holds when all is well again.
    fn check_peace(&self) {
        for clique in self.cliques() {
            self.check_circle(&clique);
        }
    }

    fn check_circle(&self, clique: &BTreeSet<NodeId>) {
        let nodes: Vec<&Node> = self.nodes.iter().flatten().filter(|node| clique.contains(&node.id)).collect();
        let first = nodes[0];
        for node in &nodes {
            assert!(node.members.0.keys().eq(clique), "all see all");
            assert!(first.desired.running().eq(node.desired.running()), "all hold the same list");
        }
        let mut specs = BTreeSet::new();
        for (id, stamp, deployment) in first.desired.running() {
            assert!(specs.insert(deployment.spec.model.clone()), "{id}: once");
            let owner = nodes.iter().find(|node| Some(node.id) == deployment.owner()).expect("its owner is here");
            let head = &owner.heads[&id];
            assert!(head.pipeline.is_running() && head.pipeline.stamp() == stamp, "{id} runs: {:?}", head.pipeline);
        }
        for node in &nodes {
            for ((id, stage), shard) in &node.shards {
                let entry = first.desired.get(*id).filter(|entry| entry.stamp == shard.task.stamp);
                let placed = entry.and_then(|entry| entry.deployment()?.placement.stages.get(*stage));
                assert_eq!(placed.map(|placed| placed.node), Some(node.id), "{id}: nothing is held that serves nobody");
            }
            let held: u64 = node.shards.values().map(|shard| shard.task.memory_bytes).sum();
            let shards = node.shards.values().map(|shard| &shard.task).collect::<Vec<_>>();
            assert!(held <= node.memory_bytes, "{} has room for what it holds: {shards:?}", node.id.short());
            for (name, (_, _, told)) in &node.wants {
                // Others need the room, or nobody has it.
                let is_told = matches!(told, Some(RequestError::Plan(_) | RequestError::MemoryBusy { .. }));
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
