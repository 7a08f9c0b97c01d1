//! Tests of whole processes with real models: what a user types, and what the commands print.
//!
//! The models are downloaded once, with `exo-node pull`, into the shared cache.

#![allow(clippy::expect_used)] // A test that cannot continue panics with the reason.

mod answers;
mod api;
mod chaos;
mod cluster;
mod commands;
mod connections;
mod context;
mod faults;
mod hosts;
mod joining;
mod lan;
mod members;
mod node;
mod references;
mod relay;
mod troubles;
mod weights;

use serde_json::Value;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::sync::Once;

const SMOLLM2: &str = "smollm2";
const GEMMA3: &str = "gemma3-270m";

fn exo(arguments: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_exo-node"));
    command.args(arguments).stdin(Stdio::null()).env("EXO_DATA_DIR", data_dir());
    command
}

/// A data folder on which no node runs: commands load their models themselves.
fn data_dir() -> PathBuf {
    Path::new(env!("CARGO_TARGET_TMPDIR")).join("nobody")
}

fn output(arguments: &[&str]) -> Output {
    exo(arguments).output().expect("exo-node starts")
}

fn stderr(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

fn json(arguments: &[&str]) -> Value {
    let output = output(arguments);
    assert!(output.status.success(), "{arguments:?}: {}", stderr(&output));
    let text = String::from_utf8(output.stdout).expect("UTF-8");
    serde_json::from_str(&text).unwrap_or_else(|error| panic!("stdout is not one JSON object ({error}): {text}"))
}

/// Downloads both models, once per test process.
fn models() {
    static PULLED: Once = Once::new();
    PULLED.call_once(|| {
        for model in [SMOLLM2, GEMMA3] {
            let pulled = output(&["pull", model]);
            assert!(pulled.status.success(), "{}", stderr(&pulled));
        }
    });
}

fn ids(value: &Value) -> Vec<u64> {
    value.as_array().expect("a list").iter().map(|id| id.as_u64().expect("an id")).collect()
}
