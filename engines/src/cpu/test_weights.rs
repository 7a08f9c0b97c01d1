//! Random weights for tests, in any element type.

use crate::format::ElementType;
use half::f16;

/// Returns `rows` × `columns` random weights of plausible magnitude, encoded as in a file.
pub(crate) fn bytes(element: ElementType, rows: usize, columns: usize, seed: u64) -> Vec<u8> {
    let mut random = fastrand::Rng::with_seed(seed);
    let blocks = rows * columns / element.block_values();
    let mut out = Vec::new();
    for _ in 0..blocks {
        let mut block: Vec<u8> = (0..element.block_bytes()).map(|_| random.u8(..)).collect();
        let value = random.f32() - 0.5;
        let scale = f16::from_f32(value / 20.0).to_le_bytes();
        let min = f16::from_f32(value / 3.0).to_le_bytes();
        match element {
            ElementType::F32 => block.copy_from_slice(&value.to_le_bytes()),
            ElementType::F16 => block.copy_from_slice(&f16::from_f32(value).to_le_bytes()),
            ElementType::BF16 => block.copy_from_slice(&half::bf16::from_f32(value).to_le_bytes()),
            ElementType::Q4_0 | ElementType::Q5_0 | ElementType::Q8_0 => block[..2].copy_from_slice(&scale),
            ElementType::IQ4_NL => block[..2].copy_from_slice(&f16::from_f32(value / 400.0).to_le_bytes()),
            ElementType::IQ4_XS => block[..2].copy_from_slice(&f16::from_f32(value / 9000.0).to_le_bytes()),
            ElementType::MXFP4 => block[0] = 120 + block[0] % 5,
            ElementType::Q2_K => {
                block[80..82].copy_from_slice(&f16::from_f32(value / 40.0).to_le_bytes());
                block[82..].copy_from_slice(&f16::from_f32(value / 50.0).to_le_bytes());
            }
            ElementType::Q3_K => block[108..].copy_from_slice(&f16::from_f32(value / 400.0).to_le_bytes()),
            ElementType::Q4_1 | ElementType::Q5_1 => {
                block[..2].copy_from_slice(&scale);
                block[2..4].copy_from_slice(&min);
            }
            ElementType::Q4_K | ElementType::Q5_K => {
                block[..2].copy_from_slice(&f16::from_f32(value / 400.0).to_le_bytes());
                block[2..4].copy_from_slice(&f16::from_f32(value / 100.0).to_le_bytes());
            }
            ElementType::Q6_K => block[208..].copy_from_slice(&f16::from_f32(value / 2000.0).to_le_bytes()),
        }
        out.extend(block);
    }
    out
}
