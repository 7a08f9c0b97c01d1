//! A node with an engine that draws the tokens of a script, whatever the prompt is.

use exo_actors::core::watchdog::HangTimeouts;
use exo_actors::models::ModelsConfig;
use exo_actors::{NodeConfig, NodeHandle, PlannerLimits, WireType};
use exo_dashboard::api::{ApiConfig, Served, listen};
use exo_engines::engine::*;
use exo_engines::model::WeightSource;
use exo_engines::{Engine, EngineError};
use serde_json::{Value, json};
use std::collections::{BTreeMap, HashMap};
use std::ops::ControlFlow;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;

/// The number of tokens of the fixture's model.
const VOCABULARY: usize = 96;

/// The text of each token, from id 0. Text in `<|…|>` is a control token.
#[derive(Debug, Clone)]
struct Vocabulary(Vec<String>);

impl Vocabulary {
    fn of(scripts: &[&[&str]]) -> Self {
        // The fixture's config names one of the first ids as the end of an answer.
        let mut texts = ["user", "w1", "w2", "w3"].map(str::to_owned).to_vec();
        for piece in scripts.iter().copied().flatten() {
            if !texts.iter().any(|text| text == piece) {
                texts.push((*piece).to_owned());
            }
        }
        assert!(texts.len() <= VOCABULARY, "the model has fewer tokens");
        texts.extend((texts.len()..VOCABULARY).map(|id| format!("w{id}")));
        Self(texts)
    }

    fn ids(&self, script: &[&str]) -> Vec<u32> {
        let id = |piece: &&str| self.0.iter().position(|text| text == piece).expect("a piece of a script") as u32;
        script.iter().map(id).collect()
    }

    fn tokenizer(&self) -> Value {
        let controls = self.0.iter().enumerate().filter(|(_, text)| text.starts_with("<|"));
        let added = controls.map(|(id, text)| {
            json!({
                "id": id, "content": text, "special": true,
                "single_word": false, "lstrip": false, "rstrip": false, "normalized": false,
            })
        });
        let ids: BTreeMap<&String, usize> = self.0.iter().enumerate().map(|(id, text)| (text, id)).collect();
        json!({
            "version": "1.0",
            "added_tokens": added.collect::<Vec<_>>(),
            "model": {"type": "WordLevel", "vocab": ids, "unk_token": "user"},
        })
    }
}

/// Draws `script` after any prompt.
#[derive(Debug, Clone)]
struct ScriptedFactory {
    script: Vec<u32>,
}

impl EngineFactory for ScriptedFactory {
    fn name(&self) -> &'static str {
        "scripted"
    }

    fn probe(&self) -> Vec<DeviceReport> {
        vec![DeviceReport {
            id: DeviceId("scripted".to_owned()),
            kind: DeviceKind::Cpu,
            engine: "scripted".to_owned(),
            name: "scripted".to_owned(),
            compute_units: None,
            tier: "scripted".to_owned(),
            memory: DeviceMemory::Shared,
            gpu: None,
        }]
    }

    fn open(&self, _: &DeviceId) -> Result<Box<dyn Engine>, EngineError> {
        Ok(Box::new(ScriptedEngine { script: self.script.clone(), caches: HashMap::new() }))
    }
}

struct ScriptedEngine {
    script: Vec<u32>,
    caches: HashMap<SeqId, Vec<u32>>,
}

impl Engine for ScriptedEngine {
    fn self_test(&mut self) -> Result<SelfTestReport, EngineError> {
        Ok(SelfTestReport { step: Duration::ZERO })
    }

    fn load(
        &mut self,
        _: &ShardSpec,
        _: &WeightSource,
        _: &mut dyn FnMut(LoadProgress) -> ControlFlow<()>,
    ) -> Result<LoadReport, EngineError> {
        Ok(LoadReport { weight_bytes: 1, kv_bytes: 1, fingerprint: "scripted".to_owned(), elapsed: Duration::ZERO })
    }

    fn warm_up(&mut self) -> Result<WarmUpReport, EngineError> {
        Ok(WarmUpReport { row: Duration::ZERO })
    }

    fn forward(&mut self, step: &Step, input: Input, _: &[RowQuery]) -> Result<Output, EngineError> {
        let Input::Tokens(tokens) = input else { panic!("the model is one shard") };
        let mut logits = Vec::new();
        for (row, token) in step.rows.iter().zip(tokens) {
            let cache = self.caches.entry(row.seq).or_default();
            cache.truncate(row.position as usize);
            cache.push(token);
            if row.wants_logits {
                let drawn = (0..self.script.len()).rev().find(|&drawn| cache.ends_with(&self.script[..drawn]));
                let next = self.script[drawn.unwrap_or(0)];
                logits.extend((0..VOCABULARY as u32).map(|id| if id == next { 100.0 } else { 0.0 }));
            }
        }
        Ok(Output { rows: OutputRows::Scores(Scores::of_logits(logits, VOCABULARY)), memory_bytes: 0, pages_used: 0 })
    }
}

/// A running node, and the path of its model.
pub(crate) struct World {
    node: NodeHandle,
    served: Served,
    model: String,
    folder: tempfile::TempDir,
}

impl World {
    /// A node whose model answers with the pieces of `script`, each of which is a token.
    pub(crate) async fn answering(script: &[&str]) -> Self {
        let vocabulary = Vocabulary::of(&[script]);
        let folder = tempfile::tempdir().expect("a temporary folder");
        let fixture = Path::new(env!("CARGO_MANIFEST_DIR")).join("../engines/tests/fixtures/llama");
        for name in ["model.safetensors", "config.json"] {
            std::fs::copy(fixture.join(name), folder.path().join(name)).expect("the fixture is there");
        }
        std::fs::write(folder.path().join("tokenizer.json"), vocabulary.tokenizer().to_string()).expect("written");
        let config = NodeConfig {
            name: "test".to_owned(),
            wire_type: WireType::F32,
            cluster: None,
            id: exo_net::Identity::ephemeral().expect("random bytes").node_id(),
            factories: vec![Arc::new(ScriptedFactory { script: vocabulary.ids(script) })],
            disabled_devices: Vec::new(),
            models: ModelsConfig {
                folders: vec![folder.path().to_owned()],
                hub_endpoint: None,
                hub_token: None,
                hub_cache: folder.path().join("hub"),
                is_offline: true,
                python: "false".to_owned(),
                progress: Arc::new(|_| {}),
            },
            limits: PlannerLimits::default(),
            hang_timeouts: HangTimeouts::default(),
            probe_after: Duration::from_secs(10),
        };
        let node = exo_actors::start(config).await.expect("the node starts");
        let socket = ApiConfig { socket_folder: Some(folder.path().to_owned()), ..ApiConfig::default() };
        let served = listen(socket).await.expect("a socket").serve(&node);
        Self { node, served, model: folder.path().display().to_string(), folder }
    }

    /// Sends a chat request with these further fields. Returns the text of the response.
    pub(crate) async fn chat(&self, fields: Value) -> String {
        let mut body = json!({"model": self.model, "messages": [{"role": "user", "content": "user"}]});
        let (Value::Object(body_fields), Value::Object(fields)) = (&mut body, fields) else { panic!("an object") };
        body_fields.extend(fields);
        let body = body.to_string();
        let mut socket = UnixStream::connect(self.folder.path().join("api.sock")).await.expect("the node listens");
        let head = format!("content-length: {}\r\nhost: localhost\r\nconnection: close\r\n", body.len());
        let request = format!("POST /v1/chat/completions HTTP/1.0\r\n{head}\r\n{body}");
        socket.write_all(request.as_bytes()).await.expect("sent");
        let mut response = String::new();
        socket.read_to_string(&mut response).await.expect("a whole response");
        // HTTP/1.0 has no chunks.
        let (head, body) = response.split_once("\r\n\r\n").expect("a head and a body");
        assert!(head.starts_with("HTTP/1.0 200"), "{response}");
        body.to_owned()
    }

    pub(crate) async fn shutdown(self) {
        self.served.stop();
        self.node.shutdown().await;
    }
}
