//! Invalid models, and the errors that name their faults. Valid models are in `tests/conformance/`.

use super::*;
use crate::cpu::CpuFactory;
use crate::engine::{ActivationBits, EngineFactory, KvElement, LoadReport, ShardSpec, TensorRank};
use crate::error::EngineError;
use crate::format::gguf_writer::{Datum, GgufWriter};
use proptest::prelude::*;
use serde_json::json;
use std::ops::ControlFlow;

/// A llama of one layer. `edit` may change each tensor's shape and values; an empty shape removes the tensor.
pub(super) fn tiny(edit: impl Fn(&str, &mut Vec<u64>, &mut Vec<f32>)) -> GgufWriter {
    let mut file = GgufWriter::default()
        .text("general.architecture", "llama")
        .count("llama.block_count", 1)
        .count("llama.embedding_length", 32)
        .count("llama.attention.head_count", 2)
        .count("llama.feed_forward_length", 64)
        .count("llama.context_length", 64);
    let tensors: [(&str, &[u64]); 11] = [
        ("token_embd.weight", &[8, 32]),
        ("output_norm.weight", &[32]),
        ("blk.0.attn_norm.weight", &[32]),
        ("blk.0.attn_q.weight", &[32, 32]),
        ("blk.0.attn_k.weight", &[32, 32]),
        ("blk.0.attn_v.weight", &[32, 32]),
        ("blk.0.attn_output.weight", &[32, 32]),
        ("blk.0.ffn_norm.weight", &[32]),
        ("blk.0.ffn_gate.weight", &[64, 32]),
        ("blk.0.ffn_up.weight", &[64, 32]),
        ("blk.0.ffn_down.weight", &[32, 64]),
    ];
    for (name, shape) in tensors {
        let mut shape = shape.to_vec();
        let mut values: Vec<f32> = (0..shape.iter().product()).map(|i: u64| (i as f32).sin()).collect();
        edit(name, &mut shape, &mut values);
        if !shape.is_empty() {
            file = file.floats(name, &shape, values);
        }
    }
    file
}

fn load(file: &GgufWriter) -> Result<LoadReport, EngineError> {
    load_while(file, |_| true)
}

/// Loads `file` while `is_wanted`, called with the number of loaded tensors, returns true.
fn load_while(file: &GgufWriter, is_wanted: impl Fn(usize) -> bool) -> Result<LoadReport, EngineError> {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let model = ModelFiles::open(&file.write(folder.path()))?;
    let spec = ShardSpec {
        layers: 0..model.architecture.layers.len(),
        architecture: model.architecture,
        tensor: TensorRank::WHOLE,
        kv_element: KvElement::F16,
        activations: ActivationBits::default(),
        kv_pages: 2,
    };
    let factory = CpuFactory::new(1);
    let mut engine = factory.open(&factory.probe()[0].id)?;
    let mut loaded = 0;
    engine.load(&spec, &model.weights, &mut |_| {
        loaded += 1;
        if is_wanted(loaded) { ControlFlow::Continue(()) } else { ControlFlow::Break(()) }
    })
}

fn refused(file: &GgufWriter) -> String {
    load(file).expect_err("an invalid model").to_string()
}

#[test]
fn the_tiny_model_loads() {
    load(&tiny(|_, _, _| {})).expect("a valid model");
}

#[test]
fn a_load_stops_when_the_callback_breaks() {
    let file = tiny(|_, _, _| {});
    for last in [1, 4, 11] {
        assert_eq!(load_while(&file, |loaded| loaded < last), Err(EngineError::Interrupted), "{last}");
    }
    load_while(&file, |loaded| loaded < 12).expect("the model has 11 tensors");
}

#[test]
fn weights_that_are_not_finite_are_named() {
    for tensor in ["blk.0.ffn_up.weight", "blk.0.attn_norm.weight", "token_embd.weight"] {
        for value in [f32::NAN, f32::INFINITY] {
            let message = refused(&tiny(|name, _, values| {
                if name == tensor {
                    values[17] = value;
                }
            }));
            assert!(message.contains(tensor) && message.contains("test.gguf"), "{message}");
        }
    }
}

#[test]
fn scales_that_are_nan_are_named() {
    let mut bytes = vec![0; 64 * 18];
    bytes[5 * 18..][..2].copy_from_slice(&half::f16::NAN.to_le_bytes());
    let without = tiny(|name, shape, _| {
        if name == "blk.0.ffn_gate.weight" {
            shape.clear();
        }
    });
    let message = refused(&without.tensor("blk.0.ffn_gate.weight", &[64, 32], 2, bytes));
    assert!(message.contains("blk.0.ffn_gate.weight") && message.contains("row 5"), "{message}");
}

#[test]
fn wrong_shapes_are_named() {
    let message = refused(&tiny(|name, shape, values| {
        if name == "blk.0.attn_k.weight" {
            shape[0] = 16;
            values.truncate(16 * 32);
        }
    }));
    assert!(message.contains("blk.0.attn_k.weight") && message.contains("16×32, not 32×32"), "{message}");
}

#[test]
fn missing_tensors_are_named() {
    let message = refused(&tiny(|name, shape, _| {
        if name == "blk.0.attn_output.weight" {
            shape.clear();
        }
    }));
    assert!(message.contains("blk.0.attn_output.weight") && message.contains("missing"), "{message}");
}

#[test]
fn absurd_expert_counts_and_widths_are_refused_before_allocation() {
    let without_gate = || {
        tiny(|name, shape, _| {
            if name == "blk.0.ffn_gate.weight" {
                shape.clear();
            }
        })
    };
    let message = refused(&without_gate().count("llama.expert_count", 1 << 40).count("llama.expert_used_count", 2));
    assert!(message.contains("number of experts"), "{message}");
    assert!(refused(&without_gate().count("llama.expert_count", 8)).contains("expert_used_count"));
    let wide = without_gate().count("llama.expert_count", 8).count("llama.expert_used_count", 2);
    let message = refused(&wide.count("llama.expert_feed_forward_length", u64::MAX));
    assert!(message.contains("feed-forward size"), "{message}");
}

#[test]
fn unknown_families_are_named() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let path = GgufWriter::default().text("general.architecture", "mamba").write(folder.path());
    let error = ModelFiles::open(&path).expect_err("an unknown family");
    assert!(error.to_string().contains("`mamba`") && error.remedy().contains("families"), "{error}");
}

/// The frequencies, and the factor of cos and sin, of the tiny model with these keys.
fn rope_with(keys: &[(&str, Datum)]) -> (Vec<f32>, f32) {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let file = keys.iter().fold(tiny(|_, _, _| {}), |file, (key, value)| file.pair(key, value.clone()));
    let files = ModelFiles::open(&file.write(folder.path())).expect("a model");
    let rope = &files.architecture.ropes[0];
    (rope.frequencies.clone(), rope.magnitude)
}

/// R4.1: keys of the rotary embedding mean what they mean in llama.cpp: a factor without a type is linear, the first
/// name of the factor still counts, and `attn_factor` holds for every type.
#[test]
fn rope_keys_mean_what_llama_cpp_takes_them_for() {
    let float = |value: f64| Datum::Float(value);
    let text = |value: &str| Datum::Text(value.to_owned());
    let (plain, _) = rope_with(&[]);
    let divided = |by: f32| plain.iter().map(|f| f / by).collect::<Vec<f32>>();
    let factor = ("llama.rope.scaling.factor", float(4.0));
    let cases = [
        (vec![factor.clone()], divided(4.0), 1.0),
        (vec![factor.clone(), ("llama.rope.scaling.type", text("linear"))], divided(4.0), 1.0),
        (vec![factor.clone(), ("llama.rope.scaling.type", text("none"))], plain.clone(), 1.0),
        (vec![("llama.rope.scale_linear", float(2.0))], divided(2.0), 1.0),
        (vec![("llama.rope.scale_linear", float(2.0)), factor.clone()], divided(4.0), 1.0),
        (vec![("llama.rope.scaling.factor", float(0.0))], plain.clone(), 1.0),
        (vec![("llama.rope.scaling.attn_factor", float(1.5))], plain.clone(), 1.5),
        (vec![factor, ("llama.rope.scaling.attn_factor", float(1.5))], divided(4.0), 1.5),
        (vec![("llama.rope.scaling.finetuned", Datum::Bool(true))], plain.clone(), 1.0),
    ];
    for (keys, frequencies, magnitude) in cases {
        assert_eq!(rope_with(&keys), (frequencies, magnitude), "{keys:?}");
    }
}

#[test]
fn impossible_headers_are_refused() {
    let cases: [(&str, Datum, &str); 10] = [
        ("llama.rope.dimension_sections", Datum::Array(vec![Datum::Unsigned(1)]), "dimension_sections"),
        ("llama.rope.scaling.yarn_log_multiplier", Datum::Float(0.1), "yarn_log_multiplier"),
        ("llama.rope.freq_base_swa", Datum::Float(1e6), "freq_base_swa"),
        ("llama.rope.scaling.factor", Datum::Float(-2.0), "scaling.factor"),
        ("llama.rope.scaling.type", Datum::Text("magic".to_owned()), "magic"),
        ("llama.attention.layer_norm_rms_epsilon", Datum::Float(f64::NAN), "epsilon"),
        ("llama.attention.head_count_kv", Datum::Unsigned(3), "key/value heads"),
        ("llama.attention.key_length", Datum::Unsigned(1 << 40), "key_length"),
        ("llama.rope.dimension_count", Datum::Unsigned(64), "dimension_count"),
        ("split.count", Datum::Unsigned(3), "gguf-split"),
    ];
    for (key, value, named) in cases {
        let message = refused(&tiny(|_, _, _| {}).pair(key, value));
        assert!(message.contains(named), "{key}: {message}");
    }
}

/// The folder of a fixture, with `config.json` changed.
fn folder_with(change: impl FnOnce(&mut serde_json::Value)) -> tempfile::TempDir {
    let fixture = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/llama");
    let folder = tempfile::tempdir().expect("a temporary folder");
    let text = std::fs::read_to_string(fixture.join("config.json")).expect("the fixture");
    let mut config = serde_json::from_str(&text).expect("JSON");
    change(&mut config);
    std::fs::write(folder.path().join("config.json"), config.to_string()).expect("written");
    std::fs::copy(fixture.join("model.safetensors"), folder.path().join("model.safetensors")).expect("copied");
    folder
}

#[test]
fn impossible_configs_are_refused_by_key() {
    let cases = [
        ("model_type", json!("mamba"), "mamba"),
        ("hidden_size", json!("many"), "hidden_size"),
        ("hidden_size", json!(-4), "hidden_size"),
        ("num_attention_heads", json!(0), "head"),
        ("head_dim", json!(1_u64 << 40), "head_dim"),
        ("num_hidden_layers", json!(1_u64 << 40), "layers"),
        ("rms_norm_eps", json!("small"), "rms_norm_eps"),
        ("rope_parameters", json!({"rope_type": "magic", "rope_theta": 1e4}), "magic"),
        ("hidden_act", json!("magic"), "magic"),
        ("quantization_config", json!({"quant_method": "gptq"}), "gptq"),
    ];
    for (key, value, named) in cases {
        let folder = folder_with(|config| config[key] = value.clone());
        let error = ModelFiles::open(folder.path()).expect_err(key);
        assert!(error.to_string().contains(named), "{key}: {error}");
        assert!(!error.remedy().is_empty());
    }
}

#[test]
fn a_missing_tokenizer_is_reported() {
    let folder = folder_with(|_| {});
    let model = ModelFiles::open(folder.path()).expect("the weights are valid");
    let error = crate::tokenizer::Tokenizer::open(&model.tokenizer).expect_err("no tokenizer");
    assert!(matches!(&error, FormatError::NoTokenizer { .. }) && error.remedy().contains("tokenizer.json"));
}

fn any_json() -> impl Strategy<Value = serde_json::Value> {
    let leaf = prop_oneof![
        Just(json!(null)),
        any::<bool>().prop_map(|v| json!(v)),
        any::<i64>().prop_map(|v| json!(v)),
        (0_u64..100).prop_map(|v| json!(v)),
        any::<f64>().prop_map(|v| json!(v)),
        "[a-z_]{0,8}".prop_map(|v| json!(v)),
    ];
    leaf.prop_recursive(2, 8, 4, |inner| {
        prop_oneof![
            prop::collection::vec(inner.clone(), 0..4).prop_map(|v| json!(v)),
            prop::collection::btree_map("rope_type|rope_theta|factor|type", inner, 0..4).prop_map(|v| json!(v)),
        ]
    })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(256))]

    /// A config with damaged values is read or refused, without a panic.
    #[test]
    fn damaged_configs_never_panic(changes in prop::collection::vec((any::<prop::sample::Index>(), any_json()), 1..4)) {
        let folder = folder_with(|config| {
            let map = config.as_object_mut().expect("an object");
            let keys: Vec<String> = map.keys().cloned().collect();
            for (key, value) in changes {
                map.insert(keys[key.index(keys.len())].clone(), value);
            }
        });
        let _ = ModelFiles::open(folder.path());
    }

    /// A model whose header has damaged bytes is read or refused, without a panic.
    #[test]
    fn damaged_headers_never_panic(changes in prop::collection::vec((0_usize..900, any::<u8>()), 1..4)) {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let mut bytes = tiny(|_, _, _| {}).bytes();
        for (at, value) in changes {
            bytes[at] = value;
        }
        let path = folder.path().join("test.gguf");
        std::fs::write(&path, bytes).expect("written");
        let _ = ModelFiles::open(&path);
    }
}
