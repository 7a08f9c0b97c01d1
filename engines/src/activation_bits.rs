//! The precision of activations in matrix products.

use serde::{Deserialize, Serialize};
use std::str::FromStr;

/// Bits of an activation in the products of exo's own engines.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default, Serialize, Deserialize)]
pub enum ActivationBits {
    /// 16 bits: log-probabilities agree with single precision to 0.01.
    #[default]
    Sixteen,
    /// 8 bits: half the work where products limit the speed, for some accuracy.
    Eight,
}

impl ActivationBits {
    /// All precisions.
    pub const ALL: [Self; 2] = [Self::Sixteen, Self::Eight];

    /// Returns the name for options and fingerprints: `16` or `8`.
    pub fn name(self) -> &'static str {
        match self {
            Self::Sixteen => "16",
            Self::Eight => "8",
        }
    }
}

impl FromStr for ActivationBits {
    type Err = UnknownActivationBits;

    fn from_str(name: &str) -> Result<Self, UnknownActivationBits> {
        let named = Self::ALL.into_iter().find(|bits| bits.name() == name);
        named.ok_or_else(|| UnknownActivationBits(name.to_owned()))
    }
}

/// A name that no precision of activations has.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("`{0}` is not a precision of activations: use 16 or 8")]
pub struct UnknownActivationBits(pub String);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_precision_is_found_by_its_name() {
        for bits in ActivationBits::ALL {
            assert_eq!(bits.name().parse(), Ok(bits));
        }
        let error = "4".parse::<ActivationBits>().expect_err("not a precision");
        assert!(error.to_string().contains("`4`"));
    }
}
