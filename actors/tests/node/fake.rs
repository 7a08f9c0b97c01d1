//! A fake engine whose next token is a function of all earlier tokens, and which fails as its script says.
//!
//! A token that is lost, doubled or computed on a wrong cache changes every later token, so a right answer was computed
//! right.

use crate::tiny_model::{VOCABULARY, write_tiny_model};
use exo_actors::core::watchdog::HangTimeouts;
use exo_actors::models::ModelsConfig;
use exo_actors::{
    GenerateRequest, Generated, Generation, ModelSpec, NodeConfig, NodeHandle, PlannerLimits, Prompt, RequestError,
    WireType,
};
use exo_engines::decoder::PageTable;
use exo_engines::engine::*;
use exo_engines::model::WeightSource;
use exo_engines::sampler::{Sampled, SamplingParams};
use exo_engines::{DeviceFault, Engine, EngineError};
use parking_lot::Mutex;
use std::collections::BTreeMap;
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

/// The token that ends an answer.
pub(crate) const END: u32 = 2;
/// The most tokens of a sequence.
const CONTEXT: u32 = 2048;

/// The hang timeout of [`World::impatient`].
const NO_TIME: Duration = Duration::from_secs(2);
/// The pause after which a failed device is probed.
const PROBE_AFTER: Duration = Duration::from_secs(1);
/// The duration of a scripted hang: longer than any test waits for an engine.
const HANGS_FOR: Duration = Duration::from_secs(60);

/// The operation in which an engine fails.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum When {
    Load,
    Prefill,
    Decode,
}

/// The kind of a scripted failure.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum How {
    Error,
    Panic,
    DeviceLost,
    /// The call does not return for [`HANGS_FOR`].
    Hang,
}

/// The scripted failures and delays of all fake engines, and counts of their work.
#[derive(Debug, Default)]
pub(crate) struct Script {
    /// The first layer of the failing shard, the operation, the kind of failure, and how many times it happens.
    pub(crate) failures: Vec<(usize, When, How, u32)>,
    /// A device with little memory: its name, the most layers that it can load, and the free bytes that it reports.
    pub(crate) short_of_memory: Option<(&'static str, usize, u64)>,
    /// The time of a row that a warm-up measures on each device.
    pub(crate) row_times: Vec<(&'static str, Duration)>,
    pub(crate) loads: u32,
    /// The device of the last load.
    pub(crate) loaded_on: &'static str,
    /// Tensors of a load after the first. If there are any, each tensor takes a millisecond.
    pub(crate) more_tensors: u32,
    /// Loads that were interrupted.
    pub(crate) interrupted: u32,
    pub(crate) step_delay: Duration,
    pub(crate) row_delay: Duration,
    /// The rows of the largest step.
    pub(crate) rows_max: usize,
    /// The rows of all steps of all shards.
    pub(crate) rows: usize,
    /// Engines that were opened and not dropped.
    pub(crate) alive: usize,
}

#[derive(Debug, Clone)]
pub(crate) struct FakeFactory {
    pub(crate) device: &'static str,
    pub(crate) kind: DeviceKind,
    pub(crate) script: Arc<Mutex<Script>>,
}

impl EngineFactory for FakeFactory {
    fn name(&self) -> &'static str {
        self.device
    }

    fn probe(&self) -> Vec<DeviceReport> {
        vec![DeviceReport {
            id: DeviceId(self.device.to_owned()),
            kind: self.kind,
            engine: self.device.to_owned(),
            name: "fake".to_owned(),
            compute_units: None,
            tier: "fake".to_owned(),
            memory: DeviceMemory::Shared,
            gpu: None,
        }]
    }

    fn open(&self, _: &DeviceId) -> Result<Box<dyn Engine>, EngineError> {
        self.script.lock().alive += 1;
        Ok(Box::new(FakeEngine {
            device: self.device,
            script: Arc::clone(&self.script),
            spec: None,
            pages: PageTable::new(0),
            life: None,
            caches: BTreeMap::new(),
        }))
    }
}

struct FakeEngine {
    device: &'static str,
    script: Arc<Mutex<Script>>,
    spec: Option<ShardSpec>,
    pages: PageTable,
    life: Option<Incarnation>,
    caches: BTreeMap<SeqId, Vec<u32>>,
}

impl Drop for FakeEngine {
    fn drop(&mut self) {
        self.script.lock().alive -= 1;
    }
}

impl FakeEngine {
    fn fail_if_told(&self, now: When) -> Result<(), EngineError> {
        let first = self.spec.as_ref().map_or(0, |spec| spec.layers.start);
        let how = {
            let mut script = self.script.lock();
            let told =
                script.failures.iter_mut().find(|(layer, when, _, left)| *layer == first && *when == now && *left > 0);
            told.map(|failure| {
                failure.3 -= 1;
                failure.2
            })
        };
        match how {
            None => Ok(()),
            Some(How::Error) => Err(EngineError::NotLoaded),
            Some(How::DeviceLost) => Err(EngineError::Device {
                device: "fake".to_owned(),
                fault: DeviceFault::Lost,
                what: "planned".to_owned(),
            }),
            Some(How::Hang) => {
                std::thread::sleep(HANGS_FOR);
                Err(EngineError::NotLoaded)
            }
            Some(How::Panic) => panic!("planned"),
        }
    }
}

/// The token that follows `prefix`.
pub(crate) fn next_token(prefix: &[u32]) -> u32 {
    let hash = prefix.iter().fold(0xcbf2_9ce4_8422_2325_u64, |h, &t| (h ^ u64::from(t)).wrapping_mul(0x100_0000_01b3));
    ((hash >> 20) % u64::from(VOCABULARY)) as u32
}

/// The answer that an undisturbed run gives to `prompt`.
pub(crate) fn answer(prompt: &[u32], max_tokens: usize) -> Vec<u32> {
    let mut tokens = prompt.to_vec();
    while tokens.len() < prompt.len() + max_tokens {
        match next_token(&tokens) {
            END => break,
            token => tokens.push(token),
        }
    }
    tokens.split_off(prompt.len())
}

impl Engine for FakeEngine {
    fn self_test(&mut self) -> Result<SelfTestReport, EngineError> {
        Ok(SelfTestReport { step: Duration::ZERO })
    }

    fn load(
        &mut self,
        shard: &ShardSpec,
        _: &WeightSource,
        on: &mut dyn FnMut(LoadProgress) -> ControlFlow<()>,
    ) -> Result<LoadReport, EngineError> {
        let more_tensors = {
            let mut script = self.script.lock();
            script.loads += 1;
            script.loaded_on = self.device;
            if let Some((device, layers_max, free_bytes)) = script.short_of_memory
                && device == self.device
                && shard.layers.len() > layers_max
            {
                let needed_bytes = free_bytes + 1;
                return Err(EngineError::OutOfMemory { what: "the shard".to_owned(), needed_bytes, free_bytes });
            }
            script.more_tensors
        };
        self.spec = Some(shard.clone());
        self.pages = PageTable::new(shard.kv_pages);
        self.fail_if_told(When::Load)?;
        let total_bytes = 1 + u64::from(more_tensors);
        for loaded_bytes in 1..=total_bytes {
            if on(LoadProgress { loaded_bytes, total_bytes }).is_break() {
                self.script.lock().interrupted += 1;
                return Err(EngineError::Interrupted);
            }
            std::thread::sleep(Duration::from_millis(u64::from(more_tensors.min(1))));
        }
        Ok(LoadReport { weight_bytes: 1, kv_bytes: 1, fingerprint: "fake".to_owned(), elapsed: Duration::ZERO })
    }

    fn warm_up(&mut self) -> Result<WarmUpReport, EngineError> {
        let script = self.script.lock();
        let known = script.row_times.iter().find(|(device, _)| *device == self.device);
        Ok(WarmUpReport { row: known.map_or(Duration::ZERO, |(_, row)| *row) })
    }

    fn forward(&mut self, step: &Step, input: Input, _: &[RowQuery]) -> Result<Output, EngineError> {
        let spec = self.spec.clone().ok_or(EngineError::NotLoaded)?;
        if self.life != Some(step.incarnation) {
            assert!(self.life.is_none_or(|life| life < step.incarnation), "a step of an earlier incarnation");
            self.life = Some(step.incarnation);
            self.pages.clear();
            self.caches.clear();
        }
        let delay = {
            let mut script = self.script.lock();
            script.rows_max = script.rows_max.max(step.rows.len());
            script.rows += step.rows.len();
            script.step_delay + script.row_delay * step.rows.len() as u32
        };
        std::thread::sleep(delay);
        if !step.rows.is_empty() {
            let decodes = step.rows.iter().all(|row| row.wants_logits);
            self.fail_if_told(if decodes { When::Decode } else { When::Prefill })?;
        }
        for &operation in &step.operations {
            self.pages.apply(operation).map_err(|e| EngineError::BadStep { what: e.to_string() })?;
            match operation {
                Operation::Release { seq } => drop(self.caches.remove(&seq)),
                Operation::Truncate { seq, length_tokens } => {
                    self.caches.entry(seq).or_default().truncate(length_tokens as usize);
                }
                Operation::Fork { from, to, length_tokens } => {
                    let beginning = self.caches[&from][..length_tokens as usize].to_vec();
                    self.caches.insert(to, beginning);
                }
            }
        }
        // The first value of a hidden row carries its token.
        let width = spec.architecture.hidden;
        let tokens: Vec<u32> = match input {
            Input::Tokens(tokens) => tokens,
            Input::Hidden(hidden) => hidden.chunks(width).map(|row| row[0] as u32).collect(),
        };
        let mut logits = Vec::new();
        let mut hidden = Vec::new();
        for (row, &token) in step.rows.iter().zip(&tokens) {
            self.pages.extend(row.seq, 1).map_err(|_| EngineError::CacheFull { pages: spec.kv_pages })?;
            let cache = self.caches.entry(row.seq).or_default();
            assert_eq!(cache.len(), row.position as usize, "a row's position is not the cache's end");
            cache.push(token);
            hidden.push(token as f32);
            hidden.extend(std::iter::repeat_n(0.0, width - 1));
            if row.wants_logits {
                let next = next_token(cache);
                logits.extend((0..VOCABULARY).map(|id| if id == next { 10.0 } else { 0.0 }));
            }
        }
        let rows = if spec.is_last() {
            OutputRows::Scores(Scores::of_logits(logits, VOCABULARY as usize))
        } else {
            OutputRows::Hidden(hidden)
        };
        Ok(Output { rows, memory_bytes: 0, pages_used: self.pages.used() })
    }
}

/// Writes the tiny model into `folder`, and returns the folder.
pub(crate) fn tiny_model(folder: &Path) -> PathBuf {
    let fixture = Path::new(env!("CARGO_MANIFEST_DIR")).join("../engines/tests/fixtures/llama");
    write_tiny_model(&fixture, folder, CONTEXT);
    folder.to_owned()
}

/// A node with fake engines, and its tiny model.
pub(crate) struct World {
    pub(crate) node: NodeHandle,
    pub(crate) script: Arc<Mutex<Script>>,
    pub(crate) model: PathBuf,
    _folder: tempfile::TempDir,
}

impl World {
    pub(crate) async fn new(script: Script) -> Self {
        Self::with_devices(script, &[("fake", DeviceKind::Cpu)]).await
    }

    /// A node with one CPU and with `limits`.
    pub(crate) async fn limited(limits: PlannerLimits) -> Self {
        let script = Arc::new(Mutex::new(Script::default()));
        let factories = Self::factories(&script, &[("fake", DeviceKind::Cpu)]);
        Self::start(script, factories, limits, HangTimeouts::default()).await
    }

    pub(crate) async fn with_devices(script: Script, devices: &[(&'static str, DeviceKind)]) -> Self {
        let script = Arc::new(Mutex::new(script));
        let factories = Self::factories(&script, devices);
        Self::with_factories(script, factories).await
    }

    /// A node whose hang timeouts are [`NO_TIME`].
    pub(crate) async fn impatient(script: Script, devices: &[(&'static str, DeviceKind)]) -> Self {
        let script = Arc::new(Mutex::new(script));
        let factories = Self::factories(&script, devices);
        let hang_timeouts = HangTimeouts { load: NO_TIME, step: NO_TIME, row: Duration::ZERO };
        Self::start(script, factories, PlannerLimits::default(), hang_timeouts).await
    }

    fn factories(script: &Arc<Mutex<Script>>, devices: &[(&'static str, DeviceKind)]) -> Vec<Arc<dyn EngineFactory>> {
        let factory = |&(device, kind): &(&'static str, DeviceKind)| -> Arc<dyn EngineFactory> {
            Arc::new(FakeFactory { device, kind, script: Arc::clone(script) })
        };
        devices.iter().map(factory).collect()
    }

    pub(crate) async fn with_factories(script: Arc<Mutex<Script>>, factories: Vec<Arc<dyn EngineFactory>>) -> Self {
        Self::start(script, factories, PlannerLimits::default(), HangTimeouts::default()).await
    }

    async fn start(
        script: Arc<Mutex<Script>>,
        factories: Vec<Arc<dyn EngineFactory>>,
        limits: PlannerLimits,
        hang_timeouts: HangTimeouts,
    ) -> Self {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let model = tiny_model(folder.path());
        let config = NodeConfig {
            name: "test".to_owned(),
            wire_type: WireType::F32,
            cluster: None,
            id: exo_net::Identity::ephemeral().expect("random bytes").node_id(),
            factories,
            disabled_devices: Vec::new(),
            models: ModelsConfig {
                folders: vec![folder.path().to_owned()],
                hub_endpoint: None,
                hub_token: None,
                hub_cache: folder.path().to_owned(),
                is_offline: true,
                python: "python3".to_owned(),
                progress: Arc::new(|_| {}),
            },
            limits,
            hang_timeouts,
            probe_after: PROBE_AFTER,
        };
        let node = exo_actors::start(config).await.expect("the node starts");
        Self { node, script, model, _folder: folder }
    }

    pub(crate) fn spec(&self, shards: usize) -> ModelSpec {
        ModelSpec { shards: Some(shards), ..ModelSpec::new(self.model.display().to_string()) }
    }

    pub(crate) fn request(&self, shards: usize, prompt: &[u32], max_tokens: u32) -> GenerateRequest {
        GenerateRequest {
            model: self.spec(shards),
            prompt: Prompt::Tokens(prompt.to_vec()),
            params: SamplingParams::greedy(),
            max_tokens: Some(max_tokens),
            stop: Vec::new(),
        }
    }

    /// The tokens of the answer.
    pub(crate) async fn ask(&self, request: GenerateRequest) -> Result<Vec<u32>, RequestError> {
        Ok(self.sampled(request).await?.iter().map(|sampled| sampled.token).collect())
    }

    /// The tokens of the answer, with their log-probabilities.
    pub(crate) async fn sampled(&self, request: GenerateRequest) -> Result<Vec<Sampled>, RequestError> {
        collect(self.node.generate(request)?).await
    }
}

/// The tokens of an answer, with their log-probabilities.
pub(crate) async fn collect(mut generation: Generation) -> Result<Vec<Sampled>, RequestError> {
    let mut tokens = Vec::new();
    loop {
        let event = tokio::time::timeout(Duration::from_secs(30), generation.next()).await.expect("it does not hang");
        match event.expect("a stream has an end")? {
            Generated::Token { sampled, .. } => tokens.push(sampled),
            Generated::Finished { .. } => return Ok(tokens),
            Generated::Started { .. } => {}
        }
    }
}
