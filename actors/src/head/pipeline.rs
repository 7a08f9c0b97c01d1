//! The placements of an instance and their incarnations: orders to stages, and reactions to their events.

use super::{HeadMsg, HeadRef, HeadReport, HeadState, StageUpdate, limits};
use crate::core::desired::{Deployment, MoveStrategy, Stamp};
use crate::core::node_status::Fact;
use crate::core::pipeline::{Pipeline, PipelineEvent};
use crate::core::request::RequestError;
use crate::core::stage::{StageEvent, StageTask};
use crate::transport::protocol::{ControlMessage, LinkEnd, StageOrder};
use crate::worker::links::{ExpectedLink, LinkTarget};
use exo_net::NodeId;
use std::sync::Arc;
use std::time::Duration;

/// How often shards of earlier placements are ordered to stop, because they hold memory and serve no request.
const CLEAR_EVERY: Duration = Duration::from_secs(5);

impl HeadState {
    /// Orders the nodes of `tasks` to load their shards.
    pub(super) fn order(&self, tasks: Vec<(NodeId, StageTask)>) {
        for (node, task) in tasks {
            self.args.router.tell(node, ControlMessage::Stage(StageOrder::Start(Box::new(task))));
        }
    }

    /// Repeats the orders that a newly joined node may not have received: to stop shards of earlier placements, and to
    /// load shards. A shard that is already loaded stays loaded.
    pub(super) fn order_again(&self, joined: NodeId) {
        if self.pipeline.is_running() {
            let clear = StageOrder::Clear { instance: self.args.id, below: self.pipeline.stamp() };
            self.args.router.tell(joined, ControlMessage::Stage(clear));
        }
        let pipelines = [Some(&self.pipeline), self.incoming.as_ref()].into_iter().flatten();
        for pipeline in pipelines.filter(|pipeline| !pipeline.is_loaded()) {
            self.order(pipeline.tasks(self.args.id).into_iter().filter(|(node, _)| *node == joined).collect());
        }
    }

    pub(super) fn on_stage_update(&mut self, myself: &HeadRef, update: StageUpdate) {
        // The slot is held until the event has been handled.
        let StageUpdate { from, stamp, event, slot: _slot } = update;
        let now = self.now();
        self.publish_progress(&event);
        if let Some(incoming) = self.incoming.as_mut().filter(|incoming| incoming.stamp() == stamp) {
            let is_shared = incoming.shares_stage(&self.pipeline, &event);
            if let PipelineEvent::Lost(stage, error) = incoming.on_stage_event(from, &event, now) {
                self.report_broken(stamp, stage, error);
            }
            if self.incoming.as_ref().is_some_and(Pipeline::is_loaded) {
                return self.switch(myself);
            }
            // A shard in both placements reports with the later stamp, and still serves the earlier placement.
            if !is_shared {
                return;
            }
        } else if self.pipeline.stamp() != stamp {
            return;
        }
        let event = self.pipeline.on_stage_event(from, &event, now);
        self.on_pipeline_event(myself, event);
    }

    fn publish_progress(&self, event: &StageEvent) {
        let instance = self.args.id;
        if let StageEvent::Up { stage, device, .. } = event {
            let (stage, device) = (*stage, device.clone());
            return self.args.facts.tell(Fact::ShardLoaded { instance, stage, device });
        }
        match *event {
            StageEvent::Speed { stage, slow_down } => {
                self.args.facts.tell(Fact::ShardSpeed { instance, stage, slow_down });
            }
            StageEvent::Leaks { stage, growth } => {
                self.args.facts.tell(Fact::ShardLeaks { instance, stage, growth });
            }
            StageEvent::Fetching { stage, fetched_bytes, total_bytes } => {
                self.args.facts.tell(Fact::ShardFetching { instance, stage, fetched_bytes, total_bytes });
            }
            StageEvent::Loading { stage, loaded_bytes, total_bytes } => {
                self.args.facts.tell(Fact::ShardLoading { instance, stage, loaded_bytes, total_bytes });
            }
            _ => {}
        }
    }

    /// Acts on an event of the current placement.
    fn on_pipeline_event(&mut self, myself: &HeadRef, event: PipelineEvent) {
        match event {
            PipelineEvent::Nothing => {}
            PipelineEvent::Loaded => self.begin_incarnation(myself),
            PipelineEvent::Running => self.on_running(),
            PipelineEvent::Moved => {
                self.void_steps();
                self.begin_incarnation(myself);
            }
            PipelineEvent::Down(stage, error) => {
                tracing::info!(instance = %self.args.id, stage, error, "a shard failed: requests wait for its restart");
                self.pause(stage, &error);
            }
            PipelineEvent::Lost(stage, error) => {
                tracing::info!(instance = %self.args.id, stage, %error, "a shard is lost: requests wait for another device");
                self.pause(stage, &error.to_string());
                self.report_broken(self.pipeline.stamp(), stage, error);
            }
            PipelineEvent::Cut(stage, what, wait) => {
                tracing::info!(instance = %self.args.id, stage, what, "the pipeline broke: connecting shards again");
                self.pause(stage, &what);
                myself.send_after(wait, || HeadMsg::Rewire);
            }
        }
    }

    pub(super) fn on_node_lost(&mut self, node: NodeId) {
        if let Some(incoming) = &mut self.incoming {
            incoming.on_node_lost(node);
        }
        if let Some(stage) = self.pipeline.on_node_lost(node) {
            let what = format!("node {} is lost", node.short());
            tracing::info!(instance = %self.args.id, stage, what, "requests wait for devices for the lost shards");
            self.pause(stage, &what);
            self.report_all_lost();
        }
    }

    /// Makes requests wait because a stage does not work. The steps in flight are void.
    fn pause(&mut self, stage: usize, error: &str) {
        self.void_steps();
        let (instance, error) = (self.args.id, error.to_owned());
        self.args.facts.tell(Fact::ShardFailed { instance, stage, error });
        self.args.planner.tell(HeadReport::Waiting { instance });
    }

    /// Gives up the steps in flight; the next incarnation computes their rows again.
    fn void_steps(&mut self) {
        self.args.link_registry.remove(self.args.id, LinkEnd::Head, Some(self.pipeline.incarnation()));
        self.scheduler.handle_pipeline_lost();
    }

    fn report_broken(&self, stamp: Stamp, stage: usize, error: RequestError) {
        let has_run = self.pipeline.stamp() == stamp && self.pipeline.has_run();
        self.args.planner.tell(HeadReport::Broken { instance: self.args.id, stamp, stage, has_run, error });
    }

    fn report_all_lost(&self) {
        for (stage, error) in self.pipeline.lost() {
            self.report_broken(self.pipeline.stamp(), stage, error);
        }
    }

    pub(super) fn replan(&mut self, myself: &HeadRef, stamp: Stamp, deployment: Arc<Deployment>) {
        if stamp <= self.pipeline.stamp() || self.incoming.as_ref().is_some_and(|incoming| stamp <= incoming.stamp()) {
            return;
        }
        let (instance, placement) = (self.args.id, deployment.placement.clone());
        self.args.facts.tell(Fact::InstancePlaced { instance, model: deployment.model.clone(), placement });
        let is_in_place = deployment.strategy == MoveStrategy::InPlace;
        let pipeline = Pipeline::new(stamp, deployment, self.now());
        self.order(pipeline.tasks(instance));
        self.incoming = Some(pipeline);
        if is_in_place {
            self.clear_below(stamp);
        }
        if is_in_place || !self.pipeline.is_loaded() {
            self.switch(myself);
        }
    }

    /// Orders all nodes to stop the instance's shards with stamps below `stamp`. A placement that still loads has a
    /// later stamp.
    pub(super) fn clear_below(&mut self, stamp: Stamp) {
        self.cleared = self.now();
        let clear = StageOrder::Clear { instance: self.args.id, below: stamp };
        self.args.router.tell(self.args.router.own(), ControlMessage::Stage(clear.clone()));
        self.args.router.tell_others(&ControlMessage::Stage(clear));
    }

    /// Replaces the current placement by the incoming one.
    fn switch(&mut self, myself: &HeadRef) {
        let Some(incoming) = self.incoming.take() else { return };
        self.pipeline = incoming;
        self.scheduler.handle_pipeline_replaced(limits(self.pipeline.deployment()));
        if self.pipeline.is_loaded() {
            self.begin_incarnation(myself);
        } else {
            self.args.planner.tell(HeadReport::Waiting { instance: self.args.id });
        }
    }

    /// Orders all stages to connect their shards, if all shards are loaded.
    pub(super) fn begin_incarnation(&mut self, myself: &HeadRef) {
        if !self.pipeline.is_loaded() || self.pipeline.is_running() {
            return;
        }
        let own = self.args.router.own();
        let incarnation = self.pipeline.next_incarnation(own, self.now());
        let head = myself.clone();
        let target = LinkTarget::Head(Arc::new(move |result| {
            // Sending fails only if the head has ended; it needs no results then.
            let _ = head.send_message(HeadMsg::StepDone(result));
        }));
        let stages = &self.pipeline.deployment().placement.stages;
        let Some(last) = stages.last() else { return };
        let expected = ExpectedLink { incarnation, from: last.node, target };
        self.args.link_registry.expect(self.args.id, LinkEnd::Head, expected);
        for (stage, placed) in stages.iter().enumerate() {
            let (next, to) = match stages.get(stage + 1) {
                Some(next) => (next.node, LinkEnd::Stage(stage + 1)),
                None => (own, LinkEnd::Head),
            };
            let from = stage.checked_sub(1).map_or(own, |before| stages[before].node);
            let (instance, wire_type) = (self.args.id, self.args.wire_type);
            let (layers, device) = (placed.layers.clone(), placed.device.clone());
            let order = StageOrder::Wire { instance, stage, layers, device, incarnation, from, next, to, wire_type };
            self.args.router.tell(placed.node, ControlMessage::Stage(order));
        }
    }

    fn on_running(&mut self) {
        self.progress += 1;
        let first = self.args.link_registry.find(self.args.id, LinkEnd::Stage(0), self.pipeline.incarnation());
        if let Some(LinkTarget::Shard { vocabulary, .. }) = first.map(|first| first.target) {
            self.scheduler.set_vocabulary(vocabulary);
        }
        let (instance, stamp, epoch) = (self.args.id, self.pipeline.stamp(), self.pipeline.incarnation().epoch);
        tracing::info!(%instance, epoch, stages = self.pipeline.deployment().placement.stages.len(), "instance ready");
        self.args.facts.tell(Fact::InstanceReady { instance, epoch });
        self.args.planner.tell(HeadReport::Ready { instance });
        self.clear_below(stamp);
    }

    /// Reports the stages of the incoming placement that cannot load. Each check repeats the report, until another
    /// placement arrives.
    fn watch_incoming(&mut self, now: Duration) {
        let router = self.args.router.clone();
        let Some(incoming) = &mut self.incoming else { return };
        for node in incoming.unreachable(now, |node| router.is_reachable(node)) {
            incoming.on_node_lost(node);
        }
        let (stamp, lost) = (incoming.stamp(), incoming.lost());
        for (stage, error) in lost {
            self.report_broken(stamp, stage, error);
        }
    }

    /// Checks the placements. Repeats orders and reports that had no effect, and gives up stages without progress.
    pub(super) fn watch(&mut self, myself: &HeadRef) {
        let now = self.now();
        let pipelines = [Some(&mut self.pipeline), self.incoming.as_mut()].into_iter().flatten();
        let silent = pipelines.flat_map(|pipeline| pipeline.silent(self.args.id, now)).collect();
        self.order(silent);
        self.pipeline.lose_stalled(now);
        if let Some(incoming) = &mut self.incoming {
            incoming.lose_stalled(now);
        }
        let may_clear = self.pipeline.is_running() || self.pipeline.deployment().strategy == MoveStrategy::InPlace;
        if may_clear && now.saturating_sub(self.cleared) >= CLEAR_EVERY {
            // A node that was disconnected or outside the clique at the last order may still host its shards.
            self.clear_below(self.pipeline.stamp());
        }
        self.watch_incoming(now);
        if self.pipeline.is_running() {
            return self.watch_steps(myself, now);
        }
        let router = self.args.router.clone();
        if !self.pipeline.lost().is_empty() {
            // The leader ignores reports about a placement after it has decided the next one.
            self.switch(myself);
        }
        for node in self.pipeline.unreachable(now, |node| router.is_reachable(node)) {
            self.on_node_lost(node);
        }
        self.report_all_lost();
        if let Some(stage) = self.pipeline.overdue(self.now()) {
            let event = self.pipeline.cut(stage, "the stage did not connect in time".to_owned(), self.now());
            self.on_pipeline_event(myself, event);
        }
    }

    /// Checks for a step without a result. Such a step was lost on a link, because a hung shard is reported sooner.
    fn watch_steps(&mut self, myself: &HeadRef, now: Duration) {
        let silence = self.watchdog.check(self.progress, now);
        let stages = self.pipeline.deployment().placement.stages.len();
        let per_stage = self.args.hang_timeouts.for_step(self.scheduler.rows_in_flight_max());
        // One more, for the links between the stages.
        let timeout = per_stage.saturating_mul(u32::try_from(stages + 1).unwrap_or(u32::MAX));
        if self.scheduler.steps_in_flight() == 0 || silence <= timeout {
            return;
        }
        if self.incoming.is_some() {
            return self.switch(myself);
        }
        let what = format!("the pipeline returned no step for {} s", silence.as_secs());
        let event = self.pipeline.stall(what, now);
        self.on_pipeline_event(myself, event);
    }
}
