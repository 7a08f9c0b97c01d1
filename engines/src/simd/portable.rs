//! The portable tier.

use super::{LANES, Simd};
use half::f16;

/// The portable tier, in plain arrays: runs on any little-endian CPU.
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
    type Pairs = [i16; 32];

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
        std::array::from_fn(|i| a[i].mul_add(b[i], c[i]))
    }
    #[inline(always)]
    unsafe fn add(a: Self::Floats, b: Self::Floats) -> Self::Floats {
        std::array::from_fn(|i| a[i] + b[i])
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
    unsafe fn dot_pairs(sum: Self::Ints, pairs: Self::Pairs, pair: i32) -> Self::Ints {
        let (low, high) = (i32::from(pair as i16), pair >> 16);
        let product = |i: usize| i32::from(pairs[2 * i]) * low + i32::from(pairs[2 * i + 1]) * high;
        std::array::from_fn(|i| sum[i].wrapping_add(product(i)))
    }
    #[inline(always)]
    unsafe fn load_ints(from: *const i32) -> Self::Ints {
        // SAFETY: the caller guarantees that the pointer is valid.
        unsafe { read(from) }
    }
    #[inline(always)]
    unsafe fn load_bytes(from: *const i8) -> Self::Ints {
        // SAFETY: the caller guarantees that the pointer is valid.
        unsafe { read::<i8, LANES>(from) }.map(i32::from)
    }
    #[inline(always)]
    unsafe fn load_words(from: *const i16) -> Self::Ints {
        // SAFETY: the caller guarantees that the pointer is valid.
        unsafe { read::<i16, LANES>(from) }.map(i32::from)
    }
    #[inline(always)]
    unsafe fn shift_left(ints: Self::Ints, bits: u32) -> Self::Ints {
        ints.map(|v| v << bits)
    }
    #[inline(always)]
    unsafe fn splat_int(value: i32) -> Self::Ints {
        [value; LANES]
    }
    #[inline(always)]
    unsafe fn low_words(ints: Self::Ints) -> Self::Ints {
        ints.map(|v| v & 0xffff)
    }
    #[inline(always)]
    unsafe fn add_ints(a: Self::Ints, b: Self::Ints) -> Self::Ints {
        std::array::from_fn(|i| a[i].wrapping_add(b[i]))
    }
    #[inline(always)]
    unsafe fn mul_add_ints(a: Self::Ints, b: Self::Ints, c: Self::Ints) -> Self::Ints {
        std::array::from_fn(|i| a[i].wrapping_mul(b[i]).wrapping_add(c[i]))
    }
    #[inline(always)]
    unsafe fn mul_add_words(a: Self::Ints, word: Self::Ints, c: Self::Ints) -> Self::Ints {
        std::array::from_fn(|i| (i32::from(a[i] as i16) * i32::from(word[i] as i16)).wrapping_add(c[i]))
    }
    #[inline(always)]
    unsafe fn floats(ints: Self::Ints) -> Self::Floats {
        ints.map(|v| v as f32)
    }
    #[inline(always)]
    unsafe fn load_pairs(from: *const i16) -> Self::Pairs {
        // SAFETY: the caller guarantees that the pointer is valid.
        unsafe { read(from) }
    }
    #[inline(always)]
    unsafe fn store_pairs(to: *mut i16, pairs: Self::Pairs) {
        // SAFETY: the caller guarantees that the pointer is valid.
        unsafe { to.cast::<Self::Pairs>().write_unaligned(pairs) }
    }
    #[inline(always)]
    unsafe fn pair(low: Self::Ints, high: Self::Ints) -> Self::Pairs {
        std::array::from_fn(|i| [low, high][i % 2][i / 2] as i16)
    }
    #[inline(always)]
    unsafe fn both(ints: Self::Ints) -> Self::Pairs {
        std::array::from_fn(|i| ints[i / 2] as i16)
    }
    #[inline(always)]
    unsafe fn repeat(pairs: Self::Pairs, index: usize) -> Self::Pairs {
        std::array::from_fn(|i| pairs[i / 2 * 2 + index])
    }
    #[inline(always)]
    unsafe fn even_odd(codes: Self::Codes) -> (Self::Pairs, Self::Pairs) {
        let at = |i: usize, odd: usize| i16::from(codes[i / 2 * 4 + i % 2 * 2 + odd]);
        (std::array::from_fn(|i| at(i, 0)), std::array::from_fn(|i| at(i, 1)))
    }
    #[inline(always)]
    unsafe fn sub_word(pairs: Self::Pairs, less: i16) -> Self::Pairs {
        pairs.map(|v| v - less)
    }
    #[inline(always)]
    unsafe fn mul_pairs(a: Self::Pairs, b: Self::Pairs) -> Self::Pairs {
        std::array::from_fn(|i| a[i].wrapping_mul(b[i]))
    }
    #[inline(always)]
    unsafe fn add_pairs(a: Self::Pairs, b: Self::Pairs) -> Self::Pairs {
        std::array::from_fn(|i| a[i].wrapping_add(b[i]))
    }
    #[inline(always)]
    unsafe fn mul_rounded(a: Self::Pairs, b: Self::Pairs) -> Self::Pairs {
        std::array::from_fn(|i| ((i32::from(a[i]) * i32::from(b[i]) + 64) >> 7) as i16)
    }
    #[inline(always)]
    unsafe fn planes(even: Self::Pairs, odd: Self::Pairs) -> (Self::Codes, Self::Codes) {
        let at = |i: usize| [even, odd][i % 2][i / 2];
        (std::array::from_fn(|i| ((at(i) + 128) >> 8) as u8), std::array::from_fn(|i| at(i) as u8))
    }
    #[inline(always)]
    unsafe fn store_codes(to: *mut u8, codes: Self::Codes) {
        // SAFETY: the caller guarantees that the pointer is valid.
        unsafe { to.cast::<Self::Codes>().write_unaligned(codes) }
    }
    #[inline(always)]
    unsafe fn sum_fours(codes: Self::Codes) -> Self::Ints {
        std::array::from_fn(|lane| codes[lane * 4..][..4].iter().map(|&byte| i32::from(byte as i8)).sum())
    }
    #[inline(always)]
    unsafe fn store_ints(to: *mut i32, ints: Self::Ints) {
        // SAFETY: the caller guarantees that the pointer is valid.
        unsafe { to.cast::<Self::Ints>().write_unaligned(ints) }
    }
}
