//! Connecting a shard with its predecessor and its successor, for one incarnation of its instance.

use super::{HostedShard, Loaded, ShardKey, WorkerMsg, WorkerRef, WorkerState};
use crate::core::stage::StageEvent;
use crate::transport::callback::EventCallback;
use crate::transport::protocol::{LinkEnd, LinkHello};
use crate::worker::engine_thread::{LinkQueue, Next};
use crate::worker::links::{ExpectedLink, LinkTarget, open};
use exo_engines::engine::Incarnation;
use exo_net::{NodeId, WireType};
use std::time::Duration;

/// The most time that opening a link may take.
const OPEN_TIMEOUT: Duration = Duration::from_secs(3);

/// The connections of a shard: the sender of its rows, and the receiver of its output.
#[derive(Debug, Clone)]
pub(crate) struct Wiring {
    pub(super) incarnation: Incarnation,
    pub(super) from: NodeId,
    pub(super) next: NodeId,
    pub(super) to: LinkEnd,
    pub(super) wire_type: WireType,
}

impl WorkerState {
    /// Connects a shard: at once if its successor is on this node, else when the link to the successor is open.
    pub(super) fn wire(&mut self, myself: &WorkerRef, owner: NodeId, key: ShardKey, wiring: Wiring) {
        let is_due =
            |shard: &&HostedShard| shard.owner == owner && shard.wired.is_none_or(|wired| wired <= wiring.incarnation);
        if self.shards.get(&key).filter(is_due).is_none() {
            return;
        }
        self.take_over(key.instance);
        let Some(shard) = self.shards.get(&key) else { return };
        // The owner receives the failure of a shard, and connects the shards again after its restart.
        if self.failover.serving(shard.serial).is_none() {
            return;
        }
        if wiring.next == self.args.router.own() {
            match self.next_here(&key, &wiring) {
                Some(next) => self.connect(&key, &wiring, next),
                None => self.on_cut(&key, wiring.incarnation, "the receiver of its output has stopped".to_owned()),
            }
            return;
        }
        let Some(data) = self.args.router.data(wiring.next) else {
            return self.on_cut(&key, wiring.incarnation, format!("node {} is not connected", wiring.next));
        };
        let hello = LinkHello { instance: key.instance, incarnation: wiring.incarnation, to: wiring.to };
        let (worker, incarnation) = (myself.clone(), wiring.incarnation);
        let of = key.clone();
        let cut = EventCallback::to(myself, move |what| WorkerMsg::Cut { key: of.clone(), incarnation, what });
        tokio::spawn(async move {
            let opening = open(&data, hello, wiring.wire_type, cut);
            let outcome = match tokio::time::timeout(OPEN_TIMEOUT, opening).await {
                Ok(outcome) => outcome.map_err(|error| error.to_string()),
                Err(_) => Err("the link did not open in time".to_owned()),
            };
            // Sending fails only if the worker has stopped; the node stops, too.
            let _ = worker.send_message(WorkerMsg::Linked { key, wiring: Box::new(wiring), outcome });
        });
    }

    fn next_here(&self, key: &ShardKey, wiring: &Wiring) -> Option<Next> {
        match wiring.to {
            LinkEnd::Stage(stage) => {
                let follows = |other: &ShardKey| {
                    (other.instance, other.stage, other.layers.start) == (key.instance, stage, key.layers.end)
                };
                let following = self.shards.iter().filter(|(other, _)| follows(other));
                let mut next = following.filter_map(|(_, shard)| self.failover.serving(shard.serial));
                Some(Next::Shard(next.next()?.engine.clone()))
            }
            LinkEnd::Head => {
                match self.args.link_registry.find(key.instance, LinkEnd::Head, wiring.incarnation)?.target {
                    LinkTarget::Head(head) => Some(Next::Head(head)),
                    LinkTarget::Shard { .. } => None,
                }
            }
        }
    }

    pub(super) fn on_linked(&mut self, key: &ShardKey, wiring: &Wiring, outcome: Result<LinkQueue, String>) {
        match outcome {
            Ok(link) => self.connect(key, wiring, Next::Link(link)),
            Err(what) => self.on_cut(key, wiring.incarnation, what),
        }
    }

    fn connect(&mut self, key: &ShardKey, wiring: &Wiring, next: Next) {
        let Some(shard) = self.shards.get_mut(key) else { return };
        // The link opened late, after a later incarnation began.
        if shard.wired.is_some_and(|wired| wired > wiring.incarnation) {
            return;
        }
        let Some(Loaded { engine, hidden, vocabulary, .. }) = self.failover.serving(shard.serial).cloned() else {
            return;
        };
        if engine.wire(wiring.incarnation, next).is_err() {
            // The engine's thread has ended or hangs; its shard reports that.
            return;
        }
        shard.wired = Some(wiring.incarnation);
        let target = LinkTarget::Shard { engine, hidden, vocabulary };
        let expected = ExpectedLink { incarnation: wiring.incarnation, from: wiring.from, target };
        self.args.link_registry.expect(key.instance, LinkEnd::Stage(key.stage), expected);
        self.tell(key, StageEvent::Wired { stage: key.stage, incarnation: wiring.incarnation });
    }
}
