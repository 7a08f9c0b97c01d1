//! How often a pipeline is connected anew.

use super::*;

const SECOND: Duration = Duration::from_secs(1);

/// A pipeline of one stage, which runs.
struct Running {
    pipeline: Pipeline,
    node: NodeId,
    now: Duration,
}

impl Running {
    fn new() -> Self {
        let node = exo_net::Identity::ephemeral().expect("random bytes").node_id();
        let stamp = Stamp { counter: 1, by: node };
        let pipeline = Pipeline::new(stamp, Arc::new(Deployment::of_one_layer("m", node)), Duration::ZERO);
        let mut running = Self { pipeline, node, now: SECOND };
        assert!(matches!(
            running.pipeline.on_stage_event(node, &StageEvent::Up { stage: 0 }, running.now),
            PipelineEvent::Loaded
        ));
        running
    }

    /// A life of so many seconds, and what its end leads to.
    fn incarnations(
        &mut self,
        seconds: u32,
        end: impl FnOnce(&mut Pipeline, Duration) -> PipelineEvent,
    ) -> PipelineEvent {
        let incarnation = self.pipeline.next_incarnation(self.node, self.now);
        let wired = StageEvent::Wired { stage: 0, incarnation };
        assert!(matches!(self.pipeline.on_stage_event(self.node, &wired, self.now), PipelineEvent::Running));
        self.now += seconds * SECOND;
        end(&mut self.pipeline, self.now)
    }
}

fn stall(pipeline: &mut Pipeline, now: Duration) -> PipelineEvent {
    pipeline.stall("no step came back".to_owned(), now)
}

fn cut(pipeline: &mut Pipeline, now: Duration) -> PipelineEvent {
    pipeline.cut(0, "the connection broke".to_owned(), now)
}

#[test]
fn a_link_that_breaks_now_and_then_is_connected_anew_each_time() {
    let mut running = Running::new();
    for _ in 0..100 {
        assert!(matches!(running.incarnations(60, cut), PipelineEvent::Cut(0, ..)));
    }
}

#[test]
fn a_link_that_does_not_hold_is_given_up() {
    let mut running = Running::new();
    for _ in 0..CUTS_MAX {
        assert!(matches!(running.incarnations(1, cut), PipelineEvent::Cut(0, ..)));
    }
    assert!(matches!(running.incarnations(1, cut), PipelineEvent::Lost(0, _)));
}

/// A life ends minutes after its step was lost, so that its length says nothing.
#[test]
fn a_pipeline_that_loses_step_after_step_is_given_up() {
    let mut running = Running::new();
    for _ in 0..CUTS_MAX {
        assert!(matches!(running.incarnations(300, stall), PipelineEvent::Cut(0, ..)));
    }
    assert!(matches!(running.incarnations(300, stall), PipelineEvent::Lost(0, _)));
}

#[test]
fn a_step_that_is_lost_now_and_then_is_replayed_each_time() {
    let mut running = Running::new();
    for _ in 0..100 {
        assert!(matches!(running.incarnations(900, stall), PipelineEvent::Cut(0, ..)));
    }
}
