//! Instances whose head is on this node, and what this node tells the others of itself.

use super::{Head, PlannerMsg, PlannerRef, PlannerState};
use crate::core::desired::{Change, Stamp, Want, Wanted};
use crate::core::lead::{Broken, ROOM_WITHIN};
use crate::core::members::{DeviceOffer, MemberReport, OwnedInstance};
use crate::core::spec::InstanceId;
use crate::core::view::Fact;
use crate::instance::{Instance, InstanceArgs, InstanceMsg, InstanceRef, InstanceReport, News};
use crate::machine::measure_once;
use crate::outlet::Outlet;
use crate::protocol::ControlMessage;
use crate::request::RequestError;
use crate::stages::StagesMsg;
use exo_net::NodeId;
use ractor::{Actor, ActorId, RpcReplyPort, SpawnErr};
use std::sync::Arc;
use std::time::{Duration, Instant};

/// A head that has moved serves until the new one does, as long as that one loads; or else so long.
const MOVES_WITHIN: Duration = Duration::from_secs(60);

/// An instance whose head is here.
#[derive(Debug)]
pub(super) struct Owned {
    instance: InstanceRef,
    stamp: Stamp,
    wanted: Arc<Wanted>,
    /// Whether it has ever served: requests wait in it since.
    is_ready: bool,
    /// Whether it serves now.
    is_running: bool,
    in_use: Arc<()>,
    /// Since its head is wanted elsewhere.
    moved: Option<Instant>,
    is_retired: bool,
}

/// This node goes.
#[derive(Debug, Default)]
pub(super) struct Draining {
    waiting: Vec<RpcReplyPort<()>>,
    /// Since when nothing that runs has a shard here.
    unused: Option<Duration>,
}

impl Draining {
    /// Whether the node may go at `now`. `is_used`: what runs has a shard here, or is to; `is_held`: memory is not free yet.
    fn is_over(&mut self, is_used: bool, is_held: bool, now: Duration) -> bool {
        if is_used {
            self.unused = None;
            return false;
        }
        let since = *self.unused.get_or_insert(now);
        // The thread of an engine that hangs keeps its memory for as long as the process lives.
        !is_held || now.saturating_sub(since) > ROOM_WITHIN
    }
}

impl PlannerState {
    pub(super) fn head(&self, id: InstanceId) -> Option<Head> {
        let owned = self.owned.get(&id).filter(|owned| owned.is_ready && !owned.is_retired)?;
        Some((owned.instance.clone(), Arc::clone(&owned.in_use)))
    }

    pub(super) fn owned_ready(&self, id: InstanceId) -> Option<InstanceRef> {
        self.head(id).map(|(instance, _)| instance)
    }

    pub(super) fn owned_by_actor(&self, actor: ActorId) -> Option<InstanceId> {
        self.owned.iter().find(|(_, owned)| owned.instance.get_id() == actor).map(|(&id, _)| id)
    }

    /// News of a stage, for the head.
    pub(super) fn on_news(&self, id: InstanceId, news: News) {
        if let Some(owned) = self.owned.get(&id) {
            // An instance that is gone is told of by supervision.
            let _ = owned.instance.send_message(InstanceMsg::News(news));
        }
    }

    pub(super) fn tell_owned_of_meeting(&self, node: NodeId) {
        for owned in self.owned.values() {
            // An instance that is gone is told of by supervision.
            let _ = owned.instance.send_message(InstanceMsg::NodeMet(node));
        }
    }

    pub(super) fn tell_owned_of_loss(&self, node: NodeId) {
        for owned in self.owned.values() {
            let _ = owned.instance.send_message(InstanceMsg::NodeLost(node));
        }
    }

    /// Starts, changes and ends the heads of this node, as is wanted; tells the shards' keeper what is wanted at all.
    pub(super) async fn reconcile_owned(&mut self, myself: &PlannerRef) {
        let own = self.args.node;
        let here: Vec<(InstanceId, Stamp, Wanted)> = self
            .desired
            .running()
            .filter(|(_, _, wanted)| wanted.owner() == Some(own))
            .map(|(id, stamp, wanted)| (id, stamp, wanted.clone()))
            .collect();
        for (id, stamp, wanted) in here {
            match self.owned.get_mut(&id) {
                None => self.start(myself, id, stamp, wanted).await,
                Some(owned) if owned.stamp < stamp => {
                    owned.stamp = stamp;
                    owned.moved = None;
                    owned.wanted = Arc::new(wanted);
                    let wanted = Arc::clone(&owned.wanted);
                    // An instance that is gone is told of by supervision.
                    let _ = owned.instance.send_message(InstanceMsg::Replan { stamp, wanted });
                }
                Some(_) => {}
            }
        }
        self.retire_others();
        // Where nobody hosts shards any more, the node stops.
        let _ = self.args.stages.send_message(StagesMsg::Keep(self.desired.listed()));
    }

    async fn start(&mut self, myself: &PlannerRef, id: InstanceId, stamp: Stamp, wanted: Wanted) {
        let wanted = Arc::new(wanted);
        let (model, placement) = (wanted.model.clone(), wanted.placement.clone());
        self.args.facts.tell(Fact::InstancePlaced { instance: id, model, placement });
        let args = InstanceArgs {
            id,
            stamp,
            wanted: Arc::clone(&wanted),
            wire_type: self.args.wire_type,
            patience: self.args.patience,
            post: self.args.post.clone(),
            board: self.args.board.clone(),
            planner: Outlet::to(myself, PlannerMsg::Instance),
            facts: self.args.facts.clone(),
        };
        let spawning = Instance::spawn_linked(None, Instance, args, myself.get_cell());
        let spawned = match &self.args.heads {
            // It waits for nobody there either.
            Some(thread) => match thread.spawn(spawning) {
                Some(spawned) => spawned.await.unwrap_or_else(|error| Err(SpawnErr::StartupFailed(error.into()))),
                None => Err(SpawnErr::StartupFailed("the network has ended".into())),
            },
            None => spawning.await,
        };
        match spawned {
            Ok((instance, _)) => {
                let (in_use, moved) = (Arc::new(()), None);
                let owned = Owned {
                    instance,
                    stamp,
                    wanted,
                    is_ready: false,
                    is_running: false,
                    in_use,
                    moved,
                    is_retired: false,
                };
                self.owned.insert(id, owned);
            }
            Err(error) => tracing::error!(instance = %id, %error, "an instance could not be started"),
        }
    }

    /// Ends heads that are wanted no more, or elsewhere.
    fn retire_others(&mut self) {
        let own = self.args.node;
        for (&id, owned) in &mut self.owned {
            let entry = self.desired.get(id);
            let wanted = entry.and_then(|entry| entry.wanted());
            let reason = match (entry.map(|entry| &entry.want), wanted.and_then(Wanted::owner)) {
                (_, Some(owner)) if owner == own => continue,
                (_, Some(owner)) => {
                    let since = *owned.moved.get_or_insert_with(Instant::now);
                    let report = self.members.0.get(&owner).and_then(|report| report.owned.get(&id));
                    let is_taken_over = report.is_some_and(|report| report.is_ready);
                    let state = report.and_then(|report| report.state.as_ref());
                    let is_coming =
                        state.is_some_and(|state| state.phase.is_coming()) || since.elapsed() < MOVES_WITHIN;
                    let is_beside = wanted.is_some_and(|wanted| wanted.change != Change::InPlace);
                    if owned.is_running && !is_taken_over && is_coming && is_beside {
                        continue;
                    }
                    RequestError::Moved
                }
                (Some(Want::Gone { error: Some(error) }), _) => error.clone(),
                _ => RequestError::Moved,
            };
            if !owned.is_retired {
                owned.is_retired = true;
                tracing::info!(instance = %id, why = %reason, "an instance is over here");
                let error = Some(reason.to_string()).filter(|_| reason != RequestError::Moved);
                self.args.facts.tell(Fact::InstanceStopped { instance: id, error });
                // An instance that is gone is told of by supervision.
                let _ = owned.instance.send_message(InstanceMsg::Retire(reason));
            }
        }
    }

    pub(super) fn on_instance(&mut self, report: InstanceReport) {
        match report {
            InstanceReport::Ready { instance } => {
                if let Some(owned) = self.owned.get_mut(&instance) {
                    (owned.is_ready, owned.is_running) = (true, true);
                }
                self.renew_report();
                self.tell_report();
            }
            InstanceReport::Waiting { instance } => {
                if let Some(owned) = self.owned.get_mut(&instance) {
                    owned.is_running = false;
                }
            }
            InstanceReport::Broken { instance, stamp, stage, has_run, error } => {
                let placed = self.owned.get(&instance).filter(|owned| owned.stamp == stamp);
                let placed = placed.and_then(|owned| owned.wanted.placement.stages.get(stage));
                if let Some(placed) = placed {
                    let (node, device) = (placed.node, placed.device.clone());
                    let broken = Broken { instance, stamp, node, device, has_run, error };
                    self.tell_leader(ControlMessage::Broken(Box::new(broken)));
                }
            }
        }
    }

    /// An instance's actor has ended. Where it was wanted, it has failed.
    pub(super) fn on_instance_ended(&mut self, id: InstanceId, what: &str) {
        let Some(owned) = self.owned.remove(&id) else { return };
        if owned.is_retired {
            return;
        }
        if self.desired.get(id).and_then(|entry| entry.wanted()).and_then(Wanted::owner) != Some(self.args.node) {
            // It serves elsewhere by now.
            return;
        }
        let what = format!("the instance ended: {what}");
        tracing::error!(instance = %id, what);
        let error = RequestError::Engine { what: what.clone(), remedy: "report it, with the log".into() };
        self.args.facts.tell(Fact::InstanceStopped { instance: id, error: Some(what) });
        // Whoever leads hears of it by the entry: it is over.
        self.decide(|_, world| world.set(id, Want::Gone { error: Some(error) }));
    }

    /// Measures free memory as soon as something has left.
    pub(super) fn measure_again(myself: &PlannerRef) {
        let planner = myself.clone();
        tokio::task::spawn_blocking(move || {
            // A planner that is gone plans nothing.
            let _ = planner.send_message(PlannerMsg::MachineMeasured(measure_once()));
        });
    }

    pub(super) fn renew_report(&mut self) {
        let wanted_bytes = |id: InstanceId| -> u64 {
            let wanted = self.desired.get(id).and_then(|entry| entry.wanted());
            let stages = wanted.into_iter().flat_map(|wanted| &wanted.placement.stages);
            let here = stages.filter(|stage| stage.node == self.args.node);
            here.fold(0, |sum, stage| sum.saturating_add(stage.memory_bytes))
        };
        // Of an instance that moves, the shards of its earlier placement, too.
        let leaving = self.held.iter().map(|(&id, bytes)| bytes.saturating_sub(wanted_bytes(id)));
        let leaving_bytes = leaving.fold(0, u64::saturating_add);
        let device = |report: &exo_engines::engine::DeviceReport| DeviceOffer {
            report: report.clone(),
            bytes_per_s: self.speeds.get(&report.id).copied(),
        };
        let owned = self.owned.iter().filter(|(_, owned)| !owned.is_retired).map(|(&id, owned)| {
            let told = OwnedInstance {
                stamp: owned.stamp,
                is_ready: owned.is_ready,
                is_in_use: Arc::strong_count(&owned.in_use) > 1,
                state: self.summary.get(&id).cloned(),
            };
            (id, told)
        });
        let report = MemberReport {
            name: self.args.name.clone(),
            addresses: self.args.addresses.clone(),
            devices: self.args.devices.iter().map(device).collect(),
            machine: self.args.machine.clone(),
            memory_limit_bytes: self.args.limits.memory_bytes,
            leaving_bytes,
            is_draining: self.draining.is_some(),
            owned: owned.collect(),
            in_use: self.used_here(),
            list: self.desired.digest(),
            links: self.links.clone(),
            peers: self.peers.clone(),
            apart: self.circle.declared(),
            cuts: self.circle.cuts(),
        };
        self.members.0.insert(self.args.node, report);
    }

    pub(super) fn tell_report(&self) {
        if let Some(report) = self.members.0.get(&self.args.node) {
            self.args.post.tell_others(&ControlMessage::Report(Box::new(report.clone())));
        }
    }

    pub(super) fn drain(&mut self, reply: RpcReplyPort<()>) {
        self.draining.get_or_insert_default().waiting.push(reply);
        self.renew_report();
        self.tell_report();
    }

    /// Whoever waits for this node to be empty hears that it is.
    pub(super) fn answer_drain(&mut self) {
        let (own, now) = (self.args.node, self.now());
        let is_alone = self.members.0.len() == 1;
        let is_placed =
            self.desired.running().any(|(.., wanted)| wanted.placement.stages.iter().any(|s| s.node == own));
        // Shards of an earlier placement serve until the next one does.
        let is_used = is_placed || self.kept > 0;
        let Some(draining) = &mut self.draining else { return };
        if draining.is_over(is_used, !self.held.is_empty(), now) || is_alone {
            for reply in draining.waiting.drain(..) {
                // Whoever asked may have gone.
                let _ = reply.send(());
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: Duration = Duration::from_secs(1);

    #[test]
    fn a_node_may_go_when_it_is_empty_and_is_not_kept_by_what_hangs() {
        let mut draining = Draining::default();
        assert!(!draining.is_over(true, true, SECOND));
        assert!(!draining.is_over(false, true, 2 * SECOND), "memory is on its way out");
        assert!(draining.is_over(false, false, 3 * SECOND));
        assert!(!draining.is_over(true, true, 20 * SECOND), "something has come back");
        assert!(!draining.is_over(false, true, 40 * SECOND));
        assert!(!draining.is_over(false, true, 40 * SECOND + ROOM_WITHIN));
        assert!(draining.is_over(false, true, 41 * SECOND + ROOM_WITHIN), "it hangs");
    }
}
