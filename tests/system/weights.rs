//! Nodes without a model's files: they get the bytes of their layers from nodes that have the files.

use crate::cluster::{Cluster, alone_with, answer, member, outcome};
use crate::node::Node;
use crate::{GEMMA3, SMOLLM2};
use std::io::{BufRead, BufReader};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

/// The name of SmolLM2's file.
const FILE: &str = "SmolLM2-135M-Instruct.Q4_1.gguf";
/// The environment of a node without models and without a source of models.
const NOTHING: [(&str, &str); 3] =
    [("EXO_MODELS_DIR", "$DATA/models"), ("HF_HUB_CACHE", "$DATA/hub"), ("HF_HUB_OFFLINE", "1")];

/// The bytes that the files below `folder` take on the disk, without the holes of sparse files.
fn taken_bytes(folder: &Path) -> u64 {
    let Ok(entries) = std::fs::read_dir(folder) else { return 0 };
    let entries = entries.filter_map(|entry| Some(entry.ok()?.path()));
    let sizes = entries.map(|path| match std::fs::symlink_metadata(&path) {
        Ok(metadata) if metadata.is_dir() => taken_bytes(&path),
        Ok(metadata) => metadata.blocks() * 512,
        Err(_) => 0,
    });
    sizes.sum()
}

fn copied_bytes(node: &Node) -> u64 {
    taken_bytes(&node.folder().join("models"))
}

fn resident_bytes(node: &Node) -> u64 {
    node.get("/state").json()["machine"]["process_bytes"].as_u64().expect("it is measured")
}

/// R7.1–R7.5: a node without a model's files gets the bytes of its layers, and no others; the answers are those of a
/// node with all files.
#[test]
fn nodes_without_the_files_get_their_layers() {
    let (expected, cluster) = (alone_with(SMOLLM2), Cluster::up_with(&NOTHING));
    // The middle stage has neither the embedding nor the output head; the embedding is a third of the model.
    assert_eq!(cluster.ask(2, "a:0-24,b:25-26,c:27-29"), expected);
    let [small, large] = [1, 2].map(|index| copied_bytes(&cluster.nodes[index]));
    let whole = 90_000_000;
    assert!((5_000_000..20_000_000).contains(&small), "two layers and the headers: {small}");
    assert!(large > small && large < whole * 3 / 4, "three layers, the head and the headers: {large}");
    // Only the missing layers are fetched.
    assert_eq!(cluster.ask(1, "a:0-24,b:25-29"), expected);
    assert!(copied_bytes(&cluster.nodes[1]) > small);
    assert_eq!(copied_bytes(&cluster.nodes[2]), large);
}

/// The files of copies below `folder`, without locks, and the time when each was last written.
fn written(folder: &Path) -> Vec<(std::path::PathBuf, std::time::SystemTime)> {
    let entries = std::fs::read_dir(folder).expect("a folder").map(|entry| entry.expect("an entry").path());
    let mut files: Vec<_> = entries
        .flat_map(|path| match path.is_dir() {
            true => written(&path),
            false => vec![(path.clone(), path.metadata().and_then(|file| file.modified()).expect("a file"))],
        })
        .filter(|(path, _)| path.extension().is_none_or(|extension| extension != "lock"))
        .collect();
    files.sort();
    files
}

/// R7.1–R7.5: a node that was killed and restarts keeps the bytes that it got: none of them is written again.
#[test]
fn a_restarted_node_keeps_its_layers() {
    let (expected, mut cluster) = (alone_with(SMOLLM2), Cluster::up_with(&NOTHING));
    let split = "a:0-9,b:10-19,c:20-29";
    assert_eq!(cluster.ask(0, split), expected);
    let shared = cluster.nodes[2].folder().join("models");
    let before = written(&shared);
    assert!(!before.is_empty());
    cluster.nodes[2].signal("KILL");
    assert_eq!(written(&shared), before);
    assert_eq!(cluster.ask(0, split), expected, "the others have its layers now");
    cluster.nodes[2].again();
    for node in &cluster.nodes {
        cluster.wait_for(node, 2);
    }
    // Another cache size makes another instance.
    let mut question = crate::cluster::question(SMOLLM2, "Tell me a long story about a ship.", "120");
    question.extend(["--context", "1024"].map(str::to_owned));
    assert_eq!(answer(cluster.asking_for(0, &question, split)), expected);
    let after = written(&shared);
    let changed: Vec<_> = after.iter().filter(|file| !before.contains(file)).collect();
    assert!(changed.is_empty(), "{changed:?}, of {before:?}");
}

/// A node holds only its own layers in memory: if embedding and head are most of a model, the middle stage is small.
#[test]
fn a_node_holds_its_own_layers_and_no_others() {
    let (expected, cluster) = (alone_with(GEMMA3), Cluster::up_with(&NOTHING));
    assert_eq!(answer(cluster.asking_model(0, GEMMA3, "a:0-5,b:6-11,c:12-17")), expected);
    let [first, middle, last] = [0, 1, 2].map(|index| resident_bytes(&cluster.nodes[index]));
    assert!(middle + 80_000_000 < first && middle + 80_000_000 < last, "{first}, {middle}, {last}");
}

/// R7.1–R7.5: when the only node with the files of some layers is lost, and no source has them, requests fail with the
/// reason, and do not hang.
#[test]
fn lost_layers_without_a_source_are_reported() {
    let cluster = Cluster::up_with(&NOTHING);
    let split = "a:0-9,b:10-19,c:20-29";
    assert!(!cluster.ask(1, split).tokens.is_empty());
    let asking = cluster.asking(1, split);
    std::thread::sleep(std::time::Duration::from_millis(500));
    cluster.nodes[0].signal("KILL");
    let output = asking.wait_with_output().expect("it ends");
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(!output.status.success() && said.contains("offline"), "{said}");
}

/// The path of SmolLM2's file.
fn model_file() -> String {
    crate::json(&["pull", SMOLLM2, "--json"])["path"].as_str().expect("a path").to_owned()
}

/// A copy of SmolLM2's file in which two tensors of equal shape have changed places.
fn write_other_weights(path: &Path) {
    let original = model_file();
    let gguf = exo_engines::format::Gguf::open(Path::new(&original)).expect("a model");
    let mut bytes = std::fs::read(&original).expect("readable");
    let range = |layer: usize| {
        let tensor = &gguf.tensors[&format!("blk.{layer}.attn_q.weight")];
        tensor.offset_bytes as usize..(tensor.offset_bytes + tensor.length_bytes) as usize
    };
    let (one, other) = (range(22), range(27));
    let kept = bytes[one.clone()].to_vec();
    assert_eq!(one.len(), other.len());
    bytes.copy_within(other.clone(), one.start);
    bytes[other].copy_from_slice(&kept);
    std::fs::create_dir_all(path.parent().expect("a folder")).expect("made");
    std::fs::write(path, bytes).expect("written");
}

/// R7.1–R7.5: a node with other weights under the same name does not compute with them for others: it gets the right
/// ones. It says that its file is not the catalogue's.
#[test]
fn different_weights_under_one_name_do_not_mix() {
    let (expected, cluster) = (alone_with(SMOLLM2), Cluster::up_with(&NOTHING));
    let other = cluster.nodes[2].folder().join("models").join(FILE);
    write_other_weights(&other);
    assert_eq!(cluster.ask(0, "a:0-19,c:20-29"), expected);
    let node = &cluster.nodes[2];
    assert!(node.has_told("is not the catalogue's smollm2"), "{:?}", node.told());
    let verified = node.command(&["models", "--verify"]);
    assert!(verified.status.success(), "the folder of the environment has the right file");
    let mut command = node.prepare(&["models", "--verify"]);
    let verified = command.env("EXO_MODELS_DIR", node.folder().join("models")).output().expect("exo-node starts");
    assert!(!verified.status.success(), "{}", String::from_utf8_lossy(&verified.stdout));
}

/// Two members; the files of `a` are in its own folder, `b` has none.
fn giver_and_taker() -> Cluster {
    let mut cluster = Cluster { nodes: vec![member("a", &[], &NOTHING)] };
    let models = cluster.nodes[0].folder().join("models");
    std::fs::create_dir_all(&models).expect("a folder");
    std::fs::copy(model_file(), models.join(FILE)).expect("copied");
    cluster.join("b", &[], &NOTHING);
    cluster.wait_for(&cluster.nodes[1], 1);
    cluster
}

/// R7.1–R7.5: when a peer cannot give weights, the error of the request has the peer's reason.
#[test]
fn the_reason_of_a_peer_without_weights_is_told() {
    let cluster = giver_and_taker();
    assert!(!cluster.ask(1, "a:0-29").tokens.is_empty());
    let file = std::fs::File::options().write(true).open(cluster.nodes[0].folder().join("models").join(FILE));
    file.and_then(|file| file.set_len(1 << 20)).expect("cut off");
    let said = outcome(cluster.asking(1, "b:0-29")).expect_err("no node has the weights");
    assert!(said.contains("a: ") && said.contains(FILE), "{said}");
}

/// A small file system below a folder, unmounted on drop.
struct SmallDisk(PathBuf);

impl SmallDisk {
    /// `None`, with a message on stderr, if this machine does not permit it.
    fn mount(at: PathBuf, size: &str) -> Option<Self> {
        std::fs::create_dir_all(&at).expect("a folder");
        let options = format!("size={size}");
        let mounted = Command::new("mount").args(["-t", "tmpfs", "-o", &options, "tmpfs"]).arg(&at).status();
        if !mounted.is_ok_and(|status| status.success()) {
            eprintln!("SKIPPED: no file systems can be mounted here, so no full disk is tested");
            return None;
        }
        Some(Self(at))
    }
}

impl Drop for SmallDisk {
    fn drop(&mut self) {
        // The node may still have files open: a lazy unmount waits for it.
        let _ = Command::new("umount").arg("--lazy").arg(&self.0).status();
    }
}

/// R7.1–R7.5: a node whose disk is too small for its layers says so, gives back what it has fetched, and leaves the
/// layers to others.
#[test]
fn a_full_disk_is_given_back() {
    let (expected, cluster) = (alone_with(SMOLLM2), Cluster::up_with(&NOTHING));
    let Some(disk) = SmallDisk::mount(cluster.nodes[2].folder().join("models"), "20m") else { return };
    assert_eq!(cluster.ask(0, "a:0-4,c:5-29"), expected, "another member computes the layers");
    assert!(cluster.nodes[0].has_told("a shard on c failed"), "{:?}", cluster.nodes[0].told());
    assert!(cluster.nodes[0].has_told("the disk is full"), "{:?}", cluster.nodes[0].told());
    let begun = std::time::Instant::now();
    while taken_bytes(&disk.0) > 1 << 20 {
        assert!(begun.elapsed().as_secs() < 10, "{} bytes are kept", taken_bytes(&disk.0));
        std::thread::sleep(std::time::Duration::from_millis(200));
    }
}

/// A running hub that has SmolLM2.
struct Hub {
    process: Child,
    address: String,
}

impl Hub {
    fn up() -> Self {
        crate::models();
        let folders = exo::Directories::from_environment().expect("a home").models;
        let script = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/system/hub.py");
        let mut python = Command::new("python3");
        let mut process =
            python.arg(script).arg(folders[0].join(FILE)).stdout(Stdio::piped()).spawn().expect("Python starts");
        let mut port = String::new();
        BufReader::new(process.stdout.take().expect("it is piped")).read_line(&mut port).expect("it prints its port");
        Self { process, address: format!("http://127.0.0.1:{}", port.trim()) }
    }
}

impl Drop for Hub {
    fn drop(&mut self) {
        // Both fail if the hub has ended by itself; the test has failed by then.
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

/// A download that fills the disk says so, and gives back what it has fetched.
#[test]
fn a_download_that_fills_the_disk_is_removed() {
    let (hub, folder) = (Hub::up(), tempfile::tempdir().expect("a temporary folder"));
    let Some(disk) = SmallDisk::mount(folder.path().join("disk"), "20m") else { return };
    let mut command = crate::exo(&["pull", SMOLLM2]);
    command.env("HF_ENDPOINT", &hub.address).env("EXO_DATA_DIR", folder.path());
    command.env("EXO_MODELS_DIR", disk.0.join("models")).env("HF_HUB_CACHE", disk.0.join("hub"));
    let output = command.output().expect("exo-node starts");
    let said = crate::stderr(&output);
    assert!(!output.status.success() && said.contains("disk"), "{said}");
    assert!(taken_bytes(&disk.0) < 1 << 20, "{} bytes are kept", taken_bytes(&disk.0));
}

/// R7.1–R7.5: layers that no other node has any more come from the catalogue's sources, and the answer continues.
#[test]
fn lost_layers_come_from_a_source() {
    let (expected, hub) = (alone_with(SMOLLM2), Hub::up());
    let cluster = Cluster::up_with(&[NOTHING[0], NOTHING[1], ("HF_ENDPOINT", &hub.address)]);
    let split = "a:0-9,b:10-19,c:20-29";
    assert_eq!(cluster.ask(1, split), expected);
    let has_fetched = || cluster.nodes[1..].iter().any(|node| node.folder().join("models").join(FILE).exists());
    assert!(!has_fetched(), "layers of another node were fetched from the source");
    let asking = cluster.asking(1, split);
    std::thread::sleep(std::time::Duration::from_millis(500));
    cluster.nodes[0].signal("KILL");
    assert_eq!(answer(asking), expected);
    assert!(has_fetched());
}
