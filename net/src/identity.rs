//! An Ed25519 key per node, stored in the data directory; the node's id is the hash of its public key.

use crate::private_file::{self, PrivateFileError};
use data_encoding::{HEXLOWER, HEXLOWER_PERMISSIVE};
use ring::digest::{SHA256, digest};
use ring::rand::SystemRandom;
use ring::signature::{Ed25519KeyPair, KeyPair};
use serde::de::Error as _;
use serde::{Deserialize, Deserializer, Serialize, Serializer};
use std::path::{Path, PathBuf};

/// The file of the key, PKCS #8, readable by its owner only.
const KEY_FILE: &str = "node.key";

/// SHA-256 of a node's public key.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct NodeId([u8; 32]);

impl NodeId {
    /// The id of the node whose Ed25519 public key has these 32 bytes.
    pub(crate) fn of_key(public_key: &[u8]) -> Self {
        let mut id = [0; 32];
        id.copy_from_slice(digest(&SHA256, public_key).as_ref());
        Self(id)
    }

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
        f.write_str(&HEXLOWER.encode(&self.0))
    }
}

/// Hexadecimal digits in human-readable formats, 32 bytes in others.
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
        digits.parse().map_err(D::Error::custom)
    }
}

/// The error of a text that is not a node's id.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("a node's id has 64 hexadecimal digits")]
pub struct NodeIdError;

impl std::str::FromStr for NodeId {
    type Err = NodeIdError;

    fn from_str(digits: &str) -> Result<Self, NodeIdError> {
        let bytes = HEXLOWER_PERMISSIVE.decode(digits.as_bytes()).map_err(|_| NodeIdError)?;
        bytes.try_into().map(Self).map_err(|_| NodeIdError)
    }
}

impl std::fmt::Debug for NodeId {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "NodeId({})", self.short())
    }
}

/// A node's key pair.
pub struct Identity {
    key: Ed25519KeyPair,
    /// The key as it is stored: PKCS #8.
    document: Vec<u8>,
}

impl std::fmt::Debug for Identity {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Identity({})", self.node_id().short())
    }
}

/// Why an identity could not be loaded or created.
#[derive(Debug, thiserror::Error)]
pub enum IdentityError {
    /// The key's file cannot be read or written, or is open to other users.
    #[error(transparent)]
    File(#[from] PrivateFileError),
    /// The key's file holds no Ed25519 key.
    #[error("{path} is not an Ed25519 key; move it away to get a new identity")]
    Malformed {
        /// The key's file.
        path: PathBuf,
    },
    /// The system's random number generator failed.
    #[error("the system gave no random bytes for a new key")]
    NoRandomness,
}

impl Identity {
    /// The identity stored in `data_dir`; the first call creates it.
    ///
    /// # Errors
    /// [`IdentityError`] where the file cannot be read or written, holds no key, or is open to other users.
    pub fn load_or_create(data_dir: &Path) -> Result<Self, IdentityError> {
        let path = data_dir.join(KEY_FILE);
        let kept = private_file::read_or_create(&path, || Ok::<_, IdentityError>(Self::ephemeral()?.document))?;
        Self::from_document(kept).ok_or(IdentityError::Malformed { path })
    }

    /// A new identity that is not stored: enough for a command that runs once.
    ///
    /// # Errors
    /// [`IdentityError::NoRandomness`].
    pub fn ephemeral() -> Result<Self, IdentityError> {
        let document = Ed25519KeyPair::generate_pkcs8(&SystemRandom::new());
        let document = document.map_err(|_| IdentityError::NoRandomness)?;
        Self::from_document(document.as_ref().to_vec()).ok_or(IdentityError::NoRandomness)
    }

    fn from_document(document: Vec<u8>) -> Option<Self> {
        let key = Ed25519KeyPair::from_pkcs8(&document).ok()?;
        Some(Self { key, document })
    }

    /// The key as PKCS #8.
    pub(crate) fn document(&self) -> &[u8] {
        &self.document
    }

    /// The node's id: the hash of its public key.
    pub fn node_id(&self) -> NodeId {
        NodeId::of_key(self.key.public_key().as_ref())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::{MetadataExt, PermissionsExt};

    #[test]
    fn an_identity_persists_and_only_its_owner_can_read_it() {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let first = Identity::load_or_create(folder.path()).expect("made").node_id();
        assert_eq!(Identity::load_or_create(folder.path()).expect("read").node_id(), first);
        let key = folder.path().join(KEY_FILE);
        assert_eq!(std::fs::metadata(&key).expect("there").mode() & 0o777, 0o600);
        assert_eq!(std::fs::read_dir(folder.path()).expect("there").count(), 1);
        std::fs::set_permissions(&key, std::fs::Permissions::from_mode(0o644)).expect("chmod");
        assert!(matches!(
            Identity::load_or_create(folder.path()),
            Err(IdentityError::File(PrivateFileError::Exposed { .. }))
        ));
    }

    #[test]
    fn a_damaged_key_is_reported_and_left_in_place() {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let key = folder.path().join(KEY_FILE);
        std::fs::write(&key, b"not a key").expect("written");
        std::fs::set_permissions(&key, std::fs::Permissions::from_mode(0o600)).expect("chmod");
        assert!(matches!(Identity::load_or_create(folder.path()), Err(IdentityError::Malformed { .. })));
        assert_eq!(std::fs::read(&key).expect("there"), b"not a key");
    }

    #[test]
    fn new_identities_have_different_ids() {
        let ids = [Identity::ephemeral(), Identity::ephemeral()].map(|id| id.map(|id| id.node_id()));
        assert_ne!(ids[0].as_ref().ok(), ids[1].as_ref().ok());
    }

    #[test]
    fn an_id_is_hexadecimal_digits_in_json() {
        let id = Identity::ephemeral().expect("random bytes").node_id();
        let text = serde_json::to_string(&id).expect("serialised");
        assert_eq!(text, format!("\"{id}\""));
        assert_eq!(serde_json::from_str::<NodeId>(&text).expect("deserialised"), id);
        for wrong in ["\"\"", "\"00\"", &text.replace(|c: char| c.is_ascii_digit(), "x"), &text[..65], "5"] {
            assert!(serde_json::from_str::<NodeId>(wrong).is_err(), "{wrong}");
        }
    }
}
