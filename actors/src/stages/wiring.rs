//! Connecting a shard with those before and behind it, for one life of its instance.

use super::{Key, Loaded, StagesMsg, StagesRef, StagesState};
use crate::core::line::StageNews;
use crate::host::{Next, Outgoing};
use crate::links::{Expected, Sink, open};
use crate::outlet::Outlet;
use crate::protocol::{End, LinkHello};
use exo_engines::engine::Incarnation;
use exo_net::{NodeId, WireType};
use std::time::Duration;

/// A link that does not open in this time does not open.
const OPEN_TIMEOUT: Duration = Duration::from_secs(3);

/// Where rows come from and go to.
#[derive(Debug, Clone)]
pub(crate) struct Wiring {
    pub(super) incarnation: Incarnation,
    pub(super) from: NodeId,
    pub(super) next: NodeId,
    pub(super) to: End,
    pub(super) wire_type: WireType,
}

impl StagesState {
    /// Wires a shard at once where the next one is here, and else when the link to it is open.
    pub(super) fn wire(&mut self, myself: &StagesRef, owner: NodeId, key: Key, wiring: Wiring) {
        let held = self.held.get(&key).filter(|held| held.owner == owner);
        let Some(held) = held.filter(|held| held.wired.is_none_or(|wired| wired <= wiring.incarnation)) else { return };
        // A shard that is down will be told of, and wired anew.
        if held.loaded.is_none() {
            return;
        }
        if wiring.next == self.args.post.own() {
            match self.next_here(&key, &wiring) {
                Some(next) => self.connect(&key, &wiring, next),
                None => self.on_cut(&key, wiring.incarnation, "the next shard is not here any more".to_owned()),
            }
            return;
        }
        let Some(data) = self.args.post.data(wiring.next) else {
            return self.on_cut(&key, wiring.incarnation, format!("no connection with {}", wiring.next));
        };
        let hello = LinkHello { instance: key.instance, incarnation: wiring.incarnation, to: wiring.to };
        let (stages, incarnation) = (myself.clone(), wiring.incarnation);
        let of = key.clone();
        let cut = Outlet::to(myself, move |what| StagesMsg::Cut { key: of.clone(), incarnation, what });
        tokio::spawn(async move {
            let opening = open(&data, hello, wiring.wire_type, cut);
            let outcome = match tokio::time::timeout(OPEN_TIMEOUT, opening).await {
                Ok(outcome) => outcome.map_err(|error| error.to_string()),
                Err(_) => Err("the link did not open in time".to_owned()),
            };
            // Where nobody hosts shards any more, the node stops.
            let _ = stages.send_message(StagesMsg::Linked { key, wiring: Box::new(wiring), outcome });
        });
    }

    fn next_here(&self, key: &Key, wiring: &Wiring) -> Option<Next> {
        match wiring.to {
            End::Stage(stage) => {
                let follows = |other: &Key| {
                    (other.instance, other.stage, other.layers.start) == (key.instance, stage, key.layers.end)
                };
                let mut next =
                    self.held.iter().filter(|(other, _)| follows(other)).filter_map(|(_, held)| held.loaded.as_ref());
                Some(Next::Shard(next.next()?.port.clone()))
            }
            End::Head => match self.args.board.find(key.instance, End::Head, wiring.incarnation)?.sink {
                Sink::Head(head) => Some(Next::Head(head)),
                Sink::Shard { .. } => None,
            },
        }
    }

    pub(super) fn on_linked(&mut self, key: &Key, wiring: &Wiring, outcome: Result<Outgoing, String>) {
        match outcome {
            Ok(link) => self.connect(key, wiring, Next::Link(link)),
            Err(what) => self.on_cut(key, wiring.incarnation, what),
        }
    }

    fn connect(&mut self, key: &Key, wiring: &Wiring, next: Next) {
        let Some(held) = self.held.get_mut(key) else { return };
        // A link that opened late, for a life that is over.
        if held.wired.is_some_and(|wired| wired > wiring.incarnation) {
            return;
        }
        let Some(Loaded { port, hidden, vocabulary }) = held.loaded.clone() else { return };
        if port.wire(wiring.incarnation, next).is_err() {
            // Its thread has ended since: the report of that is on its way.
            return;
        }
        held.wired = Some(wiring.incarnation);
        let sink = Sink::Shard { port, hidden, vocabulary };
        let expected = Expected { incarnation: wiring.incarnation, from: wiring.from, sink };
        self.args.board.expect(key.instance, End::Stage(key.stage), expected);
        self.tell(key, StageNews::Wired { stage: key.stage, incarnation: wiring.incarnation });
    }
}
