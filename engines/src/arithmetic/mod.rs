//! The arithmetic of exo's engines: every operation, with its roundings and its order, in plain loops.
//!
//! ```text
//! weights.rs      a file's blocks ─► 16-bit integers, one unit per superblock of 256 columns
//! activations.rs  a row of floats ─► 16-bit integers, or 8-bit ones, one unit per superblock
//! products.rs     integers × integers ─► exact integer sums per superblock ─► fused chains of floats
//! functions.rs    exp, tanh, the activation functions
//! norms.rs        RMS norms
//! rotary.rs       rotary position embeddings
//! cache.rs        keys and values as bytes
//! attention.rs    scores, softmax and mixing, in chunks of 256 positions
//! ```
//! The experts of a row, and their weights, are those of [`route`](crate::expert_routing::route).
//!
//! The bits of a result depend on the model and on the row's own sequence alone. The other rows, the number of threads
//! and the device change nothing. Integer sums are exact, so a device may compute them in any order. An engine that
//! follows these files has the same bits on any processor with IEEE single precision and a fused multiply-add. Tests
//! compare every kernel tier of the CPU engine with the [reference backend](crate::reference), to the bit.
//!
//! Conventions: additions, multiplications, divisions and square roots of `f32` round to nearest even, and nothing is
//! contracted; `mul_add` is fused and rounds once. An integer becomes a float by rounding to nearest even. Denormal
//! numbers are kept. The sign of a zero and the payload of a NaN are not specified.

pub mod activations;
pub mod attention;
pub mod cache;
pub mod functions;
pub mod norms;
pub mod products;
pub mod rotary;
pub mod weights;

use crate::activation_bits::ActivationBits;

/// The version of the arithmetic, which is part of an engine's fingerprint: a change of any bit of any result changes
/// this number.
pub const VERSION: u32 = 1;

/// The fingerprint of the arithmetic: `exact/1`, or with 8-bit activations `exact/1/a8`.
pub fn fingerprint(bits: ActivationBits) -> String {
    match bits {
        ActivationBits::Sixteen => format!("exact/{VERSION}"),
        ActivationBits::Eight => format!("exact/{VERSION}/a{}", bits.name()),
    }
}

/// Columns of a superblock, which share one unit. The last superblock of a row may be shorter.
pub const SUPERBLOCK: usize = 256;

/// Returns the number of superblocks in a row of `columns`.
pub fn superblocks(columns: usize) -> usize {
    columns.div_ceil(SUPERBLOCK)
}
