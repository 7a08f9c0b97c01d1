//! The encoding of values between members. No other module uses bincode.
//!
//! Decoding checks lengths before it allocates memory, and must consume all bytes.

use serde::Serialize;
use serde::de::DeserializeOwned;

/// The longest value, in bytes: a prompt of 128k tokens with all its data has less than 1 MiB.
pub const VALUE_BYTES_MAX: usize = 4 << 20;

/// Why a value cannot be encoded or decoded.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum WireError {
    /// The value cannot be encoded; the text says why.
    #[error("a value cannot be encoded: {0}")]
    Encode(String),
    /// The bytes cannot be decoded, or continue after the value; the text says why.
    #[error("a value from a peer cannot be decoded: {0}")]
    Decode(String),
    /// The encoded value is longer than [`VALUE_BYTES_MAX`].
    #[error("a value has {bytes} bytes; at most {VALUE_BYTES_MAX} are allowed")]
    TooLong {
        /// The length in bytes.
        bytes: usize,
    },
}

/// The encoded bytes of `value`.
///
/// # Errors
/// [`WireError`] where the value is too long or cannot be encoded.
pub fn encode<T: Serialize>(value: &T) -> Result<Vec<u8>, WireError> {
    let bytes = bincode::serde::encode_to_vec(value, bincode::config::standard());
    let bytes = bytes.map_err(|error| WireError::Encode(error.to_string()))?;
    match bytes.len() {
        0..=VALUE_BYTES_MAX => Ok(bytes),
        bytes => Err(WireError::TooLong { bytes }),
    }
}

/// The value that `bytes` encode.
///
/// # Errors
/// [`WireError`] where `bytes` are too long, do not encode a `T`, or continue after it.
pub fn decode<T: DeserializeOwned>(bytes: &[u8]) -> Result<T, WireError> {
    if bytes.len() > VALUE_BYTES_MAX {
        return Err(WireError::TooLong { bytes: bytes.len() });
    }
    let config = bincode::config::standard().with_limit::<VALUE_BYTES_MAX>();
    let decoded = bincode::serde::decode_from_slice(bytes, config);
    let (value, read) = decoded.map_err(|error| WireError::Decode(error.to_string()))?;
    match bytes.len() - read {
        0 => Ok(value),
        rest => Err(WireError::Decode(format!("{rest} bytes follow the value"))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn a_value_round_trips_and_trailing_bytes_are_refused() {
        let value = (7_u64, "seven".to_owned(), vec![1_u32, 2, 3]);
        let mut bytes = encode(&value).expect("encoded");
        assert_eq!(decode::<(u64, String, Vec<u32>)>(&bytes), Ok(value));
        bytes.push(0);
        assert!(decode::<(u64, String, Vec<u32>)>(&bytes).is_err());
    }

    #[test]
    fn an_impossible_length_is_refused_before_memory_is_allocated() {
        // 253: a length of eight bytes follows.
        let bytes = [253, 255, 255, 255, 255, 255, 255, 255, 127];
        assert!(decode::<Vec<u8>>(&bytes).is_err());
        assert!(decode::<Vec<Vec<u64>>>(&bytes).is_err());
        assert_eq!(decode::<u8>(&vec![0; VALUE_BYTES_MAX + 1]), Err(WireError::TooLong { bytes: VALUE_BYTES_MAX + 1 }));
    }

    proptest! {
        #[test]
        fn arbitrary_bytes_never_panic(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
            let _ = decode::<Vec<(String, Option<Vec<u32>>)>>(&bytes);
            let _ = decode::<(u64, Result<String, u8>)>(&bytes);
        }
    }
}
