//! Recipes for the quantisation of weights on loading.
//!
//! The recipes follow llama.cpp's mixes of the same names: the matrices of layers have the type that names the recipe.
//! Embedding and head, which small errors hurt most, have more bits. Routers, norms and biases are not quantised.

use super::{LayerRole, Part, Role, TensorSlice};
use crate::format::ElementType;
use serde::{Deserialize, Serialize};

/// A recipe that users can choose.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[allow(non_camel_case_types)]
#[serde(rename_all = "lowercase")]
pub enum Recipe {
    /// Layers in Q4_0; embedding and head in Q6_K, or in Q8_0 if rows are not whole blocks of 256.
    Q4_0,
    /// Layers in Q4_K, or in Q5_0 if rows are not whole blocks of 256; embedding and head as in `Q4_0`.
    Q4_K,
    /// All matrices in Q8_0.
    Q8_0,
}

/// The error for a name of no recipe.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("the quantisation `{name}` is not supported: use q4_0, q4_k or q8_0")]
pub struct UnknownRecipe {
    /// The unknown name.
    pub name: String,
}

impl Recipe {
    /// Every recipe.
    pub const ALL: [Self; 3] = [Self::Q4_0, Self::Q4_K, Self::Q8_0];

    /// The recipe's name, as users write it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Q4_0 => "q4_0",
            Self::Q4_K => "q4_k",
            Self::Q8_0 => "q8_0",
        }
    }

    /// The type in which `slice`, the tensor of `role`, is to be stored.
    pub(super) fn element_for(self, role: Role, slice: &TensorSlice) -> ElementType {
        let wanted: &[ElementType] = match (role, self) {
            (_, Self::Q8_0) => &[ElementType::Q8_0],
            (Role::TokenEmbedding | Role::Output, _) => &[ElementType::Q6_K, ElementType::Q8_0],
            (_, Self::Q4_0) => &[ElementType::Q4_0],
            // Rows that are not whole blocks of 256 use the next better type with blocks of 32.
            (_, Self::Q4_K) => &[ElementType::Q4_K, ElementType::Q5_0],
        };
        let fits = |element: &&ElementType| element.row_bytes(slice.columns).is_some();
        match is_matrix(role) && !slice.element.is_quantised() {
            true => wanted.iter().find(fits).copied().unwrap_or(slice.element),
            false => slice.element,
        }
    }
}

fn is_matrix(role: Role) -> bool {
    use LayerRole::*;
    match role {
        Role::TokenEmbedding | Role::Output => true,
        Role::OutputNorm => false,
        Role::Layer(_, Query | Key | Value | AttentionOutput) => true,
        Role::Layer(_, Gated(part) | Expert(_, part)) => matches!(part, Part::Gate | Part::Up | Part::Down),
        Role::Layer(..) => false,
    }
}

impl std::fmt::Display for Recipe {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.name())
    }
}

impl std::str::FromStr for Recipe {
    type Err = UnknownRecipe;

    fn from_str(name: &str) -> Result<Self, UnknownRecipe> {
        let found = Self::ALL.into_iter().find(|recipe| recipe.name().eq_ignore_ascii_case(name));
        found.ok_or_else(|| UnknownRecipe { name: name.to_owned() })
    }
}
