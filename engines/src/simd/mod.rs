//! Vector operations for kernels, sixteen lanes wide, and the instruction sets that implement them.
//!
//! A kernel is a value with a generic [`Kernel::run`]; [`Tier::run`] runs it on the instruction set found at start. All
//! tiers share one kernel body: code for a single tier is in this module, not in the kernels.

#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
mod avx512;
pub(crate) mod math;
mod tier;

pub use tier::Tier;

use half::{bf16, f16};

/// Lanes of a vector, and weight rows (outputs) of a panel.
pub(crate) const LANES: usize = 16;

/// Work that is compiled once per tier. `run` and every function that it calls must be `#[inline(always)]`.
pub(crate) trait Kernel {
    fn run<S: Simd>(self);
}

/// Operations on sixteen lanes. All methods are safe to call only inside [`Kernel::run`], where the CPU has the
/// instructions. Pointers need no alignment, and must be valid for sixteen elements (for codes, sixty-four).
pub(crate) trait Simd: Copy {
    type Floats: Copy;
    type Ints: Copy;
    /// Sixty-four bytes: four successive codes for each lane.
    type Codes: Copy;

    unsafe fn splat(value: f32) -> Self::Floats;
    unsafe fn load(from: *const f32) -> Self::Floats;
    unsafe fn load_f16(from: *const u16) -> Self::Floats;
    unsafe fn load_bf16(from: *const u16) -> Self::Floats;
    unsafe fn store(to: *mut f32, value: Self::Floats);
    unsafe fn store_f16(to: *mut u16, value: Self::Floats);
    unsafe fn mul(a: Self::Floats, b: Self::Floats) -> Self::Floats;
    /// a · b + c, fused in tiers with the instruction.
    unsafe fn fma(a: Self::Floats, b: Self::Floats, c: Self::Floats) -> Self::Floats;
    /// One lane of [`Self::fma`], for loops that the compiler vectorises.
    fn fma1(a: f32, b: f32, c: f32) -> f32;

    unsafe fn codes(from: *const u8) -> Self::Codes;
    unsafe fn low_nibbles(codes: Self::Codes) -> Self::Codes;
    unsafe fn high_nibbles(codes: Self::Codes) -> Self::Codes;
    /// Returns bits 0–1 of every byte of `plane`, and `plane` shifted so that the next two bits are at bit 0.
    unsafe fn low_pairs(plane: Self::Codes) -> (Self::Codes, Self::Codes);
    /// Joins bit 0 of every byte of `plane` to `low`, at bit `TO` (2 or 4); also returns `plane` shifted by one bit.
    unsafe fn join_bit<const TO: u32>(low: Self::Codes, plane: Self::Codes) -> (Self::Codes, Self::Codes);
    /// Joins bits 0–1 of every byte of `plane` to `low`, at bits 4–5; also returns `plane` shifted by two bits.
    unsafe fn join_bits(low: Self::Codes, plane: Self::Codes) -> (Self::Codes, Self::Codes);

    /// Returns the entry of `table` for every code. Codes are less than 16.
    unsafe fn look_up(codes: Self::Codes, table: &[u8; 16]) -> Self::Codes;

    unsafe fn ints_zero() -> Self::Ints;
    /// Per lane: sum + Σ codes[4] · four[4], with unsigned codes of at most 7 bits and the signed bytes of `four`.
    unsafe fn dot(sum: Self::Ints, codes: Self::Codes, four: i32) -> Self::Ints;
    /// Like [`Self::dot`], with codes of 8 bits.
    unsafe fn dot_wide(sum: Self::Ints, codes: Self::Codes, four: i32) -> Self::Ints;
    /// 256 · upper + lower.
    unsafe fn join_planes(upper: Self::Ints, lower: Self::Ints) -> Self::Ints;
    /// (ints − less) as floats.
    unsafe fn floats_less(ints: Self::Ints, less: i32) -> Self::Floats;
}

/// The portable tier, in plain arrays: runs on any CPU, and is the reference for the other tiers.
#[derive(Clone, Copy)]
pub(crate) struct Portable;

#[inline(always)]
unsafe fn read<T: Copy, const N: usize>(from: *const T) -> [T; N] {
    // SAFETY: the caller guarantees that the pointer is valid.
    unsafe { from.cast::<[T; N]>().read_unaligned() }
}

impl Simd for Portable {
    type Floats = [f32; LANES];
    type Ints = [i32; LANES];
    type Codes = [u8; 64];

    #[inline(always)]
    unsafe fn splat(value: f32) -> Self::Floats {
        [value; LANES]
    }
    #[inline(always)]
    unsafe fn load(from: *const f32) -> Self::Floats {
        // SAFETY: the caller guarantees that the pointer is valid.
        unsafe { read(from) }
    }
    #[inline(always)]
    unsafe fn load_f16(from: *const u16) -> Self::Floats {
        // SAFETY: the caller guarantees that the pointer is valid.
        unsafe { read::<u16, LANES>(from) }.map(|bits| f16::from_bits(bits).to_f32())
    }
    #[inline(always)]
    unsafe fn load_bf16(from: *const u16) -> Self::Floats {
        // SAFETY: the caller guarantees that the pointer is valid.
        unsafe { read::<u16, LANES>(from) }.map(|bits| bf16::from_bits(bits).to_f32())
    }
    #[inline(always)]
    unsafe fn store(to: *mut f32, value: Self::Floats) {
        // SAFETY: the caller guarantees that the pointer is valid.
        unsafe { to.cast::<Self::Floats>().write_unaligned(value) }
    }
    #[inline(always)]
    unsafe fn store_f16(to: *mut u16, value: Self::Floats) {
        // SAFETY: the caller guarantees that the pointer is valid.
        unsafe { to.cast::<[u16; LANES]>().write_unaligned(value.map(|v| f16::from_f32(v).to_bits())) }
    }
    #[inline(always)]
    unsafe fn mul(a: Self::Floats, b: Self::Floats) -> Self::Floats {
        std::array::from_fn(|i| a[i] * b[i])
    }
    #[inline(always)]
    unsafe fn fma(a: Self::Floats, b: Self::Floats, c: Self::Floats) -> Self::Floats {
        std::array::from_fn(|i| a[i] * b[i] + c[i])
    }
    #[inline(always)]
    fn fma1(a: f32, b: f32, c: f32) -> f32 {
        a * b + c
    }
    #[inline(always)]
    unsafe fn codes(from: *const u8) -> Self::Codes {
        // SAFETY: the caller guarantees that the pointer is valid.
        unsafe { read(from) }
    }
    #[inline(always)]
    unsafe fn low_nibbles(codes: Self::Codes) -> Self::Codes {
        codes.map(|c| c & 15)
    }
    #[inline(always)]
    unsafe fn high_nibbles(codes: Self::Codes) -> Self::Codes {
        codes.map(|c| c >> 4)
    }
    #[inline(always)]
    unsafe fn low_pairs(plane: Self::Codes) -> (Self::Codes, Self::Codes) {
        (plane.map(|p| p & 3), plane.map(|p| p >> 2))
    }
    #[inline(always)]
    unsafe fn join_bit<const TO: u32>(low: Self::Codes, plane: Self::Codes) -> (Self::Codes, Self::Codes) {
        (std::array::from_fn(|i| low[i] | (plane[i] & 1) << TO), plane.map(|p| p >> 1))
    }
    #[inline(always)]
    unsafe fn join_bits(low: Self::Codes, plane: Self::Codes) -> (Self::Codes, Self::Codes) {
        (std::array::from_fn(|i| low[i] | plane[i] << 4 & 0x30), plane.map(|p| p >> 2))
    }
    #[inline(always)]
    unsafe fn look_up(codes: Self::Codes, table: &[u8; 16]) -> Self::Codes {
        codes.map(|c| table[usize::from(c & 15)])
    }
    #[inline(always)]
    unsafe fn ints_zero() -> Self::Ints {
        [0; LANES]
    }
    #[inline(always)]
    unsafe fn dot(sum: Self::Ints, codes: Self::Codes, four: i32) -> Self::Ints {
        let four = four.to_le_bytes().map(|b| i32::from(b as i8));
        std::array::from_fn(|lane| {
            let at = lane * 4;
            sum[lane]
                + i32::from(codes[at]) * four[0]
                + i32::from(codes[at + 1]) * four[1]
                + i32::from(codes[at + 2]) * four[2]
                + i32::from(codes[at + 3]) * four[3]
        })
    }
    #[inline(always)]
    unsafe fn dot_wide(sum: Self::Ints, codes: Self::Codes, four: i32) -> Self::Ints {
        // SAFETY: `dot` of this tier is plain arithmetic.
        unsafe { Self::dot(sum, codes, four) }
    }
    #[inline(always)]
    unsafe fn join_planes(upper: Self::Ints, lower: Self::Ints) -> Self::Ints {
        std::array::from_fn(|i| (upper[i] << 8) + lower[i])
    }
    #[inline(always)]
    unsafe fn floats_less(ints: Self::Ints, less: i32) -> Self::Floats {
        ints.map(|v| (v - less) as f32)
    }
}
