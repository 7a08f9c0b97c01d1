//! How the kernels unpack the codes of an element type, as compile-time constants.

use crate::arithmetic::weights::Rule;
use crate::cpu::activation::START_LEVEL;
use crate::cpu::packed::Coded;
use crate::format::ElementType;
use crate::format::blocks::{BLOCK, Coding, Levels};
use crate::simd::{LANES, Simd, prefetch_ahead};

/// The coding and the rule of a quantised type.
pub(super) trait Layout {
    const CODING: Coding;
    const RULE: Rule;
    /// Scales of a block: for all of it, or for its halves.
    const HALVES: usize = if Self::CODING.split { 2 } else { 1 };
    /// Whether the sums of one scale's products of bytes fit in 16 bits, counted from [`Self::START`]: 32 products with
    /// levels −7 to 8, or 16 with levels up to 7.
    const NARROW: bool = matches!(Self::CODING.levels, Levels::Even) && Self::CODING.bits <= 4;
    /// The level from which sums of products count.
    const START: i32 = if Self::NARROW && Self::CODING.bits == 4 { START_LEVEL } else { 0 };
    /// The level that weighs nothing, less [`Self::START`]; 0 in a type with minima, whose bases are those of
    /// [`Self::START`].
    const ZERO: i32 = if Self::CODING.has_mins { 0 } else { Self::CODING.zero - Self::START };
    /// Whether scales have eight bits.
    const BYTE_SCALES: bool = matches!(Self::RULE, Rule::Product { byte_scales: true, .. });
    /// Whether levels need eight bits.
    const WIDE: bool = Self::CODING.bits == 8 || Self::CODING.is_iq4();
    /// The power of two that stored scales lack.
    const SHIFT: u32 = if let Rule::Product { shift, .. } = Self::RULE { shift } else { 0 };
}

/// The layout of the element type with this number.
pub(super) struct Of<const ELEMENT: u8>;

impl<const ELEMENT: u8> Layout for Of<ELEMENT> {
    const CODING: Coding = match Coding::of(ElementType::ALL[ELEMENT as usize]) {
        Some(coding) => coding,
        None => panic!("dense floats have no codes"),
    };
    const RULE: Rule = match Rule::of(ElementType::ALL[ELEMENT as usize]) {
        Some(rule) => rule,
        None => panic!("dense floats have no codes"),
    };
}

/// Calls `function::<Of<element>>(…)`, with the layout of `$element`.
macro_rules! with_layout {
    ($element:expr, $($function:ident)::+($($argument:expr),*)) => {{
        use crate::format::ElementType as Element;
        match $element {
            Element::Q4_0 => $($function)::+::<Of<{ Element::Q4_0 as u8 }>>($($argument),*),
            Element::Q4_1 => $($function)::+::<Of<{ Element::Q4_1 as u8 }>>($($argument),*),
            Element::Q5_0 => $($function)::+::<Of<{ Element::Q5_0 as u8 }>>($($argument),*),
            Element::Q5_1 => $($function)::+::<Of<{ Element::Q5_1 as u8 }>>($($argument),*),
            Element::Q8_0 => $($function)::+::<Of<{ Element::Q8_0 as u8 }>>($($argument),*),
            Element::Q2_K => $($function)::+::<Of<{ Element::Q2_K as u8 }>>($($argument),*),
            Element::Q3_K => $($function)::+::<Of<{ Element::Q3_K as u8 }>>($($argument),*),
            Element::Q4_K => $($function)::+::<Of<{ Element::Q4_K as u8 }>>($($argument),*),
            Element::Q5_K => $($function)::+::<Of<{ Element::Q5_K as u8 }>>($($argument),*),
            Element::Q6_K => $($function)::+::<Of<{ Element::Q6_K as u8 }>>($($argument),*),
            Element::IQ4_NL => $($function)::+::<Of<{ Element::IQ4_NL as u8 }>>($($argument),*),
            Element::IQ4_XS => $($function)::+::<Of<{ Element::IQ4_XS as u8 }>>($($argument),*),
            Element::MXFP4 => $($function)::+::<Of<{ Element::MXFP4 as u8 }>>($($argument),*),
            Element::F32 | Element::F16 | Element::BF16 => unreachable!("dense floats have no codes"),
        }
    }};
}
pub(super) use with_layout;

/// Loads the scales of sixteen rows, without their power of two; `index` counts blocks or half blocks.
///
/// # Safety
/// Call only inside a kernel of `S`, with an index inside the matrix.
#[inline(always)]
pub(super) unsafe fn scales<S: Simd, L: Layout>(coded: &Coded, index: usize) -> S::Ints {
    let start = coded.scales.start();
    // SAFETY: the caller upholds the contract of this function.
    unsafe {
        match L::BYTE_SCALES {
            true => S::load_bytes(start.cast::<i8>().add(index * LANES)),
            false => S::load_words(start.cast::<i16>().add(index * LANES)),
        }
    }
}

/// Asks for a block of codes that is read later than the one at `at`.
#[inline(always)]
pub(super) fn prefetch_block<L: Layout>(at: *const u8) {
    match L::CODING.bits {
        2 => prefetch_ahead::<128>(at),
        3 => prefetch_ahead::<192>(at),
        4 => prefetch_ahead::<256>(at),
        5 => prefetch_ahead::<320>(at),
        6 => prefetch_ahead::<384>(at),
        _ => prefetch_ahead::<512>(at),
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
        let upper = match L::CODING.bits {
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
            let mut codes = match L::CODING.bits {
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
            match L::CODING.bits {
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
            match L::CODING.levels.table() {
                Some(table) => S::look_up(codes, table),
                None => codes,
            }
        }
    }
}

/// Integers of sixteen rows: scales and bases as pairs, which turn the levels of a half block into weights.
pub(super) struct Integers<S: Simd> {
    scale: S::Pairs,
    base: S::Pairs,
}

impl<S: Simd> Integers<S> {
    /// Loads those of half `half` of `block`; blocks and pairs of bases count from the panel's first.
    ///
    /// # Safety
    /// Call only inside a kernel of `S`, with a block inside the matrix.
    #[inline(always)]
    pub(super) unsafe fn load<L: Layout>(
        coded: &Coded,
        (first_block, first_pair): (usize, usize),
        block: usize,
        half: usize,
    ) -> Self {
        // SAFETY: the caller upholds the contract of this method.
        unsafe {
            let number = if L::CODING.split { block * 2 + half } else { block };
            let index = first_block * L::HALVES + number;
            let mut scale = scales::<S, L>(coded, index);
            if L::SHIFT > 0 {
                scale = S::shift_left(scale, L::SHIFT);
            }
            let base = match L::CODING.has_mins {
                true => {
                    let pair = coded.bases.as_ptr().add((first_pair + number / 2) * 2 * LANES);
                    S::repeat(S::load_pairs(pair), number % 2)
                }
                false => S::both(S::ints_zero()),
            };
            Self { scale: S::both(scale), base }
        }
    }

    /// The weights of a group of four columns: columns 0 and 2, and 1 and 3.
    ///
    /// # Safety
    /// Call only inside a kernel of `S`.
    #[inline(always)]
    pub(super) unsafe fn weights<L: Layout>(&self, codes: S::Codes) -> [S::Pairs; 2] {
        // SAFETY: the caller upholds the contract of this method.
        unsafe {
            let (even, odd) = S::even_odd(codes);
            [self.weight::<L>(even), self.weight::<L>(odd)]
        }
    }

    #[inline(always)]
    unsafe fn weight<L: Layout>(&self, codes: S::Pairs) -> S::Pairs {
        // SAFETY: the caller upholds the contract of this method.
        unsafe {
            let base = Coded::base_level(L::CODING);
            let levels = if base == 0 { codes } else { S::sub_word(codes, base as i16) };
            match L::RULE {
                Rule::Rounded => S::mul_rounded(levels, self.scale),
                Rule::Product { .. } if L::CODING.has_mins => S::add_pairs(S::mul_pairs(levels, self.scale), self.base),
                Rule::Product { .. } => S::mul_pairs(levels, self.scale),
            }
        }
    }
}

/// What is done with each group of weights. A trait, not a closure: a compiler inlines no closure that two kernels
/// call, and then every vector operation in it is a call.
pub(super) trait EachGroup<S: Simd> {
    /// Takes the weights of a group of four columns; groups count from the panel's first.
    ///
    /// # Safety
    /// Call only inside a kernel of `S`, with a group for which there is room.
    unsafe fn take(&mut self, group: usize, weights: [S::Pairs; 2]);
}

/// Gives `each` the weights of every group of four columns of `panel`, in order.
///
/// # Safety
/// Call only inside a kernel of `S`, with a panel of the matrix, which has `columns`; `each` has room for its groups.
#[inline(always)]
pub(super) unsafe fn for_groups<S: Simd, L: Layout, E: EachGroup<S>>(
    coded: &Coded,
    columns: usize,
    panel: usize,
    each: &mut E,
) {
    let blocks = columns / BLOCK;
    let block_bytes = Coded::block_bytes(L::CODING);
    let codes = &coded.codes.bytes()[panel * blocks * block_bytes..][..blocks * block_bytes];
    let first = (panel * blocks, panel * Coded::base_pairs(L::CODING, columns));
    for block in 0..blocks {
        // SAFETY: the caller upholds the contract of this function; the panel has whole blocks.
        unsafe {
            let at = codes.as_ptr().add(block * block_bytes);
            prefetch_block::<L>(at);
            let mut planes = Planes::<S>::of::<L>(at);
            let mut integers = Integers::<S>::load::<L>(coded, first, block, 0);
            for group in 0..8 {
                if L::CODING.split && group == 4 {
                    integers = Integers::<S>::load::<L>(coded, first, block, 1);
                }
                each.take(block * 8 + group, integers.weights::<L>(planes.next::<L>(at, group)));
            }
        }
    }
}
