//! One placement of an instance: how far its shards are.
//!
//! A state machine without I/O. News of stages go in, and what they mean for the whole comes out; time is an argument,
//! since any fixed start.

use crate::core::desired::{Stamp, Wanted, incarnation};
use crate::core::plan::{KV_PAGES_MAX, SHARD_BYTES_MAX};
use crate::core::spec::{FilesId, InstanceId, ModelSpec};
use crate::request::RequestError;
use exo_engines::EngineError;
use exo_engines::engine::{DeviceId, Incarnation};
use exo_engines::model::LAYERS_MAX;
use exo_net::NodeId;
use serde::{Deserialize, Serialize};
use std::ops::Range;
use std::sync::Arc;
use std::time::Duration;

/// From the order to wire to the last stage's answer.
const WIRE_DEADLINE: Duration = Duration::from_secs(5);
/// A placement may be of a node that its owner has yet to meet.
const REACHED_WITHIN: Duration = Duration::from_secs(4);
/// A node that was ordered a shard, and is silent for so long, may not have it: it is ordered again.
const SILENT_MAX: Duration = Duration::from_secs(5);
/// A shard that loads and of which nothing is heard for so long hangs: the hashes of the largest models take minutes.
const STALLED_MAX: Duration = Duration::from_secs(600);
/// The first wait before shards are connected anew; each further one doubles it.
const CUT_WAIT: Duration = Duration::from_millis(50);
/// More cuts than this in a row: the link does not come back by itself.
const CUTS_MAX: u32 = 5;
/// A life this long says that the link is well.
const LIVES_WELL: Duration = Duration::from_secs(10);
/// Steps that are lost count together within this: each takes minutes to be noticed.
const STALLS_WITHIN: Duration = Duration::from_secs(3600);

/// A shard to be loaded.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(crate) struct StageTask {
    pub instance: InstanceId,
    pub stamp: Stamp,
    pub stage: usize,
    pub spec: ModelSpec,
    /// Whatever else has that name is another model.
    pub files: FilesId,
    pub layers: Range<usize>,
    pub device: DeviceId,
    pub context_tokens: u32,
    pub kv_pages: u32,
    /// Weights and cache, as they were planned.
    pub memory_bytes: u64,
}

impl StageTask {
    /// Whether a planner could have placed it.
    pub(crate) fn is_plausible(&self) -> bool {
        !self.layers.is_empty()
            && self.layers.end <= LAYERS_MAX
            && self.stage < LAYERS_MAX
            && self.kv_pages <= KV_PAGES_MAX
            && self.memory_bytes <= SHARD_BYTES_MAX
    }
}

/// What an owner hears of a stage.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) enum StageNews {
    /// Its weights come from elsewhere.
    Fetching {
        stage: usize,
        fetched_bytes: u64,
        total_bytes: u64,
    },
    Loading {
        stage: usize,
        loaded_bytes: u64,
        total_bytes: u64,
    },
    Up {
        stage: usize,
    },
    /// Wired for this life.
    Wired {
        stage: usize,
        incarnation: Incarnation,
    },
    /// It failed; its device is at work on it.
    Down {
        stage: usize,
        error: EngineError,
    },
    /// It failed, and will not come back there.
    Lost {
        stage: usize,
        error: EngineError,
    },
    /// The model's files cannot be had there.
    NoModel {
        stage: usize,
        error: RequestError,
    },
    /// Rows do not get through to the next stage.
    Cut {
        stage: usize,
        incarnation: Incarnation,
        what: String,
    },
}

impl StageNews {
    fn stage(&self) -> usize {
        match self {
            Self::Fetching { stage, .. }
            | Self::Loading { stage, .. }
            | Self::Up { stage }
            | Self::Wired { stage, .. }
            | Self::Down { stage, .. }
            | Self::Lost { stage, .. }
            | Self::NoModel { stage, .. }
            | Self::Cut { stage, .. } => *stage,
        }
    }
}

#[derive(Debug, Clone)]
enum StageState {
    Loading,
    Up,
    /// Wired for the life of this epoch.
    Wired(u64),
    /// Its place is gone.
    Lost(RequestError),
}

/// What news mean for the whole.
#[derive(Debug)]
pub(crate) enum Step {
    Nothing,
    /// All shards are up.
    Loaded,
    /// All are wired: a life begins.
    Running,
    Down(usize, String),
    Lost(usize, RequestError),
    /// To be wired anew, after a wait.
    Cut(usize, String, Duration),
}

#[derive(Debug)]
pub(crate) struct Line {
    stamp: Stamp,
    wanted: Arc<Wanted>,
    stages: Vec<StageState>,
    /// When there were news of each, or it was ordered.
    heard: Vec<Duration>,
    /// When there were news of each.
    advanced: Vec<Duration>,
    life: u64,
    incarnation: Option<Incarnation>,
    is_running: bool,
    has_run: bool,
    ordered: Duration,
    /// Since it was ordered to be wired, or ran.
    since: Duration,
    cuts: u32,
    /// When steps were lost, of late.
    stalls: Vec<Duration>,
}

impl Line {
    pub(crate) fn new(stamp: Stamp, wanted: Arc<Wanted>, now: Duration) -> Self {
        let stages = vec![StageState::Loading; wanted.placement.stages.len()];
        let heard = vec![now; stages.len()];
        Self {
            stamp,
            wanted,
            stages,
            advanced: heard.clone(),
            heard,
            life: 0,
            incarnation: None,
            is_running: false,
            has_run: false,
            ordered: now,
            since: now,
            cuts: 0,
            stalls: Vec::new(),
        }
    }

    /// The shards, to be ordered of their nodes.
    pub(crate) fn tasks(&self, instance: InstanceId) -> Vec<(NodeId, StageTask)> {
        (0..self.stages.len()).map(|stage| self.task(instance, stage)).collect()
    }

    fn task(&self, instance: InstanceId, stage: usize) -> (NodeId, StageTask) {
        let placed = &self.wanted.placement.stages[stage];
        let task = StageTask {
            instance,
            stamp: self.stamp,
            stage,
            spec: self.wanted.spec.clone(),
            files: self.wanted.model.files,
            layers: placed.layers.clone(),
            device: placed.device.clone(),
            context_tokens: self.wanted.model.context_tokens,
            kv_pages: self.wanted.demand.kv_pages,
            memory_bytes: placed.memory_bytes,
        };
        (placed.node, task)
    }

    /// The shards of which nothing was heard for too long while they load, to be ordered again.
    pub(crate) fn silent(&mut self, instance: InstanceId, now: Duration) -> Vec<(NodeId, StageTask)> {
        let is_silent = |stage: &usize| {
            matches!(self.stages[*stage], StageState::Loading) && now.saturating_sub(self.heard[*stage]) > SILENT_MAX
        };
        let silent: Vec<usize> = (0..self.stages.len()).filter(is_silent).collect();
        silent.iter().for_each(|&stage| self.heard[stage] = now);
        silent.into_iter().map(|stage| self.task(instance, stage)).collect()
    }

    /// Shards that load and do not advance have no place where they are.
    pub(crate) fn lose_stalled(&mut self, now: Duration) {
        for stage in 0..self.stages.len() {
            let is_loading = matches!(self.stages[stage], StageState::Loading);
            if is_loading && now.saturating_sub(self.advanced[stage]) > STALLED_MAX {
                let what = format!("loading it did not advance for {} s", STALLED_MAX.as_secs());
                self.lose(stage, RequestError::Engine { what, remedy: "see the log of that machine".into() });
            }
        }
    }

    pub(crate) fn stamp(&self) -> Stamp {
        self.stamp
    }

    pub(crate) fn wanted(&self) -> &Wanted {
        &self.wanted
    }

    /// Whether all shards are up.
    pub(crate) fn is_loaded(&self) -> bool {
        self.stages.iter().all(|stage| matches!(stage, StageState::Up | StageState::Wired(_)))
    }

    pub(crate) fn is_running(&self) -> bool {
        self.is_running
    }

    /// Whether it has ever served.
    pub(crate) fn has_run(&self) -> bool {
        self.has_run
    }

    /// Of the life that runs, or is to.
    pub(crate) fn incarnation(&self) -> Incarnation {
        self.incarnation.unwrap_or(Incarnation { epoch: 0, owner: [0; 32] })
    }

    /// Begins to be wired for a new life.
    pub(crate) fn next_life(&mut self, owner: NodeId, now: Duration) -> Incarnation {
        self.life += 1;
        self.since = now;
        *self.incarnation.insert(incarnation(self.stamp, self.life, owner))
    }

    /// The first stage that has not answered in time.
    pub(crate) fn is_overdue(&self, now: Duration) -> Option<usize> {
        let epoch = self.incarnation?.epoch;
        let is_late = !self.is_running && self.is_loaded() && now.saturating_sub(self.since) > WIRE_DEADLINE;
        let is_missing = |stage: &StageState| !matches!(stage, StageState::Wired(of) if *of == epoch);
        self.stages.iter().position(is_missing).filter(|_| is_late)
    }

    /// Stages that have no place, and why.
    pub(crate) fn lost(&self) -> Vec<(usize, RequestError)> {
        let lost = self.stages.iter().enumerate().filter_map(|(index, stage)| match stage {
            StageState::Lost(error) => Some((index, error.clone())),
            _ => None,
        });
        lost.collect()
    }

    /// Whether `news` are of a shard that `other` has just so.
    pub(crate) fn shares_stage(&self, other: &Self, news: &StageNews) -> bool {
        let (StageNews::Down { stage, .. }
        | StageNews::Lost { stage, .. }
        | StageNews::Up { stage }
        | StageNews::Cut { stage, .. }
        | StageNews::Wired { stage, .. }) = news
        else {
            return false;
        };
        let of = |line: &Self| line.wanted.placement.stages.get(*stage).cloned();
        of(self).is_some() && of(self) == of(other) && self.wanted.demand.kv_pages == other.wanted.demand.kv_pages
    }

    /// Nodes of shards that have been away for so long since they were ordered that the order may be lost. `is_here`: who
    /// can be reached.
    pub(crate) fn out_of_reach(&self, now: Duration, is_here: impl Fn(NodeId) -> bool) -> Vec<NodeId> {
        let stages = self.wanted.placement.stages.iter().zip(&self.stages);
        let waits = stages.filter(|(_, state)| matches!(state, StageState::Loading)).map(|(placed, _)| placed.node);
        let is_due = now.saturating_sub(self.ordered) > REACHED_WITHIN;
        waits.filter(|&node| is_due && !is_here(node)).collect()
    }

    pub(crate) fn on_node_lost(&mut self, node: NodeId) -> Option<usize> {
        let placed = &self.wanted.placement.stages;
        let mut first = None;
        for (index, stage) in self.stages.iter_mut().enumerate().filter(|(index, _)| placed[*index].node == node) {
            let what = format!("node {} is gone", node.short());
            let remedy = "start it again, or give the other machines more memory".into();
            *stage = StageState::Lost(RequestError::Engine { what, remedy });
            first = first.or(Some(index));
        }
        if first.is_some() {
            self.stop_running();
        }
        first
    }

    /// Takes news of `from` in.
    pub(crate) fn on_news(&mut self, from: NodeId, news: &StageNews, now: Duration) -> Step {
        let is_from = |stage: usize| self.wanted.placement.stages.get(stage).is_some_and(|placed| placed.node == from);
        if is_from(news.stage()) {
            (self.heard[news.stage()], self.advanced[news.stage()]) = (now, now);
        }
        match news {
            StageNews::Up { stage } if is_from(*stage) => {
                let was_loaded = self.is_loaded();
                self.stages[*stage] = StageState::Up;
                if self.is_loaded() && !was_loaded { Step::Loaded } else { Step::Nothing }
            }
            StageNews::Wired { stage, incarnation } if is_from(*stage) && self.incarnation == Some(*incarnation) => {
                self.stages[*stage] = StageState::Wired(incarnation.epoch);
                let is_wired = |stage: &StageState| matches!(stage, StageState::Wired(of) if *of == incarnation.epoch);
                if self.is_running || !self.stages.iter().all(is_wired) {
                    return Step::Nothing;
                }
                (self.is_running, self.has_run) = (true, true);
                self.since = now;
                Step::Running
            }
            StageNews::Down { stage, error } if is_from(*stage) => {
                self.stages[*stage] = StageState::Loading;
                self.stop_running();
                Step::Down(*stage, error.to_string())
            }
            StageNews::Lost { stage, error } if is_from(*stage) => {
                let (what, remedy) = (error.to_string(), error.remedy().into());
                self.lose(*stage, RequestError::Engine { what, remedy })
            }
            StageNews::NoModel { stage, error } if is_from(*stage) => self.lose(*stage, error.clone()),
            StageNews::Cut { stage, incarnation, what }
                if is_from(*stage) && self.incarnation == Some(*incarnation) =>
            {
                self.cut(*stage, what.clone(), now)
            }
            _ => Step::Nothing,
        }
    }

    fn lose(&mut self, stage: usize, error: RequestError) -> Step {
        self.stages[stage] = StageState::Lost(error.clone());
        self.stop_running();
        Step::Lost(stage, error)
    }

    /// Rows do not get from `stage` to the next one. A link that stays cut makes the stage behind it lost.
    pub(crate) fn cut(&mut self, stage: usize, what: String, now: Duration) -> Step {
        if self.is_running && now.saturating_sub(self.since) > LIVES_WELL {
            self.cuts = 0;
        }
        self.cuts += 1;
        self.end_life(stage, what, self.cuts)
    }

    /// A step did not come back, and nobody says why. However long a life lasts that ends so, it says nothing for the link.
    pub(crate) fn stall(&mut self, what: String, now: Duration) -> Step {
        self.stalls.retain(|&stall| now.saturating_sub(stall) < STALLS_WITHIN);
        self.stalls.push(now);
        let last = self.stages.len().saturating_sub(1);
        self.end_life(last, what, u32::try_from(self.stalls.len()).unwrap_or(u32::MAX))
    }

    fn end_life(&mut self, stage: usize, what: String, ends: u32) -> Step {
        self.stop_running();
        // Further news of this life are of no more use.
        self.incarnation = None;
        if ends > CUTS_MAX {
            let placed = &self.wanted.placement.stages;
            // The way back to the head is the last stage's.
            let behind = if stage + 1 < placed.len() { stage + 1 } else { stage };
            let remedy = "check the network between the machines".into();
            return self.lose(behind, RequestError::Engine { what, remedy });
        }
        Step::Cut(stage, what, CUT_WAIT * (1 << ends.min(6)))
    }

    fn stop_running(&mut self) {
        self.is_running = false;
    }
}

#[cfg(test)]
mod tests;
