//! `exo-node plan`: shows where a model would be placed, and why, without loading it.

use super::client::NodeClient;
use super::model_args::ModelArguments;
use super::outcome::Outcome;
use super::progress::Display;
use crate::{NodeId, NodeStatus, Placement, Policy, Preview, PreviewOutcome};
use clap::Args;
use std::sync::Arc;

#[derive(Debug, Args)]
#[command(after_help = "Examples:
  exo-node plan llama3.2-3b
  exo-node plan llama3.3-70b --json | jq '.[].outcome.placed.reason'")]
pub(super) struct PlanArguments {
    #[command(flatten)]
    model: ModelArguments,
    /// Print the previews as one JSON array on stdout
    #[arg(long)]
    json: bool,
}

pub(super) async fn run(arguments: PlanArguments) -> anyhow::Result<Outcome> {
    let spec = arguments.model.spec();
    let (status, previews) = match arguments.model.running_node().await? {
        Some(node) => ask(&node, &spec).await?,
        None => {
            let node = arguments.model.start_node(&Arc::new(Display::quiet())).await?;
            let asked = (node.status().await?, node.preview(spec).await?);
            node.shutdown().await;
            asked
        }
    };
    if arguments.json {
        println!("{}", serde_json::to_string(&previews)?);
        return Ok(Outcome::Done);
    }
    for preview in &previews {
        print!("{}", draw(&status, preview));
    }
    Ok(Outcome::Done)
}

async fn ask(node: &NodeClient, spec: &crate::ModelSpec) -> anyhow::Result<(NodeStatus, Vec<Preview>)> {
    Ok((node.status().await?, node.plan(spec).await?))
}

fn draw(status: &NodeStatus, preview: &Preview) -> String {
    let policy = match preview.policy {
        Policy::Latency => "latency",
        Policy::Throughput => "throughput",
        Policy::FewestNodes => "fewest-nodes",
    };
    match &preview.outcome {
        PreviewOutcome::Placed { placement, reason, stages_s, .. } => {
            format!("{policy:13} {reason}\n{}", stages(status, placement, stages_s))
        }
        PreviewOutcome::Refused { error, remedy } => format!("{policy:13} not possible: {error}\n{:13} {remedy}\n", ""),
    }
}

fn stages(status: &NodeStatus, placement: &Placement, stages_s: &[f64]) -> String {
    let line = |(stage, seconds): (&crate::Stage, &f64)| {
        let (first, last) = (stage.layers.start, stage.layers.end - 1);
        let (node, gigabytes) = (name_of(status, stage.node), stage.memory_bytes as f64 / 1e9);
        let (device, milliseconds) = (&stage.device, seconds * 1e3);
        format!("{:13} layers {first}–{last} on {device} of {node}, {gigabytes:.1} GB, {milliseconds:.1} ms\n", "")
    };
    placement.stages.iter().zip(stages_s).map(line).collect()
}

/// The name of a node, with its short id where another node has the same name; the short id alone where the name is
/// unknown.
pub(super) fn name_of(status: &NodeStatus, node: NodeId) -> String {
    let members = status.members.iter().map(|(&id, member)| (id, &member.name));
    let outside = status.outside.iter().map(|(&id, outside)| (id, &outside.name));
    let names: Vec<_> = members.chain(outside).chain([(status.node, &status.name)]).collect();
    let Some((_, name)) = names.iter().find(|(id, _)| *id == node) else { return node.short() };
    let is_shared = names.iter().any(|(id, other)| *id != node && other == name);
    if is_shared { format!("{name} ({})", node.short()) } else { (*name).clone() }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cli::status::tests::status;

    #[test]
    fn previews_are_drawn() {
        let previews: Vec<Preview> =
            serde_json::from_str(include_str!("fixtures/plan.json")).expect("the JSON of earlier nodes is read");
        let text: String = previews.iter().map(|preview| draw(&status(), preview)).collect();
        insta::assert_snapshot!(text);
    }
}
