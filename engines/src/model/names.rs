//! What files call the tensor of a role.

use super::{Architecture, Layer, LayerRole, NormPlacement, Role};

/// The roles that a model of `architecture` has.
pub(super) fn roles(architecture: &Architecture) -> Vec<Role> {
    let mut roles = vec![Role::TokenEmbedding, Role::OutputNorm, Role::Output];
    for (index, layer) in architecture.layers.iter().enumerate() {
        roles.extend(layer_roles(layer).into_iter().map(|part| Role::Layer(index as u32, part)));
    }
    roles
}

fn layer_roles(layer: &Layer) -> Vec<LayerRole> {
    use LayerRole::*;
    let mut roles = vec![Query, Key, Value, AttentionOutput, Gate, Up, Down];
    let mut add = |has: bool, parts: &[LayerRole]| {
        if has {
            roles.extend(parts);
        }
    };
    add(layer.norms.before(), &[AttentionNorm, FeedForwardNorm]);
    add(layer.norms.after(), &[PostAttentionNorm, PostFeedForwardNorm]);
    add(layer.attention.query_key_norm.is_some(), &[QueryNorm, KeyNorm]);
    add(layer.attention.input_bias, &[QueryBias, KeyBias, ValueBias]);
    add(layer.attention.output_bias, &[AttentionOutputBias]);
    add(layer.feed_forward.bias, &[GateBias, UpBias, DownBias]);
    roles
}

/// GGUF's name (the table `TENSOR_NAMES` of ggml's gguf-py).
pub(super) fn gguf(role: Role) -> String {
    use LayerRole::*;
    let (layer, part) = match role {
        Role::TokenEmbedding => return "token_embd.weight".to_owned(),
        Role::OutputNorm => return "output_norm.weight".to_owned(),
        Role::Output => return "output.weight".to_owned(),
        Role::Layer(layer, part) => (layer, part),
    };
    let name = match part {
        AttentionNorm => "attn_norm.weight",
        Query => "attn_q.weight",
        Key => "attn_k.weight",
        Value => "attn_v.weight",
        QueryBias => "attn_q.bias",
        KeyBias => "attn_k.bias",
        ValueBias => "attn_v.bias",
        QueryNorm => "attn_q_norm.weight",
        KeyNorm => "attn_k_norm.weight",
        AttentionOutput => "attn_output.weight",
        AttentionOutputBias => "attn_output.bias",
        PostAttentionNorm => "post_attention_norm.weight",
        FeedForwardNorm => "ffn_norm.weight",
        Gate => "ffn_gate.weight",
        Up => "ffn_up.weight",
        Down => "ffn_down.weight",
        GateBias => "ffn_gate.bias",
        UpBias => "ffn_up.bias",
        DownBias => "ffn_down.bias",
        PostFeedForwardNorm => "post_ffw_norm.weight",
    };
    format!("blk.{layer}.{name}")
}

/// Hugging Face's name, behind `prefix` (`model.`, or a multimodal wrapper's).
pub(super) fn safetensors(role: Role, norms: NormPlacement, prefix: &str) -> String {
    use LayerRole::*;
    let (layer, part) = match role {
        Role::TokenEmbedding => return format!("{prefix}embed_tokens.weight"),
        Role::OutputNorm => return format!("{prefix}norm.weight"),
        Role::Output => return "lm_head.weight".to_owned(),
        Role::Layer(layer, part) => (layer, part),
    };
    let name = match part {
        AttentionNorm => "input_layernorm.weight",
        Query => "self_attn.q_proj.weight",
        Key => "self_attn.k_proj.weight",
        Value => "self_attn.v_proj.weight",
        QueryBias => "self_attn.q_proj.bias",
        KeyBias => "self_attn.k_proj.bias",
        ValueBias => "self_attn.v_proj.bias",
        QueryNorm => "self_attn.q_norm.weight",
        KeyNorm => "self_attn.k_norm.weight",
        AttentionOutput => "self_attn.o_proj.weight",
        AttentionOutputBias => "self_attn.o_proj.bias",
        PostAttentionNorm => "post_attention_layernorm.weight",
        // Where there is no norm on attention's output, the name is free for the one before the feed-forward.
        FeedForwardNorm if norms == NormPlacement::Before => "post_attention_layernorm.weight",
        FeedForwardNorm => "pre_feedforward_layernorm.weight",
        Gate => "mlp.gate_proj.weight",
        Up => "mlp.up_proj.weight",
        Down => "mlp.down_proj.weight",
        GateBias => "mlp.gate_proj.bias",
        UpBias => "mlp.up_proj.bias",
        DownBias => "mlp.down_proj.bias",
        PostFeedForwardNorm => "post_feedforward_layernorm.weight",
    };
    format!("{prefix}layers.{layer}.{name}")
}
