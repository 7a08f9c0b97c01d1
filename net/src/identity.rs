//! An Ed25519 key per node, kept in the data directory; the node's id is the hash of its public key.

use ring::digest::{SHA256, digest};
use ring::rand::SystemRandom;
use ring::signature::{Ed25519KeyPair, KeyPair};
use serde::de::Error as _;
use serde::{Deserialize, Deserializer, Serialize, Serializer};
use std::fs::OpenOptions;
use std::io::{Read, Write};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};

/// The file of the key, PKCS #8, readable by its owner only.
const KEY_FILE: &str = "node.key";
/// A PKCS #8 document of an Ed25519 key has 83 bytes.
const KEY_BYTES_MAX: u64 = 1024;

/// SHA-256 of a node's public key.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct NodeId([u8; 32]);

impl NodeId {
    /// The id's bytes.
    pub fn as_bytes(&self) -> &[u8; 32] {
        &self.0
    }

    /// The first eight digits: enough to tell a home's machines apart.
    pub fn short(&self) -> String {
        self.to_string()[..8].to_owned()
    }
}

impl std::fmt::Display for NodeId {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

/// Digits where people read, bytes where they do not.
impl Serialize for NodeId {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        match serializer.is_human_readable() {
            true => serializer.collect_str(self),
            false => self.0.serialize(serializer),
        }
    }
}

impl<'de> Deserialize<'de> for NodeId {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        if !deserializer.is_human_readable() {
            return <[u8; 32]>::deserialize(deserializer).map(Self);
        }
        let digits = String::deserialize(deserializer)?;
        let byte = |at: usize| u8::from_str_radix(digits.get(at * 2..at * 2 + 2)?, 16).ok();
        let mut id = [0; 32];
        for (at, slot) in id.iter_mut().enumerate() {
            *slot = byte(at).ok_or_else(|| D::Error::custom("a node's id has 64 hexadecimal digits"))?;
        }
        match digits.len() {
            64 => Ok(Self(id)),
            _ => Err(D::Error::custom("a node's id has 64 hexadecimal digits")),
        }
    }
}

impl std::fmt::Debug for NodeId {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "NodeId({})", self.short())
    }
}

/// A node's key pair.
#[derive(Debug)]
pub struct Identity {
    key: Ed25519KeyPair,
}

/// Why a node has no identity.
#[derive(Debug, thiserror::Error)]
pub enum IdentityError {
    #[error("{path}: {source}")]
    Io { path: PathBuf, source: std::io::Error },
    #[error("{path} is not an Ed25519 key; move it away to get a new identity")]
    Malformed { path: PathBuf },
    #[error("{path} may be read by others (mode {mode:o}); chmod 600 it")]
    Exposed { path: PathBuf, mode: u32 },
    #[error("the system gave no random bytes for a new key")]
    NoRandomness,
}

impl Identity {
    /// The identity kept in `data_dir`; the first call makes it.
    ///
    /// # Errors
    /// [`IdentityError`] where the file cannot be read or written, is no key, or is open to others.
    pub fn load_or_create(data_dir: &Path) -> Result<Self, IdentityError> {
        let path = data_dir.join(KEY_FILE);
        match OpenOptions::new().read(true).open(&path) {
            Ok(file) => Self::read(file, path),
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => Self::create(data_dir, path),
            Err(source) => Err(IdentityError::Io { path, source }),
        }
    }

    /// An identity that is kept nowhere: a command that runs once needs none.
    ///
    /// # Errors
    /// [`IdentityError::NoRandomness`].
    pub fn ephemeral() -> Result<Self, IdentityError> {
        let document = Ed25519KeyPair::generate_pkcs8(&SystemRandom::new());
        let document = document.map_err(|_| IdentityError::NoRandomness)?;
        let key = Ed25519KeyPair::from_pkcs8(document.as_ref()).map_err(|_| IdentityError::NoRandomness)?;
        Ok(Self { key })
    }

    fn read(file: std::fs::File, path: PathBuf) -> Result<Self, IdentityError> {
        let io = |source| IdentityError::Io { path: path.clone(), source };
        let mode = file.metadata().map_err(io)?.mode() & 0o777;
        if mode & 0o077 != 0 {
            return Err(IdentityError::Exposed { path, mode });
        }
        let mut bytes = Vec::new();
        file.take(KEY_BYTES_MAX).read_to_end(&mut bytes).map_err(io)?;
        let key = Ed25519KeyPair::from_pkcs8(&bytes).map_err(|_| IdentityError::Malformed { path })?;
        Ok(Self { key })
    }

    fn create(data_dir: &Path, path: PathBuf) -> Result<Self, IdentityError> {
        let io = |source| IdentityError::Io { path: path.clone(), source };
        let document = Ed25519KeyPair::generate_pkcs8(&SystemRandom::new());
        let document = document.map_err(|_| IdentityError::NoRandomness)?;
        std::fs::create_dir_all(data_dir).map_err(io)?;
        std::fs::set_permissions(data_dir, std::fs::Permissions::from_mode(0o700)).map_err(io)?;
        // Written whole under another name, then linked: two processes that start at once agree on one key.
        let draft = data_dir.join(format!("{KEY_FILE}.{}", std::process::id()));
        let mut file =
            OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(&draft).map_err(io)?;
        file.write_all(document.as_ref()).and_then(|()| file.sync_all()).map_err(io)?;
        let linked = std::fs::hard_link(&draft, &path);
        std::fs::remove_file(&draft).map_err(io)?;
        match linked {
            Ok(()) => {}
            Err(error) if error.kind() == std::io::ErrorKind::AlreadyExists => {}
            Err(source) => return Err(IdentityError::Io { path, source }),
        }
        let file = OpenOptions::new().read(true).open(&path).map_err(io)?;
        Self::read(file, path)
    }

    /// The id that follows from the key.
    pub fn node_id(&self) -> NodeId {
        let hash = digest(&SHA256, self.key.public_key().as_ref());
        let mut id = [0; 32];
        id.copy_from_slice(hash.as_ref());
        NodeId(id)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_identity_stays_and_is_its_owner_s_alone() {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let first = Identity::load_or_create(folder.path()).expect("made").node_id();
        assert_eq!(Identity::load_or_create(folder.path()).expect("read").node_id(), first);
        let key = folder.path().join(KEY_FILE);
        assert_eq!(std::fs::metadata(&key).expect("there").mode() & 0o777, 0o600);
        assert_eq!(std::fs::read_dir(folder.path()).expect("there").count(), 1);
        std::fs::set_permissions(&key, std::fs::Permissions::from_mode(0o644)).expect("chmod");
        assert!(matches!(Identity::load_or_create(folder.path()), Err(IdentityError::Exposed { .. })));
    }

    #[test]
    fn a_damaged_key_is_named_and_kept() {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let key = folder.path().join(KEY_FILE);
        std::fs::write(&key, b"not a key").expect("written");
        std::fs::set_permissions(&key, std::fs::Permissions::from_mode(0o600)).expect("chmod");
        assert!(matches!(Identity::load_or_create(folder.path()), Err(IdentityError::Malformed { .. })));
        assert_eq!(std::fs::read(&key).expect("there"), b"not a key");
    }

    #[test]
    fn ids_differ() {
        let ids = [Identity::ephemeral(), Identity::ephemeral()].map(|id| id.map(|id| id.node_id()));
        assert_ne!(ids[0].as_ref().ok(), ids[1].as_ref().ok());
    }

    #[test]
    fn an_id_is_its_digits_where_people_read() {
        let id = Identity::ephemeral().expect("random bytes").node_id();
        let text = serde_json::to_string(&id).expect("it is text");
        assert_eq!(text, format!("\"{id}\""));
        assert_eq!(serde_json::from_str::<NodeId>(&text).expect("it reads back"), id);
        for wrong in ["\"\"", "\"00\"", &text.replace(|c: char| c.is_ascii_digit(), "x"), &text[..65], "5"] {
            assert!(serde_json::from_str::<NodeId>(wrong).is_err(), "{wrong}");
        }
    }
}
