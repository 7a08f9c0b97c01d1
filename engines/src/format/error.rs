//! Errors in a model's files.

use std::path::PathBuf;

/// The reason why a model's files cannot be read. Every variant names the faulty thing; [`FormatError::remedy`] says
/// what the user can do.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error, serde::Serialize, serde::Deserialize)]
#[non_exhaustive]
pub enum FormatError {
    #[error("{path}: {reason}")]
    Io { path: PathBuf, reason: String },
    #[error("{path}: neither a GGUF file nor a folder with safetensors ({reason})")]
    NotAModel { path: PathBuf, reason: String },
    #[error("{path}: the file ends before {what} is complete")]
    Truncated { path: PathBuf, what: String },
    #[error("{path}: {what} claims {claimed}, more than the limit of {limit}")]
    TooLarge { path: PathBuf, what: String, claimed: u64, limit: u64 },
    #[error("{path}: {what}")]
    Malformed { path: PathBuf, what: String },
    #[error("{path}: tensor `{tensor}`: {what}")]
    BadTensor { path: PathBuf, tensor: String, what: String },
    #[error("{path}: tensor `{tensor}` has the type {element}, which no engine supports")]
    UnsupportedType { path: PathBuf, tensor: String, element: String },
    #[error("{path}: the model family `{family}` is not supported")]
    UnknownFamily { path: PathBuf, family: String },
    #[error("{path}: `{key}` {what}")]
    BadConfig { path: PathBuf, key: String, what: String },
    #[error("{path}: the weights are already {quantization} and are not quantised again to {recipe}")]
    AlreadyQuantised { path: PathBuf, quantization: String, recipe: String },
    #[error("{path}: the model has no tokenizer")]
    NoTokenizer { path: PathBuf },
    #[error("{path}: tokenizer: {what}")]
    BadTokenizer { path: PathBuf, what: String },
}

impl FormatError {
    pub(crate) fn io(path: &std::path::Path, error: &std::io::Error) -> Self {
        Self::Io { path: path.to_owned(), reason: error.to_string() }
    }

    /// Returns what the user can do about the error.
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
                "the file contradicts its own header: download it again, or convert it from the original again"
            }
            Self::UnsupportedType { .. } => {
                "use F32, F16, BF16, Q4_0, Q4_1, Q5_0, Q5_1, Q8_0, a K-quant (Q2_K to Q6_K), IQ4_NL, IQ4_XS or MXFP4"
            }
            Self::UnknownFamily { .. } => "list the supported families, and use a model of one of them",
            Self::BadConfig { .. } => "compare config.json (or the GGUF metadata) with the original model",
            Self::AlreadyQuantised { .. } => "run the model as it is, or use the original model in BF16, F16 or F32",
            Self::NoTokenizer { .. } => {
                "put the model's tokenizer.json beside its weights, or use a GGUF file with a tokenizer"
            }
            Self::BadTokenizer { .. } => "use the tokenizer.json from the model's original repository",
        }
    }
}
