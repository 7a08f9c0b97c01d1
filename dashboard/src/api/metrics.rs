//! `/metrics`: the node's state in Prometheus' text format, version 0.0.4.

use super::context::ApiContext;
use super::error::ApiError;
use axum::extract::State;
use axum::http::header;
use axum::response::{IntoResponse, Response};
use exo_actors::core::node_status::NodeStatus;
use exo_actors::core::status::{InstanceStatus, Totals};
use std::fmt::Write as _;

pub(super) async fn metrics(State(api): State<ApiContext>) -> Result<Response, ApiError> {
    let text = render(&api.node.status().await?);
    Ok(([(header::CONTENT_TYPE, "text/plain; version=0.0.4")], text).into_response())
}

/// The name, kind and help text of one metric.
struct Metric<'a> {
    name: &'a str,
    /// `gauge` or `counter`.
    kind: &'a str,
    help: &'a str,
}

impl Metric<'_> {
    fn write(&self, out: &mut String, values: impl IntoIterator<Item = (String, f64)>) {
        let mut values = values.into_iter().peekable();
        // An unknown value is left out, never written as 0.
        if values.peek().is_none() {
            return;
        }
        let Self { name, kind, help } = self;
        // Writing to a string does not fail.
        let _ = write!(out, "# HELP exo_{name} {help}\n# TYPE exo_{name} {kind}\n");
        for (labels, value) in values {
            let _ = writeln!(out, "exo_{name}{labels} {value}");
        }
    }
}

fn gauge<'a>(name: &'a str, help: &'a str) -> Metric<'a> {
    Metric { name, kind: "gauge", help }
}

fn counter<'a>(name: &'a str, help: &'a str) -> Metric<'a> {
    Metric { name, kind: "counter", help }
}

fn render(status: &NodeStatus) -> String {
    let mut out = String::new();
    let machine = &status.machine;
    let plain = |value: Option<f64>| value.map(|value| (String::new(), value));
    let bytes = |bytes: Option<u64>| plain(bytes.map(|bytes| bytes as f64));
    gauge("memory_total_bytes", "Memory of this machine.").write(&mut out, bytes(machine.memory_total_bytes));
    gauge("memory_free_bytes", "Memory that is available.").write(&mut out, bytes(machine.memory_free_bytes));
    gauge("process_bytes", "Resident memory of this process and of its engines' processes.")
        .write(&mut out, bytes(machine.process_bytes));
    gauge("unaccounted_bytes", "Memory of this machine that neither processes nor caches account for.")
        .write(&mut out, bytes(machine.unaccounted_bytes));
    let busy = machine.cpu_utilisation.map(f64::from);
    gauge("cpu_utilisation", "Share of all cores in use, 0 to 1.").write(&mut out, plain(busy));
    let devices = status
        .devices
        .iter()
        .map(|device| (labels(&[("device", &device.id.0), ("engine", &device.engine), ("tier", &device.tier)]), 1.0));
    let failed = status.devices.iter().map(|device| {
        let is_failed = status.failed_devices.contains_key(&device.id);
        (labels(&[("device", &device.id.0)]), f64::from(u8::from(is_failed)))
    });
    gauge("device_failed", "1 while a device has failed and its shards run elsewhere.").write(&mut out, failed);
    gauge("device_info", "Devices on which engines can be opened.").write(&mut out, devices);
    instances(status, &mut out);
    totals(status, &mut out);
    out
}

/// What the heads of this node have done since it started. Counters never fall: they outlive instances.
fn totals(status: &NodeStatus, out: &mut String) {
    type Read = fn(&Totals) -> u64;
    let metrics: [(Metric<'_>, Read); 6] = [
        (counter("requests_total", "Requests that have ended."), |totals| totals.requests),
        (counter("prompt_tokens_total", "Prompt tokens of admitted requests."), |totals| totals.prompt_tokens),
        (counter("reused_tokens_total", "Prompt tokens found in the prefix cache."), |totals| totals.cached_tokens),
        (counter("generated_tokens_total", "Sampled tokens."), |totals| totals.generated_tokens),
        (counter("drafted_tokens_total", "Tokens that were guessed ahead."), |totals| totals.drafted_tokens),
        (counter("accepted_tokens_total", "Guessed tokens that the model drew."), |totals| totals.accepted_tokens),
    ];
    for (metric, read) in metrics {
        let values = status.totals.iter().map(|(model, totals)| (labels(&[("model", model)]), read(totals) as f64));
        metric.write(out, values);
    }
}

fn instances(status: &NodeStatus, out: &mut String) {
    type Read = fn(&InstanceStatus) -> f64;
    let metrics: [(Metric<'_>, Read); 7] = [
        (gauge("requests_running", "Requests in prefill or decode."), |i| i.requests_running as f64),
        (gauge("requests_waiting", "Requests that wait for pages or their turn."), |i| i.requests_waiting as f64),
        (gauge("kv_pages_used", "KV cache pages in use, cached prefixes included."), |i| f64::from(i.pages_used)),
        (gauge("kv_pages_total", "KV cache pages."), |i| f64::from(i.pages_total)),
        (gauge("slow_stages", "Stages whose steps take much longer than they did."), |i| i.slow.len() as f64),
        (gauge("leaking_stages", "Stages whose processes leak memory."), |i| i.leaks.len() as f64),
        (gauge("instance_epoch", "Epoch of the instance's latest incarnation."), |i| i.epoch as f64),
    ];
    for (metric, read) in metrics {
        let values = status.live().map(|(id, instance)| {
            (labels(&[("instance", &id.to_string()), ("model", &instance.model.name)]), read(instance))
        });
        metric.write(out, values);
    }
}

/// Returns `{name="value",…}`, escaped as Prometheus' format demands.
fn labels(pairs: &[(&str, &str)]) -> String {
    let escape = |text: &str| text.replace('\\', "\\\\").replace('"', "\\\"").replace('\n', "\\n");
    let pairs: Vec<String> = pairs.iter().map(|(name, value)| format!("{name}=\"{}\"", escape(value))).collect();
    format!("{{{}}}", pairs.join(","))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn labels_are_escaped() {
        assert_eq!(labels(&[("a", "x\"y\\z\n"), ("b", "")]), "{a=\"x\\\"y\\\\z\\n\",b=\"\"}");
    }

    #[test]
    fn unknown_values_are_left_out() {
        let mut out = String::new();
        gauge("memory_free_bytes", "…").write(&mut out, None::<(String, f64)>);
        assert_eq!(out, "");
        gauge("memory_free_bytes", "Free.").write(&mut out, Some((String::new(), 5.0)));
        assert_eq!(
            out,
            "# HELP exo_memory_free_bytes Free.\n# TYPE exo_memory_free_bytes gauge\nexo_memory_free_bytes 5\n"
        );
    }
}
