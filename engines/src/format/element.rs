//! How the numbers of a tensor are stored: dense floats, or blocks of small codes with their scales.
//!
//! Source of GGUF's type numbers and layouts: `ggml.h` and `ggml-quants.h` of the ggml project.

use serde::{Deserialize, Serialize};

/// A storage type that the engines compute on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[allow(non_camel_case_types)]
pub enum ElementType {
    /// Single-precision floats, 4 bytes each.
    F32,
    /// Half-precision floats, 2 bytes each.
    F16,
    /// bfloat16, 2 bytes each.
    BF16,
    /// 4-bit codes; a scale for each 32 values.
    Q4_0,
    /// 4-bit codes; a scale and a minimum for each 32 values.
    Q4_1,
    /// 5-bit codes; a scale for each 32 values.
    Q5_0,
    /// 5-bit codes; a scale and a minimum for each 32 values.
    Q5_1,
    /// 8-bit codes; a scale for each 32 values.
    Q8_0,
    /// 2-bit codes in blocks of 256 values; a 4-bit scale and minimum for each 16 values.
    Q2_K,
    /// 3-bit codes in blocks of 256 values; a 6-bit scale for each 16 values.
    Q3_K,
    /// 4-bit codes in blocks of 256 values; a 6-bit scale and minimum for each 32 values.
    Q4_K,
    /// 5-bit codes in blocks of 256 values; a 6-bit scale and minimum for each 32 values.
    Q5_K,
    /// 6-bit codes in blocks of 256 values; an 8-bit scale for each 16 values.
    Q6_K,
    /// 4-bit codes of 16 uneven levels; a scale for each 32 values.
    IQ4_NL,
    /// 4-bit codes of 16 uneven levels in blocks of 256 values; a 6-bit scale for each 32 values.
    IQ4_XS,
    /// 4-bit floats; a power of two as the scale of each 32 values.
    MXFP4,
}

impl ElementType {
    /// Every type that the engines compute on.
    pub const ALL: [Self; 16] = [
        Self::F32,
        Self::F16,
        Self::BF16,
        Self::Q4_0,
        Self::Q4_1,
        Self::Q5_0,
        Self::Q5_1,
        Self::Q8_0,
        Self::Q2_K,
        Self::Q3_K,
        Self::Q4_K,
        Self::Q5_K,
        Self::Q6_K,
        Self::IQ4_NL,
        Self::IQ4_XS,
        Self::MXFP4,
    ];

    /// Values in one block (1, 32 or 256): a row is a whole number of blocks.
    pub fn block_values(self) -> usize {
        match self {
            Self::F32 | Self::F16 | Self::BF16 => 1,
            Self::Q4_0 | Self::Q4_1 | Self::Q5_0 | Self::Q5_1 | Self::Q8_0 | Self::IQ4_NL | Self::MXFP4 => 32,
            Self::Q2_K | Self::Q3_K | Self::Q4_K | Self::Q5_K | Self::Q6_K | Self::IQ4_XS => 256,
        }
    }

    /// Bytes of one block, from 2 to 210.
    pub fn block_bytes(self) -> usize {
        match self {
            Self::F32 => 4,
            Self::F16 | Self::BF16 => 2,
            Self::MXFP4 => 17,
            Self::Q4_0 | Self::IQ4_NL => 18,
            Self::Q4_1 => 20,
            Self::Q5_0 => 22,
            Self::Q5_1 => 24,
            Self::Q8_0 => 34,
            Self::Q2_K => 84,
            Self::Q3_K => 110,
            Self::IQ4_XS => 136,
            Self::Q4_K => 144,
            Self::Q5_K => 176,
            Self::Q6_K => 210,
        }
    }

    /// Whether values are codes in blocks rather than floats.
    pub fn is_quantised(self) -> bool {
        self.block_values() > 1
    }

    /// Bytes of a row of `values` values; `None` if they are not a whole number of blocks, or the result overflows.
    pub fn row_bytes(self, values: usize) -> Option<usize> {
        if !values.is_multiple_of(self.block_values()) {
            return None;
        }
        (values / self.block_values()).checked_mul(self.block_bytes())
    }

    /// The type's common name.
    pub fn name(self) -> &'static str {
        match self {
            Self::F32 => "F32",
            Self::F16 => "F16",
            Self::BF16 => "BF16",
            Self::Q4_0 => "Q4_0",
            Self::Q4_1 => "Q4_1",
            Self::Q5_0 => "Q5_0",
            Self::Q5_1 => "Q5_1",
            Self::Q8_0 => "Q8_0",
            Self::Q2_K => "Q2_K",
            Self::Q3_K => "Q3_K",
            Self::Q4_K => "Q4_K",
            Self::Q5_K => "Q5_K",
            Self::Q6_K => "Q6_K",
            Self::IQ4_NL => "IQ4_NL",
            Self::IQ4_XS => "IQ4_XS",
            Self::MXFP4 => "MXFP4",
        }
    }

    /// Returns the type with this number in a GGUF header; for an unsupported type, its name as the error.
    pub(crate) fn from_gguf(number: u32) -> Result<Self, String> {
        Ok(match number {
            0 => Self::F32,
            1 => Self::F16,
            2 => Self::Q4_0,
            3 => Self::Q4_1,
            6 => Self::Q5_0,
            7 => Self::Q5_1,
            8 => Self::Q8_0,
            10 => Self::Q2_K,
            11 => Self::Q3_K,
            12 => Self::Q4_K,
            13 => Self::Q5_K,
            14 => Self::Q6_K,
            20 => Self::IQ4_NL,
            23 => Self::IQ4_XS,
            30 => Self::BF16,
            39 => Self::MXFP4,
            other => return Err(unsupported_gguf_name(other)),
        })
    }

    /// Returns the type with this name in a safetensors header; `None` for an unsupported type.
    pub(crate) fn from_safetensors(name: &str) -> Option<Self> {
        match name {
            "F32" => Some(Self::F32),
            "F16" => Some(Self::F16),
            "BF16" => Some(Self::BF16),
            _ => None,
        }
    }
}

impl std::fmt::Display for ElementType {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.name())
    }
}

fn unsupported_gguf_name(number: u32) -> String {
    let name = match number {
        9 => "Q8_1",
        15 => "Q8_K",
        16 => "IQ2_XXS",
        17 => "IQ2_XS",
        18 => "IQ3_XXS",
        19 => "IQ1_S",
        21 => "IQ3_S",
        22 => "IQ2_S",
        24 => "I8",
        25 => "I16",
        26 => "I32",
        27 => "I64",
        28 => "F64",
        29 => "IQ1_M",
        34 => "TQ1_0",
        35 => "TQ2_0",
        _ => return format!("type number {number}"),
    };
    name.to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_are_whole_blocks() {
        assert_eq!(ElementType::Q4_0.row_bytes(64), Some(36));
        assert_eq!(ElementType::Q4_0.row_bytes(33), None);
        assert_eq!(ElementType::Q6_K.row_bytes(256), Some(210));
        assert_eq!(ElementType::F16.row_bytes(3), Some(6));
        assert_eq!(ElementType::F32.row_bytes(usize::MAX), None);
    }

    #[test]
    fn an_unsupported_type_is_named() {
        assert_eq!(ElementType::from_gguf(21), Err("IQ3_S".to_owned()));
        assert_eq!(ElementType::from_gguf(77), Err("type number 77".to_owned()));
    }
}
