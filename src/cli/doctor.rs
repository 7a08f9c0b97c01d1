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
use super::events::printable;
use super::outcome::Outcome;
use crate::config::Directories;
use crate::{Isolation, node};
use clap::Args;
use devices::Measuring;
use exo_actors::core::status::GpuStatus;
use exo_actors::{Discovery, ask_runtime, discover};
use exo_engines::hardware::SystemRoot;
use serde::Serialize;
use std::fmt::Write as _;
use std::path::{Path, PathBuf};

#[derive(Debug, Args)]
#[command(after_help = "Examples:
  exo-node doctor
  exo-node doctor --json | jq '.checks[] | select(.verdict != \"ok\")'

Exit codes: 0 no check fails, 1 a check fails or doctor itself does, 2 wrong usage.")]
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
    /// What kind of thing it is, for scripts: `AREA.KIND`.
    id: &'static str,
    subject: String,
    verdict: Verdict,
    found: String,
    remedy: Option<String>,
}

impl Check {
    fn ok(id: &'static str, subject: impl Into<String>, found: impl Into<String>) -> Self {
        Self { id, subject: subject.into(), verdict: Verdict::Ok, found: found.into(), remedy: None }
    }

    fn warn(id: &'static str, subject: impl Into<String>, found: impl Into<String>, remedy: impl Into<String>) -> Self {
        Self { verdict: Verdict::Warn, remedy: Some(remedy.into()), ..Self::ok(id, subject, found) }
    }

    fn fail(id: &'static str, subject: impl Into<String>, found: impl Into<String>, remedy: impl Into<String>) -> Self {
        Self { verdict: Verdict::Fail, remedy: Some(remedy.into()), ..Self::ok(id, subject, found) }
    }

    fn area(&self) -> &'static str {
        self.id.split('.').next().unwrap_or(self.id)
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
    let data_dir = arguments.data_dir.unwrap_or_else(|| directories.data.clone());
    let measuring = if arguments.no_measure { Measuring::Skip } else { Measuring::Measure };
    let report = tokio::task::spawn_blocking(move || diagnose(&directories, &data_dir, measuring)).await??;
    match arguments.json {
        true => println!("{}", serde_json::to_string(&report)?),
        false => print!("{}", printable(&draw(&report.checks))),
    }
    match report.checks.iter().any(|check| check.verdict == Verdict::Fail) {
        true => Ok(Outcome::ChecksFailed),
        false => Ok(Outcome::Done),
    }
}

/// Looks at everything. Blocks for some seconds.
fn diagnose(directories: &Directories, data_dir: &Path, measuring: Measuring) -> anyhow::Result<Report> {
    let factories = node::built_in(threads_or_cores(None), Isolation::Default, None)?;
    let found = discover(&factories, &directories.disabled_devices, &SystemRoot::default());
    let Discovery { devices, disabled, unknown, mut gpus, runtime } = found;
    let runtime = runtime.unwrap_or_else(|| ask_runtime(&factories));
    let devices = devices::diagnose(devices, measuring, devices::TESTED_WITHIN);
    hardware::sample(&mut gpus);
    let mut checks = hardware::checks(&gpus, runtime);
    checks.extend(devices::checks(&devices, &disabled, &unknown));
    checks.extend(network::checks());
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
        if check.area() != area {
            area = check.area();
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn checks_are_drawn_by_area() {
        let checks = [
            Check::ok("hardware.cpu", "CPU", "x86_64, 8 cores"),
            Check::warn(
                "hardware.gpu",
                "GPU 0000:03:00.0",
                "Intel Arc B580: no runtime",
                "sudo apt install intel-opencl-icd",
            ),
            Check::fail("files.data", "data folder", "/x cannot be written", "choose another with --data-dir"),
        ];
        insta::assert_snapshot!(draw(&checks));
    }
}
