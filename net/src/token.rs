//! Join tokens: a cluster's secret and members' addresses, as one word that a person carries from machine to machine.
//!
//! `exo1` and URL-safe base64 of: the secret (32 bytes), the number of addresses (1), each as 4 or 6 (1), the IP
//! address (4 or 16), the port (2, big-endian); then the first 4 bytes of the SHA-256 of all that.

use crate::secret::{ClusterSecret, SECRET_BYTES};
use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use ring::digest::{SHA256, digest};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::str::FromStr;

const PREFIX: &str = "exo1";
const CHECK_BYTES: usize = 4;
/// The most addresses in a token: more would make it too long to carry.
const ADDRESSES_MAX: usize = 16;

/// The data that a machine needs to join a cluster.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct JoinToken {
    /// The secret of the cluster to join.
    pub secret: ClusterSecret,
    /// The addresses at which some members listen; discovery finds others.
    pub addresses: Vec<SocketAddr>,
}

/// Why a text is not a join token.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum TokenError {
    /// The text does not begin with the prefix of this version's tokens.
    #[error("not a join token, or one of another version: it does not begin with `{PREFIX}`")]
    Prefix,
    /// The text after the prefix cannot be decoded, or its checksum does not match.
    #[error("the join token is damaged: copy it whole")]
    Damaged,
}

impl std::fmt::Display for JoinToken {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let mut bytes = self.secret.as_bytes().to_vec();
        let addresses = &self.addresses[..self.addresses.len().min(ADDRESSES_MAX)];
        bytes.push(addresses.len() as u8);
        for address in addresses {
            match address.ip() {
                IpAddr::V4(ip) => {
                    bytes.push(4);
                    bytes.extend(ip.octets());
                }
                IpAddr::V6(ip) => {
                    bytes.push(6);
                    bytes.extend(ip.octets());
                }
            }
            bytes.extend(address.port().to_be_bytes());
        }
        let check = digest(&SHA256, &bytes);
        bytes.extend(&check.as_ref()[..CHECK_BYTES]);
        write!(f, "{PREFIX}{}", URL_SAFE_NO_PAD.encode(bytes))
    }
}

impl FromStr for JoinToken {
    type Err = TokenError;

    fn from_str(text: &str) -> Result<Self, TokenError> {
        let encoded = text.trim().strip_prefix(PREFIX).ok_or(TokenError::Prefix)?;
        let bytes = URL_SAFE_NO_PAD.decode(encoded).map_err(|_| TokenError::Damaged)?;
        let (body, check) = bytes.split_last_chunk::<CHECK_BYTES>().ok_or(TokenError::Damaged)?;
        if digest(&SHA256, body).as_ref()[..CHECK_BYTES] != check[..] {
            return Err(TokenError::Damaged);
        }
        let (secret, rest) = body.split_first_chunk::<SECRET_BYTES>().ok_or(TokenError::Damaged)?;
        let addresses = addresses(rest).ok_or(TokenError::Damaged)?;
        Ok(Self { secret: ClusterSecret::from_bytes(*secret), addresses })
    }
}

fn addresses(bytes: &[u8]) -> Option<Vec<SocketAddr>> {
    let (&count, mut rest) = bytes.split_first()?;
    let mut addresses = Vec::new();
    for _ in 0..count {
        let (&kind, tail) = rest.split_first()?;
        let (ip, tail): (IpAddr, &[u8]) = match kind {
            4 => tail.split_first_chunk::<4>().map(|(ip, tail)| (Ipv4Addr::from(*ip).into(), tail))?,
            6 => tail.split_first_chunk::<16>().map(|(ip, tail)| (Ipv6Addr::from(*ip).into(), tail))?,
            _ => return None,
        };
        let (port, tail) = tail.split_first_chunk::<2>()?;
        addresses.push(SocketAddr::new(ip, u16::from_be_bytes(*port)));
        rest = tail;
    }
    rest.is_empty().then_some(addresses)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn token(addresses: &[&str]) -> JoinToken {
        let addresses = addresses.iter().map(|address| address.parse().expect("an address")).collect();
        JoinToken { secret: ClusterSecret::from_bytes([7; 32]), addresses }
    }

    #[test]
    fn a_token_round_trips() {
        for token in [token(&[]), token(&["127.0.0.1:52416", "[fe80::1]:9"])] {
            let text = token.to_string();
            assert!(!text.contains(char::is_whitespace));
            assert_eq!(format!(" {text}\n").parse(), Ok(token));
        }
    }

    #[test]
    fn a_truncated_token_is_refused() {
        let text = token(&["127.0.0.1:52416"]).to_string();
        assert_eq!("hello".parse::<JoinToken>(), Err(TokenError::Prefix));
        for end in PREFIX.len()..text.len() {
            assert_eq!(text[..end].parse::<JoinToken>(), Err(TokenError::Damaged));
        }
    }

    proptest! {
        #[test]
        fn arbitrary_text_never_panics(text in "\\PC{0,80}", bytes in prop::collection::vec(any::<u8>(), 0..80)) {
            let _ = text.parse::<JoinToken>();
            let mut bytes = bytes;
            let check = digest(&SHA256, &bytes);
            bytes.extend(&check.as_ref()[..CHECK_BYTES]);
            if let Ok(token) = format!("{PREFIX}{}", URL_SAFE_NO_PAD.encode(&bytes)).parse::<JoinToken>() {
                prop_assert!(token.addresses.len() <= 255);
            }
        }
    }
}
