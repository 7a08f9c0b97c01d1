//! Tensor names of the roles in each file format.

mod gguf;
mod safetensors;

pub(super) use gguf::gguf;
pub(super) use safetensors::{Mxfp4Place, Safetensors};

use super::{Architecture, Layer, LayerRole, Part, Role};
use std::ops::Range;

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
    let mut roles = vec![Query, Key, Value, AttentionOutput];
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
    add(layer.attention.sinks, &[Sinks]);
    let mut parts = vec![Part::Gate, Part::Up, Part::Down];
    if layer.feed_forward.bias {
        parts.extend([Part::GateBias, Part::UpBias, Part::DownBias]);
    }
    match &layer.feed_forward.experts {
        None => roles.extend(parts.into_iter().map(Gated)),
        Some(experts) => {
            add(true, &[Router]);
            add(experts.router_bias, &[RouterBias]);
            let of = |expert| parts.iter().map(move |&part| Expert(expert, part));
            roles.extend((0..experts.count as u32).flat_map(of));
        }
    }
    roles
}

/// The rows of queries, keys or values in a fused projection, which holds them in this order.
fn fused_rows(layer: &Layer, role: LayerRole) -> Range<usize> {
    use LayerRole::*;
    let (query, kv) = (layer.attention.query_width(), layer.attention.kv_width());
    match role {
        Query | QueryBias => 0..query,
        Key | KeyBias => query..query + kv,
        _ => query + kv..query + 2 * kv,
    }
}
