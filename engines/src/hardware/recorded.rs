//! Recorded trees of `/sys`, `/proc`, `/dev` and `/etc`, for tests.
//!
//! A tree is a text file in `trees/`. Its lines are `path = content`, with `\n` between lines of the content
//! and `\t` for tabs, and `path -> target` for a link. Lines that begin with `#` are comments.

use super::SystemRoot;
use std::path::Path;

/// A tree in a folder of its own, until it is dropped.
#[derive(Debug)]
pub(super) struct Tree {
    folder: tempfile::TempDir,
    pub(super) root: SystemRoot,
}

impl Tree {
    /// The tree `trees/NAME.txt`.
    pub(super) fn open(name: &str) -> Self {
        let file = Path::new(env!("CARGO_MANIFEST_DIR")).join("src/hardware/trees").join(format!("{name}.txt"));
        let tree = Self::empty();
        let text = std::fs::read_to_string(file).expect("a recorded tree");
        for line in text.lines().filter(|line| !line.starts_with('#') && !line.is_empty()) {
            match (line.split_once(" = "), line.split_once(" -> ")) {
                (Some((path, content)), _) => tree.write(path, &content.replace("\\n", "\n").replace("\\t", "\t")),
                (_, Some((path, target))) => tree.link(path, target),
                _ => panic!("neither a file nor a link: {line}"),
            }
        }
        tree
    }

    pub(super) fn empty() -> Self {
        let folder = tempfile::tempdir().expect("a folder");
        let root = SystemRoot::at(folder.path());
        Self { folder, root }
    }

    /// Writes or replaces a file.
    pub(super) fn write(&self, path: &str, content: &str) {
        let file = self.folder.path().join(path);
        std::fs::create_dir_all(file.parent().expect("a folder")).expect("created");
        std::fs::write(file, format!("{content}\n")).expect("written");
    }

    /// Removes a file.
    pub(super) fn remove(&self, path: &str) {
        std::fs::remove_file(self.folder.path().join(path)).expect("removed");
    }

    /// Makes a link.
    pub(super) fn link(&self, path: &str, target: &str) {
        let link = self.folder.path().join(path);
        std::fs::create_dir_all(link.parent().expect("a folder")).expect("created");
        std::os::unix::fs::symlink(target, link).expect("linked");
    }
}
