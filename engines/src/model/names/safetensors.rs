//! Hugging Face's tensor names. Source: the modelling code of transformers 5.23.

use super::super::families::Naming;
use super::super::tensor_source::{Strided, TensorSource};
use super::super::{Architecture, LayerRole, NormPlacement, Part, Role};
use super::fused_rows;

/// The names of one model's tensors.
#[derive(Debug, Clone, Copy)]
pub(in crate::model) struct Safetensors<'a> {
    pub(in crate::model) naming: Naming,
    /// The prefix of all names: `model.`, or a multimodal wrapper's.
    pub(in crate::model) prefix: &'a str,
    pub(in crate::model) architecture: &'a Architecture,
}

/// A matrix in MXFP4 whose blocks and scales are separate tensors.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(in crate::model) struct Mxfp4Place {
    pub(in crate::model) blocks: String,
    pub(in crate::model) scales: String,
    pub(in crate::model) rows: usize,
    pub(in crate::model) columns: usize,
    /// The matrix's first row among all rows of the tensor.
    pub(in crate::model) first_row: usize,
    pub(in crate::model) row_step: usize,
}

impl Safetensors<'_> {
    /// The possible locations of a role's values, the likeliest first.
    pub(in crate::model) fn places(&self, role: Role) -> Vec<TensorSource> {
        match role {
            Role::TokenEmbedding => vec![self.embedding()],
            Role::OutputNorm => vec![TensorSource::all(format!("{}norm.weight", self.prefix))],
            Role::Output => vec![TensorSource::all("lm_head.weight".to_owned()), self.embedding()],
            Role::Layer(index, LayerRole::Expert(expert, part)) => vec![self.expert(index, expert as usize, part)],
            Role::Layer(index, part) => self.layer(index, part),
        }
    }

    pub(in crate::model) fn embedding(&self) -> TensorSource {
        TensorSource::all(format!("{}embed_tokens.weight", self.prefix))
    }

    /// The location of a role's values as MXFP4 in two tensors, if the family stores them so.
    pub(in crate::model) fn mxfp4(&self, role: Role) -> Option<Mxfp4Place> {
        let (Naming::GptOss, Role::Layer(index, LayerRole::Expert(expert, part))) = (self.naming, role) else {
            return None;
        };
        let (hidden, width) = (self.architecture.hidden, self.architecture.layers[index as usize].feed_forward.width);
        let expert = expert as usize;
        let (name, rows, columns, first_row, row_step) = match part {
            Part::Gate => ("gate_up_proj", width, hidden, expert * 2 * width, 2),
            Part::Up => ("gate_up_proj", width, hidden, expert * 2 * width + 1, 2),
            Part::Down => ("down_proj", hidden, width, expert * hidden, 1),
            Part::GateBias | Part::UpBias | Part::DownBias => return None,
        };
        let tensor = |what: &str| self.name(index, &format!("mlp.experts.{name}_{what}"));
        Some(Mxfp4Place { blocks: tensor("blocks"), scales: tensor("scales"), rows, columns, first_row, row_step })
    }

    fn name(&self, layer: u32, name: &str) -> String {
        format!("{}layers.{layer}.{name}", self.prefix)
    }

    fn layer(&self, index: u32, role: LayerRole) -> Vec<TensorSource> {
        use LayerRole::*;
        let layer = &self.architecture.layers[index as usize];
        let width = layer.feed_forward.width;
        let name = |name: &str| self.name(index, name);
        let all = |own: &str| vec![TensorSource::all(name(own))];
        let fused = |own: &str| {
            vec![
                TensorSource::all(name(own)),
                TensorSource::rows(name("self_attn.qkv_proj.weight"), fused_rows(layer, role)),
            ]
        };
        match role {
            AttentionNorm => all("input_layernorm.weight"),
            Query => fused("self_attn.q_proj.weight"),
            Key => fused("self_attn.k_proj.weight"),
            Value => fused("self_attn.v_proj.weight"),
            QueryBias => all("self_attn.q_proj.bias"),
            KeyBias => all("self_attn.k_proj.bias"),
            ValueBias => all("self_attn.v_proj.bias"),
            QueryNorm => all("self_attn.q_norm.weight"),
            KeyNorm => all("self_attn.k_norm.weight"),
            Sinks => all("self_attn.sinks"),
            AttentionOutput => all("self_attn.o_proj.weight"),
            AttentionOutputBias => all("self_attn.o_proj.bias"),
            PostAttentionNorm => all("post_attention_layernorm.weight"),
            // Models without a norm on attention's output use this name for the norm before the feed-forward.
            FeedForwardNorm if layer.norms == NormPlacement::Before => all("post_attention_layernorm.weight"),
            FeedForwardNorm => all("pre_feedforward_layernorm.weight"),
            PostFeedForwardNorm => all("post_feedforward_layernorm.weight"),
            Router => match self.naming {
                Naming::Llama => all("mlp.gate.weight"),
                Naming::Mixtral => all("block_sparse_moe.gate.weight"),
                Naming::GptOss => all("mlp.router.weight"),
            },
            RouterBias => all("mlp.router.bias"),
            Gated(part) => {
                let own = TensorSource::all(name(&format!("mlp.{}", gated(part))));
                let fused = name("mlp.gate_up_proj.weight");
                match part {
                    Part::Gate => vec![own, TensorSource::rows(fused, 0..width)],
                    Part::Up => vec![own, TensorSource::rows(fused, width..2 * width)],
                    _ => vec![own],
                }
            }
            // `places` handles experts.
            Expert(..) => Vec::new(),
        }
    }

    fn expert(&self, index: u32, expert: usize, part: Part) -> TensorSource {
        let (hidden, width) = (self.architecture.hidden, self.architecture.layers[index as usize].feed_forward.width);
        let name = match self.naming {
            Naming::Llama => format!("mlp.experts.{expert}.{}", gated(part)),
            Naming::Mixtral => {
                let numbered = match part {
                    Part::Gate => "w1.weight",
                    Part::Up => "w3.weight",
                    Part::Down => "w2.weight",
                    Part::GateBias => "w1.bias",
                    Part::UpBias => "w3.bias",
                    Part::DownBias => "w2.bias",
                };
                format!("block_sparse_moe.experts.{expert}.{numbered}")
            }
            Naming::GptOss => {
                let tensor = |name: &str| self.name(index, &format!("mlp.experts.{name}"));
                // The file's matrices are transposed, with gates in even columns and ups in odd ones.
                let gate_up = |first: usize| {
                    let first = expert * hidden * 2 * width + first;
                    Strided { rows: width, columns: hidden, first, row_step: 2, column_step: 2 * width }
                };
                let bias = |first: usize| {
                    let first = expert * 2 * width + first;
                    Strided { rows: 1, columns: width, first, row_step: 0, column_step: 2 }
                };
                let down = Strided {
                    rows: hidden,
                    columns: width,
                    first: expert * width * hidden,
                    row_step: 1,
                    column_step: hidden,
                };
                return match part {
                    Part::Gate => TensorSource::strided(tensor("gate_up_proj"), gate_up(0)),
                    Part::Up => TensorSource::strided(tensor("gate_up_proj"), gate_up(1)),
                    Part::Down => TensorSource::strided(tensor("down_proj"), down),
                    Part::GateBias => TensorSource::strided(tensor("gate_up_proj_bias"), bias(0)),
                    Part::UpBias => TensorSource::strided(tensor("gate_up_proj_bias"), bias(1)),
                    Part::DownBias => TensorSource::rows(tensor("down_proj_bias"), expert..expert + 1),
                };
            }
        };
        TensorSource::all(self.name(index, &name))
    }
}

fn gated(part: Part) -> &'static str {
    match part {
        Part::Gate => "gate_proj.weight",
        Part::Up => "up_proj.weight",
        Part::Down => "down_proj.weight",
        Part::GateBias => "gate_proj.bias",
        Part::UpBias => "up_proj.bias",
        Part::DownBias => "down_proj.bias",
    }
}
