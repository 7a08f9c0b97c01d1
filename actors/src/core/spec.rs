//! Which model is asked for, how it is to be run, and what it is called while it runs.

use crate::core::plan::{Policy, Split};
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

/// Which files a model is of: the SHA-256 of all that stands in them before their tensors, and of their lengths.
/// Nodes that know two files by one name see by it that they are two.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct FilesId(pub [u8; 32]);

impl std::fmt::Display for FilesId {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&data_encoding::HEXLOWER.encode(&self.0))
    }
}

impl std::fmt::Debug for FilesId {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        std::fmt::Display::fmt(self, f)
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

/// One running or starting model.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct InstanceId(pub u64);

impl std::fmt::Display for InstanceId {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}", self.0)
    }
}

/// What is run.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Model {
    /// As it was asked for, its recipe included.
    pub name: String,
    pub family: String,
    /// How most of its weights are kept.
    pub quantization: String,
    /// Tokens of one sequence at most.
    pub context_tokens: u32,
    /// Tokens below this number are the model's.
    pub vocabulary: u32,
    pub files: FilesId,
}
