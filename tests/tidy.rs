//! The house's rules: who may import whom, what the pure core may not touch, and a module doc on every file.

#![allow(clippy::expect_used)] // A test that cannot go on says why.

use std::path::{Path, PathBuf};

fn root() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR"))
}

fn rust_files(folder: &Path) -> Vec<PathBuf> {
    let mut files = Vec::new();
    let Ok(entries) = std::fs::read_dir(folder) else { return files };
    for path in entries.filter_map(|entry| Some(entry.ok()?.path())) {
        if path.is_dir() {
            files.extend(rust_files(&path));
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            files.push(path);
        }
    }
    files
}

/// Lines of code of the files in `folder`, comments left out, as (file, line).
fn code(folder: &str) -> Vec<(PathBuf, String)> {
    let files = rust_files(&root().join(folder));
    assert!(!files.is_empty(), "{folder} has files");
    let mut lines = Vec::new();
    for file in files {
        let text = std::fs::read_to_string(&file).expect("readable");
        let code = text.lines().filter(|line| !line.trim_start().starts_with("//"));
        lines.extend(code.map(|line| (file.clone(), line.to_owned())));
    }
    lines
}

fn forbid(folder: &str, words: &[&str]) {
    for (file, line) in code(folder) {
        for word in words {
            assert!(!line.contains(word), "{}: `{word}` has no place in {folder}: {line}", file.display());
        }
    }
}

#[test]
fn crates_import_downwards_only() {
    forbid("engines/src", &["exo_net", "exo_actors", "exo_dashboard", "tokio", "ractor", "async fn"]);
    forbid("net/src", &["exo_engines", "exo_actors", "exo_dashboard"]);
    forbid("actors/src", &["exo_dashboard", "exo::"]);
    forbid("dashboard/src", &["exo_engines", "exo_net", "ractor", "exo::"]);
}

/// Actors from the lowest up: none imports one that stands above it. News go up through outlets.
#[test]
fn actors_know_only_those_below() {
    let floors = [
        "outlet",
        "room",
        "protocol",
        "control",
        "post",
        "host",
        "links",
        "models",
        "shard",
        "tokenizer",
        "device",
        "stages",
        "instance",
        "machine",
        "planner",
        "monitor",
        "gateway",
        "cluster",
        "node",
        "handle",
    ];
    for (index, floor) in floors.iter().enumerate() {
        let file = root().join(format!("actors/src/{floor}.rs"));
        let text = std::fs::read_to_string(&file).expect("every actor has a file");
        for above in &floors[index + 1..] {
            assert!(!text.contains(&format!("crate::{above}::")), "{floor} imports {above}, which stands above it");
        }
    }
}

#[test]
fn the_core_is_pure() {
    forbid(
        "actors/src/core",
        &[
            "ractor",
            "tokio",
            "Instant::now",
            "SystemTime",
            "std::fs",
            "std::net::Tcp",
            "std::net::Udp",
            "ToSocketAddrs",
            "std::thread",
            "chrono",
            "spawn",
        ],
    );
}

#[test]
fn the_environment_is_read_in_one_place() {
    for folder in ["engines/src", "net/src", "actors/src", "dashboard/src"] {
        for (file, line) in code(folder) {
            let is_test = file.ends_with("simulation/mod.rs");
            assert!(is_test || !line.contains("env::var"), "{}: {line}", file.display());
        }
    }
}

#[test]
fn every_file_says_what_it_is() {
    for folder in ["src", "actors", "benches", "dashboard", "engines", "net", "tests", "examples"] {
        for file in rust_files(&root().join(folder)) {
            let text = std::fs::read_to_string(&file).expect("readable");
            assert!(text.starts_with("//! "), "{} has no module doc", file.display());
            let lines = text.lines().count();
            assert!(lines <= 500, "{} has {lines} lines: more than one idea?", file.display());
        }
    }
}

#[test]
fn there_is_no_room_without_a_purpose() {
    for folder in ["src", "actors/src", "dashboard/src", "engines/src", "net/src"] {
        for file in rust_files(&root().join(folder)) {
            let stem = file.file_stem().and_then(|stem| stem.to_str()).unwrap_or_default();
            assert!(!["common", "utils", "util", "types", "helpers", "misc"].contains(&stem), "{}", file.display());
        }
    }
}
