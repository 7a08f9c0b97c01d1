//! Certificates: whether a peer is a member, and which member it is.
//!
//! The cluster's secret yields the key of its certificate authority, so every member has that key and signs a
//! certificate for its own identity. A peer is a member if its certificate is signed by that authority and valid now.
//! The peer's id is the hash of the certificate's key, and the name in the certificate must be that id. rustls' own
//! verifier checks chains, signatures, dates and purposes; this module does not.

use crate::identity::{Identity, NodeId};
use crate::secret::ClusterSecret;
use rcgen::{
    BasicConstraints, CertificateParams, DistinguishedName, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair,
    KeyUsagePurpose, PKCS_ED25519,
};
use rustls::client::Resumption;
use rustls::crypto::CryptoProvider;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, PrivatePkcs8KeyDer, ServerName};
use rustls::server::{NoServerSessionStorage, WebPkiClientVerifier};
use rustls::{ClientConfig, RootCertStore, ServerConfig};
use std::sync::Arc;
use std::time::{Duration, SystemTime};

/// The name in every member's certificate, which diallers ask for: the certificate's key, not this name, identifies it.
pub(crate) const MEMBER_NAME: &str = "member.exo.internal";
/// The time until a certificate expires. A node makes a new one at each start, and when its clock is a day from then.
const VALID_FOR: Duration = Duration::from_secs(60 * 24 * 3600);
/// The distance from now, in either direction, at which a certificate is renewed: a board without a battery starts at
/// some past date, and gets the right one a minute later.
const STALE_AFTER: Duration = Duration::from_secs(24 * 3600);
/// How far a certificate's validity begins in the past: clocks at home are off by hours.
const VALID_BEFORE: Duration = Duration::from_secs(2 * 24 * 3600);
/// The head of an Ed25519 key's PKCS #8, version 1, up to the key's 32 bytes (RFC 8410, section 7).
const ED25519_PKCS8_HEAD: [u8; 16] =
    [0x30, 0x2e, 0x02, 0x01, 0x00, 0x30, 0x05, 0x06, 0x03, 0x2b, 0x65, 0x70, 0x04, 0x22, 0x04, 0x20];
/// The head of an Ed25519 key's SubjectPublicKeyInfo, up to the key's 32 bytes (RFC 8410, section 4).
const ED25519_SPKI_HEAD: [u8; 12] = [0x30, 0x2a, 0x30, 0x05, 0x06, 0x03, 0x2b, 0x65, 0x70, 0x03, 0x21, 0x00];

/// Why a certificate could not be made.
#[derive(Debug, thiserror::Error)]
pub enum CertificateError {
    /// The key cannot be used, or the certificate cannot be encoded or signed.
    #[error("cannot make a certificate: {0}")]
    Make(#[from] rcgen::Error),
    /// The TLS library refuses the certificate or the cipher settings.
    #[error("this node's own certificate was refused: {0}")]
    Configure(#[from] rustls::Error),
    /// The TLS library cannot verify peers with the cluster's root certificate.
    #[error("this node's own certificate was refused: {0}")]
    Verifier(#[from] rustls::server::VerifierBuilderError),
}

/// Why a peer's certificate does not identify the peer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum PeerIdError {
    /// The certificate cannot be decoded.
    #[error("the peer's certificate cannot be read")]
    Unreadable,
    /// The certificate has a key of another algorithm than Ed25519.
    #[error("the peer's key is not an Ed25519 key")]
    NotEd25519,
    /// The certificate does not name the node whose id follows from its key.
    #[error("the peer's certificate names another node than its key")]
    WrongName,
}

/// The period in which a certificate is valid.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Validity {
    pub(crate) from: SystemTime,
    pub(crate) to: SystemTime,
}

impl Validity {
    /// The period from [`VALID_BEFORE`] before `now` to [`VALID_FOR`] after it.
    pub(crate) fn from_now(now: SystemTime) -> Self {
        Self { from: now - VALID_BEFORE, to: now + VALID_FOR }
    }
}

/// Whether a certificate that was made at `made` must be renewed.
pub(crate) fn is_stale(made: SystemTime, now: SystemTime) -> bool {
    let age = now.duration_since(made).unwrap_or_else(|backwards| backwards.duration());
    age >= STALE_AFTER
}

/// A member's certificate and the root that signed it.
#[derive(Debug)]
pub(crate) struct Credentials {
    root: CertificateDer<'static>,
    certificate: CertificateDer<'static>,
    key: Vec<u8>,
}

impl Credentials {
    /// A certificate for `identity` in the cluster of `secret`.
    pub(crate) fn make(
        identity: &Identity,
        secret: &ClusterSecret,
        validity: Validity,
    ) -> Result<Self, CertificateError> {
        Self::make_named(identity, secret, validity, identity.node_id())
    }

    /// A certificate with the name of any node, as an impostor would make it.
    fn make_named(
        identity: &Identity,
        secret: &ClusterSecret,
        validity: Validity,
        name: NodeId,
    ) -> Result<Self, CertificateError> {
        let authority_key = [&ED25519_PKCS8_HEAD[..], &secret.authority_seed()[..]].concat();
        let authority_key = key_pair(&authority_key)?;
        let authority = authority_params();
        let root = authority.self_signed(&authority_key)?;
        let mut params = CertificateParams::new(vec![MEMBER_NAME.to_owned(), node_name(name)])?;
        params.distinguished_name = named("exo node");
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        params.not_before = validity.from.into();
        params.not_after = validity.to.into();
        let issuer = Issuer::new(authority, authority_key);
        let certificate = params.signed_by(&key_pair(identity.document())?, &issuer)?;
        Ok(Self { root: root.der().clone(), certificate: certificate.der().clone(), key: identity.document().to_vec() })
    }

    /// The configuration for accepting connections: TLS 1.3, and diallers must show a certificate.
    pub(crate) fn server(&self, protocols: &[&[u8]]) -> Result<ServerConfig, CertificateError> {
        let verifier = WebPkiClientVerifier::builder_with_provider(Arc::new(self.roots()?), provider()).build()?;
        let mut config = ServerConfig::builder_with_provider(provider())
            .with_protocol_versions(&[&rustls::version::TLS13])?
            .with_client_cert_verifier(verifier)
            .with_single_cert(vec![self.certificate.clone()], self.private_key())?;
        config.alpn_protocols = protocols.iter().map(|protocol| protocol.to_vec()).collect();
        // Each connection authenticates anew: an evicted node cannot return with a session ticket.
        config.session_storage = Arc::new(NoServerSessionStorage {});
        config.send_tls13_tickets = 0;
        Ok(config)
    }

    /// The configuration for dialling: TLS 1.3, with this node's certificate.
    pub(crate) fn client(&self, protocol: &[u8]) -> Result<ClientConfig, CertificateError> {
        let mut config = ClientConfig::builder_with_provider(provider())
            .with_protocol_versions(&[&rustls::version::TLS13])?
            .with_root_certificates(self.roots()?)
            .with_client_auth_cert(vec![self.certificate.clone()], self.private_key())?;
        config.alpn_protocols = vec![protocol.to_vec()];
        config.resumption = Resumption::disabled();
        Ok(config)
    }

    fn roots(&self) -> Result<RootCertStore, rustls::Error> {
        let mut roots = RootCertStore::empty();
        roots.add(self.root.clone())?;
        Ok(roots)
    }

    fn private_key(&self) -> PrivateKeyDer<'static> {
        PrivateKeyDer::Pkcs8(PrivatePkcs8KeyDer::from(self.key.clone()))
    }
}

/// The crypto provider `ring`, even where the program links others.
fn provider() -> Arc<CryptoProvider> {
    Arc::new(rustls::crypto::ring::default_provider())
}

fn key_pair(document: &[u8]) -> Result<KeyPair, rcgen::Error> {
    KeyPair::from_pkcs8_der_and_sign_algo(&PrivatePkcs8KeyDer::from(document), &PKCS_ED25519)
}

/// The parameters of the authority's certificate: bit for bit the same on every member.
fn authority_params() -> CertificateParams {
    let mut params = CertificateParams::default();
    params.distinguished_name = named("exo cluster");
    params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign];
    params.not_before = rcgen::date_time_ymd(2020, 1, 1);
    params.not_after = rcgen::date_time_ymd(2120, 1, 1);
    params.serial_number = Some(1_u64.into());
    params
}

fn named(name: &str) -> DistinguishedName {
    let mut names = DistinguishedName::new();
    names.push(DnType::CommonName, name);
    names
}

/// A node's id as a DNS name of two labels: a label has at most 63 characters, and an id 64.
fn node_name(id: NodeId) -> String {
    let digits = id.to_string();
    format!("{}.{}.exo.internal", &digits[..32], &digits[32..])
}

/// The id of the node to which `certificate`, already verified by rustls, belongs.
pub(crate) fn peer_id(certificate: &CertificateDer<'_>) -> Result<NodeId, PeerIdError> {
    let parsed = webpki::EndEntityCert::try_from(certificate).map_err(|_| PeerIdError::Unreadable)?;
    let spki = parsed.subject_public_key_info();
    let key = spki.strip_prefix(&ED25519_SPKI_HEAD[..]).filter(|key| key.len() == 32);
    let id = NodeId::of_key(key.ok_or(PeerIdError::NotEd25519)?);
    let name = ServerName::try_from(node_name(id)).map_err(|_| PeerIdError::Unreadable)?;
    parsed.verify_is_valid_for_subject_name(&name).map_err(|_| PeerIdError::WrongName)?;
    Ok(id)
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    /// A certificate that names another node than its key.
    pub(crate) fn impostor(identity: &Identity, secret: &ClusterSecret, name: NodeId) -> Credentials {
        let validity = Validity::from_now(SystemTime::now());
        Credentials::make_named(identity, secret, validity, name).expect("a certificate")
    }

    /// A client that trusts the root of `trusted`, and shows the certificate of `shown`, or none.
    pub(crate) fn client_trusting(trusted: &Credentials, shown: Option<&Credentials>, protocol: &[u8]) -> ClientConfig {
        let builder = ClientConfig::builder_with_provider(provider())
            .with_protocol_versions(&[&rustls::version::TLS13])
            .expect("TLS 1.3")
            .with_root_certificates(trusted.roots().expect("a root"));
        let mut config = match shown {
            Some(shown) => builder
                .with_client_auth_cert(vec![shown.certificate.clone()], shown.private_key())
                .expect("a certificate"),
            None => builder.with_no_client_auth(),
        };
        config.alpn_protocols = vec![protocol.to_vec()];
        config
    }

    fn secret(byte: u8) -> ClusterSecret {
        ClusterSecret::from_bytes([byte; 32])
    }

    /// ractor_cluster builds rustls with aws-lc-rs, too, so each configuration has to choose.
    #[test]
    fn every_configuration_uses_ring() {
        let identity = Identity::ephemeral().expect("a key");
        let validity = Validity::from_now(SystemTime::now());
        let credentials = Credentials::make(&identity, &secret(1), validity).expect("a certificate");
        let server = credentials.server(&[b"test"]).expect("a configuration");
        let client = credentials.client(b"test").expect("a configuration");
        for provider in [server.crypto_provider(), client.crypto_provider()] {
            let names = [format!("{:?}", provider.secure_random), format!("{:?}", provider.key_provider)];
            assert_eq!(names, ["Ring", "Ring"]);
        }
    }

    #[test]
    fn members_agree_on_the_authority_and_keep_their_own_ids() {
        let (a, b) = (Identity::ephemeral().expect("a key"), Identity::ephemeral().expect("a key"));
        let validity = Validity::from_now(SystemTime::now());
        let [of_a, of_b] =
            [&a, &b].map(|identity| Credentials::make(identity, &secret(1), validity).expect("a certificate"));
        assert_eq!(of_a.root, of_b.root);
        assert_ne!(of_a.root, Credentials::make(&a, &secret(2), validity).expect("a certificate").root);
        assert_eq!(peer_id(&of_a.certificate), Ok(a.node_id()));
        assert_eq!(peer_id(&of_b.certificate), Ok(b.node_id()));
    }

    #[test]
    fn a_certificate_is_renewed_each_day_and_when_the_clock_is_set() {
        let now = SystemTime::UNIX_EPOCH + Duration::from_secs(20_000 * 24 * 3600);
        let hours = |count: u64| Duration::from_secs(count * 3600);
        assert!(!is_stale(now, now + hours(23)) && !is_stale(now, now - hours(23)), "less than a day away");
        assert!(is_stale(now, now + hours(24)));
        assert!(is_stale(SystemTime::UNIX_EPOCH, now), "a board that started at a past date");
        assert!(is_stale(now, SystemTime::UNIX_EPOCH), "a clock that was in the future");
    }

    #[test]
    fn a_name_that_does_not_match_the_key_is_refused() {
        let (a, b) = (Identity::ephemeral().expect("a key"), Identity::ephemeral().expect("a key"));
        let forged = impostor(&a, &secret(1), b.node_id());
        assert_eq!(peer_id(&forged.certificate), Err(PeerIdError::WrongName));
        assert_eq!(peer_id(&CertificateDer::from(vec![1, 2, 3])), Err(PeerIdError::Unreadable));
    }
}
