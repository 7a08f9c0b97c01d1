//! One round of candle-transformers' quantised model.

use crate::{Round, Work};
use anyhow::bail;
use candle_core::quantized::gguf_file::Content;
use candle_core::{D, Device, Tensor};
use candle_transformers::models::{quantized_gemma3, quantized_llama};
use std::path::Path;
use std::time::Instant;

enum Model {
    Llama(quantized_llama::ModelWeights),
    Gemma3(quantized_gemma3::ModelWeights),
}

impl Model {
    fn load(path: &Path) -> anyhow::Result<(Self, usize)> {
        let mut file = std::fs::File::open(path)?;
        let content = Content::read(&mut file)?;
        let vocabulary = content.metadata["tokenizer.ggml.tokens"].to_vec()?.len();
        let architecture = content.metadata["general.architecture"].to_string()?.clone();
        let model = match architecture.as_str() {
            "llama" => Self::Llama(quantized_llama::ModelWeights::from_gguf(content, &mut file, &Device::Cpu)?),
            "gemma3" => Self::Gemma3(quantized_gemma3::ModelWeights::from_gguf(content, &mut file, &Device::Cpu)?),
            other => bail!("this bench has no candle-transformers model for the architecture `{other}`"),
        };
        Ok((model, vocabulary))
    }

    /// The likeliest token after `tokens`, the first of which is at `position`.
    fn next(&mut self, tokens: &[u32], position: usize) -> anyhow::Result<u32> {
        let input = Tensor::new(tokens, &Device::Cpu)?.unsqueeze(0)?;
        let logits = match self {
            Self::Llama(model) => model.forward(&input, position)?,
            Self::Gemma3(model) => model.forward(&input, position)?,
        };
        Ok(logits.squeeze(0)?.argmax(D::Minus1)?.to_scalar()?)
    }
}

pub(crate) fn round(path: &Path, work: Work) -> anyhow::Result<Round> {
    let start = Instant::now();
    let (mut model, vocabulary) = Model::load(path)?;
    let load = start.elapsed();
    // A first pass touches the weights' memory, as exo-node's warm-up does.
    model.next(&[0], 0)?;
    let prompt: Vec<u32> = (0..work.prompt_tokens).map(|i| ((i * 7919 + 11) % vocabulary) as u32).collect();
    let start = Instant::now();
    let mut token = model.next(&prompt, 0)?;
    let prefill = start.elapsed();
    let start = Instant::now();
    for position in 0..work.generate_tokens - 1 {
        token = model.next(&[token], work.prompt_tokens + position)?;
    }
    let decode = start.elapsed();
    Ok(Round {
        prefill_tokens_per_s: work.prompt_tokens as f64 / prefill.as_secs_f64(),
        decode_tokens_per_s: (work.generate_tokens - 1) as f64 / decode.as_secs_f64(),
        load_ms: Some(load.as_secs_f64() * 1e3),
        peak_memory_bytes: peak_memory_bytes(),
    })
}

/// The largest resident memory of this process so far (Linux: `VmHWM`).
fn peak_memory_bytes() -> Option<u64> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"))?;
    let kilobytes: u64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    Some(kilobytes * 1024)
}
