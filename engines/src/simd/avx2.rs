//! The AVX2 tier: sixteen lanes in two 256-bit registers.

#![allow(clippy::undocumented_unsafe_blocks)] // One condition holds for all: the CPU has the features (see `Simd`).

use super::{Kernel, Simd};
use std::arch::x86_64::*;

pub(crate) fn is_available() -> bool {
    is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") && is_x86_feature_detected!("f16c")
}

#[target_feature(enable = "avx2,fma,f16c")]
pub(crate) fn run<K: Kernel>(kernel: K) {
    kernel.run::<Avx2>();
}

#[derive(Clone, Copy)]
pub(crate) struct Avx2;

#[inline(always)]
fn both<A: Copy, B: Copy, R>(a: [A; 2], b: [B; 2], f: impl Fn(A, B) -> R) -> [R; 2] {
    [f(a[0], b[0]), f(a[1], b[1])]
}

impl Simd for Avx2 {
    type Floats = [__m256; 2];
    type Ints = [__m256i; 2];
    type Codes = [__m256i; 2];
    type Pairs = [__m256i; 2];

    #[inline(always)]
    unsafe fn splat(value: f32) -> [__m256; 2] {
        unsafe { [_mm256_set1_ps(value); 2] }
    }
    #[inline(always)]
    unsafe fn load(from: *const f32) -> [__m256; 2] {
        unsafe { [_mm256_loadu_ps(from), _mm256_loadu_ps(from.add(8))] }
    }
    #[inline(always)]
    unsafe fn load_f16(from: *const u16) -> [__m256; 2] {
        unsafe { [_mm256_cvtph_ps(_mm_loadu_si128(from.cast())), _mm256_cvtph_ps(_mm_loadu_si128(from.add(8).cast()))] }
    }
    #[inline(always)]
    unsafe fn store(to: *mut f32, value: [__m256; 2]) {
        unsafe {
            _mm256_storeu_ps(to, value[0]);
            _mm256_storeu_ps(to.add(8), value[1]);
        }
    }
    #[inline(always)]
    unsafe fn store_f16(to: *mut u16, value: [__m256; 2]) {
        unsafe {
            _mm_storeu_si128(to.cast(), _mm256_cvtps_ph::<_MM_FROUND_TO_NEAREST_INT>(value[0]));
            _mm_storeu_si128(to.add(8).cast(), _mm256_cvtps_ph::<_MM_FROUND_TO_NEAREST_INT>(value[1]));
        }
    }
    #[inline(always)]
    unsafe fn mul(a: [__m256; 2], b: [__m256; 2]) -> [__m256; 2] {
        both(a, b, |a, b| unsafe { _mm256_mul_ps(a, b) })
    }
    #[inline(always)]
    unsafe fn fma(a: [__m256; 2], b: [__m256; 2], c: [__m256; 2]) -> [__m256; 2] {
        unsafe { [_mm256_fmadd_ps(a[0], b[0], c[0]), _mm256_fmadd_ps(a[1], b[1], c[1])] }
    }
    #[inline(always)]
    unsafe fn add(a: [__m256; 2], b: [__m256; 2]) -> [__m256; 2] {
        both(a, b, |a, b| unsafe { _mm256_add_ps(a, b) })
    }
    #[inline(always)]
    unsafe fn codes(from: *const u8) -> [__m256i; 2] {
        unsafe { [_mm256_loadu_si256(from.cast()), _mm256_loadu_si256(from.add(32).cast())] }
    }
    #[inline(always)]
    unsafe fn low_nibbles(codes: [__m256i; 2]) -> [__m256i; 2] {
        codes.map(|c| unsafe { _mm256_and_si256(c, _mm256_set1_epi8(0x0f)) })
    }
    #[inline(always)]
    unsafe fn high_nibbles(codes: [__m256i; 2]) -> [__m256i; 2] {
        codes.map(|c| unsafe { _mm256_and_si256(_mm256_srli_epi16::<4>(c), _mm256_set1_epi8(0x0f)) })
    }
    #[inline(always)]
    unsafe fn low_pairs(plane: [__m256i; 2]) -> ([__m256i; 2], [__m256i; 2]) {
        let low = plane.map(|p| unsafe { _mm256_and_si256(p, _mm256_set1_epi8(3)) });
        (low, plane.map(|p| unsafe { _mm256_srli_epi16::<2>(p) }))
    }
    #[inline(always)]
    unsafe fn join_bit<const TO: u32>(low: [__m256i; 2], plane: [__m256i; 2]) -> ([__m256i; 2], [__m256i; 2]) {
        let joined = both(low, plane, |low, plane| unsafe {
            let moved = if TO == 4 { _mm256_slli_epi16::<4>(plane) } else { _mm256_slli_epi16::<2>(plane) };
            _mm256_or_si256(low, _mm256_and_si256(moved, _mm256_set1_epi8(1 << TO)))
        });
        (joined, plane.map(|p| unsafe { _mm256_srli_epi16::<1>(p) }))
    }
    #[inline(always)]
    unsafe fn join_bits(low: [__m256i; 2], plane: [__m256i; 2]) -> ([__m256i; 2], [__m256i; 2]) {
        let joined = both(low, plane, |low, plane| unsafe {
            let bits = _mm256_and_si256(_mm256_slli_epi16::<4>(plane), _mm256_set1_epi8(0x30));
            _mm256_or_si256(low, bits)
        });
        (joined, plane.map(|p| unsafe { _mm256_srli_epi16::<2>(p) }))
    }
    #[inline(always)]
    unsafe fn look_up(codes: [__m256i; 2], table: &[u8; 16]) -> [__m256i; 2] {
        unsafe {
            let table = _mm256_broadcastsi128_si256(_mm_loadu_si128(table.as_ptr().cast()));
            codes.map(|c| _mm256_shuffle_epi8(table, c))
        }
    }
    #[inline(always)]
    unsafe fn ints_zero() -> [__m256i; 2] {
        unsafe { [_mm256_setzero_si256(); 2] }
    }
    #[inline(always)]
    unsafe fn dot(sum: [__m256i; 2], codes: [__m256i; 2], four: i32) -> [__m256i; 2] {
        // The sum of two products has at most the magnitude 2 · 63 · 128, which fits in 16 bits.
        both(sum, codes, |sum, codes| unsafe {
            let pairs = _mm256_maddubs_epi16(codes, _mm256_set1_epi32(four));
            _mm256_add_epi32(sum, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)))
        })
    }
    #[inline(always)]
    unsafe fn dot_wide(sum: [__m256i; 2], codes: [__m256i; 2], four: i32) -> [__m256i; 2] {
        // Pairs of 8-bit codes would overflow 16 bits, so even and odd bytes are widened and multiplied separately.
        both(sum, codes, |sum, codes| unsafe {
            let four = _mm256_set1_epi32(four);
            let even = _mm256_and_si256(codes, _mm256_set1_epi16(0xff));
            let odd = _mm256_srli_epi16::<8>(codes);
            let four_even = _mm256_srai_epi16::<8>(_mm256_slli_epi16::<8>(four));
            let four_odd = _mm256_srai_epi16::<8>(four);
            let products = _mm256_add_epi32(_mm256_madd_epi16(even, four_even), _mm256_madd_epi16(odd, four_odd));
            _mm256_add_epi32(sum, products)
        })
    }
    #[inline(always)]
    unsafe fn dot_pairs(sum: [__m256i; 2], pairs: [__m256i; 2], pair: i32) -> [__m256i; 2] {
        both(sum, pairs, |sum, pairs| unsafe {
            _mm256_add_epi32(sum, _mm256_madd_epi16(pairs, _mm256_set1_epi32(pair)))
        })
    }
    #[inline(always)]
    unsafe fn load_ints(from: *const i32) -> [__m256i; 2] {
        unsafe { Self::codes(from.cast()) }
    }
    #[inline(always)]
    unsafe fn load_bytes(from: *const i8) -> [__m256i; 2] {
        unsafe { [from, from.add(8)].map(|from| _mm256_cvtepi8_epi32(_mm_loadl_epi64(from.cast()))) }
    }
    #[inline(always)]
    unsafe fn load_words(from: *const i16) -> [__m256i; 2] {
        unsafe { [from, from.add(8)].map(|from| _mm256_cvtepi16_epi32(_mm_loadu_si128(from.cast()))) }
    }
    #[inline(always)]
    unsafe fn shift_left(ints: [__m256i; 2], bits: u32) -> [__m256i; 2] {
        ints.map(|v| unsafe { _mm256_sll_epi32(v, _mm_cvtsi32_si128(bits as i32)) })
    }
    #[inline(always)]
    unsafe fn splat_int(value: i32) -> [__m256i; 2] {
        unsafe { [_mm256_set1_epi32(value); 2] }
    }
    #[inline(always)]
    unsafe fn low_words(ints: [__m256i; 2]) -> [__m256i; 2] {
        ints.map(|v| unsafe { _mm256_and_si256(v, _mm256_set1_epi32(0xffff)) })
    }
    #[inline(always)]
    unsafe fn add_ints(a: [__m256i; 2], b: [__m256i; 2]) -> [__m256i; 2] {
        both(a, b, |a, b| unsafe { _mm256_add_epi32(a, b) })
    }
    #[inline(always)]
    unsafe fn mul_add_ints(a: [__m256i; 2], b: [__m256i; 2], c: [__m256i; 2]) -> [__m256i; 2] {
        both(both(a, b, |a, b| unsafe { _mm256_mullo_epi32(a, b) }), c, |p, c| unsafe { _mm256_add_epi32(p, c) })
    }
    #[inline(always)]
    unsafe fn mul_add_words(a: [__m256i; 2], word: [__m256i; 2], c: [__m256i; 2]) -> [__m256i; 2] {
        both(both(a, word, |a, word| unsafe { _mm256_madd_epi16(a, word) }), c, |p, c| unsafe {
            _mm256_add_epi32(p, c)
        })
    }
    #[inline(always)]
    unsafe fn floats(ints: [__m256i; 2]) -> [__m256; 2] {
        ints.map(|v| unsafe { _mm256_cvtepi32_ps(v) })
    }
    #[inline(always)]
    unsafe fn load_pairs(from: *const i16) -> [__m256i; 2] {
        unsafe { Self::codes(from.cast()) }
    }
    #[inline(always)]
    unsafe fn store_pairs(to: *mut i16, pairs: [__m256i; 2]) {
        unsafe { Self::store_codes(to.cast(), pairs) }
    }
    #[inline(always)]
    unsafe fn pair(low: [__m256i; 2], high: [__m256i; 2]) -> [__m256i; 2] {
        both(low, high, |low, high| unsafe { _mm256_or_si256(low, _mm256_slli_epi32::<16>(high)) })
    }
    #[inline(always)]
    unsafe fn both(ints: [__m256i; 2]) -> [__m256i; 2] {
        ints.map(|v| unsafe {
            _mm256_or_si256(_mm256_and_si256(v, _mm256_set1_epi32(0xffff)), _mm256_slli_epi32::<16>(v))
        })
    }
    #[inline(always)]
    unsafe fn repeat(pairs: [__m256i; 2], index: usize) -> [__m256i; 2] {
        unsafe {
            if index == 0 {
                return Self::both(pairs);
            }
            pairs.map(|v| {
                let high = _mm256_andnot_si256(_mm256_set1_epi32(0xffff), v);
                _mm256_or_si256(high, _mm256_srli_epi32::<16>(v))
            })
        }
    }
    #[inline(always)]
    unsafe fn even_odd(codes: [__m256i; 2]) -> ([__m256i; 2], [__m256i; 2]) {
        let even = codes.map(|c| unsafe { _mm256_and_si256(c, _mm256_set1_epi16(0xff)) });
        (even, codes.map(|c| unsafe { _mm256_srli_epi16::<8>(c) }))
    }
    #[inline(always)]
    unsafe fn sub_word(pairs: [__m256i; 2], less: i16) -> [__m256i; 2] {
        pairs.map(|v| unsafe { _mm256_sub_epi16(v, _mm256_set1_epi16(less)) })
    }
    #[inline(always)]
    unsafe fn mul_pairs(a: [__m256i; 2], b: [__m256i; 2]) -> [__m256i; 2] {
        both(a, b, |a, b| unsafe { _mm256_mullo_epi16(a, b) })
    }
    #[inline(always)]
    unsafe fn add_pairs(a: [__m256i; 2], b: [__m256i; 2]) -> [__m256i; 2] {
        both(a, b, |a, b| unsafe { _mm256_add_epi16(a, b) })
    }
    #[inline(always)]
    unsafe fn mul_rounded(a: [__m256i; 2], b: [__m256i; 2]) -> [__m256i; 2] {
        // (256 a · b + 2¹⁴) / 2¹⁵.
        both(a, b, |a, b| unsafe { _mm256_mulhrs_epi16(_mm256_slli_epi16::<8>(a), b) })
    }
    #[inline(always)]
    unsafe fn planes(even: [__m256i; 2], odd: [__m256i; 2]) -> ([__m256i; 2], [__m256i; 2]) {
        unsafe {
            let (low_bytes, half) = (_mm256_set1_epi16(0xff), _mm256_set1_epi16(128));
            let upper = both(even, odd, |even, odd| {
                let (even, odd) = (_mm256_add_epi16(even, half), _mm256_add_epi16(odd, half));
                _mm256_or_si256(_mm256_srli_epi16::<8>(even), _mm256_andnot_si256(low_bytes, odd))
            });
            let lower = both(even, odd, |even, odd| {
                _mm256_or_si256(_mm256_and_si256(even, low_bytes), _mm256_slli_epi16::<8>(odd))
            });
            (upper, lower)
        }
    }
    #[inline(always)]
    unsafe fn store_codes(to: *mut u8, codes: [__m256i; 2]) {
        unsafe {
            _mm256_storeu_si256(to.cast(), codes[0]);
            _mm256_storeu_si256(to.add(32).cast(), codes[1]);
        }
    }
    #[inline(always)]
    unsafe fn sum_fours(codes: [__m256i; 2]) -> [__m256i; 2] {
        codes.map(|c| unsafe { _mm256_madd_epi16(_mm256_maddubs_epi16(_mm256_set1_epi8(1), c), _mm256_set1_epi16(1)) })
    }
    #[inline(always)]
    unsafe fn store_ints(to: *mut i32, ints: [__m256i; 2]) {
        unsafe { Self::store_codes(to.cast(), ints) }
    }
}
