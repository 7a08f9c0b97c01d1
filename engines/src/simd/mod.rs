//! Vector operations for kernels, sixteen lanes wide, and the instruction sets that implement them.
//!
//! A kernel is a value with a generic [`Kernel::run`]; [`Tier::run`] runs it on the instruction set found at start. All
//! tiers share one kernel body. Code for a single tier is in this module, but for the products on AMX tiles.

#[cfg(target_arch = "x86_64")]
pub(crate) mod amx;
#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
mod avx512;
mod portable;
mod tier;

pub use tier::Tier;

#[cfg(target_endian = "big")]
compile_error!("kernels read bytes of codes as little-endian integers");

/// Lanes of a vector, and weight rows (outputs) of a panel.
pub(crate) const LANES: usize = 16;

/// How far ahead of their use weights are prefetched. A core with vector units uses bytes faster than the processor's
/// own prefetcher fetches them from memory: on an Emerald Rapids core, products of one row read 10 GB/s without this,
/// and 12, 14 and 15 GB/s with 1, 2 and 4 KiB.
const AHEAD_BYTES: usize = 4096;

/// Asks for the `BYTES` that are [`AHEAD_BYTES`] behind `from`, which may be behind the end of the data.
#[inline(always)]
pub(crate) fn prefetch_ahead<const BYTES: usize>(from: *const u8) {
    for line in (0..BYTES).step_by(64) {
        prefetch(from.wrapping_add(AHEAD_BYTES + line));
    }
}

/// Asks for the cache line at `from`, which may be any address.
#[inline(always)]
pub(crate) fn prefetch(from: *const u8) {
    #[cfg(target_arch = "x86_64")]
    {
        use std::arch::x86_64::{_MM_HINT_T0, _mm_prefetch};
        // SAFETY: a prefetch reads nothing that the program can observe, at any address.
        unsafe { _mm_prefetch::<_MM_HINT_T0>(from.cast()) };
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = from;
}

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
    /// Thirty-two 16-bit integers: two for each lane.
    type Pairs: Copy;

    unsafe fn splat(value: f32) -> Self::Floats;
    unsafe fn load(from: *const f32) -> Self::Floats;
    unsafe fn load_f16(from: *const u16) -> Self::Floats;
    unsafe fn store(to: *mut f32, value: Self::Floats);
    unsafe fn store_f16(to: *mut u16, value: Self::Floats);
    unsafe fn mul(a: Self::Floats, b: Self::Floats) -> Self::Floats;
    unsafe fn add(a: Self::Floats, b: Self::Floats) -> Self::Floats;
    /// a · b + c, rounded once.
    unsafe fn fma(a: Self::Floats, b: Self::Floats, c: Self::Floats) -> Self::Floats;

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
    /// Adds [`Self::dot`] (`WIDE`: [`Self::dot_wide`]) of the bytes `AT` to `AT` + 3 of every slot to its sums: of the
    /// first plane, and of the second, which is `plane` bytes behind.
    #[inline(always)]
    unsafe fn dot_slots<const SLOTS: usize, const AT: usize, const WIDE: bool>(
        sums: &mut [[Self::Ints; 2]; SLOTS],
        codes: Self::Codes,
        slots: &[*const i8; SLOTS],
        plane: usize,
    ) {
        for (sums, slot) in sums.iter_mut().zip(slots) {
            // SAFETY: the caller guarantees that every slot has these bytes in both planes.
            unsafe {
                let first = slot.add(AT).cast::<i32>().read_unaligned();
                let second = slot.add(plane + AT).cast::<i32>().read_unaligned();
                if WIDE {
                    *sums = [Self::dot_wide(sums[0], codes, first), Self::dot_wide(sums[1], codes, second)];
                } else {
                    *sums = [Self::dot(sums[0], codes, first), Self::dot(sums[1], codes, second)];
                }
            }
        }
    }
    /// Like [`Self::dot`], with codes of 8 bits.
    unsafe fn dot_wide(sum: Self::Ints, codes: Self::Codes, four: i32) -> Self::Ints;
    /// Per lane: sum + pairs[2] · pair[2], with the two 16-bit halves of `pair`.
    unsafe fn dot_pairs(sum: Self::Ints, pairs: Self::Pairs, pair: i32) -> Self::Ints;
    /// Adds [`Self::dot_pairs`] of a group of four columns to the sums of every slot: `weights` are columns 0 and 2,
    /// and 1 and 3. A slot has four bytes of its first plane in this order, as 16-bit integers; those of the second are
    /// `PLANE` behind.
    #[inline(always)]
    unsafe fn dot_pairs_slots<const SLOTS: usize, const PLANE: usize>(
        sums: &mut [[Self::Ints; 2]; SLOTS],
        weights: [Self::Pairs; 2],
        slots: &[*const i16; SLOTS],
    ) {
        for (i, weights) in weights.into_iter().enumerate() {
            for (sums, slot) in sums.iter_mut().zip(slots) {
                for (plane, sum) in sums.iter_mut().enumerate() {
                    // SAFETY: the caller guarantees that every slot has these integers.
                    unsafe {
                        let pair = slot.add(plane * PLANE + i * 2).cast::<i32>().read_unaligned();
                        *sum = Self::dot_pairs(*sum, weights, pair);
                    }
                }
            }
        }
    }
    unsafe fn load_ints(from: *const i32) -> Self::Ints;
    unsafe fn load_bytes(from: *const i8) -> Self::Ints;
    unsafe fn load_words(from: *const i16) -> Self::Ints;
    unsafe fn shift_left(ints: Self::Ints, bits: u32) -> Self::Ints;
    unsafe fn splat_int(value: i32) -> Self::Ints;
    /// The low 16 bits of each lane, the others 0.
    unsafe fn low_words(ints: Self::Ints) -> Self::Ints;
    unsafe fn add_ints(a: Self::Ints, b: Self::Ints) -> Self::Ints;
    /// a · b + c, with the low 32 bits of the product.
    unsafe fn mul_add_ints(a: Self::Ints, b: Self::Ints, c: Self::Ints) -> Self::Ints;
    /// a · word + c, for signed 16-bit numbers a; the upper 16 bits of each `word` are 0, the lower ones signed.
    unsafe fn mul_add_words(a: Self::Ints, word: Self::Ints, c: Self::Ints) -> Self::Ints;
    unsafe fn floats(ints: Self::Ints) -> Self::Floats;

    unsafe fn load_pairs(from: *const i16) -> Self::Pairs;
    unsafe fn store_pairs(to: *mut i16, pairs: Self::Pairs);
    /// The low 16 bits of each lane of `low`, whose other bits are 0, and of `high`.
    unsafe fn pair(low: Self::Ints, high: Self::Ints) -> Self::Pairs;
    /// The low 16 bits of each lane, twice.
    unsafe fn both(ints: Self::Ints) -> Self::Pairs;
    /// The first (`index` 0) or the second (1) integer of each lane, twice.
    unsafe fn repeat(pairs: Self::Pairs, index: usize) -> Self::Pairs;
    /// Codes 0 and 2, and codes 1 and 3 of each lane, as 16-bit integers.
    unsafe fn even_odd(codes: Self::Codes) -> (Self::Pairs, Self::Pairs);
    unsafe fn sub_word(pairs: Self::Pairs, less: i16) -> Self::Pairs;
    /// The low 16 bits of a · b.
    unsafe fn mul_pairs(a: Self::Pairs, b: Self::Pairs) -> Self::Pairs;
    unsafe fn add_pairs(a: Self::Pairs, b: Self::Pairs) -> Self::Pairs;
    /// (a · b + 64) / 128, rounded down, for a from −128 to 127.
    unsafe fn mul_rounded(a: Self::Pairs, b: Self::Pairs) -> Self::Pairs;
    /// The inverse of [`Self::even_odd`] for integers of 16 bits: their upper and lower bytes, in the order of codes.
    /// A pair is 256 · upper + lower with signed bytes.
    unsafe fn planes(even: Self::Pairs, odd: Self::Pairs) -> (Self::Codes, Self::Codes);
    unsafe fn store_codes(to: *mut u8, codes: Self::Codes);
    /// The sum of the four signed bytes of each lane.
    unsafe fn sum_fours(codes: Self::Codes) -> Self::Ints;
    unsafe fn store_ints(to: *mut i32, ints: Self::Ints);
}
