//! The placements of an instance, and its lives in them: orders to stages, news of them, and what these lead to.

use super::{InstanceMsg, InstanceRef, InstanceReport, InstanceState};
use crate::core::desired::{Change, Stamp, Wanted};
use crate::core::line::{Line, StageNews, StageTask, Step as LineStep};
use crate::core::view::Fact;
use crate::links::{Expected, Sink};
use crate::protocol::{ControlMessage, End, StageOrder};
use exo_net::NodeId;
use std::sync::Arc;
use std::time::Duration;

/// How often shards of earlier placements are ordered to go: they hold memory, and serve nobody.
const CLEAR_EVERY: Duration = Duration::from_secs(5);

impl InstanceState {
    /// Orders shards to be loaded.
    pub(super) fn order(&self, tasks: Vec<(NodeId, StageTask)>) {
        for (node, task) in tasks {
            self.args.post.tell(node, ControlMessage::Stage(StageOrder::Start(Box::new(task))));
        }
    }

    /// Orders what is still to come from a node once more: a shard that is there stays as it is, and one of an earlier
    /// placement goes.
    pub(super) fn order_again(&self, met: NodeId) {
        if self.line.is_running() {
            let clear = StageOrder::Clear { instance: self.args.id, below: self.line.stamp() };
            self.args.post.tell(met, ControlMessage::Stage(clear));
        }
        for line in [Some(&self.line), self.coming.as_ref()].into_iter().flatten().filter(|line| !line.is_loaded()) {
            self.order(line.tasks(self.args.id).into_iter().filter(|(node, _)| *node == met).collect());
        }
    }

    pub(super) fn on_news(&mut self, myself: &InstanceRef, from: NodeId, stamp: Stamp, news: StageNews) {
        let (instance, now) = (self.args.id, self.now());
        match news {
            StageNews::Fetching { stage, fetched_bytes, total_bytes } => {
                self.args.facts.tell(Fact::ShardFetching { instance, stage, fetched_bytes, total_bytes });
            }
            StageNews::Loading { stage, loaded_bytes, total_bytes } => {
                self.args.facts.tell(Fact::ShardLoading { instance, stage, loaded_bytes, total_bytes });
            }
            _ => {}
        }
        if let Some(coming) = self.coming.as_mut().filter(|coming| coming.stamp() == stamp) {
            let shared = coming.shares_stage(&self.line, &news);
            let step = coming.on_news(from, &news, now);
            if matches!(step, LineStep::Lost(..)) {
                self.report_broken(stamp, &step);
            }
            if self.coming.as_ref().is_some_and(Line::is_loaded) {
                return self.switch(myself);
            }
            // A shard that both placements have is of the later stamp, and serves the earlier one.
            if !shared {
                return;
            }
        } else if self.line.stamp() != stamp {
            return;
        }
        let step = self.line.on_news(from, &news, now);
        self.take(myself, step);
    }

    /// What news of the serving placement lead to.
    fn take(&mut self, myself: &InstanceRef, step: LineStep) {
        match step {
            LineStep::Nothing => {}
            LineStep::Loaded => self.begin_life(myself),
            LineStep::Running => self.on_running(),
            LineStep::Down(stage, ref error) => {
                tracing::warn!(instance = %self.args.id, stage, error, "a shard is down: requests wait for it");
                self.pause(stage, error);
            }
            LineStep::Lost(stage, ref error) => {
                tracing::warn!(instance = %self.args.id, stage, %error, "a shard is lost: requests wait for another place");
                self.pause(stage, &error.to_string());
                self.report_broken(self.line.stamp(), &step);
            }
            LineStep::Cut(stage, ref what, wait) => {
                tracing::warn!(instance = %self.args.id, stage, what, "rows do not get through: connecting anew");
                self.pause(stage, what);
                myself.send_after(wait, || InstanceMsg::Rewire);
            }
        }
    }

    pub(super) fn on_node_lost(&mut self, node: NodeId) {
        if let Some(coming) = &mut self.coming {
            coming.on_node_lost(node);
        }
        if let Some(stage) = self.line.on_node_lost(node) {
            let what = format!("node {} is gone", node.short());
            tracing::warn!(instance = %self.args.id, stage, what, "requests wait for another place of its shards");
            self.pause(stage, &what);
            self.report_all_lost();
        }
    }

    /// The pipeline does not work: what is in flight is void.
    fn pause(&mut self, stage: usize, error: &str) {
        self.args.board.forget(self.args.id, End::Head, Some(self.line.incarnation()));
        self.schedule.handle_pipeline_lost();
        let (instance, error) = (self.args.id, error.to_owned());
        self.args.facts.tell(Fact::ShardFailed { instance, stage, error });
        self.args.planner.tell(InstanceReport::Waiting { instance });
    }

    fn report_broken(&self, stamp: Stamp, step: &LineStep) {
        if let LineStep::Lost(stage, error) = step {
            let (instance, stage, error) = (self.args.id, *stage, error.clone());
            let has_run = self.line.stamp() == stamp && self.line.has_run();
            self.args.planner.tell(InstanceReport::Broken { instance, stamp, stage, has_run, error });
        }
    }

    fn report_all_lost(&self) {
        for (stage, error) in self.line.lost() {
            self.report_broken(self.line.stamp(), &LineStep::Lost(stage, error));
        }
    }

    pub(super) fn replan(&mut self, myself: &InstanceRef, stamp: Stamp, wanted: Arc<Wanted>) {
        if stamp <= self.line.stamp() || self.coming.as_ref().is_some_and(|coming| stamp <= coming.stamp()) {
            return;
        }
        let (instance, placement) = (self.args.id, wanted.placement.clone());
        self.args.facts.tell(Fact::InstancePlaced { instance, model: wanted.model.clone(), placement });
        let is_in_place = wanted.change == Change::InPlace;
        let line = Line::new(stamp, wanted, self.now());
        self.order(line.tasks(instance));
        self.coming = Some(line);
        if is_in_place {
            self.clear_below(stamp);
        }
        if is_in_place || !self.line.is_loaded() {
            self.switch(myself);
        }
    }

    /// Shards of earlier placements have served their time; one that is coming has a later stamp.
    pub(super) fn clear_below(&mut self, stamp: Stamp) {
        self.cleared = self.now();
        let clear = StageOrder::Clear { instance: self.args.id, below: stamp };
        self.args.post.tell(self.args.post.own(), ControlMessage::Stage(clear.clone()));
        self.args.post.tell_others(&ControlMessage::Stage(clear));
    }

    /// The coming placement takes over.
    fn switch(&mut self, myself: &InstanceRef) {
        let Some(coming) = self.coming.take() else { return };
        self.line = coming;
        self.schedule.handle_pipeline_lost();
        self.schedule.set_steps_in_flight(self.line.wanted().placement.stages.len());
        if self.line.is_loaded() {
            self.begin_life(myself);
        } else {
            self.args.planner.tell(InstanceReport::Waiting { instance: self.args.id });
        }
    }

    /// Has all shards wired, if all are loaded.
    pub(super) fn begin_life(&mut self, myself: &InstanceRef) {
        if !self.line.is_loaded() || self.line.is_running() {
            return;
        }
        let own = self.args.post.own();
        let incarnation = self.line.next_life(own, self.now());
        let head = myself.clone();
        let sink = Sink::Head(Arc::new(move |result| {
            // A head that is gone wants no results.
            let _ = head.send_message(InstanceMsg::StepDone(result));
        }));
        let stages = &self.line.wanted().placement.stages;
        let Some(last) = stages.last() else { return };
        self.args.board.expect(self.args.id, End::Head, Expected { incarnation, from: last.node, sink });
        for (stage, placed) in stages.iter().enumerate() {
            let (next, to) = match stages.get(stage + 1) {
                Some(next) => (next.node, End::Stage(stage + 1)),
                None => (own, End::Head),
            };
            let from = stage.checked_sub(1).map_or(own, |before| stages[before].node);
            let (instance, wire_type) = (self.args.id, self.args.wire_type);
            let layers = placed.layers.clone();
            let order = StageOrder::Wire { instance, stage, layers, incarnation, from, next, to, wire_type };
            self.args.post.tell(placed.node, ControlMessage::Stage(order));
        }
    }

    fn on_running(&mut self) {
        self.signs += 1;
        let first = self.args.board.find(self.args.id, End::Stage(0), self.line.incarnation());
        if let Some(Sink::Shard { vocabulary, .. }) = first.map(|first| first.sink) {
            self.schedule.set_vocabulary(vocabulary);
        }
        let (instance, stamp, epoch) = (self.args.id, self.line.stamp(), self.line.incarnation().epoch);
        tracing::info!(%instance, epoch, stages = self.line.wanted().placement.stages.len(), "instance ready");
        self.args.facts.tell(Fact::InstanceReady { instance, epoch });
        self.args.planner.tell(InstanceReport::Ready { instance });
        self.clear_below(stamp);
    }

    /// The coming placement has no place for a shard either, or cannot be reached: it is said until there is another one.
    fn watch_coming(&mut self, now: Duration) {
        let post = self.args.post.clone();
        let Some(coming) = &mut self.coming else { return };
        for node in coming.out_of_reach(now, |node| post.is_here(node)) {
            coming.on_node_lost(node);
        }
        let (stamp, lost) = (coming.stamp(), coming.lost());
        for (stage, error) in lost {
            self.report_broken(stamp, &LineStep::Lost(stage, error));
        }
    }

    /// What nobody has acted on is said again.
    pub(super) fn watch(&mut self, myself: &InstanceRef) {
        let now = self.now();
        let lines = [Some(&mut self.line), self.coming.as_mut()].into_iter().flatten();
        let silent = lines.flat_map(|line| line.silent(self.args.id, now)).collect();
        self.order(silent);
        self.line.lose_stalled(now);
        if let Some(coming) = &mut self.coming {
            coming.lose_stalled(now);
        }
        let may_clear = self.line.is_running() || self.line.wanted().change == Change::InPlace;
        if may_clear && now.saturating_sub(self.cleared) >= CLEAR_EVERY {
            // Who was away, or apart, when it was said has kept what it had.
            self.clear_below(self.line.stamp());
        }
        self.watch_coming(now);
        if self.line.is_running() {
            return self.watch_steps(myself, now);
        }
        let post = self.args.post.clone();
        if !self.line.lost().is_empty() {
            // What is said of the earlier placement is heard no more where another is to come.
            self.switch(myself);
        }
        for node in self.line.out_of_reach(now, |node| post.is_here(node)) {
            self.on_node_lost(node);
        }
        self.report_all_lost();
        if let Some(stage) = self.line.is_overdue(self.now()) {
            let step = self.line.cut(stage, "a stage did not answer in time".to_owned(), self.now());
            self.take(myself, step);
        }
    }

    /// A step that does not come back was lost on its way: a shard that hangs says so itself, and before.
    fn watch_steps(&mut self, myself: &InstanceRef, now: Duration) {
        let silence = self.watchdog.look(self.signs, now);
        let stages = self.line.wanted().placement.stages.len();
        let a_stage = self.args.patience.with_step(self.schedule.rows_in_flight_max());
        // One more, for the ways between them.
        let within = a_stage.saturating_mul(u32::try_from(stages + 1).unwrap_or(u32::MAX));
        if self.schedule.steps_in_flight() == 0 || silence <= within {
            return;
        }
        if self.coming.is_some() {
            return self.switch(myself);
        }
        let what = format!("no step came back for {} s", silence.as_secs());
        let step = self.line.stall(what, now);
        self.take(myself, step);
    }
}
