//! Errors in a model's files.

use std::path::PathBuf;

/// The reason why a model's files cannot be read. Every variant names the faulty thing; [`FormatError::remedy`] says
/// what the user can do.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error, serde::Serialize, serde::Deserialize)]
#[non_exhaustive]
pub enum FormatError {
    /// The operating system cannot open or read the path.
    #[error("{path}: {reason}")]
    Io {
        /// The file or folder.
        path: PathBuf,
        /// The operating system's message.
        reason: String,
    },
    /// The path is no model.
    #[error("{path}: neither a GGUF file nor a folder with safetensors ({reason})")]
    NotAModel {
        /// The path that should be a model.
        path: PathBuf,
        /// The evidence that it is no model.
        reason: String,
    },
    /// The file ends too early.
    #[error("{path}: the file ends before {what} is complete")]
    Truncated {
        /// The file.
        path: PathBuf,
        /// The part that is incomplete.
        what: String,
    },
    /// Another program wrote to the file while it was read.
    #[error("{path}: the file was changed while it was read")]
    Changed {
        /// The file.
        path: PathBuf,
    },
    /// A count or length is above the reader's limit.
    #[error("{path}: {what} claims {claimed}, more than the limit of {limit}")]
    TooLarge {
        /// The file.
        path: PathBuf,
        /// The count or length.
        what: String,
        /// Its value in the file, in bytes or items.
        claimed: u64,
        /// The largest permitted value, in the same unit.
        limit: u64,
    },
    /// The file violates its format.
    #[error("{path}: {what}")]
    Malformed {
        /// The file.
        path: PathBuf,
        /// A description of the fault.
        what: String,
    },
    /// A tensor is missing, contradicts the file, or has a value that is not finite.
    #[error("{path}: tensor `{tensor}`: {what}")]
    BadTensor {
        /// The file or folder that should hold the tensor.
        path: PathBuf,
        /// The tensor's name.
        tensor: String,
        /// A description of the fault.
        what: String,
    },
    /// A tensor has a storage type outside [`ElementType`](super::ElementType).
    #[error("{path}: tensor `{tensor}` has the type {element}, which no engine supports")]
    UnsupportedType {
        /// The file.
        path: PathBuf,
        /// The tensor's name.
        tensor: String,
        /// The type's name or number.
        element: String,
    },
    /// The model belongs to no supported family.
    #[error("{path}: the model family `{family}` is not supported")]
    UnknownFamily {
        /// The GGUF file or config.json.
        path: PathBuf,
        /// The family's name there; empty if there is none.
        family: String,
    },
    /// A value of the model's configuration is missing, unsupported or impossible.
    #[error("{path}: `{key}` {what}")]
    BadConfig {
        /// The file or folder.
        path: PathBuf,
        /// The key, or the name of the property.
        key: String,
        /// The rest of a sentence that begins with the key.
        what: String,
    },
    /// The model has no dense matrix to quantise.
    #[error("{path}: the weights are already {quantization} and are not quantised again to {recipe}")]
    AlreadyQuantised {
        /// The model's file or folder.
        path: PathBuf,
        /// The common name of the present storage type.
        quantization: String,
        /// The name of the requested recipe.
        recipe: String,
    },
    /// The model has no tokenizer.
    #[error("{path}: the model has no tokenizer")]
    NoTokenizer {
        /// The GGUF file, or the folder without tokenizer.json.
        path: PathBuf,
    },
    /// The tokenizer is malformed or unsupported.
    #[error("{path}: tokenizer: {what}")]
    BadTokenizer {
        /// The GGUF file or tokenizer.json.
        path: PathBuf,
        /// A description of the fault.
        what: String,
    },
}

impl FormatError {
    /// Returns the error of a tensor whose `row` has a value that is no number. The file is not known here.
    pub(crate) fn not_a_number(tensor: &str, row: usize) -> Self {
        Self::BadTensor {
            path: PathBuf::new(),
            tensor: tensor.to_owned(),
            what: format!("row {row} has a value that is not a finite number"),
        }
    }

    pub(crate) fn io(path: &std::path::Path, error: &std::io::Error) -> Self {
        Self::Io { path: path.to_owned(), reason: error.to_string() }
    }

    /// Returns what the user can do about the error.
    pub fn remedy(&self) -> &'static str {
        match self {
            Self::Io { .. } => "check that the path exists and that you may read it",
            Self::Changed { .. } => "wait until the other program has written the file, then load the model again",
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
