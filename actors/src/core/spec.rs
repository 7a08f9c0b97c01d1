//! Which model is asked for, and how it is to be run.

use super::plan::{Policy, Split};
use exo_engines::engine::DeviceId;
use exo_engines::model::Recipe;
use serde::{Deserialize, Serialize};

/// Which model, and how it is to be run. Requests with equal specs share an instance.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct ModelSpec {
    /// A catalogue name, a hub name, or a path.
    pub model: String,
    /// `None`: one, or as few as fit.
    pub shards: Option<usize>,
    /// `None`: the best there is.
    pub device: Option<DeviceId>,
    /// Tokens of one sequence; `None`: the model's, up to a default bound.
    pub context_tokens: Option<u32>,
    /// What dense weights are quantised to while they are loaded.
    pub quantize: Option<Recipe>,
    /// Which layers go where; `None`: as the planner finds best.
    #[serde(default)]
    pub split: Option<Split>,
    /// What its placement is to be good at.
    #[serde(default)]
    pub policy: Policy,
}

impl ModelSpec {
    /// The model as the node would run it by itself. A name may end with the recipe that the weights are quantised
    /// by: `owner/model@q4_k`.
    pub fn new(model: impl Into<String>) -> Self {
        let model = model.into();
        let (model, quantize) = match model.rsplit_once('@').map(|(name, recipe)| (name, recipe.parse())) {
            Some((name, Ok(recipe))) => (name.to_owned(), Some(recipe)),
            _ => (model, None),
        };
        Self {
            model,
            shards: None,
            device: None,
            context_tokens: None,
            quantize,
            split: None,
            policy: Policy::default(),
        }
    }
}

/// The model's name, its recipe included.
impl std::fmt::Display for ModelSpec {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self.quantize {
            Some(recipe) => write!(f, "{}@{recipe}", self.model),
            None => f.write_str(&self.model),
        }
    }
}
