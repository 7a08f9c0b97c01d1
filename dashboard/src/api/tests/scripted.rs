//! A node with an engine that draws the tokens of a script, whatever the prompt is.

use crate::api::context::{ApiContext, Caller, NamedModels};
use crate::api::router::router;
use axum::body::{Body, to_bytes};
use axum::http::{Request, StatusCode, header};
use exo_actors::core::watchdog::HangTimeouts;
use exo_actors::models::ModelsConfig;
use exo_actors::{NodeConfig, NodeHandle, PlannerLimits, WireType};
use exo_engines::engine::*;
use exo_engines::model::WeightSource;
use exo_engines::{Engine, EngineError};
use serde_json::{Value, json};
use std::collections::{BTreeMap, HashMap};
use std::ops::ControlFlow;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;
use tower::ServiceExt;

/// The number of tokens of the fixture's model.
const VOCABULARY: usize = 96;
/// The most bytes of a response.
const RESPONSE_BYTES_MAX: usize = 1 << 20;

/// The text of each token, from id 0. Text in `<|…|>` is a control token.
#[derive(Debug, Clone)]
struct Vocabulary(Vec<String>);

impl Vocabulary {
    fn of(scripts: &[&[&str]]) -> Self {
        let mut texts = vec!["user".to_owned()];
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

    fn forward(&mut self, step: &Step, input: Input) -> Result<Output, EngineError> {
        let Input::Tokens(tokens) = input else { panic!("the model is one shard") };
        let mut logits = Vec::new();
        for (row, token) in step.rows.iter().zip(tokens) {
            let cache = self.caches.entry(row.seq).or_default();
            cache.truncate(row.position as usize);
            cache.push(token);
            if row.wants_logits {
                let drawn = (0..self.script.len()).rev().find(|&drawn| cache.ends_with(&self.script[..drawn]));
                let next = self.script[drawn.unwrap_or(0)];
                logits.extend((0..VOCABULARY as u32).map(|id| if id == next { 10.0 } else { 0.0 }));
            }
        }
        Ok(Output { rows: OutputRows::Logits(logits), memory_bytes: 0, pages_used: 0 })
    }
}

/// A running node, and the path of its model.
pub(super) struct World {
    node: NodeHandle,
    model: String,
    _folder: tempfile::TempDir,
}

impl World {
    /// A node whose model answers with the pieces of `script`, each of which is a token.
    pub(super) async fn answering(script: &[&str]) -> Self {
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
        };
        let node = exo_actors::start(config).await.expect("the node starts");
        Self { node, model: folder.path().display().to_string(), _folder: folder }
    }

    /// Sends a chat request with these further fields. Returns the text of the response.
    pub(super) async fn chat(&self, fields: Value) -> String {
        let mut body = json!({"model": self.model, "messages": [{"role": "user", "content": "user"}]});
        let (Value::Object(body_fields), Value::Object(fields)) = (&mut body, fields) else { panic!("an object") };
        body_fields.extend(fields);
        let api = ApiContext {
            node: self.node.clone(),
            caller: Caller::Owner,
            named: Arc::new(NamedModels::new(Vec::new())),
        };
        let request = Request::post("/v1/chat/completions").header(header::CONTENT_TYPE, "application/json");
        let request = request.body(Body::from(body.to_string())).expect("a request");
        let response = router(api).oneshot(request).await.expect("a response");
        let status = response.status();
        let bytes = to_bytes(response.into_body(), RESPONSE_BYTES_MAX).await.expect("the whole body");
        let text = String::from_utf8(bytes.to_vec()).expect("text");
        assert_eq!(status, StatusCode::OK, "{text}");
        text
    }

    pub(super) async fn shutdown(self) {
        self.node.shutdown().await;
    }
}
