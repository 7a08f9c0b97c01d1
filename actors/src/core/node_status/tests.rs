//! The status after facts.

use super::*;
use crate::core::plan::Placement;
use crate::core::spec::FilesId;
use crate::core::spec::Model;
use crate::core::status::Load;

fn model() -> Model {
    Model {
        name: "m".to_owned(),
        family: String::new(),
        quantization: String::new(),
        context: crate::core::context::Context::largest(Some(1), 1, None),
        vocabulary: 256,
        files: FilesId([0; 32]),
    }
}

fn status() -> NodeStatus {
    let node = exo_net::Identity::ephemeral().expect("random bytes").node_id();
    NodeStatus::new(node, "here".to_owned(), Vec::new())
}

fn placed(instance: InstanceId) -> NodeStatus {
    let mut state = status();
    state.apply(&Fact::InstancePlaced { instance, model: model(), placement: Placement { stages: Vec::new() } });
    state
}

#[test]
fn facts_change_an_instance_s_phase() {
    let instance = InstanceId(1);
    let mut state = status();
    let phase = |state: &NodeStatus| state.instances[&instance].phase.clone();
    state.apply(&Fact::ShardLoading { instance, stage: 0, loaded_bytes: 1, total_bytes: 2 });
    assert!(state.instances.is_empty());
    let mut state = placed(instance);
    state.apply(&Fact::ShardFetching { instance, stage: 0, fetched_bytes: 5, total_bytes: 9 });
    assert_eq!(phase(&state), Phase::Fetching { fetched_bytes: 5, total_bytes: 9 });
    state.apply(&Fact::ShardFetching { instance, stage: 0, fetched_bytes: 9, total_bytes: 9 });
    state.apply(&Fact::ShardLoading { instance, stage: 0, loaded_bytes: 1, total_bytes: 2 });
    state.apply(&Fact::ShardLoading { instance, stage: 1, loaded_bytes: 3, total_bytes: 4 });
    assert_eq!(phase(&state), Phase::Loading { loaded_bytes: 4, total_bytes: 6 });
    state.apply(&Fact::InstanceReady { instance, epoch: 1 });
    assert_eq!(phase(&state), Phase::Ready);
    state.apply(&Fact::ShardFailed { instance, stage: 1, error: "gone".to_owned() });
    assert_eq!(phase(&state), Phase::Recovering { error: "gone".to_owned() });
    for id in 2..100 {
        let instance = InstanceId(id);
        state.apply(&Fact::InstancePlaced { instance, model: model(), placement: Placement { stages: Vec::new() } });
        state.apply(&Fact::InstanceStopped { instance, error: None });
    }
    assert_eq!(state.instances.len(), STOPPED_KEPT + 1);
}

#[test]
fn a_late_fact_does_not_revive_a_stopped_instance() {
    let instance = InstanceId(1);
    let mut state = placed(instance);
    let stopped = Fact::InstanceStopped { instance, error: Some("gone".to_owned()) };
    state.apply(&stopped);
    for late in [
        Fact::ShardFetching { instance, stage: 0, fetched_bytes: 1, total_bytes: 2 },
        Fact::ShardLoading { instance, stage: 0, loaded_bytes: 1, total_bytes: 2 },
        Fact::InstanceReady { instance, epoch: 1 },
        Fact::ShardFailed { instance, stage: 0, error: "late".to_owned() },
    ] {
        state.apply(&late);
        assert_eq!(state.instances[&instance].phase, Phase::Stopped { error: Some("gone".to_owned()) }, "{late:?}");
        assert_eq!(state.live().count(), 0);
    }
    state.apply(&Fact::InstancePlaced { instance, model: model(), placement: Placement { stages: Vec::new() } });
    state.apply(&Fact::InstanceReady { instance, epoch: 2 });
    assert_eq!(state.instances[&instance].phase, Phase::Ready);
}

/// An instance that is placed again with another context shows that context.
#[test]
fn a_new_context_is_shown() {
    let instance = InstanceId(1);
    let mut state = placed(instance);
    let context = crate::core::context::Context::largest(Some(2), 2, None);
    let placement = Placement { stages: Vec::new() };
    state.apply(&Fact::InstancePlaced { instance, model: Model { context, ..model() }, placement });
    assert_eq!(state.instances[&instance].model.context, context);
}

/// Totals are the node's: they stay when an instance has stopped, and a head that starts again adds to them.
#[test]
fn totals_outlive_instances() {
    let instance = InstanceId(1);
    let mut state = placed(instance);
    let done = |requests| {
        let totals = Totals { requests, prompt_tokens: 10 * requests, ..Totals::default() };
        Fact::RequestsChanged { instance, load: Load::default(), totals }
    };
    for requests in [1, 3] {
        state.apply(&done(requests));
    }
    state.apply(&Fact::InstanceStopped { instance, error: None });
    state.apply(&Fact::InstancePlaced { instance, model: model(), placement: Placement { stages: Vec::new() } });
    state.apply(&done(2));
    assert_eq!((state.totals["m"].requests, state.totals["m"].prompt_tokens), (5, 50));
}
