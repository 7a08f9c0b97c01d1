//! The bring-up of one placement of an instance: which shards are loaded and connected.
//!
//! A state machine without I/O: it takes events of stages and returns what they mean for the pipeline. Times count from
//! any fixed start.

use crate::core::desired::{Deployment, Stamp, incarnation};
use crate::core::request::RequestError;
use crate::core::spec::InstanceId;
use crate::core::stage::{StageEvent, StageTask};
use exo_engines::engine::Incarnation;
use exo_net::NodeId;
use std::sync::Arc;
use std::time::Duration;

/// The limit on the time from the order to connect to the last stage's answer.
const WIRE_DEADLINE: Duration = Duration::from_secs(5);
/// How long a stage's node may be unreachable after the order to load: the owner may not be connected to it yet.
const UNREACHABLE_MAX: Duration = Duration::from_secs(4);
/// After this long without an event of a loading stage its order is repeated, because the order may have been lost.
const SILENT_MAX: Duration = Duration::from_secs(5);
/// After this long without progress a loading shard counts as hung. Hashing the largest models takes minutes.
const STALLED_MAX: Duration = Duration::from_secs(600);
/// The unit of the wait before shards reconnect after a broken link. The wait doubles with each further break.
const CUT_WAIT: Duration = Duration::from_millis(50);
/// After more breaks in a row than this the link counts as unable to recover.
const CUTS_MAX: u32 = 5;
/// An incarnation that lasts this long shows that its links work.
const STABLE_AFTER: Duration = Duration::from_secs(10);
/// Lost steps within this time count together: noticing one takes minutes.
const STALLS_WITHIN: Duration = Duration::from_secs(3600);

#[derive(Debug, Clone)]
enum StageState {
    Loading,
    Up,
    /// Connected for the incarnation of this epoch.
    Wired(u64),
    /// The shard cannot run on its device, and why.
    Lost(RequestError),
}

/// What an event of a stage means for the pipeline.
#[derive(Debug)]
pub(crate) enum PipelineEvent {
    Nothing,
    /// All shards are loaded.
    Loaded,
    /// All shards are connected, so an incarnation begins.
    Running,
    /// All shards are loaded, one of them anew beside what serves: the shards must connect again.
    Moved,
    /// A shard's engine failed, and its node starts another one.
    Down(usize, String),
    /// A shard cannot run on its device any more.
    Lost(usize, RequestError),
    /// A stage's link broke: the shards must reconnect after this wait.
    Cut(usize, String, Duration),
}

#[derive(Debug)]
pub(crate) struct Pipeline {
    stamp: Stamp,
    deployment: Arc<Deployment>,
    stages: Vec<StageState>,
    /// The number of each stage's latest load on its node.
    loads: Vec<Option<u64>>,
    /// When each stage last reported, or was last ordered to load.
    heard: Vec<Duration>,
    /// When each stage last reported.
    advanced: Vec<Duration>,
    /// The number of incarnations so far.
    incarnations: u64,
    incarnation: Option<Incarnation>,
    is_running: bool,
    has_run: bool,
    ordered: Duration,
    /// When the shards were last ordered to connect, or began to run.
    since: Duration,
    cuts: u32,
    /// When steps were lost recently.
    stalls: Vec<Duration>,
}

impl Pipeline {
    pub(crate) fn new(stamp: Stamp, deployment: Arc<Deployment>, now: Duration) -> Self {
        let stages = vec![StageState::Loading; deployment.placement.stages.len()];
        let heard = vec![now; stages.len()];
        Self {
            stamp,
            deployment,
            stages,
            loads: vec![None; heard.len()],
            advanced: heard.clone(),
            heard,
            incarnations: 0,
            incarnation: None,
            is_running: false,
            has_run: false,
            ordered: now,
            since: now,
            cuts: 0,
            stalls: Vec::new(),
        }
    }

    /// The shards to load, with their nodes.
    pub(crate) fn tasks(&self, instance: InstanceId) -> Vec<(NodeId, StageTask)> {
        (0..self.stages.len()).map(|stage| self.task(instance, stage)).collect()
    }

    fn task(&self, instance: InstanceId, stage: usize) -> (NodeId, StageTask) {
        let placed = &self.deployment.placement.stages[stage];
        let task = StageTask {
            instance,
            stamp: self.stamp,
            stage,
            spec: self.deployment.spec.clone(),
            files: self.deployment.model.files,
            layers: placed.layers.clone(),
            device: placed.device.clone(),
            context_tokens: self.deployment.model.context.tokens,
            kv_pages: self.deployment.demand.kv_pages,
            memory_bytes: placed.memory_bytes,
        };
        (placed.node, task)
    }

    /// Returns the orders to repeat: those of loading shards that have sent no event for [`SILENT_MAX`].
    pub(crate) fn silent(&mut self, instance: InstanceId, now: Duration) -> Vec<(NodeId, StageTask)> {
        let is_silent = |stage: &usize| {
            matches!(self.stages[*stage], StageState::Loading) && now.saturating_sub(self.heard[*stage]) > SILENT_MAX
        };
        let silent: Vec<usize> = (0..self.stages.len()).filter(is_silent).collect();
        silent.iter().for_each(|&stage| self.heard[stage] = now);
        silent.into_iter().map(|stage| self.task(instance, stage)).collect()
    }

    /// Gives up the loading shards that have made no progress for [`STALLED_MAX`].
    pub(crate) fn lose_stalled(&mut self, now: Duration) {
        for stage in 0..self.stages.len() {
            let is_loading = matches!(self.stages[stage], StageState::Loading);
            if is_loading && now.saturating_sub(self.advanced[stage]) > STALLED_MAX {
                let what = format!("the shard made no load progress for {} s", STALLED_MAX.as_secs());
                self.lose(stage, RequestError::Engine { what, remedy: "see the log of that machine".into() });
            }
        }
    }

    pub(crate) fn stamp(&self) -> Stamp {
        self.stamp
    }

    pub(crate) fn deployment(&self) -> &Deployment {
        &self.deployment
    }

    /// Whether all shards are loaded.
    pub(crate) fn is_loaded(&self) -> bool {
        self.stages.iter().all(|stage| matches!(stage, StageState::Up | StageState::Wired(_)))
    }

    pub(crate) fn is_running(&self) -> bool {
        self.is_running
    }

    /// Whether the placement has ever served.
    pub(crate) fn has_run(&self) -> bool {
        self.has_run
    }

    /// The incarnation that runs or is being connected; epoch 0 if there is none.
    pub(crate) fn incarnation(&self) -> Incarnation {
        self.incarnation.unwrap_or(Incarnation { epoch: 0, owner: [0; 32] })
    }

    /// Starts connecting a new incarnation.
    pub(crate) fn next_incarnation(&mut self, owner: NodeId, now: Duration) -> Incarnation {
        self.incarnations += 1;
        self.since = now;
        *self.incarnation.insert(incarnation(self.stamp, self.incarnations, owner))
    }

    /// The first stage that did not connect within [`WIRE_DEADLINE`].
    pub(crate) fn overdue(&self, now: Duration) -> Option<usize> {
        let epoch = self.incarnation?.epoch;
        let is_late = !self.is_running && self.is_loaded() && now.saturating_sub(self.since) > WIRE_DEADLINE;
        let is_missing = |stage: &StageState| !matches!(stage, StageState::Wired(of) if *of == epoch);
        self.stages.iter().position(is_missing).filter(|_| is_late)
    }

    /// The stages that cannot run on their devices, and why.
    pub(crate) fn lost(&self) -> Vec<(usize, RequestError)> {
        let lost = self.stages.iter().enumerate().filter_map(|(index, stage)| match stage {
            StageState::Lost(error) => Some((index, error.clone())),
            _ => None,
        });
        lost.collect()
    }

    /// Whether `event` is about a shard that `other` has at the same stage, with equal device, layers and cache.
    pub(crate) fn shares_stage(&self, other: &Self, event: &StageEvent) -> bool {
        let (StageEvent::Down { stage, .. }
        | StageEvent::Lost { stage, .. }
        | StageEvent::Up { stage, .. }
        | StageEvent::Cut { stage, .. }
        | StageEvent::Wired { stage, .. }) = event
        else {
            return false;
        };
        let of = |pipeline: &Self| pipeline.deployment.placement.stages.get(*stage).cloned();
        of(self).is_some()
            && of(self) == of(other)
            && self.deployment.demand.kv_pages == other.deployment.demand.kv_pages
    }

    /// The nodes of loading shards that are still unreachable [`UNREACHABLE_MAX`] after the order, which may be lost.
    pub(crate) fn unreachable(&self, now: Duration, is_reachable: impl Fn(NodeId) -> bool) -> Vec<NodeId> {
        let stages = self.deployment.placement.stages.iter().zip(&self.stages);
        let waits = stages.filter(|(_, state)| matches!(state, StageState::Loading)).map(|(placed, _)| placed.node);
        let is_due = now.saturating_sub(self.ordered) > UNREACHABLE_MAX;
        waits.filter(|&node| is_due && !is_reachable(node)).collect()
    }

    pub(crate) fn on_node_lost(&mut self, node: NodeId) -> Option<usize> {
        let placed = &self.deployment.placement.stages;
        let mut first = None;
        for (index, stage) in self.stages.iter_mut().enumerate().filter(|(index, _)| placed[*index].node == node) {
            let what = format!("node {} is lost", node.short());
            let remedy = "start it again, or give the other machines more memory".into();
            *stage = StageState::Lost(RequestError::Engine { what, remedy });
            first = first.or(Some(index));
        }
        if first.is_some() {
            self.stop_running();
        }
        first
    }

    /// Applies an event of a stage, from the node `from`.
    pub(crate) fn on_stage_event(&mut self, from: NodeId, event: &StageEvent, now: Duration) -> PipelineEvent {
        let is_from =
            |stage: usize| self.deployment.placement.stages.get(stage).is_some_and(|placed| placed.node == from);
        if is_from(event.stage()) {
            (self.heard[event.stage()], self.advanced[event.stage()]) = (now, now);
        }
        match event {
            StageEvent::Up { stage, load, .. } if is_from(*stage) => self.on_up(*stage, *load),
            StageEvent::Wired { stage, incarnation } if is_from(*stage) && self.incarnation == Some(*incarnation) => {
                self.stages[*stage] = StageState::Wired(incarnation.epoch);
                let is_wired = |stage: &StageState| matches!(stage, StageState::Wired(of) if *of == incarnation.epoch);
                if self.is_running || !self.stages.iter().all(is_wired) {
                    return PipelineEvent::Nothing;
                }
                (self.is_running, self.has_run) = (true, true);
                self.since = now;
                PipelineEvent::Running
            }
            StageEvent::Down { stage, error } if is_from(*stage) => {
                self.stages[*stage] = StageState::Loading;
                self.stop_running();
                PipelineEvent::Down(*stage, error.to_string())
            }
            StageEvent::Lost { stage, error } if is_from(*stage) => self.lose(*stage, RequestError::of_engine(error)),
            StageEvent::NoModel { stage, error } if is_from(*stage) => self.lose(*stage, error.clone()),
            StageEvent::Cut { stage, incarnation, what }
                if is_from(*stage) && self.incarnation == Some(*incarnation) =>
            {
                self.cut(*stage, what.clone(), now)
            }
            _ => PipelineEvent::Nothing,
        }
    }

    fn on_up(&mut self, stage: usize, load: u64) -> PipelineEvent {
        let was_loaded = self.is_loaded();
        let before = self.loads[stage].replace(load);
        self.stages[stage] = StageState::Up;
        match (self.is_loaded(), was_loaded) {
            (true, false) => PipelineEvent::Loaded,
            (true, true) if before != Some(load) => {
                self.stop_running();
                // Further events of this incarnation are ignored.
                self.incarnation = None;
                PipelineEvent::Moved
            }
            _ => PipelineEvent::Nothing,
        }
    }

    fn lose(&mut self, stage: usize, error: RequestError) -> PipelineEvent {
        self.stages[stage] = StageState::Lost(error.clone());
        self.stop_running();
        PipelineEvent::Lost(stage, error)
    }

    /// Ends the incarnation because the link from `stage` to the next stage broke. After more than [`CUTS_MAX`] breaks
    /// the next stage is lost.
    pub(crate) fn cut(&mut self, stage: usize, what: String, now: Duration) -> PipelineEvent {
        if self.is_running && now.saturating_sub(self.since) > STABLE_AFTER {
            self.cuts = 0;
        }
        self.cuts += 1;
        self.end_incarnation(stage, what, self.cuts)
    }

    /// Ends the incarnation because a step did not come back and no stage reports why. How long the incarnation lasted
    /// does not matter here.
    pub(crate) fn stall(&mut self, what: String, now: Duration) -> PipelineEvent {
        self.stalls.retain(|&stall| now.saturating_sub(stall) < STALLS_WITHIN);
        self.stalls.push(now);
        let last = self.stages.len().saturating_sub(1);
        self.end_incarnation(last, what, u32::try_from(self.stalls.len()).unwrap_or(u32::MAX))
    }

    fn end_incarnation(&mut self, stage: usize, what: String, ends: u32) -> PipelineEvent {
        self.stop_running();
        // Further events of this incarnation are ignored.
        self.incarnation = None;
        if ends > CUTS_MAX {
            let placed = &self.deployment.placement.stages;
            // The last stage owns the link to the head.
            let behind = if stage + 1 < placed.len() { stage + 1 } else { stage };
            let remedy = "check the network between the machines".into();
            return self.lose(behind, RequestError::Engine { what, remedy });
        }
        PipelineEvent::Cut(stage, what, CUT_WAIT * (1 << ends.min(6)))
    }

    fn stop_running(&mut self) {
        self.is_running = false;
    }
}

#[cfg(test)]
mod tests;
