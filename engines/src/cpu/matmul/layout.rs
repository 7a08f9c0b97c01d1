//! The properties of a coding that kernels need as compile-time constants.

use crate::format::blocks::Levels;
use crate::simd::Simd;

/// A [`Coding`](crate::format::blocks::Coding) as constants.
pub(super) trait Layout {
    const BITS: u32;
    const LEVELS: Levels;
    const MINS: bool;
    const SPLIT: bool;
    /// Whether levels need eight bits.
    const WIDE: bool;

    /// Loads the scales of sixteen rows.
    ///
    /// # Safety
    /// Call only inside a kernel of `S`, with sixteen scales at `at`.
    unsafe fn scales<S: Simd>(at: *const u16) -> S::Floats;
}

/// [`Levels::Even`]: each code is its own level.
pub(super) struct Even<const BITS: u32, const MINS: bool, const SPLIT: bool>;

impl<const BITS: u32, const MINS: bool, const SPLIT: bool> Layout for Even<BITS, MINS, SPLIT> {
    const BITS: u32 = BITS;
    const LEVELS: Levels = Levels::Even;
    const MINS: bool = MINS;
    const SPLIT: bool = SPLIT;
    const WIDE: bool = BITS == 8;

    #[inline(always)]
    unsafe fn scales<S: Simd>(at: *const u16) -> S::Floats {
        // SAFETY: the caller upholds the contract of this method.
        unsafe { S::load_f16(at) }
    }
}

/// [`Levels::Fp4`].
pub(super) struct Fp4;

impl Layout for Fp4 {
    const BITS: u32 = 4;
    const LEVELS: Levels = Levels::Fp4;
    const MINS: bool = false;
    const SPLIT: bool = false;
    const WIDE: bool = false;

    #[inline(always)]
    unsafe fn scales<S: Simd>(at: *const u16) -> S::Floats {
        // SAFETY: the caller upholds the contract of this method.
        unsafe { S::load_bf16(at) }
    }
}

/// [`Levels::Iq4`].
pub(super) struct Iq4;

impl Layout for Iq4 {
    const BITS: u32 = 4;
    const LEVELS: Levels = Levels::Iq4;
    const MINS: bool = false;
    const SPLIT: bool = false;
    const WIDE: bool = true;

    #[inline(always)]
    unsafe fn scales<S: Simd>(at: *const u16) -> S::Floats {
        // SAFETY: the caller upholds the contract of this method.
        unsafe { S::load_f16(at) }
    }
}

/// The bit planes of a block, shifted as groups of codes are read.
pub(super) struct Planes<S: Simd> {
    /// The third bit of 3-bit codes, the fifth of 5-bit codes, the fifth and sixth of 6-bit codes.
    upper: S::Codes,
    /// The low bit pairs of 2-bit and 3-bit codes.
    pairs: S::Codes,
}

impl<S: Simd> Planes<S> {
    /// # Safety
    /// Call only inside a kernel of `S`, with a whole block of `L` at `at`.
    #[inline(always)]
    pub(super) unsafe fn of<L: Layout>(at: *const u8) -> Self {
        let upper = match L::BITS {
            3 => 128,
            5 | 6 => 256,
            _ => 0,
        };
        // SAFETY: the caller upholds the contract of this method.
        unsafe { Self { upper: S::codes(at.add(upper)), pairs: S::codes(at) } }
    }

    /// Returns the levels of columns 4 · `group` to 4 · `group` + 3 of each row. Call for groups 0 to 7 in order.
    ///
    /// # Safety
    /// Like [`Planes::of`].
    #[inline(always)]
    pub(super) unsafe fn next<L: Layout>(&mut self, at: *const u8, group: usize) -> S::Codes {
        // SAFETY: the caller upholds the contract of this method.
        unsafe {
            let mut codes = match L::BITS {
                8 => S::codes(at.add(group * 64)),
                2 | 3 => {
                    if group == 4 {
                        self.pairs = S::codes(at.add(64));
                    }
                    let (codes, pairs) = S::low_pairs(self.pairs);
                    self.pairs = pairs;
                    codes
                }
                _ => {
                    let pair = S::codes(at.add(group % 4 * 64));
                    if group < 4 { S::low_nibbles(pair) } else { S::high_nibbles(pair) }
                }
            };
            match L::BITS {
                3 => (codes, self.upper) = S::join_bit::<2>(codes, self.upper),
                5 => (codes, self.upper) = S::join_bit::<4>(codes, self.upper),
                6 => {
                    if group == 4 {
                        self.upper = S::codes(at.add(320));
                    }
                    (codes, self.upper) = S::join_bits(codes, self.upper);
                }
                _ => {}
            }
            match L::LEVELS.table() {
                Some(table) => S::look_up(codes, table),
                None => codes,
            }
        }
    }
}
