//! Rules of the source tree: imports go downwards, the core is pure, every file has a module doc.

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

/// The modules of a floor plan, from the lowest up: none names one that stands above it, nor does a module stand
/// outside the plan. A module is a file and the folder of the same name.
fn modules_import_downwards(folder: &str, path: &str, modules: &[&str]) {
    for (file, line) in code(folder) {
        let inner = file.strip_prefix(root().join(folder)).expect("a file of the folder");
        let module = inner.components().next().map(|first| first.as_os_str().to_string_lossy().into_owned());
        let module = module.unwrap_or_default().trim_end_matches(".rs").to_owned();
        if ["lib", "mod"].contains(&module.as_str()) {
            continue;
        }
        let Some(floor) = modules.iter().position(|name| *name == module) else {
            panic!("{}: {folder} has no module `{module}` in its floor plan", file.display());
        };
        for above in &modules[floor + 1..] {
            let name = format!("{path}::{above}");
            let names_it = line.match_indices(&name).any(|(start, _)| {
                !line[start + name.len()..].starts_with(|next: char| next.is_alphanumeric() || next == '_')
            });
            assert!(!names_it, "{}: {module} imports {above}, which stands above it: {line}", file.display());
        }
    }
    for module in modules {
        let file = root().join(folder).join(format!("{module}.rs"));
        let inner = root().join(folder).join(module);
        assert!(file.exists() || inner.exists(), "{folder} has no `{module}`: the floor plan is out of date");
    }
}

#[test]
fn modules_of_a_crate_import_downwards_only() {
    let actors = ["core", "transport", "models", "worker", "head", "planner", "monitor", "gateway", "cluster", "node"];
    modules_import_downwards("actors/src", "crate", &actors);
}

/// The core's own files: what several decide with stands below what decides.
#[test]
fn modules_of_the_core_import_downwards_only() {
    let core = [
        "step_times",
        "memory_watch",
        "watchdog",
        "restart_policy",
        "device_health",
        "failover",
        "model_error",
        "context",
        "speed",
        "offer",
        "plan",
        "spec",
        "scheduler",
        "request",
        "desired",
        "status",
        "stage",
        "pipeline",
        "members",
        "clique",
        "fact",
        "node_status",
        "leader",
        "tests",
    ];
    modules_import_downwards("actors/src/core", "crate::core", &core);
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

/// rustls is built with two crypto providers: a configuration that names none would fail or take either. The clients of
/// reqwest take ring where no default is installed.
#[test]
fn tls_configurations_name_their_provider() {
    for folder in ["src", "actors/src", "benches/src", "dashboard/src", "engines/src", "net/src"] {
        forbid(folder, &["ServerConfig::builder()", "ClientConfig::builder()", "install_default", "aws_lc_rs"]);
    }
}

#[test]
fn the_environment_is_read_in_one_place() {
    for folder in ["engines/src", "net/src", "actors/src", "dashboard/src"] {
        for (file, line) in code(folder) {
            let is_test = file.ends_with("core/tests/mod.rs") || file.ends_with("programs/intel_gate.rs");
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
fn no_module_is_a_collection_of_leftovers() {
    for folder in ["src", "actors/src", "dashboard/src", "engines/src", "net/src"] {
        for file in rust_files(&root().join(folder)) {
            let stem = file.file_stem().and_then(|stem| stem.to_str()).unwrap_or_default();
            assert!(!["common", "utils", "util", "types", "helpers", "misc"].contains(&stem), "{}", file.display());
        }
    }
}

/// Requirements that tests name as `R1.4`, `R7.1–R7.5` or `R4.4, R4.5`: those that `text` holds, as they stand there.
fn requirements(text: &str) -> Vec<&str> {
    let is_row = |word: &str| {
        let bytes = word.as_bytes();
        bytes.len() >= 4
            && bytes[0] == b'R'
            && bytes[1].is_ascii_digit()
            && bytes[2] == b'.'
            && bytes[3].is_ascii_digit()
    };
    let words = text.split([' ', ',', ':', ';', '(', ')', '`', '|', '\n']);
    words.map(|word| word.trim_end_matches('.')).filter(|word| is_row(word)).collect()
}

/// A tag in a test's doc is a row, or a range of rows, of docs/requirements.md.
#[test]
fn tests_name_requirements_that_exist() {
    let table = std::fs::read_to_string(root().join("docs/requirements.md")).expect("readable");
    let rows: Vec<&str> = table.lines().filter(|line| line.starts_with("| R")).flat_map(requirements).collect();
    let mut named = 0;
    for folder in ["actors", "dashboard", "engines", "net", "src", "tests/system"] {
        for file in rust_files(&root().join(folder)) {
            let text = std::fs::read_to_string(&file).expect("readable");
            for tag in text.lines().filter(|line| line.trim_start().starts_with("//")).flat_map(requirements) {
                assert!(rows.contains(&tag), "{}: docs/requirements.md has no row `{tag}`", file.display());
                named += 1;
            }
        }
    }
    assert!(named > 50, "tests name the requirements that they prove");
}

#[test]
fn comments_wrap_at_120_columns() {
    for folder in ["src", "actors", "benches", "dashboard", "engines", "net", "tests", "examples"] {
        for file in rust_files(&root().join(folder)) {
            let text = std::fs::read_to_string(&file).expect("readable");
            for (index, line) in text.lines().enumerate().filter(|(_, line)| line.trim_start().starts_with("//")) {
                let columns = line.chars().count();
                assert!(columns <= 120, "{}:{}: {columns} columns", file.display(), index + 1);
            }
        }
    }
}
