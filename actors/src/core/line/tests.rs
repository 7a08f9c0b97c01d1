//! How often a pipeline is connected anew.

use super::*;

const SECOND: Duration = Duration::from_secs(1);

/// A pipeline of one stage, which runs.
struct Running {
    line: Line,
    node: NodeId,
    now: Duration,
}

impl Running {
    fn new() -> Self {
        let node = exo_net::Identity::ephemeral().expect("random bytes").node_id();
        let stamp = Stamp { counter: 1, by: node };
        let line = Line::new(stamp, Arc::new(Wanted::of_one_layer("m", node)), Duration::ZERO);
        let mut running = Self { line, node, now: SECOND };
        assert!(matches!(running.line.on_news(node, &StageNews::Up { stage: 0 }, running.now), Step::Loaded));
        running
    }

    /// A life of so many seconds, and what its end leads to.
    fn life(&mut self, seconds: u32, end: impl FnOnce(&mut Line, Duration) -> Step) -> Step {
        let incarnation = self.line.next_life(self.node, self.now);
        let wired = StageNews::Wired { stage: 0, incarnation };
        assert!(matches!(self.line.on_news(self.node, &wired, self.now), Step::Running));
        self.now += seconds * SECOND;
        end(&mut self.line, self.now)
    }
}

fn stall(line: &mut Line, now: Duration) -> Step {
    line.stall("no step came back".to_owned(), now)
}

fn cut(line: &mut Line, now: Duration) -> Step {
    line.cut(0, "the connection broke".to_owned(), now)
}

#[test]
fn a_link_that_breaks_now_and_then_is_connected_anew_each_time() {
    let mut running = Running::new();
    for _ in 0..100 {
        assert!(matches!(running.life(60, cut), Step::Cut(0, ..)));
    }
}

#[test]
fn a_link_that_does_not_hold_is_given_up() {
    let mut running = Running::new();
    for _ in 0..CUTS_MAX {
        assert!(matches!(running.life(1, cut), Step::Cut(0, ..)));
    }
    assert!(matches!(running.life(1, cut), Step::Lost(0, _)));
}

/// A life ends minutes after its step was lost, so that its length says nothing.
#[test]
fn a_pipeline_that_loses_step_after_step_is_given_up() {
    let mut running = Running::new();
    for _ in 0..CUTS_MAX {
        assert!(matches!(running.life(300, stall), Step::Cut(0, ..)));
    }
    assert!(matches!(running.life(300, stall), Step::Lost(0, _)));
}

#[test]
fn a_step_that_is_lost_now_and_then_is_replayed_each_time() {
    let mut running = Running::new();
    for _ in 0..100 {
        assert!(matches!(running.life(900, stall), Step::Cut(0, ..)));
    }
}
