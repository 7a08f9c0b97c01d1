//! The quantised block formats, taken apart.
//!
//! Every format becomes the same thing, 32 values at a time: value = scale · (code − zero) + min, with one scale
//! (and min) for each half of 16. Source of the layouts: `ggml-common.h` and `ggml-quants.c` of the ggml project.

use super::ElementType;
use half::f16;

/// Values in a [`Block`].
pub const BLOCK: usize = 32;

/// 32 values of a quantised row.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Block {
    /// Unsigned codes: 4, 5, 6 or 8 bits, as the format has.
    pub codes: [u8; BLOCK],
    /// For values 0–15 and 16–31; equal where the format has one for all 32.
    pub scales: [f32; 2],
    /// Likewise; zero for a format without minima.
    pub mins: [f32; 2],
}

/// What all blocks of a format share.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Coding {
    /// Bits of a code.
    pub bits: u32,
    /// The code that means nought, where the format has no minima; else 0.
    pub zero: i32,
    /// Whether a block's minima differ from nought.
    pub has_mins: bool,
    /// Whether the halves of a block have scales of their own.
    pub split_scales: bool,
}

impl Coding {
    /// The coding of `element`, or `None` for dense floats.
    pub fn of(element: ElementType) -> Option<Self> {
        let (bits, zero, has_mins, split_scales) = match element {
            ElementType::F32 | ElementType::F16 | ElementType::BF16 => return None,
            ElementType::Q4_0 => (4, 8, false, false),
            ElementType::Q4_1 | ElementType::Q4_K => (4, 0, true, false),
            ElementType::Q5_0 => (5, 16, false, false),
            ElementType::Q5_1 | ElementType::Q5_K => (5, 0, true, false),
            ElementType::Q6_K => (6, 32, false, true),
            ElementType::Q8_0 => (8, 128, false, false),
        };
        Some(Self { bits, zero, has_mins, split_scales })
    }
}

/// The `index`-th block of 32 values in `row`, a row stored as `element`.
///
/// # Panics
/// Where `element` is dense, or the row has no such block: both are checked when a tensor is opened.
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
        ElementType::Q4_K => q4_k(block, part),
        ElementType::Q5_K => q5_k(block, part),
        ElementType::Q6_K => q6_k(block, part),
        ElementType::F32 | ElementType::F16 | ElementType::BF16 => {
            unreachable!("a dense row has no blocks")
        }
    }
}

/// The values of `row`, in f32.
///
/// # Panics
/// Where `row` is shorter than `out` asks for.
pub fn dequantise_row(element: ElementType, row: &[u8], out: &mut [f32]) {
    match element {
        ElementType::F32 => {
            for (value, bytes) in out.iter_mut().zip(row.as_chunks::<4>().0) {
                *value = f32::from_le_bytes(*bytes);
            }
        }
        ElementType::F16 => {
            for (value, bytes) in out.iter_mut().zip(row.as_chunks::<2>().0) {
                *value = f16::from_le_bytes(*bytes).to_f32();
            }
        }
        ElementType::BF16 => {
            for (value, bytes) in out.iter_mut().zip(row.as_chunks::<2>().0) {
                *value = half::bf16::from_le_bytes(*bytes).to_f32();
            }
        }
        quantised => {
            let zero = Coding::of(quantised).map_or(0, |coding| coding.zero);
            for (index, values) in out.chunks_mut(BLOCK).enumerate() {
                let block = decode(quantised, row, index);
                for (i, value) in values.iter_mut().enumerate() {
                    let half = i / 16;
                    *value = block.scales[half] * (i32::from(block.codes[i]) - zero) as f32 + block.mins[half];
                }
            }
        }
    }
}

fn float(block: &[u8], at: usize) -> f32 {
    f16::from_le_bytes([block[at], block[at + 1]]).to_f32()
}

fn one_scale(codes: [u8; BLOCK], scale: f32, min: f32) -> Block {
    Block { codes, scales: [scale; 2], mins: [min; 2] }
}

/// Low nibbles are values 0–15, high nibbles 16–31.
fn nibbles(bytes: &[u8]) -> [u8; BLOCK] {
    std::array::from_fn(|i| if i < 16 { bytes[i] & 15 } else { bytes[i - 16] >> 4 })
}

fn fifth_bits(low: &[u8], high: &[u8]) -> [u8; BLOCK] {
    let mut codes = nibbles(low);
    for (i, code) in codes.iter_mut().enumerate() {
        *code |= (high[i / 8] >> (i % 8) & 1) << 4;
    }
    codes
}

fn q8_0(block: &[u8]) -> Block {
    // Signed bytes become unsigned codes around 128.
    one_scale(std::array::from_fn(|i| block[2 + i] ^ 0x80), float(block, 0), 0.0)
}

/// The 6-bit scale and minimum of part `part` of 8: four whole ones, then four whose upper bits lie in the first four.
fn k_scale_min(packed: &[u8], part: usize) -> (f32, f32) {
    let (scale, min) = if part < 4 {
        (packed[part] & 63, packed[part + 4] & 63)
    } else {
        (packed[part + 4] & 15 | packed[part - 4] >> 6 << 4, packed[part + 4] >> 4 | packed[part] >> 6 << 4)
    };
    (f32::from(scale), f32::from(min))
}

/// Parts come in pairs that share 32 bytes: the even one has the low nibbles, the odd one the high.
fn k_nibbles(bytes: &[u8], part: usize) -> [u8; BLOCK] {
    let pair = &bytes[part / 2 * 32..][..32];
    std::array::from_fn(|i| pair[i] >> (part % 2 * 4) & 15)
}

fn q4_k(block: &[u8], part: usize) -> Block {
    let (scale, min) = k_scale_min(&block[4..16], part);
    one_scale(k_nibbles(&block[16..144], part), float(block, 0) * scale, -float(block, 2) * min)
}

fn q5_k(block: &[u8], part: usize) -> Block {
    let (scale, min) = k_scale_min(&block[4..16], part);
    let high = &block[16..48];
    let mut codes = k_nibbles(&block[48..176], part);
    for (code, bits) in codes.iter_mut().zip(high) {
        *code |= (bits >> part & 1) << 4;
    }
    one_scale(codes, float(block, 0) * scale, -float(block, 2) * min)
}

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
mod tests {
    use super::*;
    use candle_core::quantized::{GgmlDType, QTensor};
    use candle_core::{Device, Tensor};

    fn candle_type(element: ElementType) -> GgmlDType {
        match element {
            ElementType::F32 => GgmlDType::F32,
            ElementType::F16 => GgmlDType::F16,
            ElementType::BF16 => GgmlDType::BF16,
            ElementType::Q4_0 => GgmlDType::Q4_0,
            ElementType::Q4_1 => GgmlDType::Q4_1,
            ElementType::Q5_0 => GgmlDType::Q5_0,
            ElementType::Q5_1 => GgmlDType::Q5_1,
            ElementType::Q8_0 => GgmlDType::Q8_0,
            ElementType::Q4_K => GgmlDType::Q4K,
            ElementType::Q5_K => GgmlDType::Q5K,
            ElementType::Q6_K => GgmlDType::Q6K,
        }
    }

    /// R4.3: every weight type reads as candle, an independent implementation, reads it.
    #[test]
    fn every_type_dequantises_as_candle_does() -> candle_core::Result<()> {
        let values: Vec<f32> = (0..1024).map(|i| (i as f32 * 0.37).sin() * (1.0 + i as f32 / 300.0)).collect();
        let tensor = Tensor::from_vec(values, (2, 512), &Device::Cpu)?;
        for element in ElementType::ALL {
            let quantised = QTensor::quantize(&tensor, candle_type(element))?;
            let expected = quantised.dequantize(&Device::Cpu)?.flatten_all()?.to_vec1::<f32>()?;
            let bytes = quantised.data()?;
            let mut got = vec![0.0; 1024];
            let row_bytes = element.row_bytes(512).expect("512 values are whole blocks");
            for (row, out) in bytes.chunks(row_bytes).zip(got.chunks_mut(512)) {
                dequantise_row(element, row, out);
            }
            for (i, (got, expected)) in got.iter().zip(&expected).enumerate() {
                let close = (got - expected).abs() <= 1e-6 * expected.abs().max(1e-3);
                assert!(close, "{element}[{i}]: {got}, candle has {expected}");
            }
        }
        Ok(())
    }
}
