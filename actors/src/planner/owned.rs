//! The heads of this node: started, replanned and retired as the desired list says.

use super::{ActiveHead, PlannerMsg, PlannerRef, PlannerState, Reconcile, StageUpdate};
use crate::core::desired::{Deployment, MoveStrategy, Stamp, Target};
use crate::core::leader::BrokenShard;
use crate::core::members::OwnedInstance;
use crate::core::node_status::Fact;
use crate::core::request::RequestError;
use crate::core::spec::InstanceId;
use crate::core::status::InstanceStatus;
use crate::head::{Head, HeadArgs, HeadMsg, HeadRef, HeadReport};
use crate::transport::callback::EventCallback;
use crate::transport::protocol::ControlMessage;
use crate::worker::WorkerMsg;
use exo_net::NodeId;
use ractor::{Actor, ActorId, SpawnErr};
use std::sync::Arc;
use std::time::{Duration, Instant};

/// How long a head serves after its instance was deployed elsewhere. It serves longer while the new head loads, and
/// ends early when the new head serves.
const HANDOVER_TIMEOUT: Duration = Duration::from_secs(60);

/// A head of this node.
#[derive(Debug)]
pub(super) struct OwnedHead {
    actor: HeadRef,
    stamp: Stamp,
    deployment: Arc<Deployment>,
    status: InstanceStatus,
    /// Whether the head has ever served. From then on it accepts requests, which wait while it does not serve.
    is_ready: bool,
    /// Whether the head serves now.
    is_running: bool,
    in_use: Arc<()>,
    /// When the instance was found to be deployed elsewhere.
    moved: Option<Instant>,
    is_retired: bool,
}

impl OwnedHead {
    pub(super) fn is_retired(&self) -> bool {
        self.is_retired
    }

    /// The instance, as this node reports it to the other members.
    pub(super) fn report(&self) -> OwnedInstance {
        OwnedInstance {
            stamp: self.stamp,
            is_ready: self.is_ready,
            is_in_use: Arc::strong_count(&self.in_use) > 1,
            state: Some(self.status.clone()),
        }
    }

    fn send(&self, message: HeadMsg) {
        // Supervision reports a head that has ended.
        let _ = self.actor.send_message(message);
    }
}

impl PlannerState {
    /// The head of an instance, where it is on this node and takes requests.
    pub(super) fn active_head(&self, id: InstanceId) -> Option<ActiveHead> {
        let head = self.owned.get(&id).filter(|head| head.is_ready && !head.is_retired)?;
        Some((head.actor.clone(), Arc::clone(&head.in_use)))
    }

    pub(super) fn instance_of(&self, actor: ActorId) -> Option<InstanceId> {
        self.owned.iter().find(|(_, head)| head.actor.get_id() == actor).map(|(&id, _)| id)
    }

    pub(super) fn on_stage_update(&self, id: InstanceId, update: StageUpdate) {
        if let Some(head) = self.owned.get(&id) {
            head.send(HeadMsg::StageUpdate(update));
        }
    }

    pub(super) fn tell_heads_of_joined(&self, node: NodeId) {
        self.owned.values().for_each(|head| head.send(HeadMsg::NodeJoined(node)));
    }

    pub(super) fn tell_heads_of_lost(&self, node: NodeId) {
        self.owned.values().for_each(|head| head.send(HeadMsg::NodeLost(node)));
    }

    /// Starts, replans and retires this node's heads as the desired list says, and sends the list to the worker.
    pub(super) async fn reconcile_owned(&mut self, myself: &PlannerRef) {
        let own = self.args.node;
        let here: Vec<(InstanceId, Stamp, Deployment)> = self
            .desired
            .running()
            .filter(|(_, _, deployment)| deployment.owner() == Some(own))
            .map(|(id, stamp, deployment)| (id, stamp, deployment.clone()))
            .collect();
        for (id, stamp, deployment) in here {
            match self.owned.get_mut(&id) {
                None => self.start(myself, id, stamp, deployment).await,
                Some(head) if head.stamp < stamp => {
                    head.stamp = stamp;
                    head.moved = None;
                    head.deployment = Arc::new(deployment);
                    head.send(HeadMsg::Replan { stamp, deployment: Arc::clone(&head.deployment) });
                }
                Some(_) => {}
            }
        }
        self.retire_others();
        // If the worker has stopped, the node stops, too.
        let _ = self.args.worker.send_message(WorkerMsg::Reconcile(self.desired.snapshot()));
    }

    async fn start(&mut self, myself: &PlannerRef, id: InstanceId, stamp: Stamp, deployment: Deployment) {
        let deployment = Arc::new(deployment);
        let (model, placement) = (deployment.model.clone(), deployment.placement.clone());
        let status = InstanceStatus::new(model.clone(), placement.clone());
        self.args.facts.tell(Fact::InstancePlaced { instance: id, model, placement });
        let args = HeadArgs {
            id,
            stamp,
            deployment: Arc::clone(&deployment),
            wire_type: self.args.wire_type,
            hang_timeouts: self.args.hang_timeouts,
            router: self.args.router.clone(),
            link_registry: self.args.link_registry.clone(),
            planner: EventCallback::to(myself, PlannerMsg::HeadReport),
            drafter: self.args.drafter.clone(),
            facts: EventCallback::to(myself, PlannerMsg::HeadFact),
        };
        let spawning = Head::spawn_linked(None, Head, args, myself.get_cell());
        let spawned = match &self.args.head_thread {
            // A head never blocks, so it does not delay the network on that thread.
            Some(thread) => match thread.spawn(spawning) {
                Some(spawned) => spawned.await.unwrap_or_else(|error| Err(SpawnErr::StartupFailed(error.into()))),
                None => Err(SpawnErr::StartupFailed("the network has stopped".into())),
            },
            None => spawning.await,
        };
        match spawned {
            Ok((actor, _)) => {
                let head = OwnedHead {
                    actor,
                    stamp,
                    deployment,
                    status,
                    is_ready: false,
                    is_running: false,
                    in_use: Arc::new(()),
                    moved: None,
                    is_retired: false,
                };
                self.owned.insert(id, head);
            }
            Err(error) => tracing::error!(instance = %id, %error, "a head could not be started"),
        }
    }

    /// Retires the heads whose instance has stopped, or is deployed elsewhere.
    fn retire_others(&mut self) {
        for id in self.owned.keys().copied().collect::<Vec<_>>() {
            let Some(reason) = self.why_retire(id) else { continue };
            let Some(head) = self.owned.get_mut(&id).filter(|head| !head.is_retired) else { continue };
            head.is_retired = true;
            tracing::info!(instance = %id, why = %reason, "retired a head");
            let error = Some(reason.to_string()).filter(|_| reason != RequestError::Moved);
            self.args.facts.tell(Fact::InstanceStopped { instance: id, error });
            head.send(HeadMsg::Retire(reason));
        }
    }

    /// The error with which the head of an instance and its requests must end; `None` where the head stays.
    fn why_retire(&mut self, id: InstanceId) -> Option<RequestError> {
        let entry = self.desired.get(id);
        let deployment = entry.and_then(|entry| entry.deployment());
        let Some(owner) = deployment.and_then(Deployment::owner) else {
            return Some(match entry.map(|entry| &entry.target) {
                Some(Target::Stopped { error: Some(error) }) => error.clone(),
                _ => RequestError::Moved,
            });
        };
        if owner == self.args.node {
            return None;
        }
        let head = self.owned.get_mut(&id)?;
        let since = *head.moved.get_or_insert_with(Instant::now);
        let report = self.members.0.get(&owner).and_then(|report| report.owned.get(&id));
        let is_taken_over = report.is_some_and(|report| report.is_ready);
        let status = report.and_then(|report| report.state.as_ref());
        let is_loading = status.is_some_and(|status| status.phase.is_loading()) || since.elapsed() < HANDOVER_TIMEOUT;
        let is_beside = deployment.is_some_and(|deployment| deployment.strategy != MoveStrategy::InPlace);
        let serves_on = head.is_running && !is_taken_over && is_loading && is_beside;
        (!serves_on).then_some(RequestError::Moved)
    }

    /// Applies a head's fact to the status in this node's report, and passes the fact on to subscribers. A fact of a
    /// head that has ended is dropped: subscribers know the instance as stopped.
    pub(super) fn on_head_fact(&mut self, fact: Fact) -> Reconcile {
        if let Some(head) = fact.instance().and_then(|id| self.owned.get_mut(&id)) {
            head.status.apply(&fact);
            self.args.facts.tell(fact);
        }
        Reconcile::No
    }

    pub(super) fn on_head_report(&mut self, report: HeadReport) -> Reconcile {
        match report {
            HeadReport::Ready { instance } => {
                if let Some(head) = self.owned.get_mut(&instance) {
                    (head.is_ready, head.is_running) = (true, true);
                }
                self.renew_report();
                self.tell_report();
            }
            HeadReport::Waiting { instance } => {
                if let Some(head) = self.owned.get_mut(&instance) {
                    head.is_running = false;
                }
                self.renew_report();
                self.tell_report();
            }
            HeadReport::Broken { instance, stamp, stage, has_run, error } => {
                let head = self.owned.get(&instance).filter(|head| head.stamp == stamp);
                let placed = head.and_then(|head| head.deployment.placement.stages.get(stage));
                if let Some(placed) = placed {
                    let (node, device) = (placed.node, placed.device.clone());
                    let broken = BrokenShard { instance, stamp, node, device, has_run, error };
                    self.tell_leader(ControlMessage::Broken(Box::new(broken)));
                }
            }
        }
        Reconcile::Yes
    }

    /// Handles the end of a head's actor. An instance that is still deployed here has failed.
    pub(super) fn on_head_ended(&mut self, id: InstanceId, what: &str) -> Reconcile {
        let Some(head) = self.owned.remove(&id) else { return Reconcile::Yes };
        let deployment = self.desired.get(id).and_then(|entry| entry.deployment());
        if head.is_retired || deployment.and_then(Deployment::owner) != Some(self.args.node) {
            return Reconcile::Yes;
        }
        let what = format!("the head ended: {what}");
        tracing::error!(instance = %id, what);
        let error = RequestError::Engine { what: what.clone(), remedy: "report it, with the log".into() };
        self.args.facts.tell(Fact::InstanceStopped { instance: id, error: Some(what) });
        // The entry reports the failure to the leader.
        self.lead(|_, round| round.set(id, Target::Stopped { error: Some(error) }));
        Reconcile::Yes
    }
}
