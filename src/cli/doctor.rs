//! `exo-node doctor`: checks this machine for all that a node needs, and says how to mend what is missing.
//!
//! ```text
//! hardware.rs  CPU, memory, GPUs, drivers, runtimes, permissions ─┐
//! devices.rs   self-test and speed of each engine's device        ├─► Check ─► lines, or JSON
//! network.rs   ports, buffers, MTU, multicast                     │
//! files.rs     folders, disks, models                            ─┘
//! ```

mod devices;
mod files;
mod hardware;
mod network;

use super::bare_engine::threads_or_cores;
use super::client::NodeClient;
use super::events::printable;
use super::outcome::Outcome;
use crate::config::Directories;
use crate::{Isolation, node};
use clap::Args;
use exo_actors::core::status::GpuStatus;
use exo_actors::{Discovery, discover};
use serde::Serialize;
use std::fmt::Write as _;
use std::path::PathBuf;

#[derive(Debug, Args)]
#[command(after_help = "Examples:
  exo-node doctor
  exo-node doctor --json | jq '.checks[] | select(.verdict != \"ok\")'

Exit codes: 0 nothing fails, 1 something fails.")]
pub(super) struct DoctorArguments {
    /// Do not compute on devices: no self-tests, no speeds
    #[arg(long)]
    no_measure: bool,
    /// Print one JSON object on stdout
    #[arg(long)]
    json: bool,
    /// Folder of the node's identity and settings
    #[arg(long, value_name = "FOLDER")]
    data_dir: Option<PathBuf>,
}

/// What a check says.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "lowercase")]
enum Verdict {
    Ok,
    /// The node works without it, or less well.
    Warn,
    /// The node cannot do its work.
    Fail,
}

/// One thing that was looked at.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
struct Check {
    area: &'static str,
    subject: String,
    verdict: Verdict,
    found: String,
    remedy: Option<String>,
}

impl Check {
    fn ok(area: &'static str, subject: impl Into<String>, found: impl Into<String>) -> Self {
        Self { area, subject: subject.into(), verdict: Verdict::Ok, found: found.into(), remedy: None }
    }

    fn warn(
        area: &'static str,
        subject: impl Into<String>,
        found: impl Into<String>,
        remedy: impl Into<String>,
    ) -> Self {
        Self { verdict: Verdict::Warn, remedy: Some(remedy.into()), ..Self::ok(area, subject, found) }
    }

    fn fail(
        area: &'static str,
        subject: impl Into<String>,
        found: impl Into<String>,
        remedy: impl Into<String>,
    ) -> Self {
        Self { verdict: Verdict::Fail, remedy: Some(remedy.into()), ..Self::ok(area, subject, found) }
    }
}

/// The whole diagnosis.
#[derive(Debug, Serialize)]
struct Report {
    version: &'static str,
    checks: Vec<Check>,
    devices: Vec<devices::DeviceDiagnosis>,
    gpus: Vec<GpuStatus>,
}

pub(super) async fn run(arguments: DoctorArguments) -> anyhow::Result<Outcome> {
    let directories = Directories::from_environment()?;
    let data_dir = arguments.data_dir.clone().unwrap_or_else(|| directories.data.clone());
    let is_running = matches!(NodeClient::find(&data_dir).await, Ok(Some(_)));
    let is_measured = !arguments.no_measure;
    let report =
        tokio::task::spawn_blocking(move || diagnose(&directories, &data_dir, is_running, is_measured)).await??;
    match arguments.json {
        true => println!("{}", serde_json::to_string(&report)?),
        false => print!("{}", printable(&draw(&report.checks))),
    }
    match report.checks.iter().any(|check| check.verdict == Verdict::Fail) {
        true => Ok(Outcome::Unwell),
        false => Ok(Outcome::Done),
    }
}

/// Looks at everything. Blocks for some seconds.
fn diagnose(
    directories: &Directories,
    data_dir: &std::path::Path,
    is_running: bool,
    is_measured: bool,
) -> anyhow::Result<Report> {
    let factories = node::built_in(threads_or_cores(None), Isolation::Default, None)?;
    let Discovery { devices: found, mut gpus } = discover(&factories, &directories.disabled_devices);
    let devices = devices::diagnose(found, is_measured);
    hardware::sample(&mut gpus);
    let mut checks = hardware::checks(&gpus, &factories);
    checks.extend(devices::checks(&devices));
    checks.extend(network::checks(is_running));
    checks.extend(files::checks(data_dir, &directories.models));
    Ok(Report { version: env!("CARGO_PKG_VERSION"), checks, devices, gpus })
}

/// Draws checks, in areas.
fn draw(checks: &[Check]) -> String {
    let mut out = String::new();
    let mut area = "";
    let width = checks.iter().map(|check| check.subject.chars().count()).max().unwrap_or(0);
    for check in checks {
        // Writing to a string does not fail.
        if check.area != area {
            area = check.area;
            let _ = writeln!(out, "{area}");
        }
        let verdict = match check.verdict {
            Verdict::Ok => "ok",
            Verdict::Warn => "warn",
            Verdict::Fail => "FAIL",
        };
        let _ = writeln!(out, "  {verdict:4}  {:width$}  {}", check.subject, check.found);
        if let Some(remedy) = &check.remedy {
            let _ = writeln!(out, "        {:width$}  remedy: {remedy}", "");
        }
    }
    let count = |verdict| checks.iter().filter(|check| check.verdict == verdict).count();
    let _ = writeln!(out, "{} checks: {} warn, {} fail", checks.len(), count(Verdict::Warn), count(Verdict::Fail));
    out
}

/// Bytes in units of 10⁹.
fn gigabytes(bytes: u64) -> String {
    format!("{:.1} GB", bytes as f64 / 1e9)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn checks_are_drawn_by_area() {
        let checks = [
            Check::ok("hardware", "CPU", "x86_64, 8 cores"),
            Check::warn(
                "hardware",
                "GPU 0000:03:00.0",
                "Intel Arc B580: no runtime",
                "sudo apt install intel-opencl-icd",
            ),
            Check::fail("files", "data folder", "/x cannot be written", "choose another with --data-dir"),
        ];
        insta::assert_snapshot!(draw(&checks));
    }
}
