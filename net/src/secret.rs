//! The secret that the members of a cluster share, and the keys derived from it.
//!
//! ```text
//! secret (32 random bytes, cluster.secret) ─HKDF-SHA256─┬─► key of the certificate authority (certificate.rs)
//!                                                       ├─► fingerprint, which discovery announces
//!                                                       └─► cookie of ractor_cluster's sessions
//! ```
//! A node that has the secret is a member, and can make further members. The secret leaves a node only in a join token
//! that its owner carries.

use crate::private_file::{self, PrivateFileError};
use data_encoding::{HEXLOWER, HEXLOWER_PERMISSIVE};
use ring::hkdf::{HKDF_SHA256, KeyType, Salt};
use ring::rand::{SecureRandom, SystemRandom};
use std::path::{Path, PathBuf};

const SECRET_FILE: &str = "cluster.secret";
pub(crate) const SECRET_BYTES: usize = 32;

/// The secret of a cluster.
#[derive(Clone, PartialEq, Eq)]
pub struct ClusterSecret([u8; SECRET_BYTES]);

impl std::fmt::Debug for ClusterSecret {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("ClusterSecret")
    }
}

/// Why a secret could not be loaded or created.
#[derive(Debug, thiserror::Error)]
pub enum SecretError {
    /// The secret's file cannot be read or written, or is open to other users.
    #[error(transparent)]
    File(#[from] PrivateFileError),
    /// The secret's file holds no secret.
    #[error("{path} is not a cluster's secret; move it away to start a new cluster, or join one")]
    Malformed {
        /// The secret's file.
        path: PathBuf,
    },
    /// The system's random number generator failed.
    #[error("the system gave no random bytes for a new secret")]
    NoRandomness,
}

impl ClusterSecret {
    /// The secret stored in `data_dir`; the first call creates one, and with it a cluster of one node.
    ///
    /// # Errors
    /// [`SecretError`] where the file cannot be read or written, holds no secret, or is open to other users.
    pub fn load_or_create(data_dir: &Path) -> Result<Self, SecretError> {
        let path = data_dir.join(SECRET_FILE);
        let make = || Ok::<_, SecretError>(Self::random()?.digits().into_bytes());
        let kept = private_file::read_or_create(&path, make)?;
        Self::from_digits(&kept).ok_or(SecretError::Malformed { path })
    }

    /// Stores this secret in `data_dir`, in place of the existing one: the node changes to this cluster.
    ///
    /// # Errors
    /// [`SecretError::File`] where the file cannot be written.
    pub fn keep(&self, data_dir: &Path) -> Result<(), SecretError> {
        Ok(private_file::replace(&data_dir.join(SECRET_FILE), self.digits().as_bytes())?)
    }

    /// A new random secret.
    ///
    /// # Errors
    /// [`SecretError::NoRandomness`].
    pub fn random() -> Result<Self, SecretError> {
        let mut bytes = [0; SECRET_BYTES];
        SystemRandom::new().fill(&mut bytes).map_err(|_| SecretError::NoRandomness)?;
        Ok(Self(bytes))
    }

    pub(crate) fn from_bytes(bytes: [u8; SECRET_BYTES]) -> Self {
        Self(bytes)
    }

    pub(crate) fn as_bytes(&self) -> &[u8; SECRET_BYTES] {
        &self.0
    }

    /// The public fingerprint that distinguishes this cluster, and reveals nothing about the secret.
    pub fn fingerprint(&self) -> String {
        HEXLOWER.encode(&self.derive("exo fingerprint 1")[..8])
    }

    /// The cookie with which ractor_cluster's sessions authenticate, after mutual TLS has done so already.
    pub fn cookie(&self) -> String {
        HEXLOWER.encode(&self.derive("exo cookie 1"))
    }

    /// The seed of the key that signs the members' certificates.
    pub(crate) fn authority_seed(&self) -> [u8; 32] {
        self.derive("exo authority 1")
    }

    fn derive(&self, purpose: &str) -> [u8; 32] {
        struct Bytes32;
        impl KeyType for Bytes32 {
            fn len(&self) -> usize {
                32
            }
        }
        let extracted = Salt::new(HKDF_SHA256, b"exo cluster").extract(&self.0);
        let mut out = [0; 32];
        // HKDF fails only on outputs of more than 255 hashes: this output is one hash.
        if let Ok(expanded) = extracted.expand(&[purpose.as_bytes()], Bytes32) {
            let filled = expanded.fill(&mut out);
            debug_assert!(filled.is_ok());
        }
        out
    }

    fn digits(&self) -> String {
        HEXLOWER.encode(&self.0) + "\n"
    }

    fn from_digits(text: &[u8]) -> Option<Self> {
        let bytes = HEXLOWER_PERMISSIVE.decode(text.trim_ascii()).ok()?;
        bytes.try_into().ok().map(Self)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::{MetadataExt, PermissionsExt};

    #[test]
    fn a_secret_persists_and_only_its_owner_can_read_it() {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let first = ClusterSecret::load_or_create(folder.path()).expect("made");
        assert_eq!(ClusterSecret::load_or_create(folder.path()).expect("read"), first);
        let path = folder.path().join(SECRET_FILE);
        assert_eq!(std::fs::metadata(&path).expect("there").mode() & 0o777, 0o600);
        let other = ClusterSecret::random().expect("random bytes");
        other.keep(folder.path()).expect("kept");
        assert_eq!(ClusterSecret::load_or_create(folder.path()).expect("read"), other);
        assert_eq!(std::fs::metadata(&path).expect("there").mode() & 0o777, 0o600);
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o640)).expect("chmod");
        assert!(matches!(
            ClusterSecret::load_or_create(folder.path()),
            Err(SecretError::File(PrivateFileError::Exposed { .. }))
        ));
    }

    #[test]
    fn derived_keys_differ_by_purpose_and_by_secret() {
        let (a, b) = (ClusterSecret::from_bytes([1; 32]), ClusterSecret::from_bytes([2; 32]));
        assert_ne!(a.fingerprint(), b.fingerprint());
        assert_ne!(a.authority_seed(), b.authority_seed());
        assert!(!a.cookie().starts_with(&a.fingerprint()));
        assert_ne!(a.cookie(), HEXLOWER.encode(&a.authority_seed()));
        // Members of different builds must agree on these.
        assert_eq!(a.fingerprint(), ClusterSecret::from_bytes([1; 32]).fingerprint());
    }

    #[test]
    fn a_damaged_secret_is_reported() {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let path = folder.path().join(SECRET_FILE);
        private_file::create(&path, b"zz").expect("written");
        assert!(matches!(ClusterSecret::load_or_create(folder.path()), Err(SecretError::Malformed { .. })));
    }
}
