//! Decoding of the quantised block formats.
//!
//! Every format decodes to the same form, 32 values at a time: value = scale · (level of code − zero) + min, with one
//! scale (and min) for each half of 16. Source of the layouts: `ggml-common.h` and `ggml-quants.c` of the ggml project.

use super::ElementType;

/// Values in a [`Block`].
pub const BLOCK: usize = 32;

/// 32 values of a quantised row.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Block {
    /// Unsigned codes of 2, 3, 4, 5, 6 or 8 bits, as the format has.
    pub codes: [u8; BLOCK],
    /// Scales of values 0–15 and 16–31; equal if the format has one scale for all 32.
    pub scales: [f32; 2],
    /// Minima of values 0–15 and 16–31; zero for a format without minima.
    pub mins: [f32; 2],
}

/// The properties that all blocks of a format share.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Coding {
    /// Bits of a code, from 2 to 8.
    pub bits: u32,
    /// The levels that codes stand for.
    pub levels: Levels,
    /// The level of the value 0 in a format without minima; else 0.
    pub zero: i32,
    /// Whether blocks have minima.
    pub has_mins: bool,
    /// Whether the halves of a block have separate scales (and minima).
    pub split: bool,
}

/// The mapping from codes to levels.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Levels {
    /// Each code is its own level.
    Even,
    /// The sixteen values of a four-bit float, doubled, plus 12 (OCP MX v1.0, §5.3.3). A block's scale is a power of
    /// two, of any size that an f32 has.
    Fp4,
    /// The sixteen values of ggml's IQ4 formats, plus 127.
    Iq4,
}

impl Levels {
    /// The level of each code; `None` if each code is its own level.
    pub fn table(self) -> Option<&'static [u8; 16]> {
        match self {
            Self::Even => None,
            Self::Fp4 => Some(&[12, 13, 14, 15, 16, 18, 20, 24, 12, 11, 10, 9, 8, 6, 4, 0]),
            Self::Iq4 => Some(&[0, 23, 44, 62, 78, 92, 105, 117, 128, 140, 152, 165, 180, 196, 216, 240]),
        }
    }
}

impl Coding {
    /// The coding of `element`, or `None` for dense floats.
    pub const fn of(element: ElementType) -> Option<Self> {
        let (bits, zero, has_mins, split) = match element {
            ElementType::F32 | ElementType::F16 | ElementType::BF16 => return None,
            ElementType::Q2_K => (2, 0, true, true),
            ElementType::Q3_K => (3, 4, false, true),
            ElementType::Q4_0 => (4, 8, false, false),
            ElementType::Q4_1 | ElementType::Q4_K => (4, 0, true, false),
            ElementType::Q5_0 => (5, 16, false, false),
            ElementType::Q5_1 | ElementType::Q5_K => (5, 0, true, false),
            ElementType::Q6_K => (6, 32, false, true),
            ElementType::Q8_0 => (8, 128, false, false),
            ElementType::IQ4_NL | ElementType::IQ4_XS => (4, 127, false, false),
            ElementType::MXFP4 => (4, 12, false, false),
        };
        let levels = match element {
            ElementType::IQ4_NL | ElementType::IQ4_XS => Levels::Iq4,
            ElementType::MXFP4 => Levels::Fp4,
            _ => Levels::Even,
        };
        Some(Self { bits, levels, zero, has_mins, split })
    }

    /// Whether the levels are those of ggml's IQ4 formats, which take eight bits.
    pub const fn is_iq4(self) -> bool {
        matches!(self.levels, Levels::Iq4)
    }

    /// The lowest and the highest level minus [`Coding::zero`].
    pub fn level_range(self) -> (i32, i32) {
        let (lowest, highest) = match self.levels {
            Levels::Even => (0, (1 << self.bits) - 1),
            Levels::Fp4 => (0, 24),
            Levels::Iq4 => (0, 240),
        };
        (lowest - self.zero, highest - self.zero)
    }

    /// The level of `code` minus [`Coding::zero`].
    pub fn level(self, code: u8) -> i32 {
        let level = self.levels.table().map_or(code, |table| table[usize::from(code & 15)]);
        i32::from(level) - self.zero
    }
}

/// Decodes the `index`-th block of 32 values of `row`, which is stored as `element`.
///
/// # Panics
/// If `element` is dense, or the row has no such block. Both are checked when a tensor is opened.
#[inline(always)]
pub fn decode(element: ElementType, row: &[u8], index: usize) -> Block {
    let per_block = element.block_values() / BLOCK;
    let bytes = element.block_bytes();
    let part = index % per_block.max(1);
    let start = index / per_block.max(1) * bytes;
    let block = &row[start..start + bytes];
    match element {
        ElementType::Q4_0 => one_scale(nibbles(&block[2..18]), float(block, 0), 0.0),
        ElementType::Q4_1 => one_scale(nibbles(&block[4..20]), float(block, 0), float(block, 2)),
        ElementType::Q5_0 => one_scale(fifth_bits(&block[6..22], &block[2..6]), float(block, 0), 0.0),
        ElementType::Q5_1 => one_scale(fifth_bits(&block[8..24], &block[4..8]), float(block, 0), float(block, 2)),
        ElementType::Q8_0 => q8_0(block),
        ElementType::IQ4_NL => one_scale(nibbles(&block[2..18]), float(block, 0), 0.0),
        ElementType::MXFP4 => one_scale(nibbles(&block[1..17]), half_power_of_two(block[0]), 0.0),
        ElementType::Q2_K => q2_k(block, part),
        ElementType::Q3_K => q3_k(block, part),
        ElementType::IQ4_XS => iq4_xs(block, part),
        ElementType::Q4_K => q4_k(block, part),
        ElementType::Q5_K => q5_k(block, part),
        ElementType::Q6_K => q6_k(block, part),
        ElementType::F32 | ElementType::F16 | ElementType::BF16 => {
            unreachable!("a dense row has no blocks")
        }
    }
}

/// Returns the factor that all scales around block `index` share, in the types that store scales as its multiples.
///
/// # Panics
/// If the row has no such block.
#[inline(always)]
pub fn shared_scale(element: ElementType, row: &[u8], index: usize) -> Option<f32> {
    let at = match element {
        ElementType::Q2_K => 80,
        ElementType::Q3_K => 108,
        ElementType::Q4_K | ElementType::Q5_K | ElementType::IQ4_XS => 0,
        ElementType::Q6_K => 208,
        _ => return None,
    };
    let start = index / (element.block_values() / BLOCK) * element.block_bytes();
    Some(float(&row[start..], at))
}

/// Decodes `row` into f32 values.
///
/// # Panics
/// If `row` is quantised and has fewer blocks than `out` needs.
#[inline(always)]
pub fn dequantise_row(element: ElementType, row: &[u8], out: &mut [f32]) {
    match element {
        ElementType::F32 => {
            for (value, bytes) in out.iter_mut().zip(row.as_chunks::<4>().0) {
                *value = f32::from_le_bytes(*bytes);
            }
        }
        ElementType::F16 => {
            for (value, bytes) in out.iter_mut().zip(row.as_chunks::<2>().0) {
                *value = f16_value(u16::from_le_bytes(*bytes));
            }
        }
        ElementType::BF16 => {
            for (value, bytes) in out.iter_mut().zip(row.as_chunks::<2>().0) {
                *value = half::bf16::from_le_bytes(*bytes).to_f32();
            }
        }
        quantised => {
            let Some(coding) = Coding::of(quantised) else { return };
            for (index, values) in out.chunks_mut(BLOCK).enumerate() {
                let block = decode(quantised, row, index);
                for (i, value) in values.iter_mut().enumerate() {
                    let half = i / 16;
                    *value = block.scales[half] * coding.level(block.codes[i]) as f32 + block.mins[half];
                }
            }
        }
    }
}

#[inline(always)]
fn float(block: &[u8], at: usize) -> f32 {
    f16_value(u16::from_le_bytes([block[at], block[at + 1]]))
}

/// The value of a float of 16 bits. Unlike the conversion of the crate `half`, which asks for the processor's features,
/// this one is inlined into kernels and vectorised.
#[inline(always)]
fn f16_value(bits: u16) -> f32 {
    /// 112 is the difference between the exponents' biases of f32 and f16.
    const BIAS: u32 = 112 << 23;
    const EXPONENT: u32 = 31 << 23;
    const SMALLEST_NORMAL: u32 = BIAS + (1 << 23);
    let magnitude = u32::from(bits & 0x7fff) << 13;
    let value = match magnitude & EXPONENT {
        0 => (f32::from_bits(SMALLEST_NORMAL | magnitude) - f32::from_bits(SMALLEST_NORMAL)).to_bits(),
        EXPONENT => magnitude + 2 * BIAS,
        _ => magnitude + BIAS,
    };
    f32::from_bits(value | u32::from(bits & 0x8000) << 16)
}

#[inline(always)]
fn one_scale(codes: [u8; BLOCK], scale: f32, min: f32) -> Block {
    Block { codes, scales: [scale; 2], mins: [min; 2] }
}

/// Unpacks nibbles: the low ones are values 0–15, the high ones values 16–31.
#[inline(always)]
fn nibbles(bytes: &[u8]) -> [u8; BLOCK] {
    std::array::from_fn(|i| if i < 16 { bytes[i] & 15 } else { bytes[i - 16] >> 4 })
}

#[inline(always)]
fn fifth_bits(low: &[u8], high: &[u8]) -> [u8; BLOCK] {
    let mut codes = nibbles(low);
    for (i, code) in codes.iter_mut().enumerate() {
        *code |= (high[i / 8] >> (i % 8) & 1) << 4;
    }
    codes
}

#[inline(always)]
fn q8_0(block: &[u8]) -> Block {
    // Signed bytes become unsigned codes around 128.
    one_scale(std::array::from_fn(|i| block[2 + i] ^ 0x80), float(block, 0), 0.0)
}

/// Half of an E8M0 scale, 2^(exponent − 128), because the levels are doubled. An exponent of 255 means NaN.
#[inline(always)]
fn half_power_of_two(exponent: u8) -> f32 {
    match exponent {
        255 => f32::NAN,
        0 | 1 => f32::from_bits(0x0020_0000 << exponent),
        _ => f32::from_bits(u32::from(exponent - 1) << 23),
    }
}

/// Unpacks the 2-bit codes of part `part` of 8. Four parts share 32 bytes.
#[inline(always)]
fn k_pairs(bytes: &[u8], part: usize) -> [u8; BLOCK] {
    let four = &bytes[part / 4 * 32..][..32];
    std::array::from_fn(|i| four[i] >> (part % 4 * 2) & 3)
}

#[inline(always)]
fn q2_k(block: &[u8], part: usize) -> Block {
    let (d, dmin) = (float(block, 80), float(block, 82));
    let packed = [block[part * 2], block[part * 2 + 1]];
    Block {
        codes: k_pairs(&block[16..80], part),
        scales: packed.map(|both| d * f32::from(both & 15)),
        mins: packed.map(|both| -dmin * f32::from(both >> 4)),
    }
}

#[inline(always)]
fn q3_k(block: &[u8], part: usize) -> Block {
    let (high, packed, d) = (&block[..32], &block[96..108], float(block, 108));
    let mut codes = k_pairs(&block[32..96], part);
    for (code, bits) in codes.iter_mut().zip(high) {
        *code |= (bits >> part & 1) << 2;
    }
    // Sixteen 6-bit scales: eight bytes hold two low nibbles each, four bytes hold the upper two bits of four scales.
    let scale = |index: usize| {
        let low = packed[index % 8] >> (index / 8 * 4) & 15;
        let upper = packed[8 + index % 4] >> (index / 4 * 2) & 3;
        d * (f32::from(low | upper << 4) - 32.0)
    };
    Block { codes, scales: [scale(part * 2), scale(part * 2 + 1)], mins: [0.0; 2] }
}

#[inline(always)]
fn iq4_xs(block: &[u8], part: usize) -> Block {
    let upper = u16::from_le_bytes([block[2], block[3]]) >> (part * 2) & 3;
    let scale = block[4 + part / 2] >> (part % 2 * 4) & 15 | (upper as u8) << 4;
    one_scale(nibbles(&block[8 + part * 16..][..16]), float(block, 0) * (f32::from(scale) - 32.0), 0.0)
}

/// The 6-bit scale and minimum of part `part` of 8. The upper bits of parts 4–7 lie in the bytes of parts 0–3.
#[inline(always)]
fn k_scale_min(packed: &[u8], part: usize) -> (f32, f32) {
    let (scale, min) = if part < 4 {
        (packed[part] & 63, packed[part + 4] & 63)
    } else {
        (packed[part + 4] & 15 | packed[part - 4] >> 6 << 4, packed[part + 4] >> 4 | packed[part] >> 6 << 4)
    };
    (f32::from(scale), f32::from(min))
}

/// Unpacks the codes of `part`. Two parts share 32 bytes: the even part has the low nibbles, the odd part the high.
#[inline(always)]
fn k_nibbles(bytes: &[u8], part: usize) -> [u8; BLOCK] {
    let pair = &bytes[part / 2 * 32..][..32];
    std::array::from_fn(|i| pair[i] >> (part % 2 * 4) & 15)
}

#[inline(always)]
fn q4_k(block: &[u8], part: usize) -> Block {
    let (scale, min) = k_scale_min(&block[4..16], part);
    one_scale(k_nibbles(&block[16..144], part), float(block, 0) * scale, -float(block, 2) * min)
}

#[inline(always)]
fn q5_k(block: &[u8], part: usize) -> Block {
    let (scale, min) = k_scale_min(&block[4..16], part);
    let high = &block[16..48];
    let mut codes = k_nibbles(&block[48..176], part);
    for (code, bits) in codes.iter_mut().zip(high) {
        *code |= (bits >> part & 1) << 4;
    }
    one_scale(codes, float(block, 0) * scale, -float(block, 2) * min)
}

#[inline(always)]
fn q6_k(block: &[u8], part: usize) -> Block {
    let (group, column) = (part / 4, part % 4);
    let low = &block[group * 64..][..64];
    let high = &block[128 + group * 32..][..32];
    let scales = &block[192 + group * 8..][..8];
    let d = float(block, 208);
    let low_start = column % 2 * 32;
    Block {
        codes: std::array::from_fn(|i| {
            (low[low_start + i] >> (column / 2 * 4) & 15) | (high[i] >> (column * 2) & 3) << 4
        }),
        scales: [0, 1].map(|half| d * f32::from(scales[column * 2 + half] as i8)),
        mins: [0.0; 2],
    }
}

#[cfg(test)]
mod tests;
