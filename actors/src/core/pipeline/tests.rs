//! When a pipeline reconnects, and when it gives up a stage.

use super::*;
use exo_engines::engine::DeviceId;

const SECOND: Duration = Duration::from_secs(1);

fn up(load: u64) -> StageEvent {
    StageEvent::Up { stage: 0, device: DeviceId("cpu".to_owned()), load }
}

/// A pipeline of one loaded stage.
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
        assert!(matches!(running.pipeline.on_stage_event(node, &up(1), running.now), PipelineEvent::Loaded));
        running
    }

    /// Runs an incarnation for `seconds`, ends it with `end`, and returns the event.
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
fn a_link_that_breaks_rarely_is_reconnected_each_time() {
    let mut running = Running::new();
    for _ in 0..100 {
        assert!(matches!(running.incarnations(60, cut), PipelineEvent::Cut(0, ..)));
    }
}

#[test]
fn a_link_that_keeps_breaking_is_given_up() {
    let mut running = Running::new();
    for _ in 0..CUTS_MAX {
        assert!(matches!(running.incarnations(1, cut), PipelineEvent::Cut(0, ..)));
    }
    assert!(matches!(running.incarnations(1, cut), PipelineEvent::Lost(0, _)));
}

/// A lost step is noticed minutes later, so the length of the incarnation shows nothing about its links.
#[test]
fn a_pipeline_that_keeps_losing_steps_is_given_up() {
    let mut running = Running::new();
    for _ in 0..CUTS_MAX {
        assert!(matches!(running.incarnations(300, stall), PipelineEvent::Cut(0, ..)));
    }
    assert!(matches!(running.incarnations(300, stall), PipelineEvent::Lost(0, _)));
}

#[test]
fn a_rarely_lost_step_is_replayed_each_time() {
    let mut running = Running::new();
    for _ in 0..100 {
        assert!(matches!(running.incarnations(900, stall), PipelineEvent::Cut(0, ..)));
    }
}

/// R7.1–R7.5: a shard that is loaded once more, as after its device has recovered, is connected anew; one that reports
/// the same load again is not.
#[test]
fn a_shard_that_is_loaded_anew_is_connected_anew() {
    let mut running = Running::new();
    let node = running.node;
    let event = running.incarnations(1, |pipeline, now| {
        assert!(matches!(pipeline.on_stage_event(node, &up(1), now), PipelineEvent::Nothing));
        pipeline.on_stage_event(node, &up(2), now)
    });
    assert!(matches!(event, PipelineEvent::Moved));
    assert!(running.pipeline.is_loaded() && !running.pipeline.is_running());
}
