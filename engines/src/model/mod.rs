//! Opens a model on disk: its architecture, the location of each weight, and the source of its tokenizer.
//!
//! ```text
//! .gguf  ─ gguf.rs ─┐  family (a row of a table)
//!                   ├─────────────► Architecture + WeightSource + TokenizerSource
//! folder ─ hf.rs  ──┘
//! ```
//! A new family is a row in [`families`], plus the new data that this row needs in [`Architecture`].

mod architecture;
mod cost;
pub mod families;
mod gather;
mod gguf;
mod gguf_rope;
mod hf;
mod hf_config;
mod names;
mod pieces;
mod recipe;
mod rope;
mod tensor_source;
mod weights;

pub use architecture::*;
pub use pieces::{FOLDER_FILES, PartedFile, Piece, Pieces};
pub use recipe::{Recipe, UnknownRecipe};
pub use weights::{LayerRole, Layout, Part, Role, TensorSlice, WeightReader, WeightSource};

use crate::format::{FormatError, Gguf};
use serde::{Deserialize, Serialize};
use std::path::{Path, PathBuf};

/// A model's files, of which only the headers are read.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct ModelFiles {
    /// The path that the user gave.
    pub path: PathBuf,
    /// The checked architecture.
    pub architecture: Architecture,
    /// The location of each weight.
    pub weights: WeightSource,
    /// The location of the tokenizer.
    pub tokenizer: TokenizerSource,
    /// The common name of the storage type of most weights: `Q4_K_M`, `BF16`, …
    pub quantization: String,
}

/// The location of a model's tokenizer.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum TokenizerSource {
    /// In the metadata of this GGUF file.
    Gguf(PathBuf),
    /// In `tokenizer.json` and `tokenizer_config.json` of this folder.
    Folder(PathBuf),
}

/// The most layers that a model may have. This bound and the bounds below stop a damaged header from asking for absurd
/// memory.
pub const LAYERS_MAX: usize = 1024;
const WIDTH_MAX: usize = 1 << 20;
const VOCABULARY_MAX: usize = 1 << 22;
const HEAD_DIM_MAX: usize = 4096;
const EXPERTS_MAX: usize = 1024;

impl ModelFiles {
    /// Reads the model at `path`: a GGUF file, or a folder with `config.json` and safetensors.
    ///
    /// # Errors
    /// [`FormatError`] that names the faulty file, key or tensor.
    pub fn open(path: &Path) -> Result<Self, FormatError> {
        let metadata = std::fs::metadata(path).map_err(|e| FormatError::io(path, &e))?;
        if metadata.is_dir() {
            hf::open(path)
        } else if Gguf::is_gguf(path) {
            gguf::open(path)
        } else {
            Err(FormatError::NotAModel { path: path.to_owned(), reason: "it does not start with `GGUF`".to_owned() })
        }
    }

    /// Returns the same model, with its dense matrices quantised while they are loaded.
    ///
    /// # Errors
    /// [`FormatError::AlreadyQuantised`] if no matrix is dense: a quantised matrix is not quantised again.
    pub fn quantised(mut self, recipe: Recipe) -> Result<Self, FormatError> {
        if !self.weights.quantise(recipe) {
            let Self { path, quantization, .. } = self;
            return Err(FormatError::AlreadyQuantised { path, quantization, recipe: recipe.name().to_owned() });
        }
        self.quantization = recipe.name().to_uppercase();
        Ok(self)
    }

    /// Bytes of all weights in the files.
    pub fn weight_bytes(&self) -> u64 {
        let layers = self.architecture.layers.len();
        self.weights.shard_bytes(0..layers, layers)
    }
}

impl Architecture {
    /// Checks the architecture of the model at `path`. Nothing is sized by the architecture before this check.
    fn checked(self, path: &Path) -> Result<Self, FormatError> {
        match self.check() {
            Ok(()) => Ok(self),
            Err((key, what)) => Err(FormatError::BadConfig { path: path.to_owned(), key: key.to_owned(), what }),
        }
    }

    /// Returns the first impossible value as an error: (key, what is wrong with it).
    fn check(&self) -> Result<(), (&'static str, String)> {
        within("vocabulary size", self.vocabulary, VOCABULARY_MAX)?;
        within("hidden size", self.hidden, WIDTH_MAX)?;
        within("number of layers", self.layers.len(), LAYERS_MAX)?;
        within("context length", self.context_tokens, 1 << 28)?;
        if !(self.norm_epsilon > 0.0 && self.norm_epsilon < 1.0) {
            return Err(("norm epsilon", format!("is {}", self.norm_epsilon)));
        }
        self.layers.iter().try_for_each(Layer::check)?;
        let long = self.long_ropes.as_ref().map_or(&[][..], |long| &long.ropes);
        if long.len() > self.ropes.len() {
            return Err(("rotary frequencies", "have more tables for long contexts than for short ones".to_owned()));
        }
        for layer in &self.layers {
            let index = layer.attention.rope;
            let ropes = self.ropes.get(index).into_iter().chain(long.get(index));
            ropes.into_iter().try_for_each(|rope| rope.check(layer.attention.head_dim))?;
        }
        Ok(())
    }
}

/// Refuses a count of 0, and a count above `limit`.
fn within(key: &'static str, value: usize, limit: usize) -> Result<(), (&'static str, String)> {
    match (1..=limit).contains(&value) {
        true => Ok(()),
        false => Err((key, format!("is {value}; it must be from 1 to {limit}"))),
    }
}

impl Layer {
    fn check(&self) -> Result<(), (&'static str, String)> {
        let attention = &self.attention;
        within("number of attention heads", attention.heads, 4096)?;
        within("number of key/value heads", attention.kv_heads, attention.heads)?;
        within("head dimension", attention.head_dim, HEAD_DIM_MAX)?;
        within("feed-forward size", self.feed_forward.width, WIDTH_MAX)?;
        within("sliding window", attention.window.unwrap_or(1), usize::MAX)?;
        if !attention.heads.is_multiple_of(attention.kv_heads) {
            return Err((
                "number of key/value heads",
                format!("is {}, which does not divide {} heads", attention.kv_heads, attention.heads),
            ));
        }
        if !attention.scale.is_finite() {
            return Err(("attention scale", format!("is {}", attention.scale)));
        }
        if attention.softcap.is_some_and(|cap| !(cap > 0.0 && cap.is_finite())) {
            return Err(("attention cap", format!("is {:?}", attention.softcap)));
        }
        if let Activation::ClampedSwish { limit, .. } = self.feed_forward.activation
            && (limit.is_nan() || limit <= 0.0)
        {
            return Err(("limit of the activation", format!("is {limit}; it must be above 0")));
        }
        if let Some(experts) = &self.feed_forward.experts {
            within("number of experts", experts.count, EXPERTS_MAX)?;
            within("number of experts in use", experts.used, experts.count)?;
        }
        Ok(())
    }
}

impl Rope {
    fn check(&self, head_dim: usize) -> Result<(), (&'static str, String)> {
        if self.frequencies.len() * 2 > head_dim {
            let what = format!("is {}, more than the head dimension {head_dim}", self.frequencies.len() * 2);
            return Err(("rotary dimension", what));
        }
        if self.frequencies.iter().any(|f| !f.is_finite()) || !self.magnitude.is_finite() {
            return Err(("rotary frequencies", "are not finite".to_owned()));
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests;
