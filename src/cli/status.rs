//! `exo-node status`: shows the status of the running node and its cluster.

use super::client::NodeClient;
use super::events::printable;
use super::gpu::{readings, slowed_by, title};
use super::outcome::Outcome;
use super::plan::name_of;
use crate::config::data_folder;
use crate::{InstanceId, InstanceStatus, Machine, MemberReport, NodeId, NodeStatus, Outside, Phase};
use clap::Args;
use exo_actors::core::status::{GpuStatus, Unused};
use serde_json::Value;
use std::fmt::Write as _;
use std::path::PathBuf;
use std::time::{SystemTime, UNIX_EPOCH};

/// How long a member that has gone is shown.
const GONE_SHOWN_S: u64 = 3600;

#[derive(Debug, Args)]
#[command(after_help = "Examples:
  exo-node status
  exo-node status --json | jq '.instances[].model.name'")]
pub(super) struct StatusArguments {
    /// Print the status as one JSON object on stdout
    #[arg(long)]
    json: bool,
    /// Folder of the node's identity and settings
    #[arg(long, value_name = "FOLDER")]
    data_dir: Option<PathBuf>,
}

pub(super) async fn run(arguments: StatusArguments) -> anyhow::Result<Outcome> {
    let data_dir = data_folder(arguments.data_dir.as_deref())?;
    let Some(node) = NodeClient::find(&data_dir).await? else {
        anyhow::bail!("no node is running on {}: `exo-node up` starts one", data_dir.display());
    };
    let status = node.status().await?;
    match arguments.json {
        true => println!("{}", cluster_json(&status)?),
        false => print!("{}", printable(&draw(&status))),
    }
    Ok(Outcome::Done)
}

/// The status as JSON. `instances` has those of all members, each with the names of the nodes of its head and stages.
fn cluster_json(status: &NodeStatus) -> serde_json::Result<Value> {
    let mut value = serde_json::to_value(status)?;
    let mut instances = serde_json::Map::new();
    for (id, instance) in status.everywhere() {
        let mut entry = serde_json::to_value(instance)?;
        let stages = &instance.placement.stages;
        entry["head"] = stages.first().map(|stage| name_of(status, stage.node)).into();
        for (index, stage) in stages.iter().enumerate() {
            entry["placement"]["stages"][index]["name"] = name_of(status, stage.node).into();
        }
        instances.insert(id.to_string(), entry);
    }
    value["instances"] = instances.into();
    value["leader"] = name_of(status, status.leader()).into();
    Ok(value)
}

fn draw(status: &NodeStatus) -> String {
    let mut out = String::new();
    // Writing to a string does not fail.
    let _ = writeln!(out, "node     {} ({})", status.name, status.node);
    if !status.members.is_empty() {
        let _ = writeln!(out, "leader   {}", name_of(status, status.leader()));
    }
    draw_machine(&mut out, &status.machine);
    if let Some(leak) = status.machine_leak {
        let grown = gigabytes(Some(leak.grown_bytes));
        let _ = writeln!(out, "         memory that no process has grew by {grown} GB: a driver may leak");
    }
    for device in &status.devices {
        let _ = writeln!(out, "device   {:12} {} {}, {}", device.id, device.engine, device.tier, device.name);
        if let Some(trouble) = status.failed_devices.get(&device.id) {
            let _ = writeln!(out, "         failed: {}", trouble.error);
            let _ = writeln!(out, "         remedy: {}", trouble.remedy);
        }
    }
    for gpu in status.gpus.values() {
        draw_gpu(&mut out, gpu);
    }
    for (id, member) in &status.members {
        draw_member(&mut out, status, *id, member);
    }
    for (id, outside) in &status.outside {
        draw_outside(&mut out, status, *id, outside);
    }
    let now_s = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs();
    draw_troubles(&mut out, status, now_s);
    let mut live = status.everywhere().peekable();
    if live.peek().is_none() {
        let _ = writeln!(out, "models   none in memory");
    }
    for (id, instance) in live {
        draw_instance(&mut out, status, id, instance);
    }
    out
}

fn gigabytes(bytes: Option<u64>) -> String {
    bytes.map_or("?".to_owned(), |bytes| format!("{:.1}", bytes as f64 / 1e9))
}

fn draw_machine(out: &mut String, machine: &Machine) {
    let busy = machine.cpu_utilisation.map_or("?".to_owned(), |busy| format!("{:.0} %", busy * 100.0));
    let (free, total) = (gigabytes(machine.memory_free_bytes), gigabytes(machine.memory_total_bytes));
    let _ = writeln!(out, "memory   {free} of {total} GB free, {} used by this node", gigabytes(machine.process_bytes));
    let _ = writeln!(out, "cores    {busy} busy");
}

/// Draws a GPU with its latest measurement.
fn draw_gpu(out: &mut String, status: &GpuStatus) {
    let _ = writeln!(out, "gpu      {:12} {}", status.gpu.address, title(status));
    let known = status.sample.iter().flat_map(|sample| readings(sample).into_iter().chain(slowed_by(sample)));
    let known: Vec<String> = known.collect();
    if !known.is_empty() {
        let _ = writeln!(out, "         {}", known.join(", "));
    }
    if let Some(Unused { error, remedy }) = &status.unused {
        let _ = writeln!(out, "         not used: {error}");
        let _ = writeln!(out, "         remedy: {remedy}");
    }
}

fn draw_member(out: &mut String, status: &NodeStatus, id: NodeId, member: &MemberReport) {
    let link = member.links.get(&status.node);
    let rtt = link.map_or("?".to_owned(), |link| format!("{:.1} ms", link.rtt_s * 1e3));
    let carries = link.and_then(|link| link.bytes_per_s);
    let carries = carries.map_or(String::new(), |bytes| format!(" over {:.0} MB/s", bytes / 1e6));
    let (free, total) = (gigabytes(member.machine.memory_free_bytes), gigabytes(member.machine.memory_total_bytes));
    let leaving = if member.is_draining { ", leaving" } else { "" };
    let _ = writeln!(
        out,
        "member   {:12} {} {rtt} away{carries}, {free} of {total} GB free{leaving}",
        name_of(status, id),
        id.short()
    );
    for gpu in member.gpus.values() {
        draw_gpu(out, gpu);
    }
    for (to, link) in member.links.iter().filter(|(to, _)| **to != status.node) {
        let carries = link.bytes_per_s.map_or(String::new(), |bytes| format!(" over {:.0} MB/s", bytes / 1e6));
        let _ = writeln!(out, "         to {:9} {:.1} ms away{carries}", name_of(status, *to), link.rtt_s * 1e3);
    }
    for device in &member.devices {
        let speed = device.speed.map_or(String::new(), |speed| {
            // Within these bounds the speed lies.
            let (slow, fast) = (speed.bytes_per_s / speed.spread / 1e9, speed.bytes_per_s * speed.spread / 1e9);
            format!(", {:.1} GB/s ({slow:.1} to {fast:.1})", speed.bytes_per_s / 1e9)
        });
        let report = &device.report;
        let _ = writeln!(out, "         {:12} {} {}, {}{speed}", report.id, report.engine, report.tier, report.name);
    }
}

fn draw_outside(out: &mut String, status: &NodeStatus, id: NodeId, outside: &Outside) {
    let why = match outside.between {
        Some((one, other)) => {
            format!("{} and {} do not reach each other", name_of(status, one), name_of(status, other))
        }
        None => "only that node knows which two nodes do not reach each other".to_owned(),
    };
    let _ = writeln!(out, "outside  {:12} {} works without this node: {why}", outside.name, id.short());
    let _ = writeln!(out, "         open UDP port 52416, or the port of --listen, between the two");
}

/// Draws members that have gone, addresses where no member answers, and copied keys.
fn draw_troubles(out: &mut String, status: &NodeStatus, now_s: u64) {
    for (id, gone) in status.gone.iter().filter(|(_, gone)| now_s.saturating_sub(gone.at_s) < GONE_SHOWN_S) {
        let since = match now_s.saturating_sub(gone.at_s) {
            seconds @ ..120 => format!("{seconds} s"),
            seconds => format!("{} min", seconds / 60),
        };
        let _ = writeln!(out, "gone     {:12} {} since {since}: {}", gone.name, id.short(), gone.reason);
    }
    for (address, failure) in &status.unreached {
        let _ = writeln!(out, "missing  {address} {failure}");
    }
    for clash in status.same_key.values() {
        let _ = writeln!(
            out,
            "copy     {} and {} have the same key: delete node.key on the copy",
            clash.first, clash.second
        );
    }
}

fn draw_instance(out: &mut String, status: &NodeStatus, id: InstanceId, instance: &InstanceStatus) {
    let (name, quantization) = (&instance.model.name, &instance.model.quantization);
    let _ = writeln!(out, "model    {name} ({quantization})  instance {id}, {}", phase(instance));
    for (index, stage) in instance.placement.stages.iter().enumerate() {
        let bytes = gigabytes(Some(stage.memory_bytes));
        let (first, last) = (stage.layers.start, stage.layers.end - 1);
        let on = format!("{} of {}", stage.device, name_of(status, stage.node));
        let fallback = instance.devices.get(&index).filter(|device| **device != stage.device);
        let fallback = fallback.map_or(String::new(), |device| format!(", for now on {device}"));
        let _ = writeln!(out, "         layers {first}–{last} on {on}{fallback}, {bytes} GB");
        if let Some(leak) = instance.leaks.get(&index) {
            let _ = writeln!(out, "         leaks memory: {} GB so far", gigabytes(Some(leak.grown_bytes)));
        }
        if let Some(slow) = instance.slow.get(&index) {
            let (best, latest) = (slow.best.as_secs_f64(), slow.latest.as_secs_f64());
            let _ = writeln!(out, "         slow: steps of {} rows take {latest:.3} s, not {best:.3} s", slow.rows);
        }
    }
    let _ = writeln!(out, "         context of {}", instance.model.context);
    let totals = &instance.totals;
    let _ = writeln!(
        out,
        "         {} running, {} waiting, {} of {} pages; {} answered, {} prompt + {} generated tokens, {} cached",
        instance.requests_running,
        instance.requests_waiting,
        instance.pages_used,
        instance.pages_total,
        totals.requests,
        totals.prompt_tokens,
        totals.generated_tokens,
        totals.cached_tokens,
    );
}

fn phase(instance: &InstanceStatus) -> String {
    match &instance.phase {
        Phase::Fetching { total_bytes: 0, .. } => "fetching".to_owned(),
        Phase::Fetching { fetched_bytes, total_bytes } => {
            format!("fetching weights, {} %", fetched_bytes * 100 / total_bytes)
        }
        Phase::Loading { total_bytes: 0, .. } => "loading".to_owned(),
        Phase::Loading { loaded_bytes, total_bytes } => format!("loading, {} %", loaded_bytes * 100 / total_bytes),
        Phase::Ready => "ready".to_owned(),
        Phase::Recovering { error } => format!("recovering from: {error}"),
        Phase::Stopped { .. } => "stopped".to_owned(),
    }
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;
    use crate::cli::gpu::tests::card;
    use exo_engines::hardware::GpuSample;

    /// The status, as a node answered it, of a cluster of two members and a peer that only one of them reaches.
    pub(crate) fn status() -> NodeStatus {
        serde_json::from_str(include_str!("fixtures/status.json")).expect("the JSON of earlier nodes is read")
    }

    #[test]
    fn a_cluster_is_drawn() {
        insta::assert_snapshot!(draw(&status()));
    }

    /// R1.2, R2.1–R2.5: a GPU that no engine uses is drawn with what it lacks, and with what its sensors show.
    #[test]
    fn gpus_are_drawn() {
        let mut out = String::new();
        let sample = GpuSample {
            temperature_celsius: Some(51.0),
            throttle_reasons: Some(vec!["pl1".to_owned()]),
            ..GpuSample::default()
        };
        draw_gpu(&mut out, &GpuStatus { sample: Some(sample), ..card() });
        let lines: Vec<&str> = out.lines().map(str::trim).collect();
        let expected = [
            "gpu      0000:03:00.0 Intel Arc B580 [8086:e20b], a card",
            "51 °C, slowed by pl1",
            "not used: the kernel has no driver for it",
            "remedy: install a newer kernel",
        ];
        assert_eq!(lines, expected);
    }

    #[test]
    fn phases_are_drawn() {
        let status = status();
        let mut instance = status.everywhere().next().expect("an instance").1.clone();
        let phases = [
            Phase::Fetching { fetched_bytes: 1, total_bytes: 4 },
            Phase::Loading { loaded_bytes: 0, total_bytes: 0 },
            Phase::Ready,
            Phase::Recovering { error: "device cpu: out of memory".to_owned() },
            Phase::Stopped { error: None },
        ];
        let lines = phases.map(|state| {
            instance.phase = state;
            phase(&instance)
        });
        insta::assert_snapshot!(lines.join("\n"));
    }
}
