//! The measured programs, and one round of each.

use crate::{Round, Work, output};
use anyhow::Context;
use serde_json::Value;
use std::path::{Path, PathBuf};
use std::process::Command;

/// A program, and where it is.
#[derive(Debug, Clone)]
pub(crate) enum Program {
    ExoNode(PathBuf),
    /// exo-node with activations of 8 bits, as its peers have.
    ExoNodeEightBits(PathBuf),
    /// candle-transformers, by this program's own command.
    Candle(PathBuf),
    /// llama.cpp's llama-bench.
    LlamaCpp(PathBuf),
    /// OpenVINO GenAI, by `openvino_bench.py` and this Python.
    OpenVino(PathBuf),
}

/// The script that measures OpenVINO GenAI.
const OPENVINO_SCRIPT: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/openvino_bench.py");

impl Program {
    pub(crate) fn name(&self) -> &'static str {
        match self {
            Self::ExoNode(_) => "exo-node",
            Self::ExoNodeEightBits(_) => "exo-node, 8-bit activations",
            Self::Candle(_) => "candle-transformers",
            Self::LlamaCpp(_) => "llama.cpp",
            Self::OpenVino(_) => "OpenVINO GenAI",
        }
    }

    /// Whether the program is exo-node, which the others are compared with.
    pub(crate) fn is_own(&self) -> bool {
        matches!(self, Self::ExoNode(_) | Self::ExoNodeEightBits(_))
    }

    /// The program's own words for its version; `None` where it has none.
    pub(crate) fn version(&self) -> Option<String> {
        let printed = match self {
            Self::ExoNode(program) => output(Command::new(program).arg("--version")),
            Self::LlamaCpp(program) => {
                let folder = |part: std::path::Component<'_>| {
                    let version = part.as_os_str().to_str()?.strip_prefix("llama.cpp-")?;
                    Some(format!("as of llama-cpp-python {version}"))
                };
                return program.components().find_map(folder);
            }
            Self::OpenVino(python) => {
                output(Command::new(python).args(["-c", "import openvino_genai as g; print(g.__version__)"]))
            }
            Self::ExoNodeEightBits(_) | Self::Candle(_) => return None,
        };
        Some(String::from_utf8_lossy(&printed.ok()?).trim().to_owned())
    }

    /// # Errors
    /// The program's, such as that of a type that it does not support.
    pub(crate) fn round(&self, model: &Path, work: Work) -> anyhow::Result<Round> {
        match self {
            Self::ExoNode(program) => exo_node(program, model, work, "16"),
            Self::ExoNodeEightBits(program) => exo_node(program, model, work, "8"),
            Self::Candle(program) => {
                let mut command = Command::new(program);
                command.arg("candle").arg(model).env("RAYON_NUM_THREADS", work.threads.to_string());
                report(&mut work.pass_to(command))
            }
            Self::OpenVino(python) => {
                let mut command = Command::new(python);
                command.arg(OPENVINO_SCRIPT).arg(model);
                report(&mut work.pass_to(command))
            }
            Self::LlamaCpp(program) => llama_cpp(program, model, work),
        }
    }
}

fn exo_node(program: &Path, model: &Path, work: Work, activations: &str) -> anyhow::Result<Round> {
    let mut command = Command::new(program);
    command.arg("bench").arg(model).args(["--repeat", "1", "--json", "--activations", activations]);
    report(&mut work.pass_to(command))
}

/// The report that a command prints as one JSON object.
fn report(command: &mut Command) -> anyhow::Result<Round> {
    Ok(serde_json::from_slice(&output(command)?)?)
}

fn llama_cpp(program: &Path, model: &Path, work: Work) -> anyhow::Result<Round> {
    let prefill = llama_cpp_speed(program, model, work, &["-p", &work.prompt_tokens.to_string(), "-n", "0"])?;
    // Decodes after the prompt, as exo-node's bench does.
    let depth = work.prompt_tokens.to_string();
    let test = ["-p", "0", "-n", &work.generate_tokens.to_string(), "-d", &depth];
    let decode = llama_cpp_speed(program, model, work, &test)?;
    Ok(Round { prefill_tokens_per_s: prefill, decode_tokens_per_s: decode, load_ms: None, peak_memory_bytes: None })
}

fn llama_cpp_speed(program: &Path, model: &Path, work: Work, test: &[&str]) -> anyhow::Result<f64> {
    let mut command = Command::new(program);
    command.arg("-m").arg(model).args(["-r", "1", "-o", "json", "-t", &work.threads.to_string()]).args(test);
    let report: Vec<Value> = serde_json::from_slice(&output(&mut command)?)?;
    report.first().and_then(|test| test["avg_ts"].as_f64()).context("llama-bench reported no speed")
}
