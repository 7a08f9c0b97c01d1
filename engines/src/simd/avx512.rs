//! The AVX-512 tier: sixteen lanes in one 512-bit register.

#![allow(clippy::undocumented_unsafe_blocks)] // One condition holds for all: the CPU has the features (see `Simd`).

use super::{Kernel, Simd};
use std::arch::asm;
use std::arch::x86_64::*;

pub(crate) fn is_available() -> bool {
    is_x86_feature_detected!("avx512f")
        && is_x86_feature_detected!("avx512bw")
        && is_x86_feature_detected!("avx512dq")
        && is_x86_feature_detected!("avx512vl")
        && is_x86_feature_detected!("avx512vnni")
        && is_x86_feature_detected!("fma")
        && is_x86_feature_detected!("f16c")
}

#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,fma,f16c")]
pub(crate) fn run<K: Kernel>(kernel: K) {
    kernel.run::<Avx512>();
}

#[derive(Clone, Copy)]
pub(crate) struct Avx512;

impl Simd for Avx512 {
    type Floats = __m512;
    type Ints = __m512i;
    type Codes = __m512i;
    type Pairs = __m512i;

    #[inline(always)]
    unsafe fn splat(value: f32) -> __m512 {
        unsafe { _mm512_set1_ps(value) }
    }
    #[inline(always)]
    unsafe fn load(from: *const f32) -> __m512 {
        unsafe { _mm512_loadu_ps(from) }
    }
    #[inline(always)]
    unsafe fn load_f16(from: *const u16) -> __m512 {
        unsafe { _mm512_cvtph_ps(_mm256_loadu_si256(from.cast())) }
    }
    #[inline(always)]
    unsafe fn store(to: *mut f32, value: __m512) {
        unsafe { _mm512_storeu_ps(to, value) }
    }
    #[inline(always)]
    unsafe fn store_f16(to: *mut u16, value: __m512) {
        unsafe { _mm256_storeu_si256(to.cast(), _mm512_cvtps_ph::<_MM_FROUND_TO_NEAREST_INT>(value)) }
    }
    #[inline(always)]
    unsafe fn mul(a: __m512, b: __m512) -> __m512 {
        unsafe { _mm512_mul_ps(a, b) }
    }
    #[inline(always)]
    unsafe fn fma(a: __m512, b: __m512, c: __m512) -> __m512 {
        unsafe { _mm512_fmadd_ps(a, b, c) }
    }
    #[inline(always)]
    unsafe fn add(a: __m512, b: __m512) -> __m512 {
        unsafe { _mm512_add_ps(a, b) }
    }
    #[inline(always)]
    unsafe fn codes(from: *const u8) -> __m512i {
        unsafe { _mm512_loadu_si512(from.cast()) }
    }
    #[inline(always)]
    unsafe fn low_nibbles(codes: __m512i) -> __m512i {
        unsafe { _mm512_and_si512(codes, _mm512_set1_epi8(0x0f)) }
    }
    #[inline(always)]
    unsafe fn high_nibbles(codes: __m512i) -> __m512i {
        unsafe { _mm512_and_si512(_mm512_srli_epi16::<4>(codes), _mm512_set1_epi8(0x0f)) }
    }
    #[inline(always)]
    unsafe fn low_pairs(plane: __m512i) -> (__m512i, __m512i) {
        unsafe { (_mm512_and_si512(plane, _mm512_set1_epi8(3)), _mm512_srli_epi16::<2>(plane)) }
    }
    #[inline(always)]
    unsafe fn join_bit<const TO: u32>(low: __m512i, plane: __m512i) -> (__m512i, __m512i) {
        unsafe {
            let moved = if TO == 4 { _mm512_slli_epi16::<4>(plane) } else { _mm512_slli_epi16::<2>(plane) };
            let bit = _mm512_and_si512(moved, _mm512_set1_epi8(1 << TO));
            (_mm512_or_si512(low, bit), _mm512_srli_epi16::<1>(plane))
        }
    }
    #[inline(always)]
    unsafe fn join_bits(low: __m512i, plane: __m512i) -> (__m512i, __m512i) {
        unsafe {
            let bits = _mm512_and_si512(_mm512_slli_epi16::<4>(plane), _mm512_set1_epi8(0x30));
            (_mm512_or_si512(low, bits), _mm512_srli_epi16::<2>(plane))
        }
    }
    #[inline(always)]
    unsafe fn look_up(codes: __m512i, table: &[u8; 16]) -> __m512i {
        unsafe { _mm512_shuffle_epi8(_mm512_broadcast_i32x4(_mm_loadu_si128(table.as_ptr().cast())), codes) }
    }
    #[inline(always)]
    unsafe fn ints_zero() -> __m512i {
        unsafe { _mm512_setzero_si512() }
    }
    #[inline(always)]
    unsafe fn dot(sum: __m512i, codes: __m512i, four: i32) -> __m512i {
        unsafe { _mm512_dpbusd_epi32(sum, codes, _mm512_set1_epi32(four)) }
    }
    #[inline(always)]
    unsafe fn dot_slots<const SLOTS: usize, const AT: usize, const WIDE: bool>(
        sums: &mut [[__m512i; 2]; SLOTS],
        codes: __m512i,
        slots: &[*const i8; SLOTS],
        plane: usize,
    ) {
        unsafe {
            let mut s = 0;
            while s + 1 < SLOTS {
                let (left, right) = sums.split_at_mut(s + 1);
                dot_two_slots::<AT>([&mut left[s], &mut right[0]], codes, [slots[s], slots[s + 1]], plane);
                s += 2;
            }
            if s < SLOTS {
                let four = |plane: usize| slots[s].add(plane + AT).cast::<i32>().read_unaligned();
                sums[s][0] = Self::dot(sums[s][0], codes, four(0));
                sums[s][1] = Self::dot(sums[s][1], codes, four(plane));
            }
        }
    }
    #[inline(always)]
    unsafe fn dot_wide(sum: __m512i, codes: __m512i, four: i32) -> __m512i {
        unsafe { Self::dot(sum, codes, four) }
    }
    #[inline(always)]
    unsafe fn dot_pairs(sum: __m512i, pairs: __m512i, pair: i32) -> __m512i {
        unsafe { _mm512_dpwssd_epi32(sum, pairs, _mm512_set1_epi32(pair)) }
    }
    #[inline(always)]
    unsafe fn dot_pairs_slots<const SLOTS: usize, const PLANE: usize>(
        sums: &mut [[__m512i; 2]; SLOTS],
        [even, odd]: [__m512i; 2],
        slots: &[*const i16; SLOTS],
    ) {
        unsafe {
            for s in 0..SLOTS {
                dot_pairs_of_slot::<0, PLANE>(&mut sums[s], even, slots[s]);
            }
            for s in 0..SLOTS {
                dot_pairs_of_slot::<4, PLANE>(&mut sums[s], odd, slots[s]);
            }
        }
    }
    #[inline(always)]
    unsafe fn load_ints(from: *const i32) -> __m512i {
        unsafe { _mm512_loadu_si512(from.cast()) }
    }
    #[inline(always)]
    unsafe fn load_bytes(from: *const i8) -> __m512i {
        unsafe { _mm512_cvtepi8_epi32(_mm_loadu_si128(from.cast())) }
    }
    #[inline(always)]
    unsafe fn load_words(from: *const i16) -> __m512i {
        unsafe { _mm512_cvtepi16_epi32(_mm256_loadu_si256(from.cast())) }
    }
    #[inline(always)]
    unsafe fn shift_left(ints: __m512i, bits: u32) -> __m512i {
        unsafe { _mm512_sll_epi32(ints, _mm_cvtsi32_si128(bits as i32)) }
    }
    #[inline(always)]
    unsafe fn splat_int(value: i32) -> __m512i {
        unsafe { _mm512_set1_epi32(value) }
    }
    #[inline(always)]
    unsafe fn low_words(ints: __m512i) -> __m512i {
        unsafe { _mm512_and_si512(ints, _mm512_set1_epi32(0xffff)) }
    }
    #[inline(always)]
    unsafe fn add_ints(a: __m512i, b: __m512i) -> __m512i {
        unsafe { _mm512_add_epi32(a, b) }
    }
    #[inline(always)]
    unsafe fn mul_add_ints(a: __m512i, b: __m512i, c: __m512i) -> __m512i {
        unsafe { _mm512_add_epi32(_mm512_mullo_epi32(a, b), c) }
    }
    #[inline(always)]
    unsafe fn mul_add_words(a: __m512i, word: __m512i, c: __m512i) -> __m512i {
        unsafe { _mm512_dpwssd_epi32(c, a, word) }
    }
    #[inline(always)]
    unsafe fn floats(ints: __m512i) -> __m512 {
        unsafe { _mm512_cvtepi32_ps(ints) }
    }
    #[inline(always)]
    unsafe fn load_pairs(from: *const i16) -> __m512i {
        unsafe { _mm512_loadu_si512(from.cast()) }
    }
    #[inline(always)]
    unsafe fn store_pairs(to: *mut i16, pairs: __m512i) {
        unsafe { _mm512_storeu_si512(to.cast(), pairs) }
    }
    #[inline(always)]
    unsafe fn pair(low: __m512i, high: __m512i) -> __m512i {
        unsafe { _mm512_or_si512(low, _mm512_slli_epi32::<16>(high)) }
    }
    #[inline(always)]
    unsafe fn both(ints: __m512i) -> __m512i {
        unsafe {
            let low = _mm512_and_si512(ints, _mm512_set1_epi32(0xffff));
            _mm512_or_si512(low, _mm512_slli_epi32::<16>(ints))
        }
    }
    #[inline(always)]
    unsafe fn repeat(pairs: __m512i, index: usize) -> __m512i {
        unsafe {
            if index == 0 {
                return Self::both(pairs);
            }
            let high = _mm512_andnot_si512(_mm512_set1_epi32(0xffff), pairs);
            _mm512_or_si512(high, _mm512_srli_epi32::<16>(pairs))
        }
    }
    #[inline(always)]
    unsafe fn even_odd(codes: __m512i) -> (__m512i, __m512i) {
        unsafe { (_mm512_and_si512(codes, _mm512_set1_epi16(0xff)), _mm512_srli_epi16::<8>(codes)) }
    }
    #[inline(always)]
    unsafe fn sub_word(pairs: __m512i, less: i16) -> __m512i {
        unsafe { _mm512_sub_epi16(pairs, _mm512_set1_epi16(less)) }
    }
    #[inline(always)]
    unsafe fn mul_pairs(a: __m512i, b: __m512i) -> __m512i {
        unsafe { _mm512_mullo_epi16(a, b) }
    }
    #[inline(always)]
    unsafe fn add_pairs(a: __m512i, b: __m512i) -> __m512i {
        unsafe { _mm512_add_epi16(a, b) }
    }
    #[inline(always)]
    unsafe fn mul_rounded(a: __m512i, b: __m512i) -> __m512i {
        // (256 a · b + 2¹⁴) / 2¹⁵.
        unsafe { _mm512_mulhrs_epi16(_mm512_slli_epi16::<8>(a), b) }
    }
    #[inline(always)]
    unsafe fn planes(even: __m512i, odd: __m512i) -> (__m512i, __m512i) {
        unsafe {
            let low_bytes = _mm512_set1_epi16(0xff);
            let half = _mm512_set1_epi16(128);
            let (even_up, odd_up) = (_mm512_add_epi16(even, half), _mm512_add_epi16(odd, half));
            let upper = _mm512_or_si512(_mm512_srli_epi16::<8>(even_up), _mm512_andnot_si512(low_bytes, odd_up));
            let lower = _mm512_or_si512(_mm512_and_si512(even, low_bytes), _mm512_slli_epi16::<8>(odd));
            (upper, lower)
        }
    }
    #[inline(always)]
    unsafe fn store_codes(to: *mut u8, codes: __m512i) {
        unsafe { _mm512_storeu_si512(to.cast(), codes) }
    }
    #[inline(always)]
    unsafe fn sum_fours(codes: __m512i) -> __m512i {
        unsafe { _mm512_dpbusd_epi32(_mm512_setzero_si512(), _mm512_set1_epi8(1), codes) }
    }
    #[inline(always)]
    unsafe fn store_ints(to: *mut i32, ints: __m512i) {
        unsafe { _mm512_storeu_si512(to.cast(), ints) }
    }
}

/// [`Simd::dot_slots`] of two slots. As `asm!`, whose blocks keep their order: a compiler would put all products of one
/// sum behind each other, where each waits for the one before.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
unsafe fn dot_two_slots<const AT: usize>(
    [a, b]: [&mut [__m512i; 2]; 2],
    codes: __m512i,
    slots: [*const i8; 2],
    plane: usize,
) {
    // SAFETY: the caller guarantees that both slots have the bytes in both planes.
    unsafe {
        asm!(
            "vpdpbusd {a_first}, {codes}, dword ptr [{a} + {at}]{{1to16}}",
            "vpdpbusd {a_second}, {codes}, dword ptr [{a} + {plane} + {at}]{{1to16}}",
            "vpdpbusd {b_first}, {codes}, dword ptr [{b} + {at}]{{1to16}}",
            "vpdpbusd {b_second}, {codes}, dword ptr [{b} + {plane} + {at}]{{1to16}}",
            a_first = inout(zmm_reg) a[0],
            a_second = inout(zmm_reg) a[1],
            b_first = inout(zmm_reg) b[0],
            b_second = inout(zmm_reg) b[1],
            codes = in(zmm_reg) codes,
            a = in(reg) slots[0],
            b = in(reg) slots[1],
            plane = in(reg) plane,
            at = const AT,
            options(readonly, nostack, preserves_flags),
        );
    }
}

/// Half of [`Simd::dot_pairs_slots`] for one slot: the pairs of both planes that are `AT` bytes behind `slot`. As
/// `asm!` for the same reason as [`dot_two_slots`].
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
unsafe fn dot_pairs_of_slot<const AT: usize, const PLANE: usize>(
    sums: &mut [__m512i; 2],
    weights: __m512i,
    slot: *const i16,
) {
    // SAFETY: the caller guarantees that the slot has the pairs in both planes.
    unsafe {
        asm!(
            "vpdpwssd {upper}, {weights}, dword ptr [{slot} + {at}]{{1to16}}",
            "vpdpwssd {lower}, {weights}, dword ptr [{slot} + 2 * {plane} + {at}]{{1to16}}",
            upper = inout(zmm_reg) sums[0],
            lower = inout(zmm_reg) sums[1],
            weights = in(zmm_reg) weights,
            slot = in(reg) slot,
            plane = const PLANE,
            at = const AT,
            options(readonly, nostack, preserves_flags),
        );
    }
}
