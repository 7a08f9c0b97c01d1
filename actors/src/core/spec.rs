//! The requested model, how it runs, and the names of running instances.

use crate::core::context::Context;
use crate::core::plan::{Policy, Split};
use exo_engines::engine::{ActivationBits, DeviceId, KvElement};
use exo_engines::model::Recipe;
use serde::{Deserialize, Serialize};

/// A model, and how it is to run. Requests with equal specs share an instance.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct ModelSpec {
    /// A catalogue name, a hub name, or a path.
    pub model: String,
    /// The number of shards; `None`: as many as are best by the policy.
    pub shards: Option<usize>,
    /// The id of the devices that may host shards; `None`: any device.
    pub device: Option<DeviceId>,
    /// Tokens of one sequence at most; `None`: the largest [context](crate::core::context) for which memory suffices.
    pub context_tokens: Option<u32>,
    /// The recipe that quantises dense weights while they load.
    pub quantize: Option<Recipe>,
    /// The type of cached keys and values; `None`: any, which is f16 for a new instance.
    #[serde(default)]
    pub kv_cache: Option<KvElement>,
    /// The bits of activations in matrix products; `None`: any, which are 16 for a new instance.
    #[serde(default)]
    pub activations: Option<ActivationBits>,
    /// The drafts of a new instance; a wish, which an instance with other drafts meets, too.
    #[serde(default)]
    pub speculation: Speculation,
    /// The draft model, with its recipe: a smaller model with the same tokens, which runs as an instance of its own.
    /// `None`: any or none, which is none for a new instance.
    #[serde(default)]
    pub draft: Option<String>,
    /// The layers of each node; `None`: the planner chooses.
    #[serde(default)]
    pub split: Option<Split>,
    /// The goal of the placement.
    #[serde(default)]
    pub policy: Policy,
}

/// How the head of an instance drafts tokens by itself, which a step computes before their turn. The answers are the
/// same. A [draft model](ModelSpec::draft) drafts where this finds nothing.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default, Serialize, Deserialize)]
pub enum Speculation {
    /// No drafts.
    None,
    /// The tokens that followed the latest tokens where these occurred before, in the prompt or the answer.
    #[default]
    Lookup,
}

/// A name that no method of speculation has.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("`{0}` is not a method of speculation: use none or lookup")]
pub struct UnknownSpeculation(pub String);

impl std::str::FromStr for Speculation {
    type Err = UnknownSpeculation;

    fn from_str(name: &str) -> Result<Self, UnknownSpeculation> {
        match name {
            "none" => Ok(Self::None),
            "lookup" => Ok(Self::Lookup),
            _ => Err(UnknownSpeculation(name.to_owned())),
        }
    }
}

impl std::fmt::Display for Speculation {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::None => "none",
            Self::Lookup => "lookup",
        })
    }
}

impl ModelSpec {
    /// Creates a spec with defaults. The name may end with the recipe that quantises the weights: `owner/model@q4_k`.
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
            kv_cache: None,
            activations: None,
            speculation: Speculation::default(),
            draft: None,
            split: None,
            policy: Policy::default(),
        }
    }

    /// The spec of the draft model, if there is one.
    pub fn draft_model(&self) -> Option<Self> {
        let named = Self::new(self.draft.as_deref()?);
        Some(Self { speculation: Speculation::None, ..named })
    }

    /// The bits of activations of a new instance.
    pub fn activation_bits(&self) -> ActivationBits {
        self.activations.unwrap_or_default()
    }

    /// The type of cached keys and values of a new instance.
    pub fn kv_element(&self) -> KvElement {
        self.kv_cache.unwrap_or_default()
    }
}

/// The identity of a model's files: the SHA-256 of their lengths, of all their bytes before the tensors, and of the
/// hashes of the tensors' pieces. Files with different weights have different ids, also under one name.
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

/// Writes the model's name, with its recipe: `owner/model@q4_k`.
impl std::fmt::Display for ModelSpec {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self.quantize {
            Some(recipe) => write!(f, "{}@{recipe}", self.model),
            None => f.write_str(&self.model),
        }
    }
}

/// The id of an instance: a running or starting model.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct InstanceId(pub u64);

impl std::fmt::Display for InstanceId {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}", self.0)
    }
}

/// The model that an instance runs.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Model {
    /// The name in the request, with its recipe.
    pub name: String,
    /// The architecture family.
    pub family: String,
    /// The format of most of its weights.
    pub quantization: String,
    /// Tokens of one sequence at most, and why.
    pub context: Context,
    /// The number of the model's tokens; valid ids are below it.
    pub vocabulary: u32,
    /// The identity of its files.
    pub files: FilesId,
}
