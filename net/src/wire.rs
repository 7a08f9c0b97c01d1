//! Values as bytes between members: bincode, in this one place.
//!
//! What is read is bounded before memory is asked for, and must be read to its end.

use serde::Serialize;
use serde::de::DeserializeOwned;

/// The longest value: a prompt of 128k tokens with all that is known of it has less than 1 MiB.
pub const VALUE_BYTES_MAX: usize = 4 << 20;

/// Why bytes are not the value that was expected, or a value cannot be sent.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum WireError {
    #[error("a value could not be written: {0}")]
    Encode(String),
    #[error("bytes from a peer are not what they should be: {0}")]
    Decode(String),
    #[error("a value of {bytes} bytes; at most {VALUE_BYTES_MAX} are allowed")]
    TooLong { bytes: usize },
}

/// The bytes of `value`.
///
/// # Errors
/// [`WireError`] where it is too long, or cannot be written.
pub fn encode<T: Serialize>(value: &T) -> Result<Vec<u8>, WireError> {
    let bytes = bincode::serde::encode_to_vec(value, bincode::config::standard());
    let bytes = bytes.map_err(|error| WireError::Encode(error.to_string()))?;
    match bytes.len() {
        0..=VALUE_BYTES_MAX => Ok(bytes),
        bytes => Err(WireError::TooLong { bytes }),
    }
}

/// The value that `bytes` are.
///
/// # Errors
/// [`WireError`] where they are too long, or are not such a value, or more than one.
pub fn decode<T: DeserializeOwned>(bytes: &[u8]) -> Result<T, WireError> {
    if bytes.len() > VALUE_BYTES_MAX {
        return Err(WireError::TooLong { bytes: bytes.len() });
    }
    let config = bincode::config::standard().with_limit::<VALUE_BYTES_MAX>();
    let decoded = bincode::serde::decode_from_slice(bytes, config);
    let (value, read) = decoded.map_err(|error| WireError::Decode(error.to_string()))?;
    match bytes.len() - read {
        0 => Ok(value),
        rest => Err(WireError::Decode(format!("{rest} bytes too many"))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn a_value_is_read_as_it_was_written_and_to_its_end() {
        let value = (7_u64, "seven".to_owned(), vec![1_u32, 2, 3]);
        let mut bytes = encode(&value).expect("written");
        assert_eq!(decode::<(u64, String, Vec<u32>)>(&bytes), Ok(value));
        bytes.push(0);
        assert!(decode::<(u64, String, Vec<u32>)>(&bytes).is_err());
    }

    #[test]
    fn a_length_that_cannot_be_is_refused_before_memory_is_asked_for() {
        // 253: a length of eight bytes follows.
        let bytes = [253, 255, 255, 255, 255, 255, 255, 255, 127];
        assert!(decode::<Vec<u8>>(&bytes).is_err());
        assert!(decode::<Vec<Vec<u64>>>(&bytes).is_err());
        assert_eq!(decode::<u8>(&vec![0; VALUE_BYTES_MAX + 1]), Err(WireError::TooLong { bytes: VALUE_BYTES_MAX + 1 }));
    }

    proptest! {
        #[test]
        fn garbage_is_refused_and_nothing_worse(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
            let _ = decode::<Vec<(String, Option<Vec<u32>>)>>(&bytes);
            let _ = decode::<(u64, Result<String, u8>)>(&bytes);
        }
    }
}
