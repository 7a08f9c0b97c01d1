//! Parts of the reports of commands that run a model.

use crate::{DeviceId, NodeStatus, Placement};
use serde::Serialize;
use std::time::Duration;

/// A stage of the pipeline, in JSON.
#[derive(Debug, Serialize)]
pub(super) struct StageReport {
    node: String,
    pub(super) device: String,
    engine: String,
    /// The first layer, and the last layer plus one.
    layers: [usize; 2],
}

/// The stages of `placement`.
pub(super) fn stages(status: &NodeStatus, placement: &Placement) -> Vec<StageReport> {
    let engine_of = |device: &DeviceId| {
        let report = status.devices.iter().find(|report| report.id == *device);
        report.map(|report| report.engine.clone()).unwrap_or_default()
    };
    let stages = placement.stages.iter().map(|stage| StageReport {
        node: stage.node.to_string(),
        device: stage.device.to_string(),
        engine: engine_of(&stage.device),
        layers: [stage.layers.start, stage.layers.end],
    });
    stages.collect()
}

/// A duration in milliseconds.
pub(super) fn milliseconds(duration: Duration) -> f64 {
    duration.as_secs_f64() * 1e3
}

/// A count per second; 0 where `duration` is zero.
pub(super) fn rate(count: usize, duration: Duration) -> f64 {
    let seconds = duration.as_secs_f64();
    if seconds > 0.0 { count as f64 / seconds } else { 0.0 }
}
