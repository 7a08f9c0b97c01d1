//! Tests of quantising during a load, above all its peak memory.

use crate::cpu::CpuFactory;
use crate::engine::{ActivationBits, EngineFactory, KvElement, ShardSpec, TensorRank};
use crate::format::gguf_writer::GgufWriter;
use crate::model::{ModelFiles, Recipe};
use std::ops::ControlFlow;

const HIDDEN: u64 = 768;
const WIDTH: u64 = 3072;
const LAYERS: u64 = 8;

/// A model with 142 MB of BF16 weights.
fn large() -> GgufWriter {
    let mut random = fastrand::Rng::with_seed(1);
    let mut values = |count: u64| -> Vec<u8> {
        let mut bytes = Vec::with_capacity(count as usize * 2);
        for _ in 0..count {
            bytes.extend(half::bf16::from_f32(random.f32() - 0.5).to_le_bytes());
        }
        bytes
    };
    let mut file = GgufWriter::default()
        .text("general.architecture", "llama")
        .count("llama.block_count", LAYERS)
        .count("llama.embedding_length", HIDDEN)
        .count("llama.attention.head_count", 12)
        .count("llama.feed_forward_length", WIDTH)
        .count("llama.context_length", 64)
        .tensor("token_embd.weight", &[64, HIDDEN], 30, values(64 * HIDDEN))
        .floats("output_norm.weight", &[HIDDEN], vec![1.0; HIDDEN as usize]);
    for layer in 0..LAYERS {
        let name = |name: &str| format!("blk.{layer}.{name}.weight");
        for part in ["attn_norm", "ffn_norm"] {
            file = file.floats(&name(part), &[HIDDEN], vec![1.0; HIDDEN as usize]);
        }
        for part in ["attn_q", "attn_k", "attn_v", "attn_output"] {
            file = file.tensor(&name(part), &[HIDDEN, HIDDEN], 30, values(HIDDEN * HIDDEN));
        }
        for part in ["ffn_gate", "ffn_up"] {
            file = file.tensor(&name(part), &[WIDTH, HIDDEN], 30, values(HIDDEN * WIDTH));
        }
        file = file.tensor(&name("ffn_down"), &[HIDDEN, WIDTH], 30, values(HIDDEN * WIDTH));
    }
    file
}

/// Returns a field of `/proc/self/status`, in bytes.
#[cfg(target_os = "linux")]
fn status_bytes(key: &str) -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").expect("Linux has /proc/self/status");
    let line = status.lines().find(|line| line.starts_with(key)).expect("the status has the field");
    let number = line.split_whitespace().nth(1).and_then(|number| number.parse::<u64>().ok());
    number.expect("a number of kilobytes") * 1024
}

/// Checks that memory never exceeds the loaded weights and one tensor of the file. The peak counts for the whole
/// process, so each recipe has its own test.
#[cfg(target_os = "linux")]
fn holds_one_tensor_besides_the_target(recipe: Recipe) {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let path = large().write(folder.path());
    let model = ModelFiles::open(&path).expect("a valid model").quantised(recipe).expect("a dense model");
    let spec = ShardSpec {
        layers: 0..LAYERS as usize,
        architecture: model.architecture.clone(),
        tensor: TensorRank::WHOLE,
        kv_element: KvElement::F16,
        activations: ActivationBits::default(),
        kv_pages: 2,
    };
    let factory = CpuFactory::new(2);
    let mut engine = factory.open(&factory.probe()[0].id).expect("a CPU engine");
    // The test built the file in memory, so the peak is reset.
    std::fs::write("/proc/self/clear_refs", "5").expect("a process can reset its own peak");
    let before = status_bytes("VmRSS");
    let report = engine.load(&spec, &model.weights, &mut |_| ControlFlow::Continue(())).expect("it loads");
    let peak = status_bytes("VmHWM") - before;
    println!("{recipe}: {} MB kept, peak {} MB", report.weight_bytes >> 20, peak >> 20);
    // The tensor as stored in the file, and its quantised copy before the backend packs it.
    let largest_tensor = HIDDEN * WIDTH * 3;
    // Pieces in f32, and the memory that the allocator retains after them.
    let pieces = 4 << 20;
    assert!(peak > report.weight_bytes / 2 && peak <= report.weight_bytes + largest_tensor + pieces, "{peak}");
    assert!(report.weight_bytes < model.weight_bytes() * 6 / 10, "{}", report.weight_bytes);
    engine.warm_up().expect("finite logits");
}

/// R4.3, R6.1–R6.5.
#[cfg(target_os = "linux")]
#[test]
fn quantising_to_q4_0_holds_one_tensor_besides_the_target() {
    holds_one_tensor_besides_the_target(Recipe::Q4_0);
}

/// R4.3, R6.1–R6.5.
#[cfg(target_os = "linux")]
#[test]
fn quantising_to_q4_k_holds_one_tensor_besides_the_target() {
    holds_one_tensor_besides_the_target(Recipe::Q4_K);
}

/// R4.3, R6.1–R6.5.
#[cfg(target_os = "linux")]
#[test]
fn quantising_to_q8_0_holds_one_tensor_besides_the_target() {
    holds_one_tensor_besides_the_target(Recipe::Q8_0);
}

#[test]
fn quantised_weights_are_not_quantised_again() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let path = GgufWriter::default()
        .text("general.architecture", "llama")
        .count("llama.block_count", 1)
        .count("llama.embedding_length", 32)
        .count("llama.attention.head_count", 2)
        .count("llama.feed_forward_length", 32)
        .count("llama.context_length", 64);
    let names = ["attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down"];
    let file = names
        .iter()
        .fold(path, |file, name| file.tensor(&format!("blk.0.{name}.weight"), &[32, 32], 8, vec![0; 32 * 34]));
    let file = file
        .tensor("token_embd.weight", &[32, 32], 8, vec![0; 32 * 34])
        .floats("output_norm.weight", &[32], vec![1.0; 32])
        .floats("blk.0.attn_norm.weight", &[32], vec![1.0; 32])
        .floats("blk.0.ffn_norm.weight", &[32], vec![1.0; 32]);
    let model = ModelFiles::open(&file.write(folder.path())).expect("a valid model");
    let error = model.quantised(Recipe::Q4_0).expect_err("Q8_0 is not dense");
    assert!(error.to_string().contains("already Q8_0") && !error.remedy().is_empty(), "{error}");
}
