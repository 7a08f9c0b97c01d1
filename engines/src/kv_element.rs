//! The types of cached keys and values.

use serde::{Deserialize, Serialize};
use std::str::FromStr;

/// Values of a head that share a scale in a cache of bytes.
pub const BLOCK: usize = 32;

/// The element type of cached keys and values.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default, Serialize, Deserialize)]
pub enum KvElement {
    /// Half-precision floats, 2 bytes each.
    #[default]
    F16,
    /// Single-precision floats, 4 bytes each.
    F32,
    /// Integers of 8 bits with a half-precision scale for each 32 values of a head: 34 bytes.
    Q8_0,
}

impl KvElement {
    /// All types.
    pub const ALL: [Self; 3] = [Self::F16, Self::F32, Self::Q8_0];

    /// Returns the bytes of one head's key, of `values` values.
    pub fn vector_bytes(self, values: usize) -> usize {
        match self {
            Self::F16 => 2 * values,
            Self::F32 => 4 * values,
            Self::Q8_0 => values + 2 * values.div_ceil(BLOCK),
        }
    }

    /// Returns the name for options and fingerprints: `f16`, `f32` or `q8_0`.
    pub fn name(self) -> &'static str {
        match self {
            Self::F16 => "f16",
            Self::F32 => "f32",
            Self::Q8_0 => "q8_0",
        }
    }
}

impl FromStr for KvElement {
    type Err = UnknownKvElement;

    fn from_str(name: &str) -> Result<Self, UnknownKvElement> {
        let named = Self::ALL.into_iter().find(|element| element.name() == name.to_lowercase());
        named.ok_or_else(|| UnknownKvElement(name.to_owned()))
    }
}

/// A name that no type of cached keys and values has.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("`{0}` is not a cache type: use f16, f32 or q8_0")]
pub struct UnknownKvElement(pub String);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_type_is_found_by_its_name() {
        for element in KvElement::ALL {
            assert_eq!(element.name().to_uppercase().parse(), Ok(element));
        }
        let error = "q4_0".parse::<KvElement>().expect_err("not a type");
        assert!(error.to_string().contains("`q4_0`"));
    }

    #[test]
    fn a_key_of_80_values_has_three_scales() {
        let bytes = KvElement::ALL.map(|element| element.vector_bytes(80));
        assert_eq!(bytes, [160, 320, 86]);
    }
}
