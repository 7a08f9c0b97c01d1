//! GGUF's tensor names. Source: the table `TENSOR_NAMES` of ggml's gguf-py.

use super::super::tensor_source::TensorSource;
use super::super::{Architecture, LayerRole, NormPlacement, Part, Role};
use super::fused_rows;

/// The possible locations of a role's values, the likeliest first.
pub(in crate::model) fn gguf(role: Role, architecture: &Architecture) -> Vec<TensorSource> {
    let at = |name: &str| TensorSource::all(name.to_owned());
    match role {
        Role::TokenEmbedding => vec![at("token_embd.weight")],
        Role::OutputNorm => vec![at("output_norm.weight")],
        // A file without a separate head uses the embedding as the head.
        Role::Output => vec![at("output.weight"), at("token_embd.weight")],
        Role::Layer(index, part) => layer(index, part, architecture),
    }
}

fn layer(index: u32, role: LayerRole, architecture: &Architecture) -> Vec<TensorSource> {
    use LayerRole::*;
    let layer = &architecture.layers[index as usize];
    let (width, hidden) = (layer.feed_forward.width, architecture.hidden);
    let name = |name: &str| format!("blk.{index}.{name}");
    let all = |own: &str| vec![TensorSource::all(name(own))];
    let fused = |own: &str, fused: &str| {
        vec![TensorSource::all(name(own)), TensorSource::rows(name(fused), fused_rows(layer, role))]
    };
    // All experts in one tensor, or each expert in its own (files from before April 2024).
    let expert = |expert: u32, part: &str, rows: usize| {
        let first = expert as usize * rows;
        let together = name(&part.replacen('.', "_exps.", 1));
        vec![
            TensorSource::rows(together, first..first + rows),
            TensorSource::all(name(&part.replacen('.', &format!(".{expert}."), 1))),
        ]
    };
    match role {
        AttentionNorm => all("attn_norm.weight"),
        Query => fused("attn_q.weight", "attn_qkv.weight"),
        Key => fused("attn_k.weight", "attn_qkv.weight"),
        Value => fused("attn_v.weight", "attn_qkv.weight"),
        QueryBias => fused("attn_q.bias", "attn_qkv.bias"),
        KeyBias => fused("attn_k.bias", "attn_qkv.bias"),
        ValueBias => fused("attn_v.bias", "attn_qkv.bias"),
        QueryNorm => all("attn_q_norm.weight"),
        KeyNorm => all("attn_k_norm.weight"),
        Sinks => all("attn_sinks.weight"),
        AttentionOutput => all("attn_output.weight"),
        AttentionOutputBias => all("attn_output.bias"),
        PostAttentionNorm => all("post_attention_norm.weight"),
        // gpt_oss has no norm on attention's output, and uses its name for the norm before the feed-forward.
        FeedForwardNorm if layer.norms == NormPlacement::Before => {
            vec![TensorSource::all(name("ffn_norm.weight")), TensorSource::all(name("post_attention_norm.weight"))]
        }
        FeedForwardNorm => all("ffn_norm.weight"),
        PostFeedForwardNorm => all("post_ffw_norm.weight"),
        Router => all("ffn_gate_inp.weight"),
        RouterBias => all("ffn_gate_inp.bias"),
        // phi3: one tensor holds the gate's rows, then the up projection's.
        Gated(Part::Gate) => {
            vec![TensorSource::all(name("ffn_gate.weight")), TensorSource::rows(name("ffn_up.weight"), 0..width)]
        }
        Gated(Part::Up) => {
            vec![TensorSource::rows(name("ffn_up.weight"), width..2 * width), TensorSource::all(name("ffn_up.weight"))]
        }
        Gated(Part::Down) => all("ffn_down.weight"),
        Gated(Part::GateBias) => all("ffn_gate.bias"),
        Gated(Part::UpBias) => all("ffn_up.bias"),
        Gated(Part::DownBias) => all("ffn_down.bias"),
        Expert(index, Part::Gate) => expert(index, "ffn_gate.weight", width),
        Expert(index, Part::Up) => expert(index, "ffn_up.weight", width),
        Expert(index, Part::Down) => expert(index, "ffn_down.weight", hidden),
        Expert(index, Part::GateBias) => expert(index, "ffn_gate.bias", 1),
        Expert(index, Part::UpBias) => expert(index, "ffn_up.bias", 1),
        Expert(index, Part::DownBias) => expert(index, "ffn_down.bias", 1),
    }
}
