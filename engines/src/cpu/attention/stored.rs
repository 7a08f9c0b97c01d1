//! How the types of the cache are read.

use super::super::cache::TOKENS;
use crate::arithmetic::cache::BLOCK;
use crate::simd::{LANES, Simd};

/// A type of keys and values. All methods are safe to call only inside a kernel of `S`, with pointers into a page.
pub(super) trait Stored {
    /// Bytes of a value, without its scale.
    const BYTES: usize;
    /// Whether each block of 32 values of a token has a scale, behind the values of a page: \[block]\[token].
    const HAS_SCALES: bool;
    /// The scale of each lane.
    type Scales<S: Simd>: Copy;
    /// The scales of all tokens of a page, in one block.
    type TokenScales;

    /// The scales of sixteen tokens.
    unsafe fn scales<S: Simd>(from: *const u8) -> Self::Scales<S>;
    unsafe fn token_scales<S: Simd>(from: *const u8) -> Self::TokenScales;
    /// The scale of a token, in every lane.
    unsafe fn splat<S: Simd>(scales: &Self::TokenScales, token: usize) -> Self::Scales<S>;
    /// Sixteen values.
    unsafe fn load<S: Simd>(from: *const u8, scales: Self::Scales<S>) -> S::Floats;

    /// Bytes of the page of a head with `dimensions`.
    #[inline(always)]
    fn page_bytes(dimensions: usize) -> usize {
        let scales = if Self::HAS_SCALES { dimensions.div_ceil(BLOCK) } else { 0 };
        Self::scales_at(dimensions, scales)
    }

    /// The place of the scales of a block.
    #[inline(always)]
    fn scales_at(dimensions: usize, block: usize) -> usize {
        (dimensions * Self::BYTES + if Self::HAS_SCALES { 2 * block } else { 0 }) * TOKENS
    }
}

/// Floats of 16 bits, or of 32.
pub(super) struct Floats<const HALF: bool>;
pub(super) type F16 = Floats<true>;
pub(super) type F32 = Floats<false>;
/// See [`arithmetic::cache`](crate::arithmetic::cache).
pub(super) struct Q8;

impl<const HALF: bool> Stored for Floats<HALF> {
    const BYTES: usize = if HALF { 2 } else { 4 };
    const HAS_SCALES: bool = false;
    type Scales<S: Simd> = ();
    type TokenScales = ();

    #[inline(always)]
    unsafe fn scales<S: Simd>(_: *const u8) {}

    #[inline(always)]
    unsafe fn token_scales<S: Simd>(_: *const u8) {}

    #[inline(always)]
    unsafe fn splat<S: Simd>((): &(), _: usize) {}

    #[inline(always)]
    unsafe fn load<S: Simd>(from: *const u8, (): ()) -> S::Floats {
        // SAFETY: the caller guarantees sixteen values.
        unsafe { if HALF { S::load_f16(from.cast()) } else { S::load(from.cast()) } }
    }
}

impl Stored for Q8 {
    const BYTES: usize = 1;
    const HAS_SCALES: bool = true;
    type Scales<S: Simd> = S::Floats;
    type TokenScales = [f32; TOKENS];

    #[inline(always)]
    unsafe fn scales<S: Simd>(from: *const u8) -> S::Floats {
        // SAFETY: the caller guarantees sixteen scales.
        unsafe { S::load_f16(from.cast()) }
    }

    #[inline(always)]
    unsafe fn token_scales<S: Simd>(from: *const u8) -> [f32; TOKENS] {
        let mut scales = [0.0; TOKENS];
        for (i, scales) in scales.as_chunks_mut::<LANES>().0.iter_mut().enumerate() {
            // SAFETY: the caller guarantees the scales of all tokens.
            unsafe { S::store(scales.as_mut_ptr(), S::load_f16(from.add(i * LANES * 2).cast())) };
        }
        scales
    }

    #[inline(always)]
    unsafe fn splat<S: Simd>(scales: &[f32; TOKENS], token: usize) -> S::Floats {
        // SAFETY: the caller runs a kernel of `S`.
        unsafe { S::splat(scales[token]) }
    }

    #[inline(always)]
    unsafe fn load<S: Simd>(from: *const u8, scales: S::Floats) -> S::Floats {
        // SAFETY: the caller guarantees sixteen values.
        unsafe { S::mul(S::floats(S::load_bytes(from.cast())), scales) }
    }
}
