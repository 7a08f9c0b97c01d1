//! What the members of a cluster share, and what follows from it.
//!
//! ```text
//! secret (32 random bytes, cluster.secret) ─HKDF-SHA256─┬─► key of the certificate authority (certificate.rs)
//!                                                       ├─► fingerprint, which discovery announces
//!                                                       └─► cookie of ractor_cluster's sessions
//! ```
//! Whoever has the secret is a member, and can make further members. It never travels, but in a join token that its
//! owner carries.

use crate::private_file::{self, PrivateFileError};
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

/// Why there is no secret.
#[derive(Debug, thiserror::Error)]
pub enum SecretError {
    #[error(transparent)]
    File(#[from] PrivateFileError),
    #[error("{path} is not a cluster's secret; move it away to start a new cluster, or join one")]
    Malformed { path: PathBuf },
    #[error("the system gave no random bytes for a new secret")]
    NoRandomness,
}

impl ClusterSecret {
    /// The secret kept in `data_dir`; the first call makes one, and so a cluster of one node.
    ///
    /// # Errors
    /// [`SecretError`] where the file cannot be read or written, is no secret, or is open to others.
    pub fn load_or_create(data_dir: &Path) -> Result<Self, SecretError> {
        let path = data_dir.join(SECRET_FILE);
        let make = || Ok::<_, SecretError>(Self::random()?.digits().into_bytes());
        let kept = private_file::read_or_create(&path, make)?;
        Self::from_digits(&kept).ok_or(SecretError::Malformed { path })
    }

    /// Keeps this secret in `data_dir`, in place of the one that is there: the node changes to this cluster.
    ///
    /// # Errors
    /// [`SecretError::File`] where it cannot be written.
    pub fn keep(&self, data_dir: &Path) -> Result<(), SecretError> {
        Ok(private_file::replace(&data_dir.join(SECRET_FILE), self.digits().as_bytes())?)
    }

    /// A secret that nobody has yet.
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

    /// What tells this cluster from others, and tells nothing about the secret.
    pub fn fingerprint(&self) -> String {
        hex(&self.derive("exo fingerprint 1")[..8])
    }

    /// What ractor_cluster's sessions ask of each other, behind mutual TLS that has asked already.
    pub fn cookie(&self) -> String {
        hex(&self.derive("exo cookie 1"))
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
        // HKDF fails on outputs of more than 255 hashes, and on nothing else: this is one.
        if let Ok(expanded) = extracted.expand(&[purpose.as_bytes()], Bytes32) {
            let filled = expanded.fill(&mut out);
            debug_assert!(filled.is_ok());
        }
        out
    }

    fn digits(&self) -> String {
        hex(&self.0) + "\n"
    }

    fn from_digits(text: &[u8]) -> Option<Self> {
        let digits = text.trim_ascii();
        let mut bytes = [0; SECRET_BYTES];
        if digits.len() != 2 * SECRET_BYTES {
            return None;
        }
        for (byte, pair) in bytes.iter_mut().zip(digits.chunks_exact(2)) {
            *byte = u8::from_str_radix(std::str::from_utf8(pair).ok()?, 16).ok()?;
        }
        Some(Self(bytes))
    }
}

fn hex(bytes: &[u8]) -> String {
    use std::fmt::Write;
    bytes.iter().fold(String::new(), |mut digits, byte| {
        // Writing to a string does not fail.
        let _ = write!(digits, "{byte:02x}");
        digits
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::{MetadataExt, PermissionsExt};

    #[test]
    fn a_secret_stays_and_is_its_owner_s_alone() {
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
    fn what_follows_from_a_secret_differs_by_purpose_and_by_secret() {
        let (a, b) = (ClusterSecret::from_bytes([1; 32]), ClusterSecret::from_bytes([2; 32]));
        assert_ne!(a.fingerprint(), b.fingerprint());
        assert_ne!(a.authority_seed(), b.authority_seed());
        assert!(!a.cookie().starts_with(&a.fingerprint()));
        assert_ne!(a.cookie(), hex(&a.authority_seed()));
        // Members of different builds must agree on these.
        assert_eq!(a.fingerprint(), ClusterSecret::from_bytes([1; 32]).fingerprint());
    }

    #[test]
    fn a_damaged_secret_is_named() {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let path = folder.path().join(SECRET_FILE);
        private_file::create(&path, b"zz").expect("written");
        assert!(matches!(ClusterSecret::load_or_create(folder.path()), Err(SecretError::Malformed { .. })));
    }
}
