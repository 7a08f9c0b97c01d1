//! What can be wrong with a model's files.

use std::path::PathBuf;

/// Why a model's files could not be read. Every variant names the thing; [`FormatError::remedy`] says what to do.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error, serde::Serialize, serde::Deserialize)]
#[non_exhaustive]
pub enum FormatError {
    #[error("{path}: {reason}")]
    Io { path: PathBuf, reason: String },
    #[error("{path}: neither a GGUF file nor a folder with safetensors ({reason})")]
    NotAModel { path: PathBuf, reason: String },
    #[error("{path}: the file ends where {what} should be")]
    Truncated { path: PathBuf, what: String },
    #[error("{path}: {what} claims {claimed}, more than the limit of {limit}")]
    TooLarge { path: PathBuf, what: String, claimed: u64, limit: u64 },
    #[error("{path}: {what}")]
    Malformed { path: PathBuf, what: String },
    #[error("{path}: tensor `{tensor}`: {what}")]
    BadTensor { path: PathBuf, tensor: String, what: String },
    #[error("{path}: tensor `{tensor}` has the type {element}, which no engine here computes on")]
    UnsupportedType { path: PathBuf, tensor: String, element: String },
    #[error("{path}: the model family `{family}` is not supported")]
    UnknownFamily { path: PathBuf, family: String },
    #[error("{path}: `{key}` {what}")]
    BadConfig { path: PathBuf, key: String, what: String },
    #[error("{path}: its weights are {quantization} already, and are not quantised again to {recipe}")]
    AlreadyQuantised { path: PathBuf, quantization: String, recipe: String },
    #[error("{path}: no tokenizer in it")]
    NoTokenizer { path: PathBuf },
    #[error("{path}: tokenizer: {what}")]
    BadTokenizer { path: PathBuf, what: String },
}

impl FormatError {
    pub(crate) fn io(path: &std::path::Path, error: &std::io::Error) -> Self {
        Self::Io { path: path.to_owned(), reason: error.to_string() }
    }

    /// What the user can do about it.
    pub fn remedy(&self) -> &'static str {
        match self {
            Self::Io { .. } => "check that the path exists and that you may read it",
            Self::NotAModel { .. } => {
                "give a .gguf file, or a folder with config.json, tokenizer.json and *.safetensors"
            }
            Self::Truncated { .. } | Self::TooLarge { .. } | Self::Malformed { .. } => {
                "the file is damaged or incomplete: download it again"
            }
            Self::BadTensor { .. } => {
                "the file does not fit its own description: download it again, or convert it anew"
            }
            Self::UnsupportedType { .. } => {
                "take F32, F16, BF16, Q4_0, Q4_1, Q5_0, Q5_1, Q8_0, a K-quant (Q2_K to Q6_K), IQ4_NL, IQ4_XS or MXFP4"
            }
            Self::UnknownFamily { .. } => "`exo-node models --families` lists the families that can be run",
            Self::BadConfig { .. } => "compare config.json (or the GGUF's metadata) with the model's original",
            Self::AlreadyQuantised { .. } => "run it as it is, or take the model's original in BF16, F16 or F32",
            Self::NoTokenizer { .. } => {
                "put the model's tokenizer.json beside its weights, or take a GGUF with a tokenizer in it"
            }
            Self::BadTokenizer { .. } => "take the tokenizer.json from the model's original repository",
        }
    }
}
