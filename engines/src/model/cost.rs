//! The estimated cost of a row in a part of a model, before any measurement.

use super::{Layer, LayerRole, ModelFiles, Role, TensorSlice};

impl ModelFiles {
    /// Bytes of weights that a decoded row computes with, for each layer. Experts count by the share of them that a row
    /// uses. Each weight counts as at least one byte: on CPUs a 4-bit weight costs as much as an 8-bit weight, because
    /// arithmetic, not memory, limits the speed.
    pub fn layer_cost_bytes(&self) -> Vec<u64> {
        let layers = &self.architecture.layers;
        let mut work = vec![(0, 0); layers.len()];
        for (role, slice) in &self.weights.tensors {
            let Role::Layer(layer, role) = role else { continue };
            let Some((of_all, of_experts)) = work.get_mut(*layer as usize) else { continue };
            match role {
                LayerRole::Expert(..) => *of_experts += slice_cost_bytes(slice),
                _ => *of_all += slice_cost_bytes(slice),
            }
        }
        let share = |layer: &Layer| {
            layer.feed_forward.experts.as_ref().map_or(1.0, |experts| experts.used as f64 / experts.count.max(1) as f64)
        };
        let whole = work.into_iter().zip(layers);
        whole.map(|((of_all, of_experts), layer)| of_all + (of_experts as f64 * share(layer)) as u64).collect()
    }

    /// The same cost for the language-model head.
    pub fn head_cost_bytes(&self) -> u64 {
        self.weights.tensors.get(&Role::Output).map_or(0, slice_cost_bytes)
    }
}

fn slice_cost_bytes(slice: &TensorSlice) -> u64 {
    slice.kept_bytes().max((slice.rows * slice.columns) as u64)
}

#[cfg(test)]
mod tests {
    use super::super::tests::tiny;
    use super::super::{Experts, ModelFiles, Part, Weighting};
    use super::*;
    use crate::format::ElementType;

    #[test]
    fn a_weight_costs_at_least_a_byte_and_experts_count_by_their_used_share() {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let mut model = ModelFiles::open(&tiny(|_, _, _| {}).write(folder.path())).expect("a model");
        let values = 4 * 32 * 32 + 3 * 64 * 32 + 2 * 32;
        assert_eq!(model.layer_cost_bytes()[0], 4 * values, "single precision");
        for slice in model.weights.tensors.values_mut().filter(|slice| slice.rows > 1) {
            slice.kept_as = ElementType::Q4_0;
        }
        assert_eq!(model.layer_cost_bytes()[0], values + 3 * 2 * 32, "the norms are vectors and stay unquantised");
        assert_eq!(model.head_cost_bytes(), 8 * 32);
        let gate = model.weights.tensors[&Role::Layer(0, LayerRole::Gated(Part::Gate))].clone();
        let without = model.layer_cost_bytes()[0];
        model.weights.tensors.extend((0..8).map(|n| (Role::Layer(0, LayerRole::Expert(n, Part::Gate)), gate.clone())));
        model.architecture.layers[0].feed_forward.experts =
            Some(Experts { count: 8, used: 2, weighting: Weighting::AmongChosen, router_bias: false });
        assert_eq!(model.layer_cost_bytes()[0], without + 2 * 64 * 32);
    }
}
