//! The demand of a model: the memory and the work of each layer, from the headers of its files.

use crate::core::plan::Demand;
use exo_engines::engine::{KvElement, PAGE_TOKENS};
use exo_engines::model::{ModelFiles, Role};

/// The memory and the work that a model needs, with KV caches of `kv_pages` pages of `element`.
pub(super) fn demand(files: &ModelFiles, element: KvElement, kv_pages: u32) -> Demand {
    let architecture = &files.architecture;
    let layers = architecture.layers.len();
    let bytes_of = |wanted: &dyn Fn(&Role) -> bool| -> u64 {
        let tensors = files.weights.tensors.iter().filter(|(role, _)| wanted(role));
        tensors.map(|(_, slice)| slice.kept_bytes()).sum()
    };
    let kv_tokens = u64::from(kv_pages) * u64::from(PAGE_TOKENS);
    let place = |role| files.weights.tensors.get(&role).map(|slice| (slice.file, slice.offset_bytes));
    Demand {
        layer_bytes: (0..layers)
            .map(|layer| bytes_of(&|role| matches!(role, Role::Layer(l, _) if *l as usize == layer)))
            .collect(),
        layer_cost_bytes: files.layer_cost_bytes(),
        kv_pages,
        kv_bytes: (0..layers)
            .map(|layer| architecture.kv_bytes_per_token(layer..layer + 1, element).saturating_mul(kv_tokens))
            .collect(),
        embedding_bytes: bytes_of(&|role| *role == Role::TokenEmbedding),
        head_bytes: bytes_of(&|role| *role == Role::Output),
        head_cost_bytes: files.head_cost_bytes(),
        row_bytes: (architecture.hidden * size_of::<f32>()) as u64,
        ties_embeddings: place(Role::Output) == place(Role::TokenEmbedding),
    }
}
