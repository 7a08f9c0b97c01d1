//! Model names: the parsing of the text by which users name a model.

use super::catalogue::{self, CatalogueEntry};
use std::path::{Path, PathBuf};

/// A parsed model name. A name of the catalogue takes precedence over the other kinds.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ModelName {
    /// An entry of the catalogue.
    Catalogue(&'static CatalogueEntry),
    /// A file or folder in a models folder, by its plain name. The ending `.gguf` may be left out.
    Plain(String),
    /// A repository of the Hugging Face hub: `owner/name`, or `owner/name:file.gguf`.
    Hub(HubName),
    /// A path on this machine.
    Path(PathBuf),
}

/// A model of the Hugging Face hub.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HubName {
    /// `owner/name`.
    pub repository: String,
    /// One GGUF file; `None`: the repository's folder of safetensors.
    pub file: Option<String>,
}

impl ModelName {
    /// Parses a name. A text that is not in the catalogue is a path if it starts with `/`, `./`, `../` or `~`, ends
    /// with `.gguf` and has no `:`, has more than one slash, or is `.` or `..`.
    pub fn parse(text: &str) -> Self {
        if let Some(entry) = catalogue::find(text) {
            return Self::Catalogue(entry);
        }
        if is_path(text) {
            return Self::Path(PathBuf::from(text));
        }
        match HubName::parse(text) {
            Some(name) => Self::Hub(name),
            None => Self::Plain(text.to_owned()),
        }
    }

    /// Whether the name is a path on this machine. A path reveals the disk's contents, so only the machine's owner may
    /// use one.
    pub fn is_path(&self) -> bool {
        matches!(self, Self::Path(_))
    }

    /// Finds the file or folder of the model, if it is on this machine outside the hub client's cache. Blocks on the
    /// disk.
    pub(super) fn find(&self, folders: &[PathBuf]) -> Option<PathBuf> {
        match self {
            // A bare file name that is not in the working directory may be in a models folder.
            Self::Path(path) if path.exists() => Some(path.clone()),
            Self::Path(_) | Self::Catalogue(_) | Self::Plain(_) | Self::Hub(_) => self.find_in(folders),
        }
    }

    /// Finds the file or folder of the model, if it is in a models folder. Paths with a folder lead elsewhere, so they
    /// are never found here. Blocks on the disk.
    pub(super) fn find_in(&self, folders: &[PathBuf]) -> Option<PathBuf> {
        match self {
            Self::Catalogue(entry) => in_folders(folders, entry.file),
            Self::Plain(name) => in_folders(folders, name).or_else(|| in_folders(folders, &format!("{name}.gguf"))),
            Self::Hub(_) => None,
            Self::Path(path) => path.to_str().and_then(|name| in_folders(folders, name)),
        }
    }
}

impl HubName {
    /// Parses `owner/name` or `owner/name:file.gguf`.
    fn parse(text: &str) -> Option<Self> {
        let (repository, file) = match text.split_once(':') {
            Some((repository, file)) => (repository, Some(file)),
            None => (text, None),
        };
        let (owner, model) = repository.split_once('/')?;
        let is_plain = |part: &str| {
            !part.is_empty()
                && !part.starts_with('.')
                && part.chars().all(|c| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.'))
        };
        let all_plain = is_plain(owner) && is_plain(model) && file.is_none_or(is_plain);
        all_plain.then(|| Self { repository: repository.to_owned(), file: file.map(str::to_owned) })
    }
}

/// The absolute path of a file or folder, without symbolic links and `..` before its last part. Blocks on the disk.
///
/// # Errors
/// The path is empty, or the working directory is lost.
pub fn absolute_path(path: &Path) -> std::io::Result<PathBuf> {
    let path = std::path::absolute(path)?;
    let folder = path.parent().and_then(|folder| folder.canonicalize().ok());
    Ok(match (folder, path.file_name()) {
        (Some(folder), Some(name)) => folder.join(name),
        _ => path,
    })
}

fn is_path(text: &str) -> bool {
    let starts = ["/", "./", "../", "~"].iter().any(|start| text.starts_with(start));
    let is_file = text.ends_with(".gguf") && !text.contains(':');
    starts || is_file || matches!(text, "." | "..") || text.matches('/').count() > 1
}

fn in_folders(folders: &[PathBuf], name: &str) -> Option<PathBuf> {
    let is_plain = Path::new(name).components().count() == 1 && !name.starts_with('.') && !name.contains(['/', '\\']);
    let found = || folders.iter().map(|folder| folder.join(name)).find(|path| path.exists());
    if is_plain { found() } else { None }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_name_parses_to_one_kind() {
        let hub = |repository: &str, file: Option<&str>| {
            ModelName::Hub(HubName { repository: repository.to_owned(), file: file.map(str::to_owned) })
        };
        assert!(matches!(ModelName::parse("smollm2"), ModelName::Catalogue(entry) if entry.name == "smollm2"));
        assert!(matches!(ModelName::parse("llama3.2-1b:q8_0"), ModelName::Catalogue(_)));
        assert_eq!(ModelName::parse("a/b-1.5"), hub("a/b-1.5", None));
        assert_eq!(ModelName::parse("a/b:c.gguf"), hub("a/b", Some("c.gguf")));
        for path in ["/x", "./x", "../x", "~/x", "~", "m.gguf", "sub/m.gguf", "a/b/c", "./smollm2", ".", "..", "a//b"] {
            assert!(ModelName::parse(path).is_path(), "{path}");
        }
        for plain in ["tiny", "tiny-v2.1", "a", "x:y", "a/", "a/..", "C:\\x"] {
            assert_eq!(ModelName::parse(plain), ModelName::Plain(plain.to_owned()), "{plain}");
        }
        for bad in ["../b", "a/b:../c", "a/b:", "/b", "a/.b"] {
            assert!(!matches!(ModelName::parse(bad), ModelName::Hub(_)), "{bad}");
        }
    }

    /// A plain name never leads out of the models folders, and a file in the working directory never hides it.
    #[test]
    fn plain_names_are_found_only_in_models_folders() {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let models = folder.path().join("models");
        std::fs::create_dir_all(models.join("tiny")).expect("a folder");
        std::fs::write(models.join("small.gguf"), "").expect("a file");
        std::fs::write(folder.path().join("secret"), "").expect("a file");
        let folders = [models.clone()];
        let find = |name: &str| ModelName::parse(name).find(&folders);
        assert_eq!(find("tiny"), Some(models.join("tiny")));
        assert_eq!(find("small"), Some(models.join("small.gguf")));
        assert_eq!(find("small.gguf"), Some(models.join("small.gguf")));
        // What peers are served is in a models folder, whatever the working directory has.
        let serve = |name: &str| ModelName::parse(name).find_in(&folders);
        assert_eq!(serve("small.gguf"), Some(models.join("small.gguf")));
        let inside = models.join("small.gguf").display().to_string();
        for name in [inside.as_str(), "./small.gguf", "models/small.gguf", "Cargo.toml", "./Cargo.toml", "~", "/"] {
            assert_eq!(serve(name), None, "{name}");
        }
        for name in ["smollm2", "secret", "models/../secret", "..", ".", "tiny/..", "a/b"] {
            let found = find(name).filter(|found| !Path::new(name).exists() || found.starts_with(&models));
            assert_eq!(found, None, "{name}");
        }
    }
}
